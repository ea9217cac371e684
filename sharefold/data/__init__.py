"""Images in: data sets by name, preprocessing by the model's own configuration, calibration images.

A data set is named by one string, ``KIND:PLACE``:

========================  ==================================================================================
``imagefolder:DIR``       ``DIR/<split>/<class>/*.png``, or ``DIR/<class>/*.png`` for every split
``npz:FILE``              arrays ``{split}_x`` (uint8, N x H x W x C) and ``{split}_y`` (or masks or images); plain ``x``, ``y``
``cifar10:DIR``           the torchvision layout, never downloaded; likewise ``cifar100:`` and ``fashionmnist:``
``timm:NAME[:k=v,...]``   ``timm.data.create_dataset(NAME, k=v, ...)``
``digits``                scikit-learn's 8 x 8 digits (extra ``demo``)
========================  ==================================================================================
"""

from __future__ import annotations

from sharefold.data.calibration import calibration_images
from sharefold.data.datasets import ArrayDataset, BatchLoader, FileDataset, loader
from sharefold.data.preprocess import Preprocess
from sharefold.data.specs import open_data
from sharefold.data.truth import Pairs, with_truth

__all__ = [
    "ArrayDataset",
    "BatchLoader",
    "FileDataset",
    "Pairs",
    "Preprocess",
    "calibration_images",
    "loader",
    "open_data",
    "with_truth",
]

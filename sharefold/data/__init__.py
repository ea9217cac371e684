"""Images in: data sets by name, preprocessing by the model's own configuration, calibration images.

A data set is named by one string, ``KIND:PLACE``:

========================  ==================================================================================
``imagefolder:DIR``       ``DIR/<split>/<class>/*.png``, or ``DIR/<class>/*.png`` for every split
``npz:FILE``              arrays ``{split}_x`` (uint8, N x H x W x C) and ``{split}_y`` (or masks or images); plain ``x``, ``y``
``cifar10:DIR``           the torchvision layout, never downloaded; likewise ``cifar100:`` and ``fashionmnist:``
``timm:NAME[:k=v,...]``   ``timm.data.create_dataset(NAME, k=v, ...)``
``digits``                scikit-learn's 8 x 8 digits (extra ``demo``)
``tensors:FILE``          what a network takes, as it takes it (.npz, .npy, .safetensors): :func:`read_tensors`
========================  ==================================================================================

Class folders are numbered in the order of their names, among those of all split folders that lie beside each other: a split may
lack a class. (torchvision and timm, and so ``timm:folder``, number each split for itself.)

Image files of 16 bits are scaled to 8 bits a channel; grey of 32 bits or of floats does not say what is white and is refused.
"""

from __future__ import annotations

from sharefold.data.calibration import calibration_images
from sharefold.data.datasets import ArrayDataset, BatchLoader, FileDataset, loader
from sharefold.data.inputs_dataset import InputsDataset
from sharefold.data.preprocess import Preprocess
from sharefold.data.specs import open_data
from sharefold.data.tensor_files import TensorFile, is_tensors, read_tensors
from sharefold.data.truth import Pairs, with_truth

__all__ = [
    "ArrayDataset",
    "BatchLoader",
    "FileDataset",
    "InputsDataset",
    "Pairs",
    "Preprocess",
    "TensorFile",
    "calibration_images",
    "is_tensors",
    "loader",
    "open_data",
    "read_tensors",
    "with_truth",
]

"""Several inputs in memory, for training and validation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sharefold.errors import SharefoldError
from sharefold.inputs import Inputs


class InputsDataset(Dataset):
    """Several inputs in memory, as ((a, b), label) a sample; label -1 where there are none.

    Raises:
        SharefoldError: not as many labels as samples, or labels that are no whole numbers.
    """

    def __init__(self, inputs: Inputs, labels: Any) -> None:
        self.inputs, self.labelled = inputs, labels is not None
        self.labels = torch.full((len(inputs),), -1) if labels is None else torch.as_tensor(labels)
        if len(self.labels) != len(inputs):
            raise SharefoldError(f"finetune: {len(inputs)} samples but {len(self.labels)} labels: the two must agree")
        if self.labels.is_floating_point():
            raise SharefoldError(f"finetune: labels are {self.labels.dtype}: want whole numbers, or None to follow a teacher")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        return tuple(tensor[index] for tensor in self.inputs.tensors), self.labels[index]

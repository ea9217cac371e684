"""Inputs of a network in memory, as it takes them, with or without labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sharefold.errors import SharefoldError
from sharefold.inputs import Input, Inputs

NO_LABEL = -1


class InputsDataset(Dataset):
    """A tensor (n, ...), or several, as (x, label) or ((a, b), label) a sample; label -1 where there are none.

    Attributes:
        inputs: all of them.
        labels: (n,) whole numbers.
        labelled: whether they were given.

    Raises:
        SharefoldError: not as many labels as samples, or labels that are no whole numbers.
    """

    def __init__(self, inputs: Input, labels: Any, where: str = "finetune") -> None:
        self.inputs, self.labelled = inputs, labels is not None
        self.labels = torch.full((len(inputs),), NO_LABEL) if labels is None else torch.as_tensor(labels)
        if len(self.labels) != len(inputs):
            raise SharefoldError(f"{where}: {len(inputs)} samples but {len(self.labels)} labels: the two must agree")
        if self.labels.is_floating_point():
            raise SharefoldError(f"{where}: labels are {self.labels.dtype}: want whole numbers, or None to follow a teacher")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        if isinstance(self.inputs, Inputs):
            return tuple(tensor[index] for tensor in self.inputs.tensors), self.labels[index]
        return self.inputs[index], self.labels[index]

    def batch(self, indices: Tensor | slice) -> tuple[Input, Tensor]:
        """Inputs and labels (n,) at ``indices``."""
        return self.inputs[indices], self.labels[indices]

"""Filters of one column each, h x 1, whose responses a row of w coefficients mixes: a spatial SVD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sharefold.layers.form import ConvForm


def splits(form: ConvForm) -> bool:
    """Whether a layer of this form can run as two, the columns first: padding must be plain zeros, axis by axis."""
    return not form.same_pad and form.padding_mode == "zeros" and not isinstance(form.padding, str)


def column_shape(form: ConvForm) -> tuple[int, int, int]:
    """(I, h, 1), the shape of one column filter."""
    channels, height = form.weight_shape[1:3]
    return channels, height, 1


def by_columns(form: ConvForm, x: Tensor, columns: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """The outputs of column filters (G * R, I/G, h, 1), then rows (O, R, 1, w), at the form's stride, padding and dilation."""
    pad, stride, dilation, groups = form.padding, form.stride, form.dilation, form.groups
    assert not isinstance(pad, str)
    x = F.conv2d(x, columns, None, (stride[0], 1), (pad[0], 0), (dilation[0], 1), groups)
    return F.conv2d(x, rows, bias, (1, stride[1]), (0, pad[1]), (1, dilation[1]), groups)


def compose_columns(columns: Tensor, rows: Tensor) -> Tensor:
    """The weight (O, I, h, w) of column filters (R, I, h, 1) and rows (O, R, 1, w)."""
    return torch.einsum("orb,ria->oiab", rows[:, :, 0], columns[..., 0])


def in_every_column(columns: Tensor, width: int) -> Tensor:
    """Filters (R * w, I, h, w) of column filters (R, I, h, 1): filter r * w + b is the r-th in column b of the window."""
    eye = torch.eye(width, dtype=columns.dtype, device=columns.device)
    return torch.einsum("ria,bc->rbiac", columns[..., 0], eye).flatten(0, 1)


def column_moments(moments: Tensor, form: ConvForm) -> Tensor:
    """(1, I*h, I*h): of moments (1, N, N) of whole windows, those of their columns, mean over the columns of the window."""
    channels, height, width = form.weight_shape[1:]
    cells = moments.reshape(channels, height, width, channels, height, width)
    return torch.einsum("iawjbw->iajb", cells).reshape(1, channels * height, channels * height) / width

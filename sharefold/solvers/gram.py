"""Products of samples with themselves, of which half is computed: they are symmetric."""

from __future__ import annotations

from torch import Tensor

# Rows of the product at once: fewer leave out more of its half, but are slower each.
FEW_ROWS, MANY_ROWS, MANY_FEATURES = 96, 192, 2048
# On other devices many small products take longer than one large one.
FEWEST_ELSEWHERE = 1024


def gram(x: Tensor) -> Tensor:
    """``x x^T`` (G, N, N) of samples (G, N, P), in their type."""
    groups, features, _ = x.shape
    rows = MANY_ROWS if features >= MANY_FEATURES else FEW_ROWS
    whole = x.transpose(1, 2)
    if features <= rows or (x.device.type != "cpu" and features < FEWEST_ELSEWHERE):
        return x @ whole
    result = x.new_empty(groups, features, features)
    for start in range(0, features, rows):
        end = min(start + rows, features)
        part = x[:, start:end] @ whole[:, :, start:]
        result[:, start:end, start:] = part
        result[:, end:, start:end] = part[:, :, end - start :].transpose(1, 2)
    return result

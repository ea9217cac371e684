"""What the demonstration found, and what it may be asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class DemoOptions:
    """What the demonstration runs.

    Attributes:
        budget: where the methods are compared. Averaging comes first; the others get just the size that it reaches.
        small: size of the network that is tuned and saved.
        epochs: of tuning, with the original as teacher.
        sizes: further sizes for the picture's curves, as shares of the parameters; averaging does not reach the small one.
        seed: of everything random.
    """

    budget: str = "20%"
    small: str = "8%"
    epochs: int = 4
    sizes: tuple[float, ...] = (0.12, 0.45)
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One network of the table; ``top1`` is a fraction of 1 on the 359 test images, ``step`` says what was done."""

    method: str
    step: str
    params: int
    size: float
    top1: float
    agreement: float | None
    seconds: float


@dataclass
class Demo:
    """What the demonstration found.

    Attributes:
        rows: original, every method at one size, and the small network before and after tuning.
        curve: method -> [(share of the parameters, top-1), ...] for the picture.
        identical: whether the reloaded network's logits equal the saved one's bit for bit.
        expanded_difference: largest difference of the logits of ``expand``'s dense network.
        file_bytes: of the saved weights; ``dense_bytes`` of the original's.
    """

    rows: list[Row] = field(default_factory=list)
    curve: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    identical: bool = False
    expanded_difference: float = 0.0
    file_bytes: int = 0
    dense_bytes: int = 0
    seconds: float = 0.0
    output: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

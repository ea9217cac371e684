"""The bank: the tensors that the layers of one group share.

A bank is registered exactly once, in the ``sharefold_banks`` dictionary of the model. The member layers hold a plain
reference that torch does not register again, so a state dict holds every shared tensor once (no aliased keys), and
deepcopy, ``.to()``, pickling, DDP, fx and torch.export see one parameter.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.layers.pivots import whole_factor
from sharefold.layers.weight_cache import Keeper, Kept

ATTRIBUTE = "sharefold_banks"


class Bank(Keeper):
    """Shared tensors of one group of layers.

    Args:
        tensors: by name; floating ones become parameters (``basis`` (R, I/groups, h, w), ``weight`` (O, I/groups, h, w),
            ``bias`` (O,), ``codebook`` (entries, values)), integers buffers. With ``pivots`` (R,) these columns of the basis
            are the identity's, and ``basis`` (R, I/groups * h * w - R) holds the others alone.
        uses: how many layers read the bank; the fine-tuning loop scales the step of a bank by it.
        stage: number of down-samplings before the group; orthogonality may join the banks of a stage.
    """

    pivots: Tensor | None

    def __init__(self, tensors: dict[str, Tensor], uses: int, stage: int = 0) -> None:
        super().__init__()
        self.register_buffer("pivots", None)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.uses = uses
        self.stage = stage
        self._kept = Kept()

    def filters(self, kernel_size: tuple[int, int], x: Tensor | None = None) -> Tensor:
        """The basis (R, I/groups, h, w); for an input ``x`` kept from run to run where it has to be put together."""
        return whole_factor(cast(Tensor, self.basis), self.pivots, (-1, *kernel_size), self._kept, x)

    @property
    def pivoted_name(self) -> str | None:
        """The name of the factor that may be kept without its pivots."""
        return "basis" if hasattr(self, "basis") else None

    def pointers(self) -> dict[str, int]:
        """As :meth:`SharedConv.pointers`."""
        return {} if self.pivots is None else {"pivots": sum(cast(Tensor, self.basis).shape)}

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters())
        return f"{shapes}, uses={self.uses}"


class Banks(nn.ModuleDict):
    """The banks of a network, by key; called as a layer it gives back what it is given.

    It is a child of the network, and ``nn.Sequential``, timm's ``features_only`` and others run all their children in turn.
    """

    def forward(self, x: Any) -> Any:
        return x


_NO_BANKS = Banks()


def bank_key(group_name: str) -> str:
    """The key of a group's bank: its name without dots, which torch reserves for module paths."""
    return group_name.replace(".", "_")


def is_bank_name(group_name: str) -> bool:
    """Whether a bank can be registered under the name of its group: not where it is empty, or an attribute of modules."""
    return bool(group_name) and not hasattr(_NO_BANKS, bank_key(group_name))


def add_bank(model: nn.Module, group_name: str, bank: Bank) -> Bank:
    """Registers ``bank`` on ``model`` under the group's name and returns it."""
    if not hasattr(model, ATTRIBUTE):
        model.add_module(ATTRIBUTE, Banks().train(model.training))
    registered = cast(nn.ModuleDict, getattr(model, ATTRIBUTE))
    key = bank_key(group_name)
    if key in registered:
        raise ValueError(f"the model has a bank named {key} already")
    registered[key] = bank.train(model.training)
    return bank


def banks(model: nn.Module) -> dict[str, Bank]:
    """All banks of a model by key; empty for a dense model."""
    registered = getattr(model, ATTRIBUTE, None)
    return {} if registered is None else {key: cast(Bank, bank) for key, bank in registered.items()}


def not_replicated(self: nn.Module) -> nn.Module:
    """In the place of ``nn.DataParallel``'s copying, which would leave every replica with the first one's bank."""
    raise SharefoldError("shared networks cannot be replicated by DataParallel: use DistributedDataParallel")


def refer(member: nn.Module, bank: Bank | None) -> None:
    """Gives ``member`` a reference to ``bank`` that torch does not register (see the module's text)."""
    member.__dict__["bank"] = bank

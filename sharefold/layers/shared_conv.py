"""The base of every shared layer: composes its weight from shared and own tensors, and picks how to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.layers.bank import Bank, not_replicated, refer
from sharefold.layers.form import ConvForm, form_of, matrix_of
from sharefold.layers.weight_cache import Keeper, Kept, own_tensors
from sharefold.layers.weight_order import in_order_of, rounded_once

RUNTIMES = ("auto", "factored", "composed")
# `auto` runs two small convolutions instead of one when they need at most this share of its multiplications
# (benchmarks/runtime.py; its results are of one CPU).
FACTORED_SHARE = 0.8
# Filters that are set are multiples of the old ones within this error, relative to each.
SAME_WEIGHT = 1e-3


class SharedConv(Keeper):
    """A convolution or Linear whose weight is put together from a bank and a few tensors of its own.

    Subclasses say how with :meth:`compose`; those that can run without the composed weight also override
    :meth:`parts`, :meth:`by_parts` and :meth:`factored_share`. In eval mode without gradients the composed weight is kept until a
    tensor it was made from changes; in train mode it is made anew, so gradients reach the bank. Writes through ``.data``
    are seen after the next ``eval()`` or ``train()``.

    Input and output are those of the replaced layer: (B, I, H, W) -> (B, O, H', W'), (B, I, L) -> (B, O, L'), (B, I, D, H, W) ->
    (B, O, D', H', W'), or (..., I) -> (..., O). Volumes and transposed convolutions always run the composed weight.
    """

    bank: Bank | None
    pivots: Tensor | None  # of the own factor, where it is kept without its pivots
    own_bias: nn.Parameter | None
    gain: nn.Parameter | None
    given: Tensor | None = None  # the weight while :func:`composed_together` is active

    def __init__(
        self, form: ConvForm, bank: Bank | None = None, bias: Tensor | None = None, gain: Tensor | None = None
    ) -> None:
        super().__init__()
        self.form = form
        refer(self, bank)
        self.register_buffer("pivots", None)
        self.register_parameter("own_bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        self.register_parameter("gain", None if gain is None else nn.Parameter(gain.detach().clone()))
        self.runtime = "auto"
        self._kept, self._kept_parts = Kept(), Kept()

    # What subclasses say -----------------------------------------------------------------------------------------

    def compose(self) -> Tensor:
        """The layer's weight (O, I/groups, h, w), before weight standardisation; differentiable."""
        raise NotImplementedError

    def parts(self, x: Tensor | None) -> tuple[Tensor | None, ...]:
        """The weights that :meth:`by_parts` takes: functions of the layer's and the bank's tensors; for ``x`` as
        :meth:`Bank.filters` does."""
        raise NotImplementedError

    def by_parts(self, x: Tensor, *parts: Tensor | None) -> Tensor:
        """Runs the layer on ``x`` (:meth:`ConvForm.as_maps`) without its composed weight."""
        raise NotImplementedError

    @property
    def keeps_parts(self) -> bool:
        """Whether :meth:`parts` are tensors that are there anyway, so that keeping them takes no memory."""
        return self.form.groups == 1

    def factored_share(self) -> float:
        """Multiplications of :meth:`by_parts` over those of the composed layer; infinity when it cannot run."""
        return float("inf")

    def linear_part(self) -> tuple[Tensor, Tensor] | None:
        """Filters (M, I/groups, h, w) and coefficients (O, M) whose product is the weight, or None.

        The coefficients belong to this layer alone; the sequential refit solves for them.
        """
        return None

    def set_linear_part(self, coefficients: Tensor) -> None:
        """Takes new coefficients (O, M) for the filters of :meth:`linear_part`."""
        raise NotImplementedError

    # The name of the tensor that holds the coefficients of :meth:`linear_part`.
    coefficients_name = "coefficients"

    @property
    def pivoted_name(self) -> str | None:
        """The name of the layer's own factor, which is a part of the filters and may be kept without its pivots, or None."""
        return None

    @property
    def own_filters(self) -> Tensor | None:
        """Own filters (Ru, ...) of the kind that the bank holds, which training may keep orthogonal to them, or None."""
        return None

    def pivoted_shape(self) -> tuple[int, ...]:
        """The shape of one row of that factor when whole."""
        raise NotImplementedError

    def own_moments(self, moments: Tensor) -> Tensor:
        """(1, M, M) moments of what the own factor's columns are multiplied by, of those (1, N, N) of the layer's patches."""
        raise NotImplementedError

    def own_power(self, power: Tensor) -> Tensor:
        """(R,) what each row of the own factor carries, of what each filter of :meth:`linear_part` does, (M,)."""
        raise NotImplementedError

    def mix_own(self, matrix: Tensor) -> None:
        """Multiplies the coefficients of the own factor by ``matrix`` (R, S) from the right; without a gradient."""
        raise NotImplementedError

    def mix_shared(self, matrix: Tensor) -> None:
        """Multiplies the coefficients of the bank's basis by ``matrix`` (R, S) from the right; without a gradient."""
        raise NotImplementedError

    def bank_power(self, rows: Tensor) -> Tensor:
        """What the layer makes of a squared error of the bank's tensor, float64 on the CPU, where a squared error of output o
        matters ``rows[o]``, (O,): of a basis the matrix (R, R) of products of its rows, of a kernel its rows' own, (O,)."""
        raise NotImplementedError

    @property
    def turnable(self) -> bool:
        """Whether the bank's basis may be exchanged for one of the same span when :meth:`mix_shared` follows."""
        return False

    def pointers(self) -> dict[str, int]:
        """Integer buffers, and how many things each of their entries may point to."""
        name = self.pivoted_name
        return {} if self.pivots is None or name is None else {"pivots": sum(getattr(self, name).shape)}

    # What users of a layer may read ------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The effective weight in the stock layer's shape (:attr:`ConvForm.stock_shape`)."""
        weight = self.form.standardized(self.compose(), self.gain)
        return self.form.native(weight).reshape(self.form.stock_shape)

    @property
    def bias(self) -> Tensor | None:
        """The effective bias (O,), or None."""
        return self.own_bias

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module; ``weight`` and ``bias`` may be set as those who merge a BatchNorm into a convolution set them.

        Raises:
            SharefoldError: the weight is not the present one with every filter multiplied by a number.
        """
        if name in ("runtime", "given") and "_kept" in self.__dict__:
            self._kept.unwatch()
            self._kept_parts.unwatch()
        if name == "weight" and isinstance(value, Tensor):
            self._rescale(value)
        elif name == "bias":
            self._set_bias(value)
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def _rescale(self, weight: Tensor) -> None:
        old, part = self.weight, self.linear_part()
        if part is None or weight.shape != old.shape:
            raise SharefoldError(f"{type(self).__name__}: its weight is put together and cannot be set: expand the network first")
        old, new = (matrix_of(each.double(), self.form) for each in (old, weight))
        scale = (new * old).sum(1) / old.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        allowed = max(SAME_WEIGHT, 4 * torch.finfo(weight.dtype).eps, 4 * torch.finfo(part[1].dtype).eps) * new.norm(dim=1)
        if not bool(((new - scale[:, None] * old).norm(dim=1) <= allowed).all()):
            raise SharefoldError(
                f"{type(self).__name__}: its weight is put together, so that only multiples of its filters can be set: expand "
                "the network first"
            )
        self.set_linear_part(part[1] * scale[:, None].to(part[1]))

    @torch.no_grad()
    def _set_bias(self, bias: Tensor | None) -> None:
        """Takes the effective bias (O,), to which a norm within the layer may add and for which a bank may stand."""
        if bias is not None and (not isinstance(bias, Tensor) or tuple(bias.shape) != (self.out_channels,)):
            shape = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
            raise SharefoldError(f"{type(self).__name__}: bias: {shape}: give a tensor of {self.out_channels} numbers, or None")
        before, effective = self.own_bias, self.bias
        wanted = torch.zeros(self.out_channels) if bias is None else bias.detach()
        own = wanted if effective is None else wanted.to(effective) - effective
        own = own if before is None else own + before
        trained = bias is not None and bias.requires_grad
        self.own_bias = None if bias is None and effective is before else nn.Parameter(own.clone(), trained)
        if self.bias is not None and not torch.allclose(self.bias, wanted.to(self.bias), atol=1e-5):
            self.own_bias = before
            raise SharefoldError(f"{type(self).__name__}: its bias is shared and cannot be set: expand the network first")

    @property
    def in_channels(self) -> int:
        return self.form.in_channels

    @property
    def out_channels(self) -> int:
        return self.form.out_channels

    in_features = in_channels
    out_features = out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.form.stock_kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        return self.form.stock_stride

    @property
    def padding(self) -> tuple[int, ...] | str:
        return self.form.stock_padding

    @property
    def dilation(self) -> tuple[int, ...]:
        return self.form.stock_dilation

    @property
    def padding_mode(self) -> str:
        return self.form.padding_mode if self.form.stock is None else self.form.stock.padding_mode

    @property
    def output_padding(self) -> tuple[int, ...]:
        stock = self.form.stock
        return (0,) * len(self.stride) if stock is None else stock.output_padding

    @property
    def transposed(self) -> bool:
        return self.form.transposed

    @property
    def groups(self) -> int:
        return self.form.groups

    # Running -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """What the replaced layer computes; ``output_size`` as torch's transposed layers take it."""
        ready, parts = self._kept.ready(x), None
        if ready is None:
            parts = self._kept_parts.ready(x)
            if parts is None and self.runs_factored():
                parts = self._parts(x)
        if parts is not None:
            return self.form.as_stock(self.by_parts(self.form.as_maps(x), *parts))
        weight, bias = self._composed(x) if ready is None else ready
        return self.form.run(x, weight, bias, output_size)

    def runs_factored(self) -> bool:
        """Whether :meth:`forward` calls :meth:`by_parts` instead of composing the weight."""
        if self.runtime == "composed" or not self.can_run_factored():
            return False
        return self.runtime == "factored" or self.factored_share() <= FACTORED_SHARE

    def can_run_factored(self) -> bool:
        """Whether the layer can run without its composed weight."""
        return self.form.standardize is None and self.form.stock is None and self.factored_share() != float("inf")

    def _composed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        def make() -> tuple[Tensor, Tensor | None]:
            return self.form.native(self.form.standardized(self.compose(), self.gain)), self.bias

        if self.given is not None:
            return self.form.native(self.given), self.bias
        if self.training:
            return rounded_once(x, make)

        def ordered() -> tuple[Tensor, Tensor | None]:
            weight, bias = make()
            return in_order_of(x, weight), bias

        found = self._kept.get(x, own_tensors(self, self.bank), ordered)
        self._kept.watch(self, "bank")
        return found

    def _parts(self, x: Tensor) -> tuple[Tensor | None, ...]:
        if self.training:
            return self.parts(None)
        if not self.keeps_parts:
            return self.parts(x)
        found = self._kept_parts.get(x, own_tensors(self, self.bank), lambda: self.parts(x))
        self._kept_parts.watch(self, "bank")
        return found

    _replicate_for_data_parallel = not_replicated

    def dense(self) -> nn.Module:
        """The stock layer that computes the same (a new module with its own tensors)."""
        with torch.no_grad():
            bias = self.bias
            return self.form.dense(self.compose(), bias, self.gain).train(self.training)

    def extra_repr(self) -> str:
        form = self.form
        text = f"{form.in_channels}, {form.out_channels}, kernel_size={form.stock_kernel_size}, stride={form.stock_stride}"
        return text + (f", groups={form.groups}" if form.groups > 1 else "")


def any_form_of(layer: nn.Module) -> ConvForm | None:
    """The form of a stock layer, as :func:`form_of` tells it, or of the one that a shared layer stands in for."""
    return layer.form if isinstance(layer, SharedConv) else form_of(layer)


def weight_matrix(layer: nn.Module) -> Tensor:
    """(O, N): the weight of a shared or stock layer, one flattened filter a row, as its patches (N,) meet it."""
    form = any_form_of(layer)
    weight: Any = layer.weight
    if form is None:
        return weight.flatten(1)
    if not isinstance(layer, SharedConv):  # its weight is standardised and has its gain already
        weight = form.standardized(weight, getattr(layer, "gain", None))
    return matrix_of(weight, form)


def checked_form(name: str, layer: nn.Module) -> ConvForm:
    """The layer's form.

    Raises:
        SharefoldError: the layer is shared already, or of a class that a shared layer cannot stand in for.
    """
    form = form_of(layer)
    if form is None:
        what = "is shared already" if isinstance(layer, SharedConv) else f"is a {type(layer).__name__}"
        raise SharefoldError(f"layer {name} {what}: only dense convolutions and Linear layers of plain torch can be converted")
    return form

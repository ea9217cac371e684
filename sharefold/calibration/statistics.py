"""Input moments of layers over the calibration images, collected on demand and with bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sharefold.calibration import sensitivity
from sharefold.calibration.mean_owner import output_mean_owner
from sharefold.calibration.parts import Parts
from sharefold.calibration.sample_selection import least_certain
from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.inputs import Input, Inputs, elements
from sharefold.layers import ConvForm, form_of, target_weight
from sharefold.outputs import Divergence, divergence_of
from sharefold.running import batch_within, device_of, evaluating, evenly, has_doubles, run_on, runs_within
from sharefold.solvers.data_norm import Window, sample_patches
from sharefold.solvers.moments import Moments

# Samples a layer needs for its N x N moment: this many a row, and never fewer than the floor.
SAMPLES_PER_FEATURE = 16
SAMPLES_FLOOR = 16_384
# Conv groups are problems of their own, of few features each: a depthwise kernel has 9 or 25.
GROUPED_FLOOR = 2048
CACHE_BYTES = 2 << 30
# Batches of images tell how much a moment is to be trusted; a few images come in so many, too.
FEWEST_BATCHES = 8
# Bounds of the identity's share in a shrunk moment.
SMALLEST_SHARE, LARGEST_SHARE = 1e-4, 0.5
# Beyond so many features a layer's moments are those of its inputs in the space of its filters; see `Statistics.frames`.
WIDE = 8192


class _Done(Exception):
    """Raised by the last needed layer's hook so that the rest of the network does not run."""


class Statistics:
    """Second moments of the inputs of ``model``'s layers.

    One pass over the images collects every layer asked for at once; moments stay in memory up to ``cache_bytes``, the
    oldest go first, so that a large network is served stage by stage.

    A layer of more than ``WIDE`` features N and fewer rows O (VGG's first Linear: 25,088 and 4,096) would need an N x N
    moment. Whatever low-rank approximation the data norm prefers lies in the space of the layer's own rows, so that an
    orthonormal basis of it says all: ``frames`` holds it, (N, O), and ``moments`` are of x in it, (1, O, O).

    Args:
        model: the dense network; its mode and hooks are left as they were.
        images: (n, C, H, W), normalised as the network expects.
        chosen: indices (m,) of those that count here; by default all.
        centered: per layer, whether the mean is taken out (a bias or BatchNorm behind the layer absorbs it).
        batch_size: images a forward pass.
        seed: of the sampled positions.
        divergence: of conversions from ``model``; by default told from the images where it is asked for.
        apart: indices of images to which nothing is fitted, for what would look too good on those that count.
    """

    def __init__(
        self, model: nn.Module, images: Input, *, chosen: Tensor | None = None, centered: dict[str, bool] | None = None,
        batch_size: int = 100, seed: int = 0, cache_bytes: int = CACHE_BYTES, divergence: Divergence | None = None,
        apart: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.model, self.images = model, images
        self.chosen = torch.arange(len(images)) if chosen is None else chosen
        self.apart = self.chosen if apart is None or not len(apart) else apart
        self.centered = centered or {}
        self.batch_size, self.seed, self.cache_bytes = batch_size, seed, cache_bytes
        self.cache: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}
        self.frames: dict[str, Tensor] = {}
        self.passes = 0
        self._divergence = divergence
        self._sensitivity: dict[str, Tensor] | None = None
        self._vectors: dict[str, tuple[Tensor, Tensor]] | None = None

    def moments(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Moments (G, N, N) of the inputs of the layers ``names``, shrunk so that they are positive definite."""
        missing = [name for name in names if name not in self.cache]
        if missing:
            self._collect(missing)
        found = {name: self.cache[name] for name in names}
        self._evict(set(names))
        return found

    @property
    def divergence(self) -> Divergence:
        """How conversions of ``model`` are compared with it."""
        if self._divergence is None:
            self._divergence = divergence_of(self.model, self.images, batch_size=self.batch_size)
        return self._divergence

    def sensitivity(self) -> dict[str, Tensor]:
        """Per layer (O,): how much its output matters to what the network says; empty where that cannot be told."""
        if self._sensitivity is None:
            self._sensitivity = sensitivity.output_sensitivity(
                self.model, self.centered, self.sample(sensitivity.IMAGES), max(1, self.batch_size // 2), self.seed,
                self.divergence,
            )  # fmt: skip
        return self._sensitivity

    def vectors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of layers with one position an image: inputs (n, I), and gradients (n, O) of what the network says, of images apart."""
        if self._vectors is None:
            images = self.images[self.apart[evenly(len(self.apart), sensitivity.IMAGES)]]
            self._vectors = sensitivity.vector_gradients(
                self.model, self.centered, images, max(1, self.batch_size // 2), self.seed, self.divergence
            )
        return self._vectors

    def sample(self, count: int) -> Input:
        """At most ``count`` of the chosen images, evenly spaced."""
        return self.images[self.chosen[evenly(len(self.chosen), count)]]

    def bytes_of(self, names: Iterable[str]) -> int:
        """Memory that the moments of these layers take."""
        total = 0
        for name in names:
            form = _form(self.model, name)
            total += 4 * form.groups * (form.out_channels if is_wide(form) else form.features) ** 2
        return total

    def batches(self, groups: Sequence[Sequence[str]]) -> list[list[int]]:
        """Indices of ``groups``, in order, cut into runs whose members' moments fit the cache together."""
        return runs_within(self.cache_bytes, [self.bytes_of(members) for members in groups])

    @torch.no_grad()
    def _collect(self, names: list[str]) -> None:
        self.passes += 1
        forms = {name: _form(self.model, name) for name in names}
        for name, form in forms.items():
            if is_wide(form) and name not in self.frames:
                rows = target_weight(self.model.get_submodule(name), form).float()
                self.frames[name] = torch.linalg.qr(rows.T).Q
        sums = {name: Moments(torch.float32) for name in forms}
        # A layer's positions do not depend on which others are collected with it.
        drawn = {name: torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode())) for name in names}
        waiting: set[str] = set()
        shifts: dict[str, Tensor] = {}
        handles = []
        for name, form in forms.items():
            positions = max(1, -(-samples_for(form) // len(self.chosen)))

            def hook(
                module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name, form: ConvForm = form,
                positions: int = positions,
            ) -> None:  # fmt: skip
                patches = patches_of(form, inputs[0], positions, drawn[name])
                patches = patches @ self.frames[name] if name in self.frames else patches
                if self.centered.get(name, False):  # about the first batch's mean: the rest is small, and so is its rounding
                    patches = patches - shifts.setdefault(name, patches.mean(0))
                sums[name].add(patches.permute(1, 2, 0))
                waiting.discard(name)
                # A layer that several inputs pass may be called once more.
                if not waiting and not isinstance(self.images, Inputs):
                    raise _Done

            handles.append(self.model.get_submodule(name).register_forward_hook(hook))
        try:
            with evaluating(self.model):
                for index in self.chosen.split(min(self.batch_size, -(-len(self.chosen) // FEWEST_BATCHES))):
                    waiting.update(names)
                    try:
                        run_on(self.model, self.images[index])
                    except _Done:
                        continue
        finally:
            for handle in handles:
                handle.remove()
        for name in names:
            if not sums[name].count:
                raise SharefoldError(f"layer {name} was not reached by the calibration images: exclude it")
            moment = sums[name].covariance(self.centered.get(name, False))
            if not bool(torch.isfinite(moment).all()):
                raise SharefoldError(f"layer {name} gets NaN or infinite inputs on the calibration images: "
                                     "check the weights and the images' normalisation")
            self.cache[name] = shrunk(moment, sums[name].noise())
            mean = sums[name].mean.float() + shifts.get(name, 0)
            self.means[name] = mean @ self.frames[name].to(mean).T if name in self.frames else mean

    def _evict(self, keep: set[str]) -> None:
        total = sum(t.numel() * 4 for t in self.cache.values())
        for name in list(self.cache):
            if total <= self.cache_bytes:
                return
            if name not in keep:
                total -= self.cache.pop(name).numel() * 4


def statistics_of(
    model: nn.Module, graph: NetworkGraph, images: Input, seed: int = 0, divergence: Divergence | None = None,
    parts: Parts | None = None,
) -> Statistics:  # fmt: skip
    """Statistics of all layers of ``graph`` on the images that ``model`` is least certain of; of ``parts`` they are taken from
    ``fit``, and ``decide`` are those apart; by default all may be taken and none is apart.

    A mean that a BatchNorm or bias can absorb is taken out.

    Raises:
        SharefoldError: the network is on a device without float64, in which the solvers compute.
    """
    if not has_doubles(device := device_of(model)):
        raise SharefoldError(
            f"the network is on {device}, which has no float64 to solve in: convert it on the CPU (model.cpu(), --device cpu) "
            "and move it afterwards"
        )
    centered = {
        name: output_mean_owner(model, model.get_submodule(name), record.norm) is not None
        for name, record in graph.layers.items()
    }
    batch = batch_for(images)
    if divergence is None:
        divergence = divergence_of(model, images, graph, batch)
    allowed = torch.arange(len(images)) if parts is None else parts.fit
    chosen = allowed[least_certain(model, images[allowed], batch, divergence.reading)]
    return Statistics(
        model, images, chosen=chosen, centered=centered, batch_size=batch, seed=seed, divergence=divergence,
        apart=None if parts is None else parts.decide,
    )  # fmt: skip


def batch_for(images: Input) -> int:
    """Images a forward pass: a hundred small ones."""
    return batch_within(100 * 3 * 64 * 64, elements(images), 100)


def samples_for(form: ConvForm) -> int:
    """How many positions tell the moments of a layer of this form."""
    return max(SAMPLES_PER_FEATURE * form.features, SAMPLES_FLOOR if form.groups == 1 else GROUPED_FLOOR)


def is_wide(form: ConvForm) -> bool:
    """Whether the layer's moments are kept in the space of its rows."""
    return form.groups == 1 and form.features > WIDE and form.out_channels < form.features


def patches_of(form: ConvForm, x: Tensor, positions: int | None, generator: torch.Generator) -> Tensor:
    """Input patches (P, G, N) of a layer of this form at sampled positions, as many an image."""
    if form.kind == "linear":
        return sample_patches(x.detach(), None, positions, generator)
    maps = form.as_maps(x.detach())
    border = form.border(maps.shape[-2], maps.shape[-1])
    mode = "zeros" if form.same_pad else form.padding_mode
    return _sampled(maps, Window(form.kernel_size, form.stride, border, form.dilation, form.groups, mode), positions, generator)


def outputs_of(form: ConvForm, y: Tensor, positions: int | None, generator: torch.Generator) -> Tensor:
    """Outputs (P, O) of a layer at the positions that :func:`patches_of` draws by an equal generator."""
    if form.kind == "linear":
        return sample_patches(y.detach(), None, positions, generator).flatten(1)
    return _sampled(form.outputs_as_maps(y.detach()), Window(1), positions, generator).flatten(1)


def _sampled(maps: Tensor, window: Window, positions: int | None, generator: torch.Generator) -> Tensor:
    """:func:`sample_patches`; of volumes (B, D, C, H, W) some of every slice, and of those as many a volume as were asked for."""
    if maps.ndim == 4:
        return sample_patches(maps, window, positions, generator)
    volumes, depth = maps.shape[:2]
    each = None if positions is None else -(-positions // depth)
    found = sample_patches(maps.flatten(0, 1), window, each, generator).unflatten(0, (volumes, -1))
    if positions is not None and found.shape[1] > positions:
        index = torch.rand(found.shape[:2], generator=generator).topk(positions, dim=1).indices.sort(1).values.to(found.device)
        found = found[torch.arange(volumes, device=found.device)[:, None], index]
    return found.flatten(0, 1)


def shrunk(moment: Tensor, noise: Tensor) -> Tensor:
    """Moment (G, N, N) pulled towards a multiple of the identity, the more so the less the images agree about it.

    A moment of few samples has directions that those images never showed; without a ridge a solver would spend
    nothing on them and the network would fail on new images. The share is the one of least expected squared error (Ledoit and
    Wolf, https://doi.org/10.1016/S0047-259X(03)00096-4), with batches of images for samples.

    Args:
        noise: (G,) expected squared Frobenius norm of the moment's error (:meth:`Moments.noise`); infinite where it is not known.
    """
    features = moment.shape[-1]
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    eye = torch.eye(features, dtype=moment.dtype, device=moment.device)
    distance = (moment - scale[:, None, None] * eye).double().square().sum((1, 2))
    share = (noise.to(distance) / distance.clamp_min(1e-30)).clamp(SMALLEST_SHARE, LARGEST_SHARE).to(moment)[:, None, None]
    return (1 - share) * moment + share * scale[:, None, None] * eye


def _form(model: nn.Module, name: str) -> ConvForm:
    form = form_of(model.get_submodule(name))
    if form is None:
        raise SharefoldError(f"layer {name} is no dense convolution or Linear of plain torch: only those have input statistics")
    return form

"""The published shared networks as plain functions of explicit tensors, in evaluation mode.

Written from the papers' rules, without using the package under test, to compare converted models with. Every function
takes the input ``x`` (N, C, H, W), the state dict ``state`` of the dense network (or of what is left of it: entries of
convolutions that the rule replaces are never read), and the shared tensors by themselves. All return logits
(N, classes). BatchNorm uses running statistics and eps 1e-5 unless an argument says otherwise.

A stage is numbered from 1; ``shared`` maps a stage to its shared kernel and leaves out the stages that share nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
Conv = Callable[[Tensor, int], Tensor]  # (x, stride) -> y, in place of the convolution of that name
Replacements = Mapping[str, Conv]


class BatchNorm(NamedTuple):
    """One BatchNorm in evaluation mode; all tensors (C,)."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float = 1e-5

    def __call__(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, False, 0.0, self.eps)


def bn(x: Tensor, state: State, name: str) -> Tensor:
    entries = (state[f"{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var"))
    return BatchNorm(*entries)(x)


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def conv(x: Tensor, state: State, name: str, stride: int, replaced: Replacements) -> Tensor:
    """Bias-free convolution with same padding, or its replacement."""
    if name in replaced:
        return replaced[name](x, stride)
    return same(state[f"{name}.weight"])(x, stride)


def same(weight: Tensor) -> Conv:
    """A bias-free convolution by ``weight`` (O, I, k, k), k odd, padded by (k - 1) / 2."""
    return lambda x, stride: F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def blocks(state: State, stage: int) -> Iterator[int]:
    """Indices of the blocks of ``layer{stage}``."""
    index = 0
    while f"layer{stage}.{index}.bn1.weight" in state:
        yield index
        index += 1


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


# ---------------------------------------------------------------------------------------------- dense skeletons


def cifar_resnet(x: Tensor, state: State, replaced: Replacements) -> Tensor:
    """6n+2 ResNet for CIFAR: stem 16, basic blocks of 16, 32, 64; option-A shortcuts; classifier ``linear``."""
    x = F.relu(bn(conv(x, state, "conv1", 1, replaced), state, "bn1"))
    for stage in (1, 2, 3):
        for i in blocks(state, stage):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            y = F.relu(bn(conv(x, state, f"{name}.conv1", stride, replaced), state, f"{name}.bn1"))
            y = bn(conv(y, state, f"{name}.conv2", 1, replaced), state, f"{name}.bn2")
            if stride == 2:
                x = x[:, :, ::2, ::2]
                zeros = torch.zeros_like(x[:, : x.shape[1] // 2])
                x = torch.cat((zeros, x, zeros), dim=1)
            x = F.relu(x + y)
    return linear(pooled(x), state, "linear")


def torchvision_resnet(x: Tensor, state: State, replaced: Replacements) -> Tensor:
    """torchvision's ResNet-18/34 (basic) and -50/101/152 (bottleneck, stride on the 3x3); ``bn3`` tells them."""
    x = F.relu(bn(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), state, "bn1"))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage in (1, 2, 3, 4):
        for i in blocks(state, stage):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            skip = x
            if f"{name}.downsample.0.weight" in state:
                skip = bn(conv(x, state, f"{name}.downsample.0", stride, {}), state, f"{name}.downsample.1")
            deep = f"{name}.bn3.weight" in state
            strides = {"conv1": 1, "conv2": stride, "conv3": 1} if deep else {"conv1": stride, "conv2": 1}
            for number, (layer, step) in enumerate(strides.items(), start=1):
                x = bn(conv(x, state, f"{name}.{layer}", step, replaced), state, f"{name}.bn{number}")
                if number < len(strides):
                    x = F.relu(x)
            x = F.relu(x + skip)
    return linear(pooled(x), state, "fc")


def preact_resnet(x: Tensor, state: State, replaced: Replacements) -> Tensor:
    """Pre-activation CIFAR network, basic (WRN) or bottleneck (ResNet-164, stride on the first 1x1).

    The first block of a stage takes its 1x1 shortcut from the activated input.
    """
    x = conv(x, state, "conv1", 1, {})
    for stage in (1, 2, 3):
        for i in blocks(state, stage):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            y = F.relu(bn(x, state, f"{name}.bn1"))
            if i == 0:
                x = conv(y, state, f"{name}.shortcut", stride, {})
            y = conv(y, state, f"{name}.conv1", stride, replaced)
            y = conv(F.relu(bn(y, state, f"{name}.bn2")), state, f"{name}.conv2", 1, replaced)
            if f"{name}.bn3.weight" in state:
                y = conv(F.relu(bn(y, state, f"{name}.bn3")), state, f"{name}.conv3", 1, replaced)
            x = x + y
    return linear(pooled(F.relu(bn(x, state, "bn"))), state, "fc")


# ------------------------------------------------------------------- kernel sharing, https://arxiv.org/abs/2210.14151


def kernel_sharing_convmixer(
    x: Tensor, state: State, dw: Tensor, dw_bias: Tensor, pw: Tensor, pw_bias: Tensor
) -> Tensor:
    """ConvMixer (timm names, patch 1) whose blocks all run the same two convolutions, biases included.

    Args:
        state: dense state dict; read are ``stem.*``, the BatchNorms of every block and ``head.*``.
        dw, dw_bias: the depthwise kernel (D, 1, k, k) and bias (D,).
        pw, pw_bias: the pointwise kernel (D, D, 1, 1) and bias (D,).
    """
    x = bn(F.gelu(F.conv2d(x, state["stem.0.weight"], state["stem.0.bias"])), state, "stem.2")
    depth = 0
    while f"blocks.{depth}.3.weight" in state:
        mixed = F.conv2d(x, dw, dw_bias, padding=dw.shape[-1] // 2, groups=dw.shape[0])
        x = x + bn(F.gelu(mixed), state, f"blocks.{depth}.0.fn.2")
        x = bn(F.gelu(F.conv2d(x, pw, pw_bias)), state, f"blocks.{depth}.3")
        depth += 1
    return linear(pooled(x), state, "head")


def kernel_sharing_se_resnet(x: Tensor, state: State, shared: Mapping[int, Tensor]) -> Tensor:
    """SE-ResNet for CIFAR (``se_resnet*_cifar`` names) with one 3x3 kernel (w, w, 3, 3) in each stage of ``shared``.

    That kernel serves ``conv2`` of every block and ``conv1`` of every block but the first, whose input is narrower.
    """
    x = F.relu(bn(conv(x, state, "conv1", 1, {}), state, "bn1"))
    for stage in (1, 2, 3):
        for i in blocks(state, stage):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            kernel = shared.get(stage)
            first = state[f"{name}.conv1.weight"] if kernel is None or i == 0 else kernel
            second = state[f"{name}.conv2.weight"] if kernel is None else kernel
            y = F.relu(bn(same(first)(x, stride), state, f"{name}.bn1"))
            y = bn(same(second)(y, 1), state, f"{name}.bn2")
            gate = F.relu(pooled(y) @ state[f"{name}.se.fc1.weight"].T) @ state[f"{name}.se.fc2.weight"].T
            y = y * torch.sigmoid(gate)[:, :, None, None]
            if i == 0:
                x = bn(conv(x, state, f"{name}.downsample.0", stride, {}), state, f"{name}.downsample.1")
            x = F.relu(x + y)
    return linear(pooled(x), state, "fc")


# ------------------------------------------------------------------------- ShaResNet, https://arxiv.org/abs/1702.08782


def sharesnet_basic(x: Tensor, state: State, shared: Mapping[int, Tensor]) -> Tensor:
    """torchvision ResNet-18/34: ``conv2`` of every block of a stage is one kernel (w, w, 3, 3)."""
    replaced = {f"layer{s}.{i}.conv2": same(kernel) for s, kernel in shared.items() for i in blocks(state, s)}
    return torchvision_resnet(x, state, replaced)


def sharesnet_bottleneck(x: Tensor, state: State, shared: Mapping[int, Tensor]) -> Tensor:
    """torchvision ResNet-50/101/152: the stride-1 3x3 layers of a stage are one kernel (w, w, 3, 3).

    The first block of stage 1 takes part; those of stages 2 to 4 have stride 2 and keep their own.
    """
    replaced = {
        f"layer{s}.{i}.conv2": same(kernel) for s, kernel in shared.items() for i in blocks(state, s) if i or s == 1
    }
    return torchvision_resnet(x, state, replaced)


def sharesnet_preact(x: Tensor, state: State, shared: Mapping[int, Tensor]) -> Tensor:
    """ResNet-164 and wide ResNets for CIFAR: ``conv2`` of every block but a stage's first is one kernel (w, w, 3, 3).

    In ResNet-164 ``conv2`` is the 3x3 of the bottleneck (w is the inner width), in a WRN the second 3x3.
    """
    replaced = {f"layer{s}.{i}.conv2": same(kernel) for s, kernel in shared.items() for i in blocks(state, s) if i}
    return preact_resnet(x, state, replaced)


# --------------------------------------------------------------------- filter bases, https://arxiv.org/abs/2006.05066


class BasisMember(NamedTuple):
    """What one convolution owns beside its stage's shared basis.

    unique (U, I, 3, 3) filters; norm over the U + S basis outputs, unique ones first; coefficients (O, U + S, 1, 1).
    """

    unique: Tensor
    norm: BatchNorm
    coefficients: Tensor


def basis_conv(shared: Tensor, member: BasisMember) -> Conv:
    """3x3 convolution by [unique; shared] filters, BatchNorm without activation, 1x1 convolution by coefficients."""

    def run(x: Tensor, stride: int) -> Tensor:
        z = same(torch.cat((member.unique, shared)))(x, stride)
        return F.conv2d(member.norm(z), member.coefficients)

    return run


def filter_bases(
    x: Tensor, state: State, bases: Mapping[int, tuple[Tensor, ...]], members: Mapping[str, BasisMember]
) -> Tensor:
    """ResNet of basic blocks with shared filter bases, for CIFAR (classifier ``linear``) or ResNet-34 (``fc``).

    Args:
        bases: stage -> one basis (S, w, 3, 3) for all its convolutions, or two: for ``conv1`` and for ``conv2``.
        members: ``layer{s}.{i}.conv1`` and ``.conv2`` for every block i >= 1 of the stages in ``bases``; the
            first block of a stage is never factorised.
    """
    replaced: dict[str, Conv] = {}
    for stage, pair in bases.items():
        for i in blocks(state, stage):
            if i == 0:
                continue
            replaced[f"layer{stage}.{i}.conv1"] = basis_conv(pair[0], members[f"layer{stage}.{i}.conv1"])
            replaced[f"layer{stage}.{i}.conv2"] = basis_conv(pair[-1], members[f"layer{stage}.{i}.conv2"])
    skeleton = cifar_resnet if "linear.weight" in state else torchvision_resnet
    return skeleton(x, state, replaced)


def filter_bases_bottleneck(
    x: Tensor, state: State, tied: Mapping[int, Tensor], expand: Mapping[int, Tensor] | None = None
) -> Tensor:
    """torchvision ResNet-50/101: blocks 2..n of a stage use one 3x3 (w, w, 3, 3), ``tie=3x3``.

    ``expand`` (``tie=3x3+expand``) also gives their last 1x1 (4w, w, 1, 1). First blocks keep all of their own.
    """
    replaced: dict[str, Conv] = {}
    for layer, kernels in (("conv2", tied), ("conv3", expand or {})):
        for s, kernel in kernels.items():
            replaced |= {f"layer{s}.{i}.{layer}": same(kernel) for i in blocks(state, s) if i}
    return torchvision_resnet(x, state, replaced)


MOBILENET_STAGES = {1: (1,), 2: (2, 3), 3: (4, 5, 6), 4: (7, 8, 9, 10), 5: (11, 12, 13), 6: (14, 15, 16), 7: (17,)}


def filter_bases_mobilenet_v2(
    x: Tensor, state: State, expand: Mapping[int, Tensor], project: Mapping[int, Tensor] | None = None
) -> Tensor:
    """torchvision MobileNetV2 (ReLU6) with shared pointwise kernels in the stages given; 3, 4, 5, 6 in the paper.

    ``expand`` maps a stage to the expansion kernel (6c, c, 1, 1) of its blocks 2..n, ``project`` to their projection
    (c, 6c, 1, 1). Depthwise kernels and first blocks are never shared.
    """
    x = F.relu6(bn(conv(x, state, "features.0.0", 2, {}), state, "features.0.1"))
    for stage, numbers in MOBILENET_STAGES.items():
        for position, number in enumerate(numbers):
            name, y = f"features.{number}.conv", x
            stride = 2 if position == 0 and stage in (2, 3, 4, 6) else 1
            last = 3 if stage > 1 else 2
            if stage > 1:
                kernel = expand[stage] if position and stage in expand else state[f"{name}.0.0.weight"]
                y = F.relu6(bn(F.conv2d(y, kernel), state, f"{name}.0.1"))
            depthwise = state[f"{name}.{last - 2}.0.weight"]
            y = F.conv2d(y, depthwise, stride=stride, padding=1, groups=depthwise.shape[0])
            y = F.relu6(bn(y, state, f"{name}.{last - 2}.1"))
            kernel = project[stage] if project and position and stage in project else state[f"{name}.{last - 1}.weight"]
            y = bn(F.conv2d(y, kernel), state, f"{name}.{last}")
            x = x + y if position else y
    x = F.relu6(bn(conv(x, state, "features.18.0", 1, {}), state, "features.18.1"))
    return linear(pooled(x), state, "classifier.1")


# ----------------------------------------------------------------------- layer reuse, https://arxiv.org/abs/1901.09615


def lrunet(x: Tensor, state: State, width: int = 1) -> Tensor:
    """LruNet from the public checkpoints' names: ``stage{s}.{dw,pw}.weight`` run as often as there are BatchNorms."""
    x = F.relu(bn(conv(x, state, "features.0", 2, {}), state, "features.1"))
    if width == 2:
        x = torch.cat((x, x), dim=1)
    for stage in (1, 2, 3, 4):
        x = _lru_stage(x, state, f"stage{stage}")
        if stage in (1, 2, 4):
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        if stage < 4:
            x = torch.cat((x, x), dim=1)
    x = F.relu(bn(F.conv2d(x, state["classifier.0.weight"], groups=8), state, "classifier.1"))
    return pooled(F.relu(F.conv2d(x, state["classifier.4.weight"], state["classifier.4.bias"])))


def _lru_stage(x: Tensor, state: State, name: str) -> Tensor:
    dw, pw = state[f"{name}.dw.weight"], state[f"{name}.pw.weight"]
    n, c, h, w = x.shape
    iteration = 0
    while f"{name}.dw_bn_list.{iteration}.weight" in state:
        if iteration:  # swap the halves, then shuffle in two groups
            x = torch.cat((x[:, c // 2 :], x[:, : c // 2]), dim=1)
            x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = bn(F.conv2d(x, dw, padding=1, groups=c), state, f"{name}.dw_bn_list.{iteration}")
        y = bn(F.conv2d(y, pw, groups=8), state, f"{name}.pw_bn_list.{iteration}")
        x = F.relu(y + x)
        iteration += 1
    return x


# ---------------------------------------------------------------------------- grouped pointwise, kEffNet (FAIA 2021)


def keffnet_groups(in_chans: int, out_chans: int, min_channels: int) -> int:
    """Largest common divisor of both widths that is at most in_chans // min_channels; 1 leaves the layer as it is."""
    candidates = range(max(1, min(in_chans, out_chans, in_chans // min_channels)), 0, -1)
    return next(g for g in candidates if in_chans % g == 0 and out_chans % g == 0)


def keffnet_pointwise(
    x: Tensor,
    k: Tensor,
    mix: Tensor | None,
    groups: int,
    k_bias: Tensor | None = None,
    mix_bias: Tensor | None = None,
    k_norm: BatchNorm | None = None,
    mix_norm: BatchNorm | None = None,
    act: Callable[[Tensor], Tensor] = lambda y: y,
) -> Tensor:
    """One pointwise layer of F outputs in kEffNet's form, (N, C, H, W) -> (N, F, H, W).

    Args:
        k: grouped kernel (F, C / groups, 1, 1); its norm and activation are those of the layer that it replaces.
        mix: second kernel (F, F / groups, 1, 1) on the interleaved output of the first, or None. The rule has it
            where C >= F, and none where the layer expands.
    """
    first = F.conv2d(x, k, k_bias, groups=groups)
    first = act(k_norm(first) if k_norm is not None else first)
    step = first.shape[1] // groups
    interleaved = torch.cat([first[:, start::step] for start in range(step)], dim=1)
    if mix is None:
        return interleaved
    second = F.conv2d(interleaved, mix, mix_bias, groups=groups)
    return act(mix_norm(second) if mix_norm is not None else second) + first


def keffnet_params(in_chans: int, out_chans: int, min_channels: int, bias: bool, norm: bool) -> int:
    """Trainable parameters of one pointwise layer under the rule, its norm (2F per convolution) and bias included."""
    groups = keffnet_groups(in_chans, out_chans, min_channels)
    extra = out_chans * (int(bias) + 2 * int(norm))
    total = in_chans * out_chans // groups + extra
    if groups > 1 and in_chans >= out_chans:
        total += out_chans * out_chans // groups + extra
    return total


class Pair(NamedTuple):
    """What kEffNet puts in place of one pointwise layer; see :func:`keffnet_pointwise`."""

    groups: int
    k: Tensor
    k_bias: Tensor | None = None
    k_norm: BatchNorm | None = None
    mix: Tensor | None = None
    mix_bias: Tensor | None = None
    mix_norm: BatchNorm | None = None


def keffnet(x: Tensor, state: State, pairs: Mapping[str, Pair]) -> Tensor:
    """timm's EfficientNet-B0 with some pointwise layers in kEffNet's form.

    Args:
        state: the dense state dict; entries of the layers in ``pairs`` are not read, nor those of the norms behind
            pairs that have a second kernel.
    """
    strides = (1, 2, 2, 2, 1, 2, 1)
    x = F.conv2d(x, state["conv_stem.weight"], stride=2, padding=1)
    x = F.silu(bn(x, state, "bn1"))
    for stage, stride in enumerate(strides):
        index = 0
        while f"blocks.{stage}.{index}.conv_dw.weight" in state:
            name, first = f"blocks.{stage}.{index}", index == 0
            narrow = not any(key.startswith(f"{name}.conv_pwl.") for key in state)  # the block without an expansion
            y = x if narrow else _point(x, state, pairs, f"{name}.conv_pw", f"{name}.bn1", F.silu)
            kernel = state[f"{name}.conv_dw.weight"]
            step, padding = stride if first else 1, (kernel.shape[-1] - 1) // 2
            y = F.conv2d(y, kernel, stride=step, padding=padding, groups=kernel.shape[0])
            y = F.silu(bn(y, state, f"{name}.{'bn1' if narrow else 'bn2'}"))
            gate = _point(y.mean((2, 3), keepdim=True), state, pairs, f"{name}.se.conv_reduce", None, F.silu)
            y = y * _point(gate, state, pairs, f"{name}.se.conv_expand", None, torch.sigmoid)
            last = ("conv_pw", "bn2") if narrow else ("conv_pwl", "bn3")
            y = _point(y, state, pairs, f"{name}.{last[0]}", f"{name}.{last[1]}", lambda z: z)
            x = y if first else x + y
            index += 1
    x = _point(x, state, pairs, "conv_head", "bn2", F.silu)
    return linear(pooled(x), state, "classifier")


def _point(
    x: Tensor, state: State, pairs: Mapping[str, Pair], name: str, norm: str | None, act: Callable[[Tensor], Tensor]
) -> Tensor:
    pair = pairs.get(name)
    if pair is not None and pair.mix is not None:
        return keffnet_pointwise(
            x, pair.k, pair.mix, pair.groups, pair.k_bias, pair.mix_bias, pair.k_norm, pair.mix_norm, act
        )
    if pair is not None:
        x = keffnet_pointwise(x, pair.k, None, pair.groups, pair.k_bias)
    else:
        x = F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"))
    return act(x if norm is None else bn(x, state, norm))

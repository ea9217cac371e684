"""One update: forward, the loss and its parts, backward, step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.finetune.augmentation import shrunk
from sharefold.finetune.batches import Batch
from sharefold.finetune.block_outputs import Taps, giving_tensors, matching_blocks
from sharefold.finetune.config import FinetuneConfig
from sharefold.finetune.distributed import World
from sharefold.finetune.graphed import GraphedGradients
from sharefold.finetune.losses import block_error, collect_bases, distillation, moments, orthogonality, spread
from sharefold.finetune.mixing import Mixing
from sharefold.finetune.training_output import training_apart_from_chance, with_logits_alone
from sharefold.graph import analyze
from sharefold.inputs import Input, Inputs, call, shapes_of
from sharefold.layers import running
from sharefold.layers.norm_fusion import FEW, norms_fused, norms_that_fuse
from sharefold.layers.together import composed_together
from sharefold.outputs.kinds import are_probabilities
from sharefold.outputs.leaves import tensors_of
from sharefold.running import run_on


def autocast_for(config: FinetuneConfig, device: torch.device) -> tuple[torch.dtype | None, Any]:
    """The autocast dtype (None: off) and a function that returns the context."""
    kinds = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if config.amp == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    else:
        dtype = kinds[config.amp]
    if dtype is None:
        return None, nullcontext
    return dtype, lambda: torch.autocast(device.type, dtype=dtype)


def _norms_of(teacher: nn.Module, example: Input) -> dict[str, str | None]:
    """The norm behind each of the teacher's layers; nothing for a network that the graph pass cannot read."""
    try:
        return {name: record.norm for name, record in analyze(teacher, example).layers.items()}
    except SharefoldError:
        return {}


def _check_augmentation(config: FinetuneConfig, example: Input) -> None:
    """Refuses what is asked for of other inputs than it is made for; several stay as they are, to belong together still."""
    if isinstance(example, Inputs):
        wanted = [name for name in ("small_images", "cutmix", "mixup", "random_erase") if getattr(config, name)]
        if wanted:
            raise SharefoldError(f"finetune: {wanted[0]} changes single images, the model takes several inputs: leave it out")
        return
    wanted = [name for name in ("small_images", "cutmix", "random_erase") if getattr(config, name)]
    if wanted and example.ndim != 4:
        shape = tuple(example.shape)
        raise SharefoldError(f"finetune: {wanted[0]} is for images (N, C, H, W), the model takes {shape}: leave it out")


def freeze_norms(model: nn.Module) -> None:
    """BatchNorms in eval mode: their statistics stay, their weights and biases still learn."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()


class Updater:
    """Student, teacher, optimizer and the loss between them.

    Args:
        model: the student, already on the device.
        teacher: the network to imitate, or None.
        optimizer: steps the student's parameters.
        config: weights of the loss and the like.
        world: processes and device; the student is wrapped in DistributedDataParallel when there are several.
        example: this process's part of the run's first batch: it shows how many classes there are, that teacher and
            student agree on them, and how large the block outputs are.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer, config: FinetuneConfig,
        world: World, example: Input,
    ) -> None:  # fmt: skip
        self.model, self.teacher, self.optimizer, self.config, self.world = model, teacher, optimizer, config, world
        self.dtype, self.autocast = autocast_for(config, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        self.distill = 0.0 if teacher is None else (config.distill if config.labels else 1.0)
        logits = self._logits(example[:2])
        self.classes = logits.shape[1]
        _check_augmentation(config, example)
        self.mixing = Mixing(config, self.classes, world.device.type)
        self.blocks: list[str] = []
        if teacher is not None and config.block_match:
            with torch.no_grad(), self.autocast():
                giving = giving_tensors(teacher, lambda: call(teacher, example[:2]))
            self.blocks = matching_blocks(model, teacher, config.block_names, giving)
            self.spreads = self._spreads(teacher, example)
        with training_apart_from_chance(model):
            forward = with_logits_alone(model, self._answer("model in training mode", model, example[:2]), logits)
        silent = config.find_unused or forward is not model  # heads that are for training alone get no gradient
        if world.size > 1:
            gpu = [world.device.index] if world.device.type == "cuda" else None
            # Frozen statistics are equal everywhere: sending them before every step would be waiting for nothing.
            parallel = nn.parallel.DistributedDataParallel
            known = inspect.signature(parallel).parameters
            sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.13
            options: dict[str, Any] = {sync: not config.freeze_norm, "gradient_as_bucket_view": True}
            forward = parallel(forward, device_ids=gpu, find_unused_parameters=silent, **options)
        self.forward: Any = torch.compile(forward) if config.compile else forward
        self.wrapped = forward
        self.teacher_forward: Any = torch.compile(teacher) if config.compile and teacher is not None else teacher
        self.gradients: Callable[[Any, Tensor], dict[str, Tensor]] = self._gradients
        # Slices add up, processes talk and fp16 looks for its factor: none of it belongs into a recorded update.
        alone = world.size == 1 and config.accumulate == 1 and self.dtype != torch.float16
        alone = alone and not isinstance(example, Inputs)  # a recorded update reads one tensor
        if config.cuda_graphs and world.device.type == "cuda" and alone:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            self.gradients = GraphedGradients(self._gradients, trained, world.device)
        self.norms = {} if teacher is None else self._norms(teacher, _norms_of(teacher, example[:1]), example)
        self.own_norms: Mapping[str, str | None] = {}
        # One class wires its layers in one way, whatever they share.
        if config.freeze_norm and type(model) is type(teacher):
            self.own_norms = self._norms(model, self.norms, example)

    def _logits(self, example: Input) -> Tensor:
        """What the model says in eval mode."""
        was_training = self.model.training
        try:
            logits = self._answer("model", self.model.eval(), example)
            goal = logits if self.teacher is None else self._answer("teacher", self.teacher, example)
        finally:
            self.model.train(was_training)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise SharefoldError(
                "finetune: the model does not return logits (batch, classes): give a classifier; networks of other tasks learn "
                "without labels while they are converted (convert --refine)"
            )
        for what, said in (("model", logits), ("teacher", goal)):
            if isinstance(said, Tensor) and said.ndim == 2 and are_probabilities(said):
                raise SharefoldError(
                    f"finetune: the {what} returns probabilities, and the loss is of logits: take its softmax off, and put it "
                    "back behind the result"
                )
        if self.distill and (not isinstance(goal, Tensor) or goal.ndim != 2):
            raise SharefoldError("finetune: the teacher does not return logits (batch, classes): give a classifier")
        if self.distill and logits.shape != goal.shape:
            raise SharefoldError(
                f"finetune: the teacher has {goal.shape[1]} classes, the model {logits.shape[1]}: they must be the same"
            )
        return logits

    def _answer(self, what: str, network: nn.Module, example: Input) -> Any:
        try:
            with torch.no_grad(), self.autocast():
                return call(network, example)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())[:150]
            raise SharefoldError(
                f"finetune: the {what} fails on a batch of shape {shapes_of(example)} ({reason}): pass data as it takes them; "
                "signals (C, L) come as a Dataset or a DataLoader"
            ) from None

    def _spreads(self, teacher: nn.Module, example: Input) -> list[float]:
        with Taps(teacher, self.blocks) as taps, torch.no_grad(), self.autocast():
            call(teacher, example)
            found = [moments(output) for output in taps.outputs()]
        return [spread(self.world.sum(values) / self.world.size) for values in found]

    def _norms(self, network: nn.Module, norms: Mapping[str, str | None], example: Input) -> Mapping[str, str | None]:
        """``norms``, or none where ``network`` says something else with them fused, or its blocks do.

        Told on the CPU: the products of a GPU are rounded so far (TF32) that the same networks differ.
        """
        few = example[:FEW]

        def answers(network: nn.Module) -> list[Tensor]:
            with Taps(network, self.blocks) as taps:
                said = tensors_of(run_on(network, few))
                return [*said.values(), *taps.outputs()]

        if self.world.device.type == "cpu":
            return norms_that_fuse(network, norms, answers)
        try:
            return norms_that_fuse(copy.deepcopy(network).cpu(), norms, answers)
        except (RuntimeError, TypeError):  # it cannot be copied, or runs on a GPU alone
            return {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While active, block outputs are recorded, shared layers run composed, and BatchNorms whose statistics are fixed
        (the teacher's, and with ``freeze_norm`` the student's) run inside of their convolutions.

        A composed weight is small beside the maps, and one convolution a layer passes over memory once.
        """
        with ExitStack() as stack:
            stack.enter_context(running(self.model, "composed"))
            if self.teacher is not None:
                stack.enter_context(norms_fused(self.teacher, self.norms, constant=True, dtype=self.dtype))
            if self.config.freeze_norm and any(self.own_norms.values()):
                freeze_norms(self.model)
                stack.enter_context(norms_fused(self.model, self.own_norms))
            networks = [m for m in (self.model, self.teacher) if m is not None]
            self._taps = [stack.enter_context(Taps(network, self.blocks)) for network in networks]
            yield

    def losses(self, images: Input, labels: Tensor) -> dict[str, Tensor]:
        """The loss's parts before weighting, their weighted sum ``loss``, and ``top1`` of hard labels."""
        config, parts = self.config, {}
        with self.autocast():
            if self.teacher is not None and (self.distill or self.blocks):
                with torch.no_grad():
                    goal = call(self.teacher_forward, images)
            logits = call(self.forward, images).float()
        total = torch.zeros((), device=logits.device)
        if config.labels and self.distill < 1:
            smoothing = 0.0 if labels.ndim == 2 else config.label_smoothing
            parts["labels"] = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            total = total + (1 - self.distill) * parts["labels"]
        if self.distill:
            parts["distill"] = distillation(logits, goal, config.temperature)
            total = total + self.distill * parts["distill"]
        if self.blocks:
            student_taps, teacher_taps = self._taps
            parts["blocks"] = block_error(student_taps.outputs(), teacher_taps.outputs(), self.spreads)
            total = total + config.block_match * parts["blocks"]
        if config.orthogonality:
            bases = collect_bases(self.model, joint=config.orthogonality_joint, skip=config.orthogonality_skip)
            if bases:
                parts["orthogonality"] = orthogonality(bases, config.orthogonality_form)
                total = total + config.orthogonality * parts["orthogonality"]
        if config.labels and labels.ndim == 1:
            parts["top1"] = (logits.argmax(1) == labels).float().mean()
        return {"loss": total, **parts}

    def _gradients(self, images: Input, labels: Tensor) -> dict[str, Tensor]:
        """Adds the gradients of one slice of a batch to those of the parameters; returns the loss's parts."""
        with ExitStack() as stack:
            with self.autocast():
                stack.enter_context(composed_together(self.model))
            parts = self.losses(images, labels)
            # Within: checkpointed blocks run again in here, and must find the same weights.
            self.scaler.scale(parts["loss"] / self.config.accumulate).backward()
        return parts

    def update(self, batches: Iterator[Batch], small: bool = False) -> dict[str, Tensor]:
        """Takes ``accumulate`` batches, makes one step, returns the mean of the loss's parts (detached).

        Args:
            small: shrink the images to 3/4 of their side, for both networks.
        """
        count = self.config.accumulate
        sums: dict[str, Tensor] = {}
        for i in range(count):
            images, labels = next(batches)
            if isinstance(images, Tensor):
                if small:
                    images = shrunk(images)
                if self.config.channels_last and images.ndim == 4:
                    images = images.contiguous(memory_format=torch.channels_last)
                images, labels = self.mixing(images, labels)
            with self._no_sync() if i < count - 1 else nullcontext():
                parts = self.gradients(images, labels)
            for name, value in parts.items():
                share = value.detach() / count
                sums[name] = sums[name] + share if name in sums else share
        if self.config.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return sums

    def _no_sync(self) -> AbstractContextManager:
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return self.wrapped.no_sync()
        return nullcontext()

"""What a budget counts: parameters, multiply-accumulates, or the layers' seconds."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sharefold.graph import LayerRecord, NetworkGraph
from sharefold.inputs import Input
from sharefold.layers import ConvForm, form_of
from sharefold.measure import count_macs, latency
from sharefold.methods import Candidate, LayerMethod

# Layers take fractions of a millisecond: their median needs more runs than a whole network's.
LAYER_REPEATS = 15


class Cost(ABC):
    """Prices of layers and of what they may become.

    Attributes:
        unit: what is counted, for messages.
        total: of the whole dense network.
        settles: whether an option that costs and loses no less than another one is of no use.
    """

    unit: str
    total: float
    settles = True

    @abstractmethod
    def dense(self, name: str) -> float:
        """The layer as it is."""

    @abstractmethod
    def shared(
        self, names: Sequence[str], forms: Sequence[ConvForm], method: LayerMethod, candidate: Candidate, stay: Sequence[int]
    ) -> float:
        """The members ``stay`` of the group ``names`` under ``candidate``, which was made for all of them."""

    @property
    def directions(self) -> Sequence[Cost]:
        """The costs by each of which it is chosen what is worth being offered."""
        return (self,)

    def member(self, names: Sequence[str], forms: Sequence[ConvForm], method: LayerMethod, candidate: Candidate) -> float:
        """What every further member adds."""
        everybody = range(len(names))
        return self.shared(names, forms, method, candidate, everybody) / len(names)

    def text(self, amount: float) -> str:
        """An amount for people."""
        return f"{amount:,.0f} {self.unit}"

    def below(self, limit: float, budget: str, floor: float, method: str) -> str:
        """What to say where ``method`` reaches no less than ``floor`` and the budget, as the user wrote it, is ``limit``."""
        return (
            f"budget {budget} ({self.text(limit)}) is below what {method} can reach on this model: the floor is "
            f"{self.text(floor)} ({floor / self.total:.1%}); raise the budget or allow more methods"
        )


class Parameters(Cost):
    """Trainable numbers; integer codes count as their bits over 32."""

    unit = "parameters"

    def __init__(self, model: nn.Module, graph: NetworkGraph) -> None:
        self.graph = graph
        self.total = sum(p.numel() for p in model.parameters())

    def dense(self, name: str) -> float:
        o, i, h, w = self.graph.layers[name].weight_shape
        return o * i * h * w

    def shared(
        self, names: Sequence[str], forms: Sequence[ConvForm], method: LayerMethod, candidate: Candidate, stay: Sequence[int]
    ) -> float:
        if len(stay) == len(names):
            return candidate.cost
        return method.cost([forms[k] for k in stay], candidate.options)

    def member(self, names: Sequence[str], forms: Sequence[ConvForm], method: LayerMethod, candidate: Candidate) -> float:
        widest = max(forms, key=lambda form: form.features)  # the bank is as wide, whoever leaves
        return (candidate.cost - method.cost([widest], candidate.options)) / max(len(names) - 1, 1)


class _PerLayer(Cost):
    """Costs that add up over the layers, each in the form that it will run in."""

    def __init__(self, graph: NetworkGraph) -> None:
        self.graph = graph
        self._shares: dict[tuple[ConvForm, str, str], float | None] = {}

    def share(self, form: ConvForm, method: LayerMethod, options: dict[str, Any]) -> float | None:
        """What a layer that runs without its composed weight multiplies, of what the dense one does; None where it runs that."""
        key = form, method.name, json.dumps(options, sort_keys=True)
        if key not in self._shares:
            with torch.device("meta"):
                layer = method.stand_in(form, options)
            self._shares[key] = layer.factored_share() if layer.runs_factored() else None
        return self._shares[key]

    @abstractmethod
    def _factored(self, record: LayerRecord, form: ConvForm, method: LayerMethod, options: dict[str, Any]) -> float:
        """One layer that runs without its composed weight."""

    def shared(
        self, names: Sequence[str], forms: Sequence[ConvForm], method: LayerMethod, candidate: Candidate, stay: Sequence[int]
    ) -> float:
        total = 0.0
        for k in stay:
            if self.share(forms[k], method, candidate.options) is not None:
                total += self._factored(self.graph.layers[names[k]], forms[k], method, candidate.options)
            else:  # runs the composed weight, which is cached, as the dense layer ran its own
                total += self.dense(names[k])
        return total


class Macs(_PerLayer):
    """Multiply-accumulates of an image."""

    unit = "MACs"

    def __init__(self, model: nn.Module, graph: NetworkGraph, example_input: Input) -> None:
        super().__init__(graph)
        self.total = count_macs(model, example_input)

    def dense(self, name: str) -> float:
        record = self.graph.layers[name]
        o, i, h, w = record.weight_shape
        return o * i * h * w * record.windows * record.calls

    def _factored(self, record: LayerRecord, form: ConvForm, method: LayerMethod, options: dict[str, Any]) -> float:
        return self.dense(record.name) * (self.share(form, method, options) or 0.0)


class Seconds(_PerLayer):
    """Median seconds of a forward pass of ``example_input``, measured here, with torch's present number of threads.

    Layers of equal shape are measured once. What runs between the layers counts as it is.
    """

    unit = "seconds"

    def __init__(self, model: nn.Module, graph: NetworkGraph, example_input: Input) -> None:
        super().__init__(graph)
        parameter = next(model.parameters())
        self.model, self.batch, self.like = model, len(example_input), parameter
        self.known: dict[str, float] = {}
        self.total = latency(model, example_input.to(parameter.device))

    def dense(self, name: str) -> float:
        record = self.graph.layers[name]
        form = form_of(self.model.get_submodule(name))
        assert form is not None
        return record.calls * self._measured(record, form, "dense", self.model.get_submodule(name))

    def _factored(self, record: LayerRecord, form: ConvForm, method: LayerMethod, options: dict[str, Any]) -> float:
        with self.like.device:
            layer = method.stand_in(form, options).to(self.like.dtype)
        if layer.bank is not None:
            layer.bank.to(self.like.dtype)
        for tensor in (*layer.parameters(), *(() if layer.bank is None else layer.bank.parameters())):
            nn.init.uniform_(tensor, -0.1, 0.1)  # unset memory may hold denormal numbers, which are slow
        return record.calls * self._measured(record, form, f"{method.name} {json.dumps(options, sort_keys=True)}", layer)

    def _measured(self, record: LayerRecord, form: ConvForm, what: str, layer: nn.Module) -> float:
        key = f"{form} {record.input_shape} {what}"
        if key not in self.known:
            x = torch.ones((self.batch, *record.input_shape), device=self.like.device, dtype=self.like.dtype)
            with torch.inference_mode():
                self.known[key] = latency(layer, x, repeats=LAYER_REPEATS)
        return self.known[key]

    def text(self, amount: float) -> str:
        return f"{amount * 1e3:,.3g} ms"


def cost_of(unit: str, model: nn.Module, graph: NetworkGraph, example_input: Input) -> Cost:
    """The costs that a budget's ``unit`` counts; bytes are planned through parameters."""
    if unit == "macs":
        return Macs(model, graph, example_input)
    if unit == "seconds":
        return Seconds(model, graph, example_input)
    return Parameters(model, graph)

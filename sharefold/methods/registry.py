"""Every conversion step, one line each; those that the planner can choose first."""

from __future__ import annotations

from sharefold.errors import SharefoldError, unknown
from sharefold.methods.average import Average, Tied
from sharefold.methods.basis import Basis
from sharefold.methods.cluster import ClusterFilters, ClusterKernels, ClusterLayers
from sharefold.methods.contract import ConversionStep, LayerMethod
from sharefold.methods.filter_bases import FilterBases
from sharefold.methods.fold import Fold
from sharefold.methods.grouped import Grouped
from sharefold.methods.hybrid import Hybrid
from sharefold.methods.reuse import Reuse
from sharefold.methods.spatial import Spatial
from sharefold.methods.svd import Svd
from sharefold.methods.tied_kernels import TiedKernels
from sharefold.methods.tucker import Tucker

METHODS: dict[str, LayerMethod] = {
    method.name: method
    for method in (
        Basis(),  # shared filter basis: https://arxiv.org/abs/2006.05066
        Hybrid(),  # basis and a layer's own column filters: https://arxiv.org/abs/2006.05066
        Svd(),  # data-norm low rank per layer: https://arxiv.org/abs/2509.25136
        Spatial(),  # column and row filters per layer: https://arxiv.org/abs/1405.3866
        Tucker(),  # shared input space and filters: https://arxiv.org/abs/1511.06530
        Average(),  # the mean kernel: https://arxiv.org/abs/2210.14151
        Tied(),  # data-norm optimum of one kernel, scaled: https://arxiv.org/abs/2212.09849
        TiedKernels(),  # one kernel and nothing beside it: https://arxiv.org/abs/1702.08782
        ClusterLayers(),  # k-means over layers: https://arxiv.org/abs/2210.14151
        ClusterFilters(),  # k-means over filters: https://arxiv.org/abs/1510.00149
        ClusterKernels(),  # k-means over h x w slices: https://arxiv.org/abs/1907.05686
    )
}
# Takes channels between layers: planned by hidden spaces, before the methods above (sharefold/planner/fold_levels.py).
FOLD = Fold()  # https://arxiv.org/abs/2502.10216
# Steps of published systems, which their recipes plan (sharefold/recipes).
RECIPE_STEPS: dict[str, ConversionStep] = {
    step.name: step
    for step in (
        FilterBases(),  # basis, BatchNorm, coefficients: https://arxiv.org/abs/2006.05066
        Reuse(),  # one block run N times: https://arxiv.org/abs/1901.09615
        Grouped(),  # grouped pointwise pair: https://doi.org/10.13164/mendel.2022.1.023
    )
}
# All that a group of a plan may name.
STEPS: dict[str, ConversionStep] = {**METHODS, FOLD.name: FOLD, **RECIPE_STEPS}
# What `--method auto` lets compete; the others were never chosen or never better at any budget measured (docs/methods).
AUTO = ("basis", "hybrid", "svd", "spatial")
ALIASES = {"cluster": "cluster-filter"}


def method_named(name: str) -> LayerMethod:
    """The method called ``name``, as ``--method`` takes it.

    Raises:
        SharefoldError: there is none; names the nearest, or the recipe that plans a step of that name.
    """
    name = ALIASES.get(name, name)
    if name in RECIPE_STEPS:
        raise SharefoldError(f"method {name!r} is a step of a published system, not one to choose: take its recipe (--recipe)")
    if name not in METHODS:
        raise unknown("method", name, ["auto", *METHODS, FOLD.name])
    return METHODS[name]


def check_method(name: str) -> None:
    """Checks that ``--method`` can take ``name``.

    Raises:
        SharefoldError: as :func:`method_named`.
    """
    if name != FOLD.name:
        method_named(name)


def step_named(name: str) -> ConversionStep:
    """What a plan's group calls ``name``: a method or a recipe's step.

    Raises:
        SharefoldError: there is none; names the nearest.
    """
    name = ALIASES.get(name, name)
    if name not in STEPS:
        raise unknown("method", name, STEPS)
    return STEPS[name]

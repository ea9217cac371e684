"""The configuration of a small file in few bytes: what a reader knows anyway is left out, and the rest is deflated.

A bare deflate stream with a preset dictionary (RFC 1950 calls it so): a text that is known to writer and reader and stands before
the JSON text, so that its words cost two or three bytes each from the first time on. The dictionary is a part of the format: what
changes it needs another :data:`sharefold.store.container.VERSION`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharefold.checksum import ALGORITHM
from sharefold.format import FORMAT_VERSION, FileConfig
from sharefold.metrics import short_metrics
from sharefold.plans import PLAN_VERSION, GroupPlan, Plan
from sharefold.store.byte_reader import inflated
from sharefold.untrusted import JSON_LIMIT, parse_json

# What is near the end is cheapest. Keys stand as they do in sorted JSON.
_DICTIONARY = (
    b'"cluster-filter","cluster-kernel","cluster-layer","count":"average","tied","grouped_pointwise","tucker","width":"basis'
    b'","aliases":{"head.weight":"dtypes":{"":"bfloat16","float16","float64"},"format":1},"exclude":"agreement_interval":["r'
    b'eport_images":"seen_before":false,"new_agreement":null,"outputs":[{"name":"kind":"metric":"value":"interval":["macs":{'
    b'"after":,"before":},"params":{"after":,"before":},"bytes":{"after":,"before":},"top1":"top5":"loss":"kl":"agreement":"'
    b'steps":[{"images":12,"kept":true,"kl_after":,"kl_before":,"name":"refit"},{"images":,"kept":false,"kl_after":,"kl_befo'
    b're":,"name":"norms"},{"kept":false,"name":"norms","reason":"the network has no BatchNorm with running statistics"},"na'
    b'me":"head"},"name":"refine"},"name":"store"}],"crop_mode":"center","crop_pct":0.875,"interpolation":"bilinear","bicubi'
    b'c","base":{"kwargs":{"num_classes":10},"library":"torchvision","name":"library":"timm","name":"resnet"input_size":[1,2'
    b'8,28],[3,32,32],[3,224,224],"mean":[0.5],"std":[0.5,0.5,0.5],"mean":[0.5,0.5,0.5],"std":[0.25,0.25,0.25]},"pretrained_'
    b'cfg":{"input_size":[3,224,224],"mean":[0.485,0.456,0.406],"std":[0.229,0.224,0.225]},"sharefold_version":"0.1.0","sour'
    b'ce":"recipe sharesnet","budget 25%, method auto","store":"int8","kmeans4","fp16","mixed:"encoder.","decoder.","feature'
    b's.","layers.","layer1.","stages.","blocks.","classifier","weight","stem","downsample","body."through":["bn1",".bn2","n'
    b'orm"],"readers":[".conv2",".project",".fc2",".0.0","head"]},"down",".depthwise","pointwise",{"error":0.0,"members":["l'
    b'ayer1.0.conv1","layer2.0.conv2","layer3.0.conv1"],"method":"hybrid","name":"stage1.conv3x3-","options":{"own":,"pivote'
    b'd":true,"rank":},"params_after":,"params_before":,"role":"conv1+conv2","stage":1},"role":"linear1","stage":2},"role":"'
    b'transition"},"role":"project"},"role":"expand"},"role":"pointwise"},"role":"depthwise"},{"error":0.00,"members":["fc1"'
    b'],"method":"svd","options":{"pivoted":true,"rank":1},"params_after":,"params_before":},{"error":0.0,"members":["conv1"'
    b'],"method":"fold","options":{"channels":16,"keep":8,"kept":[""],"readers":["conv2"]},"params_after":1,"params_before":'
    b'2,"role":"stem"},{"error":0.0,"members":["conv"],"method":"spatial","options":{"pivoted":true,"rank":},"params_after":'
    b',"params_before":,"role":"conv"}],"params_after":1,"params_before":2,"source":"budget 50%, method auto + fold"}{"plan"'
    b':{"groups":[{"error":0.0'
)
_FOLD = "fold"
_DIGITS = 4  # of what was measured, where every byte counts


def shorter(config: FileConfig, metrics: bool = True) -> Iterator[FileConfig]:
    """``config`` and what may be left of it in a small file, from all to what loading needs.

    Steps go first, then all but a few metrics, then what was measured of the groups. ``metrics``: whether they, and steps, may be
    there at all.
    """
    if metrics:
        if config.steps:
            yield config
            config = replace(config, steps=())
        yield config
        yield replace(config, metrics=short_metrics(config.metrics))
    config = replace(config, metrics={}, steps=())
    groups = [replace(group, error=None if group.error is None else _rounded(group.error)) for group in config.plan.groups]
    yield replace(config, plan=replace(config.plan, groups=groups))
    bare = [GroupPlan(group.name, group.method, group.members, group.options) for group in groups]
    yield replace(config, plan=replace(config.plan, groups=bare, source=""), sharefold_version="")


def short_bytes(config: FileConfig) -> bytes:
    """``config`` for a file whose checksum is its container's."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _DICTIONARY)
    text = json.dumps(_without_defaults(config), separators=(",", ":"), sort_keys=True)
    return squeeze.compress(text.encode()) + squeeze.flush()


def config_from(data: memoryview, where: str | Path) -> FileConfig:
    """Reads :func:`short_bytes`.

    Raises:
        SharefoldError: damaged, larger than any configuration, or as :meth:`FileConfig.from_dict`.
    """
    text = inflated(data, JSON_LIMIT, _DICTIONARY).decode("utf-8", "replace")
    found = parse_json(text, f"{where}: its configuration")
    plan = found.get("plan") if isinstance(found, dict) else None
    groups = plan.get("groups") if isinstance(plan, dict) else None
    for group in groups if isinstance(groups, list) else ():
        members = group.get("members") if isinstance(group, dict) else None
        if isinstance(members, list) and members and isinstance(members[0], str):
            group.setdefault("name", _own_name(str(group.get("method")), members[0]))
    if isinstance(found, dict):
        found.setdefault("format_version", FORMAT_VERSION)
        found.setdefault("checksum", ALGORITHM)
    return FileConfig.from_dict(found, where)


def _without_defaults(config: FileConfig) -> dict[str, Any]:
    given = config.to_dict()
    plan = given["plan"]
    for group in plan["groups"]:
        if group["name"] == _own_name(group["method"], group["members"][0]):
            del group["name"]
    kept = [_unlike(group, {"options": {}, "params_before": 0, "params_after": 0, "error": None, "stage": 0, "role": ""})
            for group in plan["groups"]]  # fmt: skip
    usual = Plan([], 0, 0).to_dict() | {"plan_version": PLAN_VERSION, "groups": None}
    known = {"format_version": FORMAT_VERSION, "sharefold_version": "", "base": None, "aliases": {}, "checksum": ALGORITHM}
    return _unlike({**given, "plan": _unlike({**plan, "groups": kept}, usual)}, known)


def _unlike(values: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in usual or value != usual[key]}


def _own_name(method: str, member: str) -> str:
    """What a group of one layer is called by the planner."""
    return f"{_FOLD} {member}" if method == _FOLD else member


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")

"""A file is never larger than the original network's, tiny networks and all small types included, and reads back bit by bit."""

from __future__ import annotations

import copy
import json
import os
import random
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import timm
import torch
from command_line import call
from file_tools import CONFIG, WEIGHTS, config_text, edit_config, is_one_tensor, metadata_of, one_tensor, parts_of
from networks import BLOCKS, images, net
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sharefold
from sharefold import checkpoint
from sharefold.convert import convert_
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.export import export
from sharefold.format import FileConfig, aliases_of, carry_config, config_of, distinct
from sharefold.plans import GroupPlan, Plan
from sharefold.repair.step_record import StepRecord
from sharefold.store import container, file_bytes
from sharefold.store.exact import encode_exact
from sharefold.store.plain_size import dense_bytes, plain_bytes
from sharefold.store.short_config import _DICTIONARY, config_from, short_bytes, shorter
from sharefold.store.tensor_spec import carried_spec
from sharefold.verify import mismatches, verify


@dataclass
class Case:
    make: Callable[[], nn.Module]
    images: Tensor
    groups: list[GroupPlan]


def chain(width: int, depth: int, inputs: int = 1) -> nn.Module:
    torch.manual_seed(width)
    convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(inputs, width, 3), *convs, nn.Flatten(), nn.Linear(36 * width, 3)).eval()


def group(method: str, *members: str, **options: object) -> GroupPlan:
    return GroupPlan(members[0] if len(members) == 1 else f"stage0.{members[0]}-and-others", method, members, options, 4321, 1234,
                     0.12345678912345, 1, "conv1+conv2")  # fmt: skip


def alone(layer: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(layer).eval()


GREY = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NOISE = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=900))
STAGE = ("stage2.0.conv1", "stage2.1.conv1", "stage2.1.conv2")
CASES = {
    "two layers": Case(lambda: chain(2, 1), GREY, [group("svd", "1", rank=1, pivoted=True)]),
    "four channels": Case(lambda: chain(4, 2), GREY, [group("basis", "1", "2", rank=5, pivoted=True)]),
    "eight channels": Case(lambda: chain(8, 3), GREY, [group("spatial", "2", rank=14)]),
    "clustered": Case(lambda: chain(8, 3), GREY, [group("cluster-filter", "1", "2", "3", count=20)]),
    "one layer": Case(lambda: alone(nn.Conv2d(3, 8, 3)), images(12), [group("svd", "0", rank=6)]),
    "one layer without bias": Case(lambda: alone(nn.Conv2d(3, 16, 3, bias=False)), images(12), [group("svd", "0", rank=7)]),
    **{kind: Case(lambda kind=kind: net(kind, width=4), images(12), [group("svd", "down", rank=3)])  # type: ignore[misc]
       for kind in BLOCKS},
    "shared": Case(lambda: net(width=8, blocks=2), images(12), [group("hybrid", *STAGE, rank=7, own=9, pivoted=True)]),
}  # fmt: skip


def converted(case: Case, store: str = "", kind: torch.dtype = torch.float32) -> nn.Module:
    model = case.make().to(kind)
    total = sum(p.numel() for p in model.parameters())
    convert_(model, Plan(copy.deepcopy(case.groups), total, total, "budget 90%, method auto", store), case.images.to(kind),
             repair=False, config={"base": None})  # fmt: skip
    return model


def original_bytes(model: nn.Module, place: Path) -> int:
    save_file(distinct(model.state_dict())[0], place / "original.safetensors")
    return os.path.getsize(place / "original.safetensors")


def same_network(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype and torch.equal(second[name], tensor), name


EVERY = [(name, store) for name in CASES for store in ("", *(("fp16", "int8", "int2") if "layer" in name else ()))]


@pytest.mark.parametrize(("name", "store"), [*EVERY, ("shared", "int8")])
def test_never_larger_and_bit_equal(name: str, store: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, size = converted(case, store), original_bytes(case.make(), tmp_path)
    metrics = {"agreement": 0.98765432123, "params": {"before": 1, "after": 2}, "note": NOISE, "macs": 123456}
    with warnings.catch_warnings():
        warnings.simplefilter("error", SharefoldWarning)
        bare = sharefold.save(model, tmp_path / "bare.safetensors")
        told = sharefold.save(model, tmp_path / "told.safetensors", metrics=metrics)
        folder = sharefold.save(model, tmp_path / "net")
    assert config_of(model).dense_bytes == size
    for file in (bare, told, folder / WEIGHTS):
        assert file.stat().st_size <= size
    spec = carried_spec(model)
    if spec is not None:
        assert told.stat().st_size == file_bytes(model, spec)
    for path in (bare, told, folder):
        assert checkpoint.is_sharefold(path)
        again = sharefold.load(path, model=case.make())
        same_network(model, again)
        assert torch.equal(again(case.images), model.eval()(case.images)) and config_of(again).dense_bytes == size
        plan, known = config_of(again).plan, config_of(model).plan
        assert [(g.name, g.method, g.members, g.options) for g in plan.groups] == [
            (g.name, g.method, g.members, g.options) for g in known.groups
        ]
    assert config_of(sharefold.load(folder, model=case.make())).metrics == metrics
    second = sharefold.save(sharefold.load(bare, model=case.make()), tmp_path / "again.safetensors")
    first, other = load_file(bare), load_file(second)
    assert second.stat().st_size == bare.stat().st_size and first.keys() == other.keys()
    assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_types(kind: torch.dtype, tmp_path: Path) -> None:
    case = CASES["shared"]
    model, size = converted(case, kind=torch.float32).to(kind), original_bytes(case.make().to(kind), tmp_path)
    carry_config(model, replace(config_of(model), dense_bytes=size))
    file = sharefold.save(model, tmp_path / "net.safetensors")
    again = sharefold.load(file, model=case.make())
    same_network(model, again)
    assert file.stat().st_size <= size and config_of(again).dense_bytes == size


@pytest.mark.parametrize("name", [*timm.list_models("test_*"), "digits_resnet"])
def test_registered_networks_saved_as_they_are(name: str, tmp_path: Path) -> None:
    """The smallest of timm's families."""
    model = sharefold.open_source(f"timm:{name}", pretrained=False).model.eval()
    size = original_bytes(model, tmp_path)
    total = sum(p.numel() for p in model.parameters())
    base = {"library": "timm", "name": name, "kwargs": {}}
    carry_config(model, FileConfig(Plan([], total, total), base))
    file = sharefold.save(model, tmp_path / "net.safetensors", metrics={"top1": 0.5})
    assert file.stat().st_size <= size and is_one_tensor(file)
    again = sharefold.load(file)
    same_network(model, again)
    assert config_of(again).dense_bytes == size and config_of(again).metrics == {"top1": 0.5} and config_of(again).base == base
    assert plain_bytes(model.state_dict()) == size


def test_files_that_save_enough_keep_their_tensors_under_their_names(tmp_path: Path) -> None:
    few = replace(CASES["shared"], groups=[group("hybrid", *STAGE, rank=2, own=1)])
    model = converted(few)
    assert load_file(sharefold.save(model, tmp_path / "net.safetensors")).keys() == model.state_dict().keys()
    case = CASES["four channels"]
    model = converted(case)
    plain = sharefold.save(model, tmp_path / "plain.safetensors", plain=True)
    packed = sharefold.save(model, tmp_path / "packed.safetensors")
    assert load_file(plain).keys() == model.state_dict().keys()
    assert is_one_tensor(packed) and packed.stat().st_size < plain.stat().st_size
    same_network(sharefold.load(plain, model=case.make()), sharefold.load(packed, model=case.make()))


def test_sizes_are_those_of_files(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16, torch.int8,
             torch.uint8, torch.bool, torch.float8_e5m2, torch.float8_e4m3fn]  # fmt: skip
    for seed in range(30):
        draw = random.Random(seed)
        tensors = {f"layer.{'näme' * draw.randrange(3)}{k}": torch.zeros([draw.randrange(4) for _ in range(draw.randrange(4))],
                   dtype=draw.choice(kinds)) for k in range(draw.randrange(1, 25))}  # fmt: skip
        for metadata in (None, {"a": 'quoted "text"\n', "b": "x" * draw.randrange(9)}):
            save_file(tensors, tmp_path / "file", metadata)
            assert plain_bytes(tensors, metadata) == os.path.getsize(tmp_path / "file"), seed
    float32 = {"w": torch.zeros(3, 4), "n": torch.tensor(1)}
    assert dense_bytes(float32, torch.float16) == plain_bytes({"w": torch.zeros(3, 4).half(), "n": torch.tensor(1)})
    assert aliases_of({"a": float32["w"], "b": float32["w"], "c": float32["n"]}) == {"b": "a"}


def packed_file(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = converted(CASES["four channels"])
    return model, sharefold.save(model, tmp_path / "net.safetensors")


def fresh() -> nn.Module:
    return CASES["four channels"].make()


def test_verify_expand_and_export_read_it(tmp_path: Path) -> None:
    model, file = packed_file(tmp_path)
    assert is_one_tensor(file) and mismatches(verify(file, model=fresh())) == ""
    dense = sharefold.expand(sharefold.load(file, model=fresh()))
    same_network(dense, sharefold.expand(model))
    done = export(sharefold.load(file, model=fresh()), tmp_path / "dense.safetensors", example_input=GREY[:1])
    assert load_file(done.path).keys() == fresh().state_dict().keys()
    registered = sharefold.open_source("timm:digits_resnet").model
    carry_config(registered, FileConfig(Plan([], 5, 5), {"library": "timm", "name": "digits_resnet", "kwargs": {}}))
    path = sharefold.save(registered, tmp_path / "digits.safetensors")
    assert is_one_tensor(path) and torch.equal(sharefold.open_source(path).model(GREY), registered(GREY))
    out = tmp_path / "expanded.safetensors"
    assert call("expand", path, "-o", out).exit_code == 0 and load_file(out).keys() == registered.state_dict().keys()
    edit_config(path, lambda config: config["plan"].update(params_after=5))
    assert call("verify", path).exit_code == 2  # it claims what is not so


def test_any_flipped_or_missing_byte_is_refused(tmp_path: Path) -> None:
    _, file = packed_file(tmp_path)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(1)
    for place in (*range(start, start + 8), *(draw.randrange(start, len(data)) for _ in range(40))):
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        for read in (lambda: sharefold.load(file, model=fresh()), lambda: checkpoint.read_config(file)):
            with pytest.raises(SharefoldError, match=r"checksum does not hold|upgrade sharefold") as error:
                read()
            assert "\n" not in str(error.value)
    for length in (start - 1, start + 3, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(SharefoldError, match="damaged or no safetensors file"):
            sharefold.load(file, model=fresh())


def test_damage_under_a_checksum_that_holds(tmp_path: Path) -> None:
    """Whoever writes it: a refusal in one line, or another network of the same shape, as in files of other forms."""
    _, file = packed_file(tmp_path)
    text, weights = parts_of(file)
    template, refused = fresh(), 0
    for number in range(120):
        draw = random.Random(number)
        parts = [bytearray(text), bytearray(weights)]
        part = parts[number % 2]
        at = draw.randrange(len(part))
        part[at : at + draw.choice((0, 1, 1, 9))] = draw.choice((b"", b"9", b"[", bytes([draw.randrange(256)])))
        one_tensor(file, bytes(parts[0]), bytes(parts[1]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                sharefold.load(file, model=copy.deepcopy(template))
            except SharefoldError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 60
    tensors = {"plain": (text.replace(b'"store":{"format":2}', b'"x":1'), weights), "cut": (text, b""),
               "other": (text, bytes([1]) + weights[1:]), "newer": (text, bytes([9]) + weights[1:])}  # fmt: skip
    for changed in tensors.values():
        one_tensor(file, *changed)
        with warnings.catch_warnings(), pytest.raises(SharefoldError):
            warnings.simplefilter("ignore")
            sharefold.load(file, model=fresh())
    save_file({container.NAME: torch.tensor([container.VERSION + 1, *range(99)], dtype=torch.uint8)}, file)
    with pytest.raises(SharefoldError, match="upgrade sharefold"):
        sharefold.load(file)
    for odd in (torch.zeros(3), torch.zeros(2, 9, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)):
        save_file({container.NAME: odd}, file)
        with pytest.raises(SharefoldError, match="damaged"):
            sharefold.load(file)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model, file = packed_file(tmp_path)
    text, _ = parts_of(file)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["0.bias"][1] = float("nan")
    one_tensor(file, text, encode_exact(tensors))
    with pytest.raises(SharefoldError, match=r"weights hold NaN: 0\.bias"):
        sharefold.load(file, model=fresh())


def test_the_dictionary_is_a_part_of_the_format() -> None:
    """Another one needs another version of the container, and this one for its files."""
    assert container.VERSION == 1 and f"{zlib.crc32(_DICTIONARY):08x}" == "367ad50a"


def full_config() -> FileConfig:
    groups = [
        GroupPlan("fold stem", "fold", ("stem",), {"channels": 4, "keep": 3, "kept": ["d"]}, 9, 8, 0.123456789, 0, "stem"),
        GroupPlan("body", "svd", ("body",), {"rank": 2}), GroupPlan("pair", "basis", ("a", "b"), {"rank": 5}, 7, 6, None, 2),
    ]  # fmt: skip
    return FileConfig(
        Plan(groups, 12, 11, "budget 50%", "int8", "head"), {"library": "timm", "name": "x", "kwargs": {"num_classes": 3}},
        {"input_size": (3, 12, 12), "mean": (0.5,) * 3}, {"top1": 0.123456789, "text": "long"}, {"out.weight": "in.weight"}, 2,
        {"": "float16"}, "crc32", steps=(StepRecord("refit", True, "", 0.5, 0.25, images=20),),
    )  # fmt: skip


def test_short_configurations_say_the_same_and_leave_out_in_order() -> None:
    config = full_config()
    forms = list(shorter(config))
    sizes = [len(short_bytes(form)) for form in forms]
    assert forms[0] == config and sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    for form in forms:
        assert config_from(memoryview(short_bytes(form)), "file").to_dict() == form.to_dict()
        for one, other in zip(form.plan.groups, config.plan.groups, strict=True):
            assert (one.name, one.method, one.members, one.options) == (other.name, other.method, other.members, other.options)
        assert (form.base, form.aliases, form.pretrained_cfg, form.store) == (
            config.base, config.aliases, config.pretrained_cfg, config.store
        )  # fmt: skip
        assert (form.plan.exclude, form.plan.store, form.plan.params_after) == ("head", "int8", 11)
    assert [form.steps != () for form in forms] == [True, False, False, False, False]
    assert forms[2].metrics == {"top1": 0.12346} and forms[3].metrics == {} and forms[3].plan.groups[0].error == 0.1235
    assert [form.metrics for form in shorter(config, metrics=False)] == [{}, {}]
    assert sizes[-1] < 230 and len(json.dumps(config.to_dict())) > 900


def test_the_copy_beside_it_must_agree(tmp_path: Path) -> None:
    model = converted(CASES["two layers"])
    steps = (StepRecord("refit", True, "", 0.5, 0.25, images=20),)
    carry_config(model, replace(config_of(model), steps=steps))
    folder = sharefold.save(model, tmp_path / "net", metrics={"top1": 0.5, "text": NOISE})
    assert is_one_tensor(folder / WEIGHTS) and metadata_of(folder / WEIGHTS) == {}
    again = config_of(sharefold.load(folder, model=CASES["two layers"].make()))
    assert again.metrics == {"top1": 0.5, "text": NOISE} and again.steps == steps
    side = folder / CONFIG
    inside, beside = json.loads(config_text(folder / WEIGHTS)), json.loads(side.read_text())
    assert "steps" not in inside and inside["metrics"] == {"top1": 0.5} and "steps" in beside
    beside["plan"]["groups"][0]["options"]["rank"] = 2
    side.write_text(json.dumps(beside))
    with pytest.raises(SharefoldError, match=f"says another plan than {WEIGHTS}"):
        sharefold.load(folder, model=CASES["two layers"].make())


def test_what_is_larger_all_the_same_is_said(tmp_path: Path) -> None:
    model = converted(CASES["four channels"])
    model.register_buffer("filler", torch.randn(4000))
    with pytest.warns(SharefoldWarning, match="so small a network is better left as it is"):
        sharefold.save(model, tmp_path / "net.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SharefoldWarning)
        sharefold.save(model, tmp_path / "plain.safetensors", plain=True)

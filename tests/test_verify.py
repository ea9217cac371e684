"""``verify`` recomputes what a file claims and names what differs; packed files keep types and metrics."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from file_tools import CONFIG, edit_config, metadata_of

import sharefold
from sharefold.convert import convert_
from sharefold.data import open_data
from sharefold.format import FileConfig, carry_config
from sharefold.measure import count_macs, count_parameters, evaluate, model_bytes
from sharefold.plans import Plan
from sharefold.store import file_bytes
from sharefold.store.tensor_spec import carried_spec
from sharefold.verify import Claim, _share, mismatches, verify

X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense() -> torch.nn.Module:
    return sharefold.open_source("timm:digits_resnet").model


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "net"
    done = call(
        "convert", "timm:digits_resnet", "--calib", "digits", "--calib-count", 100, "--method", "svd", "--budget", "70%",
        "--no-repair", "-o", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def saved(converted: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(converted, tmp_path / "net")


def test_what_holds_and_what_does_not(saved: Path, dense: torch.nn.Module) -> None:
    network = sharefold.load(saved)
    data = open_data("digits", "test", transform_cfg=network.sharefold_config.pretrained_cfg)
    claims = {claim.name: claim for claim in verify(saved, source=dense, data=data, limit=200)}
    assert list(claims) == ["checksum", "params", "params before", "bytes", "macs", "agreement", "top1"]
    assert claims["params"].found == claims["params"].claimed == count_parameters(network)
    assert claims["bytes"].found == claims["bytes"].claimed == model_bytes(network)
    assert claims["macs"].found == claims["macs"].claimed == count_macs(network, X[:1])
    assert claims["top1"].claimed is None and claims["top1"].found == evaluate(network, _batches(data), limit=200)["top1"]
    assert all(claim.holds for claim in claims.values()) and mismatches(list(claims.values())) == ""
    for change, words in (
        (lambda c: c["metrics"]["params"].update(after=5), "params is"),
        (lambda c: c["metrics"].update(macs={"before": 1, "after": 2}), "macs is"),
        (lambda c: c["metrics"].update(agreement=0.1), "agreement is"),
        (lambda c: c["metrics"].update(top1=0.2), "top1 is"),
        (lambda c: c["plan"].update(params_after=7), "params of the plan is"),
    ):
        edit_config(saved, change)
        done = call("verify", saved, "--source", "timm:digits_resnet", "--data", "digits", "--limit", 200, "--json")
        assert done.exit_code == 2 and words in done.stderr and json.loads(done.stdout)["holds"] is False


def test_a_claim_of_few_images_is_as_uncertain_as_they_are() -> None:
    """148 of 150 and 96.5 % of 10,000 are the same network's; of 10,000 each they are not."""
    few, many = (_share("agreement", {"agreement": 148 / 150}, 0.965, 10_000, behind) for behind in (150, 10_000))
    assert few.holds and not many.holds


@pytest.mark.parametrize(
    ("seen", "new", "holds", "note"),
    [
        (True, 0.0, True, "as the file expects of new images"), (True, -0.5, False, ""), (False, 0.0, False, ""),
        (True, None, False, ""), (True, "most", False, ""), (True, 0.5, False, "as the file expects of new images"),
    ],
)  # fmt: skip
def test_of_training_images_a_file_claims_two_things(
    seen: bool, new: Any, holds: bool, note: str, saved: Path, dense: torch.nn.Module
) -> None:
    """``new`` is counted from what is found here; the claim for training images is far off."""
    data = open_data("digits", "test", transform_cfg=sharefold.load(saved).sharefold_config.pretrained_cfg)

    def agreed() -> Claim:
        return {claim.name: claim for claim in verify(saved, source=dense, data=data, limit=200)}["agreement"]

    found: Any = agreed().found
    expected = found + new if isinstance(new, float) and abs(new) < 0.5 else 0.5 if new == 0.5 else new
    edit_config(saved, lambda c: c["metrics"].update(
        agreement=0.1, report_images=500, seen_before=seen, new_agreement=expected))  # fmt: skip
    claim = agreed()
    assert claim.holds is holds and claim.note == note and (not holds or claim.claimed == found)


@pytest.mark.parametrize("claim", [0, "5", [5], float("nan"), True, {"after": "119,306"}, {"before": 5}, -1, 1e999])
@pytest.mark.parametrize("name", ["params", "bytes", "macs"])
def test_a_claim_that_can_not_be_differs(saved: Path, name: str, claim: Any) -> None:
    edit_config(saved, lambda c: c["metrics"].update({name: claim}))
    claims = {claim.name: claim for claim in verify(saved)}
    assert not claims[name].holds and claims[name].claimed is not None and f"{name} is" in mismatches(list(claims.values()))


def test_what_is_claimed_of_the_original(saved: Path, dense: torch.nn.Module) -> None:
    count = count_parameters(dense)
    assert {c.name: c for c in verify(saved)}["params before"].found == count
    for change, claimed in (
        (lambda c: c["metrics"]["params"].update(before=10**9), 10**9),
        (lambda c: c["metrics"]["params"].update(before="many"), "'many'"),
    ):
        edit_config(saved, change)
        assert {c.name: c.claimed for c in verify(saved) if not c.holds} == {"params before": claimed}
    edit_config(saved, lambda c: (c["metrics"].pop("params"), c["plan"].update(params_before=5)))
    assert {c.name: c.claimed for c in verify(saved) if not c.holds} == {"params before": 5}


def test_shares_that_can_not_be_and_those_of_few_images() -> None:
    for told in ({"agreement": 1.2}, {"agreement": "1"}, {"agreement": float("nan")}, {"agreement": True}, {"agreement": -0.1}):
        assert not _share("agreement", told, 0.995, 1000).holds
    for behind in (0, -3, "200", True, 1.5):
        assert not _share("agreement", {"agreement": 0.995}, 0.995, 1000, behind).holds
    one = _share("agreement", {"agreement": 0.2}, 0.995, 1000, 1)
    assert one.claimed is None and "1 images alone, which is no claim" in one.note
    fifty = _share("agreement", {"agreement": 0.2}, 0.995, 1000, 50)
    assert fifty.claimed == 0.2 and not fifty.holds
    assert "3 images tell little" in _share("top1", {"top1": 0.2}, 0.995, 3).note


def test_a_network_of_ones_own_is_run_at_a_size_that_it_takes(tmp_path: Path) -> None:
    """The conversion did not know its size and wrote 3 x 224 x 224."""
    own = [torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)).eval() for _ in range(2)]
    carry_config(own[0], FileConfig(Plan([], 0, 0), None, {"input_size": (3, 224, 224)}, {"macs": 1584}))
    file = sharefold.save(own[0], tmp_path / "own.safetensors")
    claims = {claim.name: claim for claim in verify(file, model=copy.deepcopy(own[1]))}
    assert claims["macs"].found is None and claims["macs"].note == "the network takes no images of 3x224x224"
    data = [(image, 0) for image in X]
    claims = {claim.name: claim for claim in verify(file, model=own[1], data=data)}
    assert claims["macs"].found == claims["macs"].claimed == 4 * 36 * 9 + 144 * 2 and mismatches(list(claims.values())) == ""


def test_a_file_that_says_nothing_of_images_is_run_as_its_network_wants(tmp_path: Path, dense: torch.nn.Module) -> None:
    base = {"library": "timm", "name": "digits_resnet", "kwargs": {"num_classes": 10}}
    network = copy.deepcopy(dense)
    carry_config(network, FileConfig(Plan([], 0, 0), base))
    file = sharefold.save(network, tmp_path / "net.safetensors")
    assert {claim.name: claim.found for claim in verify(file)}["macs"] == count_macs(dense, X[:1])
    done = call("verify", file, "--data", "digits", "--limit", 60)
    assert done.exit_code == 0, done.output
    edit_config(file, lambda c: c.update(pretrained_cfg={"input_size": [1, 1, 1]}, metrics={"macs": 5}))
    assert call("verify", file).exit_code == 2
    edit_config(file, lambda c: c.update(pretrained_cfg={"input_size": [3, 8, 8]}))
    done = call("verify", file)
    assert done.exit_code == 2 and "macs is the network takes no images of 3x8x8" in done.stderr


def _batches(data: object) -> object:
    from sharefold.data import loader

    return loader(data, 250)  # type: ignore[arg-type]


def test_damage_is_told(saved: Path) -> None:
    assert call("verify", saved).exit_code == 0
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    done = call("verify", saved)
    assert done.exit_code == 2 and "checksum does not hold" in done.stderr
    done = call("verify", saved, "--source", "timm:digits_resnet")
    assert done.exit_code == 2 and "give --data" in done.stderr


def test_shares_hold_within_the_error_of_the_images() -> None:
    assert Claim("top1", 0.90, 0.92, 0.03).holds and not Claim("top1", 0.90, 0.95, 0.03).holds
    assert Claim("params", None, 5).holds and not Claim("params", 4, 5).holds


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_packed_files_keep_types_and_metrics(kind: torch.dtype, tmp_path: Path) -> None:
    model = sharefold.open_source("timm:digits_resnet").model.to(kind)
    convert_(model, Plan([], 198_898, 198_898, store="fp16"), calibration=X.to(kind))
    spec = carried_spec(model)
    assert spec is not None
    told = {"params": {"before": 1, "after": 198_898}, "agreement": 0.987654321, "top1": 0.5, "note": "x" * 500, "steps": [1]}
    file = sharefold.save(model, tmp_path / "net.safetensors", metrics=told)
    bare = sharefold.save(model, tmp_path / "bare.safetensors")
    assert file.stat().st_size == bare.stat().st_size == file_bytes(model, spec)
    again = sharefold.load(file)
    assert again.sharefold_config.metrics == {"params": 198_898, "agreement": 0.98765, "top1": 0.5}
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype and torch.equal(again.state_dict()[name], tensor), name
    assert sharefold.load(sharefold.save(again, tmp_path / "net")).sharefold_config.metrics == again.sharefold_config.metrics
    assert json.loads((tmp_path / "net" / CONFIG).read_text())["store"].get("dtypes", {}) == (
        {} if kind == torch.float32 else {"": str(kind)[6:]}
    )


def test_room_for_metrics_is_always_the_same() -> None:
    config = FileConfig(Plan([], 5, 5), store=1)
    many = FileConfig(Plan([], 5, 5), store=1, metrics={f"measure{i}": i * 1.234567 for i in range(100)})
    assert len(many.packed()) == len(config.packed())
    read = FileConfig.from_text(many.packed(), "file")
    assert 3 < len(read.metrics) < 100 and all(many.metrics[k] == pytest.approx(v, rel=1e-4) for k, v in read.metrics.items())


def test_metadata(saved: Path) -> None:
    assert json.loads(metadata_of(saved / "model.safetensors")["sharefold"])["checksum"] == "crc32"

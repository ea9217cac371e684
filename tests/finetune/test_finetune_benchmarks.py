"""The benchmark scripts run at a tiny scale, with random weights and images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not HERE.is_dir(), reason="the benchmarks are not installed with the package")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    for name in ("finetune_cifar", "finetune_ablation", "finetune_recipes", "finetune_step", "gpu"):
        sys.modules.pop(name, None)


def test_the_cifar_script_writes_a_record_a_seed(labelled_npz: str, tmp_path: Path) -> None:
    import finetune_cifar

    out = tmp_path / "out.json"
    common = ["--source", "timm:resnet20_cifar", "--random", "--data", labelled_npz, "--out", str(out), "--quiet"]
    tiny = ["--limit", "32", "--epochs", "1", "--method", "basis", "--set", "batch_size=16", "--device", "cpu"]
    (first,) = finetune_cifar.main(["resnet20-4epochs", *common, *tiny])
    finetune_cifar.write(out, {**first, "seed": 1})
    finetune_cifar.write(out, first)
    records = json.loads(out.read_text())
    assert [r["seed"] for r in records] == [0, 1]
    for record in records:
        assert record["params_after"] <= record["params_allowed"] == 94_400 < record["params_before"] == 269_722
        assert record["settings"]["batch_size"] == 16 and record["epochs"] == 1
        assert record["images_per_second"]["ratio"] > 0
        assert record["hardware"]["torch"] and 0 <= record["top1"] <= 1


def test_the_ablation_script_runs_parts(labelled_npz: str, tmp_path: Path) -> None:
    import finetune_ablation

    out = tmp_path / "out.json"
    finetune_ablation.main([
        "--source", "timm:resnet20_cifar", "--random", "--data", labelled_npz, "--limit", "32", "--test-limit", "16",
        "--batch-size", "16", "--parts", "defaults", "gradual", "bank step 1/K", "--out", str(out), "--device", "cpu",
    ])  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [row["part"].split(":")[0] for row in rows] == [
        "all defaults",
        "bank step 1/K",
        "gradual",
        "SGD, bank step 1/K",
    ]


def test_blending_goes_from_the_dense_network_to_the_shared_one() -> None:
    import finetune_ablation
    import torch
    from finetune_nets import shared_net
    from networks import Small

    dense, shared = Small().train(), shared_net().train()
    layer, target = shared.layer1[0].conv1, dense.layer1[0].conv1.weight
    own = layer.compose().detach()
    x = torch.randn(4, 3, 8, 8)
    with finetune_ablation.blended(shared, dense, 4), torch.no_grad():
        assert torch.equal(layer.compose(), target)
        shared(x)
        assert torch.allclose(layer.compose(), 0.75 * target + 0.25 * own, atol=1e-6)
        assert torch.equal(layer.eval().compose(), own)
        for _ in range(3):
            shared(x)
        assert torch.equal(layer.train().compose(), own)
    assert torch.equal(layer.compose(), own) and "compose" not in layer.__dict__


def test_what_a_gpu_would_measure_is_measured_at_a_tiny_scale(
    labelled_npz: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune_recipes
    import finetune_step
    import gpu
    import torch

    import sharefold

    dense = sharefold.open_source("timm:resnet20_cifar", pretrained=False).model
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    plan = sharefold.plan(dense, "50%", torch.randn(8, 3, 32, 32), method="average")
    sharefold.convert_(dense, plan, torch.randn(8, 3, 32, 32), repair=False)
    sharefold.save(dense, tmp_path / "start")
    source, start, out = str(tmp_path / "dense.pt"), str(tmp_path / "start"), tmp_path / "out.json"

    def run(script: object, *arguments: str) -> list[dict[str, object]]:
        out.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["script", *arguments, "--device", "cpu", "--out", str(out)])
        script.main()  # type: ignore[attr-defined]
        return json.loads(out.read_text())

    few = ["--source", source, "--start", start]
    tuned = run(
        finetune_recipes, "resnet20", *few, "--data", labelled_npz, "--recipes", "default", "sgd-.02", "--epochs", "1",
        "--set", "batch_size=16",
    )  # fmt: skip
    assert [r["recipe"] for r in tuned] == ["default", "sgd-.02"]
    assert all(0 <= r["top1"] <= 1 and r["deciding_images"] > 0 for r in tuned)
    steps = run(finetune_step, "resnet20", *few, "--batch", "8", "--updates", "1")
    assert [r["network"] for r in steps] == ["dense", "shared"] and all(r["images_per_second"] > 0 for r in steps)
    common = ["resnet20", "--weights", source, "--data", labelled_npz.removeprefix("npz:"), "--network", start]
    (fast,) = run(gpu, "latency", *common, "--batch", "1", "--repeats", "1")
    assert [row["dtype"] for row in fast["rows"]] == ["float32", "bfloat16"]
    (right,) = run(gpu, "accuracy", *common)
    assert 0 <= right["agreement"] <= 1 and right["kl"] > 0
    monkeypatch.setattr(sys, "argv", ["script", "latency", *common[:-2], "--out", str(out)])
    with pytest.raises(SystemExit):
        gpu.main()


def test_the_time_that_libraries_take_to_load_does_not_count_as_speed(
    monkeypatch: pytest.MonkeyPatch, labelled_npz: str
) -> None:
    """The first run of a process is slow: the difference to it would be next to nothing, and the speed without limit."""
    import finetune_cifar
    from finetune_nets import shared_net

    from sharefold.data import open_data

    class Report:
        def __init__(self, images: int, first: bool) -> None:
            self.updates, self.seconds = images, images / 100 + (5 if first else 1)

    calls = []

    def stand_in(model: object, train: list[object], **_: object) -> Report:
        calls.append(len(train))
        return Report(len(train), len(calls) == 1)

    monkeypatch.setattr(finetune_cifar, "finetune", stand_in)
    net, train = shared_net(), open_data(labelled_npz, "train")
    assert finetune_cifar.throughput(net, net, train, {"batch_size": 1}, len(train) // 3) == pytest.approx(100)

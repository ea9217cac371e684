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
    for name in ("finetune_cifar", "finetune_ablation"):
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

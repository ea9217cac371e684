"""Shared networks among the tools their users have: the Hub, timm, torch.compile, torchao."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from command_line import call
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from networks import answers
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sharefold
import sharefold.models
from sharefold.errors import SharefoldError
from sharefold.export import export
from sharefold.hub import load_from_hub, push_to_hub
from sharefold.layers import replace_module, shared_layers

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("digits_resnet").eval()
    images = torch.randn(40, 1, 8, 8)
    plan = sharefold.plan(model, budget="45%", calibration=images, method=("basis", "svd"))
    sharefold.convert_(model, plan, calibration=images, repair=False)
    return model


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """Of few layers, for compilers."""
    torch.manual_seed(0)
    model = timm.create_model("digits_resnet", blocks=2, width=16).eval()
    images = torch.randn(40, 1, 8, 8)
    sharefold.convert_(model, sharefold.plan(model, "45%", images, method=("basis", "svd", "spatial")), images, repair=False)
    return model


@pytest.fixture(scope="module")
def saved(shared: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharefold.save(shared, tmp_path_factory.mktemp("hub") / "net")


class Hub:
    """The Hub as a local folder: what HfApi would send, and what snapshot_download would give."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.calls = root, [] # type: ignore[var-annotated]
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, *a, **k: self.create(*a, **k))
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda api, **k: self.upload(**k))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.file)

    def create(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", options))
        (self.root / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])

    def upload(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], **options: Any) -> Any:
        self.calls.append(("upload", options))
        names = huggingface_hub.utils.filter_repo_objects(
            [path.name for path in folder_path.iterdir()], allow_patterns=allow_patterns
        )  # fmt: skip
        for name in names:
            shutil.copy(folder_path / name, self.root / repo_id / name)
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})()

    def download(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("download", options.get("revision")))
        if not (self.root / repo_id).is_dir():
            raise FileNotFoundError(f"404: {repo_id}")
        return str(self.root / repo_id)

    def file(self, repo_id: str, name: str, *, revision: str | None) -> str:
        self.calls.append(("file", revision))
        path = self.root / repo_id / name
        if not path.exists():
            raise EntryNotFoundError(f"404: {name}")
        return str(path)


def test_a_saved_directory_is_a_model_repository(shared: nn.Module, saved: Path) -> None:
    card = huggingface_hub.ModelCard.load(saved / "README.md")
    assert card.data.library_name == "sharefold" and "model-compression" in card.data.tags
    assert "sharefold.load(" in card.text
    config = json.loads((saved / "sharefold_config.json").read_text())
    assert config["base"]["name"] == "digits_resnet" and f"{config['plan']['params_after']:,}" in card.text
    metadata = huggingface_hub.parse_local_safetensors_file_metadata(saved / "model.safetensors")
    stored = sum(count for kind, count in metadata.parameter_count.items() if kind == "F32")
    assert sum(p.numel() for p in shared.parameters()) <= stored <= sum(t.numel() for t in shared.state_dict().values())


def test_push_and_load(shared: nn.Module, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tmp_path / "net"
    shutil.copytree(saved, local)
    (local / "secrets.txt").write_text("stays here")
    hub = Hub(tmp_path / "hub", monkeypatch)
    assert push_to_hub(local, "me/net", private=True) == "https://hub/me/net/commit/1"
    assert hub.calls[0] == ("create", {"private": True, "exist_ok": True, "repo_type": "model"})
    assert sorted(path.name for path in (tmp_path / "hub" / "me" / "net").iterdir()) == [
        "README.md", "model.safetensors", "sharefold_config.json",
    ]  # fmt: skip
    assert torch.equal(answers(load_from_hub("me/net"), IMAGES), answers(shared, IMAGES))
    push_to_hub(local, "me/net", create=False)
    assert [name for name, _ in hub.calls] == ["create", "upload", "download", "upload"]
    with pytest.raises(SharefoldError, match=r"me/nothing could not be read: 404"):
        load_from_hub("me/nothing")


def test_a_pushed_network_is_a_source(
    shared: nn.Module, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub", monkeypatch)
    push_to_hub(saved, "me/net")
    opened = sharefold.open_source("hf-hub:me/net@v1")
    assert opened.shared and opened.kind == "hf-hub" and opened.name == "digits_resnet"
    assert hub.calls[-2:] == [("file", "v1"), ("download", "v1")]
    assert opened.base == shared.sharefold_config.base and opened.pretrained_cfg["input_size"] == (1, 8, 8)
    assert torch.equal(answers(opened.model, IMAGES), answers(shared, IMAGES))
    with pytest.raises(SharefoldError, match=r"hf-hub:me/net is a converted network .*: leave --num-classes out"):
        sharefold.open_source("hf-hub:me/net", num_classes=3)

    result = call("eval", "hf-hub:me/net", "--data", "digits", "--limit", 50, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == 50
    tuned = tmp_path / "tuned"
    result = call("finetune", "hf-hub:me/net", "--data", "digits", "--teacher", "timm:digits_resnet", "--epochs", 1,
                 "--limit", 64, "--batch-size", 32, "--val-limit", 20, "-o", tuned, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    again = sharefold.load(tuned)
    assert shared_layers(again).keys() == shared_layers(shared).keys()
    assert not torch.equal(answers(again, IMAGES), answers(shared, IMAGES))


def test_a_repository_of_timm_is_still_timms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(tmp_path, monkeypatch).create("someone/stock", exist_ok=True)
    made = timm.create_model("digits_resnet", num_classes=4).eval()
    monkeypatch.setattr("timm.models.load_model_config_from_hf", lambda _: ({}, "digits_resnet", {}))
    monkeypatch.setattr("timm.create_model", lambda name, **_: made if name == "hf-hub:someone/stock" else None)
    opened = sharefold.open_source("hf-hub:someone/stock")
    assert opened.model is made and not opened.shared and opened.base["kwargs"] == {"num_classes": 4}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalEntryNotFoundError("offline and\nnot in the cache"), "could not download weights of hf-hub:me/net: offline and"),
        (ConnectionError("Cannot reach the Hub\nstack"), "Hugging Face Hub: me/net could not be read: Cannot reach the Hub"),
        (HFValidationError("Repo id must be"), "Hugging Face Hub: me/net could not be read: Repo id must be"),
    ],
)
def test_the_hub_out_of_reach(error: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr("timm.models.load_model_config_from_hf", fail)
    for verb in (["eval", "--data", "digits"], ["finetune", "--data", "digits", "-o", tmp_path / "tuned"]):
        result = call(verb[0], "hf-hub:me/net", *verb[1:])
        assert result.exit_code == 2 and result.stdout == "" and not list(tmp_path.iterdir())
        assert result.stderr.count("\n") == 1 and words in result.stderr


def test_what_cannot_be_pushed(shared: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path / "hub", monkeypatch)
    with pytest.raises(SharefoldError, match="does not exist"):
        push_to_hub(tmp_path / "nothing", "me/net")
    one = sharefold.save(shared, tmp_path / "one.safetensors")
    with pytest.raises(SharefoldError, match="as a directory"):
        push_to_hub(one, "me/net")
    assert not hub.calls


def test_timm_reads_the_expanded_network(shared: nn.Module, tmp_path: Path) -> None:
    done = export(shared, tmp_path / "dense.safetensors")
    stock = timm.create_model("digits_resnet", checkpoint_path=str(done.path))
    assert not shared_layers(stock) and torch.allclose(answers(stock, IMAGES), answers(shared, IMAGES), atol=1e-4)


def test_evaluation_as_timm_validates(shared: nn.Module) -> None:
    config = timm.data.resolve_data_config({}, model=shared)
    assert config["input_size"] == (1, 8, 8)
    labels = answers(shared, IMAGES).argmax(1)
    meter = timm.utils.AverageMeter()
    for images, target in DataLoader(TensorDataset(IMAGES, labels), batch_size=4):
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            top1, _ = timm.utils.accuracy(shared.eval()(images), target, topk=(1, 5))
        meter.update(top1.item(), len(images))
    assert meter.avg == 100 and meter.count == 6
    assert shared.get_classifier().out_features == 10 and shared.forward_features(IMAGES).shape[1] == 48


@pytest.mark.parametrize("runtime", ["composed", "factored"])
def test_torch_compile(small: nn.Module, runtime: str) -> None:
    model = copy.deepcopy(small)
    for layer in shared_layers(model).values():
        layer.runtime = runtime
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(answers(compiled, IMAGES), answers(model, IMAGES), atol=1e-5)
    model.train()
    gradients = []
    for network in (compiled, model):
        model.zero_grad()
        model.load_state_dict(small.state_dict())
        network(IMAGES).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max() + 1))


@pytest.mark.sweep
def test_torch_compile_to_machine_code(shared: nn.Module) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(shared), fullgraph=True)
    assert torch.allclose(answers(compiled, IMAGES), answers(shared, IMAGES), atol=1e-4)


def int8(model: nn.Module) -> list[str]:
    """Quantises every Linear to int8 weights in place; gives the names of those that are."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except Exception as error:
        pytest.skip(f"this torchao does not work with torch {torch.__version__}: {error}")
    quantize_(model, Int8WeightOnlyConfig())
    return [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight.data).__name__ != "Tensor"
    ]  # fmt: skip


def close(ours: Tensor, theirs: Tensor) -> None:
    assert not torch.equal(ours, theirs) and float((ours - theirs).norm() / theirs.norm()) < 0.03


def test_torchao_quantises_what_is_left_dense(shared: nn.Module) -> None:
    model = copy.deepcopy(shared)
    if "fc" in shared_layers(shared):  # whether the plan factors it is its own affair
        replace_module(model, "fc", shared_layers(shared)["fc"].dense())
    wanted = answers(model, IMAGES)
    assert int8(model) == ["fc"] and set(shared_layers(model)) == set(shared_layers(shared)) - {"fc"}
    close(answers(model, IMAGES), wanted)


def test_torchao_quantises_the_expanded_network() -> None:
    torch.manual_seed(0)
    model = ConvNeXt(num_classes=10, depths=(1, 1, 2, 1), dims=(8, 16, 32, 64)).eval()
    images = torch.randn(24, 3, 64, 64)
    plan = sharefold.plan(model, budget="60%", calibration=images, method=["basis", "svd"])
    sharefold.convert_(model, plan, calibration=images, repair=False)
    assert shared_layers(model)
    dense = sharefold.expand(model)
    wanted = answers(dense, images)
    assert len(int8(dense)) == 11  # two Linears a block, and the classifier
    close(answers(dense, images), wanted)

"""``open_source`` end to end: named models, checkpoints, sharefold files, and one clear line for everything else."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from huggingface_hub.errors import EntryNotFoundError
from own_nets import OwnNet
from safetensors.torch import save_file
from torch import nn

import sharefold.checkpoint
from sharefold import offline
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.format import FileConfig, carry_config
from sharefold.plans import Plan
from sharefold.sources import Source, build_base, open_source
from sharefold.sources import hub_models as hub


def logits(model: nn.Module, channels: int = 3, size: int = 64) -> torch.Tensor:
    image = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(image)


def random_model(name: str, **kwargs: Any) -> nn.Module:
    """With running statistics that are not the default ones, so that losing them shows."""
    model = timm.create_model(name, **kwargs)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def fails(source: str | Path, words: str, **kwargs: Any) -> str:
    with pytest.raises(SharefoldError, match=words) as error:
        open_source(source, **kwargs)
    text = str(error.value)
    assert "\n" not in text and len(text) < 2500
    return text


class TestNamed:
    def test_timm(self) -> None:
        source = open_source("timm:resnet18", pretrained=False, num_classes=7)
        assert source.kind == "timm" and source.name == "resnet18" and not source.shared
        assert source.base == {"library": "timm", "name": "resnet18", "kwargs": {"num_classes": 7}}
        assert not source.model.training and logits(source.model).shape == (2, 7)
        cfg = source.pretrained_cfg
        assert cfg["input_size"] == (3, 224, 224) and cfg["num_classes"] == 7 and cfg["interpolation"] == "bicubic"
        assert cfg["mean"] == pytest.approx((0.485, 0.456, 0.406)) and 0.8 < cfg["crop_pct"] <= 1

    def test_options(self) -> None:
        source = open_source("timm:lrunet:reuse=3,width=2,num_classes=5", pretrained=False)
        assert source.base["kwargs"] == {"reuse": 3, "width": 2, "num_classes": 5}
        assert source.pretrained_cfg["mean"] == (0.0, 0.0, 0.0) and source.pretrained_cfg["input_size"] == (3, 32, 32)
        assert logits(source.model, size=32).shape == (2, 5)

    def test_default_class_count_is_kept(self) -> None:
        source = open_source("timm:resnet20_cifar", pretrained=False)
        assert source.base["kwargs"] == {"num_classes": 10}

    def test_tag_and_input_channels(self) -> None:
        source = open_source("timm:resnet18.tv_in1k", pretrained=False, in_chans=1)
        assert logits(source.model, channels=1).shape == (2, 1000)
        cfg = source.pretrained_cfg
        assert cfg["input_size"] == (1, 224, 224) and cfg["mean"] == pytest.approx((0.449,), abs=1e-3)
        assert cfg["interpolation"] == "bilinear"

    def test_image_size(self) -> None:
        source = open_source("timm:vit_tiny_patch16_224:img_size=64,num_classes=3", pretrained=False)
        assert source.pretrained_cfg["input_size"] == (3, 64, 64) and logits(source.model).shape == (2, 3)

    def test_a_picture_that_the_network_wants_squashed(self) -> None:
        cfg = open_source("timm:convnextv2_nano.fcmae_ft_in22k_in1k_384", pretrained=False).pretrained_cfg
        assert cfg["crop_mode"] == "squash" and cfg["crop_pct"] == 1.0
        assert "crop_mode" not in open_source("timm:resnet20_cifar", pretrained=False).pretrained_cfg

    def test_torchvision(self) -> None:
        source = open_source("tv:mobilenet_v3_small:num_classes=4", pretrained=False)
        assert source.kind == "torchvision" and logits(source.model).shape == (2, 4)
        cfg = source.pretrained_cfg
        assert cfg["input_size"] == (3, 224, 224) and cfg["crop_pct"] == pytest.approx(224 / 256)
        assert cfg["interpolation"] == "bilinear" and cfg["num_classes"] == 4
        assert open_source("tv:resnet50", pretrained=False).pretrained_cfg["crop_pct"] == pytest.approx(224 / 232)

    def test_base_rebuilds_the_same_form(self) -> None:
        for name in ("timm:resnet18:num_classes=3", "tv:squeezenet1_1:num_classes=3", "timm:lrunet:reuse=2"):
            source = open_source(name, pretrained=False)
            rebuilt = build_base(json.loads(json.dumps(source.base)))
            assert rebuilt.load_state_dict(source.model.state_dict())

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("timm:resnet5", "unknown model timm:resnet5: did you mean resnet50"),
            ("tv:resnet5", "unknown model tv:resnet5: did you mean resnet50"),
            ("tv:convmixer_768_32", "timm:convmixer_768_32 exists"),
            ("timm:", "no model name"),
            ("timm:resnet18.a9_in1k", "unknown tag 'a9_in1k' of timm:resnet18: did you mean a3_in1k"),
            ("timm:resnet18:depth", "bad option 'depth'"),
            ("timm:resnet18:checkpoint_path=x", "not allowed"),
            ("timm:resnet18:frills=2", "cannot be built with frills=2"),
            ("tv:resnet18:weights=DEFAULT", "not allowed"),
            ("keras:resnet", "unknown source 'keras:resnet'"),
            ("resnet18", "write timm:resnet18"),
            ("googlenet", "write tv:googlenet"),
            ("resnet1812", "did you mean resnet18"),
        ],
    )
    def test_refusals(self, source: str, words: str) -> None:
        fails(source, words, pretrained=False)

    def test_counts_below_one(self) -> None:
        fails("timm:resnet18", "num_classes=0", num_classes=0)
        fails("timm:resnet18", "in_chans=-1", in_chans=-1)

    def test_arch_is_for_files(self) -> None:
        fails("timm:resnet18", "leave --arch out", arch="resnet50", pretrained=False)


def lacks_it(repo_id: str, name: str, **_: Any) -> str:
    raise EntryNotFoundError(f"404: {repo_id} holds no {name}")


class TestDownloads:
    """No test touches the network: downloads are replaced where the library is called."""

    def test_failure_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_network(*_: Any, **__: Any) -> None:
            raise URLError(OSError("Name or service not known. Check this\nlong advice"))

        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
        monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", no_network)
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
        monkeypatch.setattr("timm.models.load_model_config_from_hf", no_network)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lacks_it)
        for name in ("timm:resnet18", "timm:resnet20_cifar", "tv:resnet18", "hf-hub:someone/model"):
            text = fails(name, f"could not download weights of {name}: Name or service not known: use")
            assert "local file" in text and "Check this" not in text

    def test_bad_arguments_are_not_called_a_failed_download(self) -> None:
        fails("timm:resnet18:frills=2", "cannot be built with frills=2")

    def test_model_without_weights(self) -> None:
        fails("timm:lrunet_unrolled", "has no published weights")

    def test_unreachable_host_is_not_retried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub.constants as constants

        def unresolved(*_: Any) -> None:
            raise OSError("no such host")

        monkeypatch.setattr(offline.urllib.request, "getproxies", dict)
        monkeypatch.setattr(offline.socket, "getaddrinfo", unresolved)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with hub.offline_when_unreachable():
            assert constants.HF_HUB_OFFLINE is True
        assert constants.HF_HUB_OFFLINE is False
        monkeypatch.setattr(offline.socket, "getaddrinfo", lambda *_: [("address",)])
        with hub.offline_when_unreachable():
            assert constants.HF_HUB_OFFLINE is False

    def test_torchvision_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Weights arrive; with another class count or other channels only the tensors concerned stay random."""
        published = random_model("resnet18").state_dict()
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(published))
        source = open_source("tv:resnet18")
        assert torch.equal(source.model.fc.weight, published["fc.weight"])
        source = open_source("tv:resnet18", num_classes=3, in_chans=1)
        state = source.model.state_dict()
        assert state["fc.weight"].shape == (3, 512) and state["conv1.weight"].shape[1] == 1
        assert all(torch.equal(state[k], v) for k, v in published.items() if k.split(".")[0] not in ("fc", "conv1"))

    def test_torchvision_googlenet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        published = torchvision.models.googlenet(aux_logits=True, init_weights=False)
        state = published.state_dict()
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(state))
        source = open_source("tv:googlenet")
        assert source.model.transform_input and source.base["kwargs"]["transform_input"] is True
        published.transform_input = True
        assert torch.equal(logits(source.model), logits(published))

    def test_hub_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = random_model("resnet20_cifar", num_classes=4)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lacks_it)
        monkeypatch.setattr(
            "timm.models.load_model_config_from_hf", lambda _: ({}, "resnet20_cifar", {"global_pool": "avg"})
        )
        monkeypatch.setattr("timm.create_model", lambda name, **_: made if name == "hf-hub:a/b" else None)
        source = open_source("hf-hub:a/b")
        assert source.model is made and source.kind == "hf-hub"
        assert source.base["kwargs"] == {"global_pool": "avg", "num_classes": 4}
        monkeypatch.setattr("timm.models.load_model_config_from_hf", lambda _: ({}, "os.system", {}))
        fails("hf-hub:a/b", "unknown model timm:os.system")


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("form", "name", "kwargs", "size"),
        [
            *((form, "resnet20_cifar", {"num_classes": 10}, 32) for form in ("plain", "wrapped", "safetensors", "legacy")),
            ("plain", "resnet18", {"num_classes": 37}, 64),
            ("safetensors", "lrunet", {"reuse": 5, "width": 1, "num_classes": 10}, 32),
            ("wrapped", "mobilenetv3_small_050", {"num_classes": 6}, 64),
            ("legacy", "resnet10t", {"num_classes": 3, "in_chans": 1}, 64),
        ],
    )
    def test_round_trip(self, tmp_path: Path, form: str, name: str, kwargs: dict[str, Any], size: int) -> None:
        model = random_model(name, **kwargs)
        state = model.state_dict()
        file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
        if form == "safetensors":
            save_file(state, str(file))
        elif form == "plain":
            torch.save(state, file)
        else:
            wrapped = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
            torch.save(wrapped, file, _use_new_zipfile_serialization=form == "wrapped")
        source = open_source(file)
        assert source.kind == "checkpoint" and source.base == {"library": "timm", "name": name, "kwargs": kwargs}
        channels = kwargs.get("in_chans", 3)
        assert torch.equal(logits(source.model, channels, size), logits(model, channels, size))
        assert source.pretrained_cfg["num_classes"] == kwargs["num_classes"]
        assert source.pretrained_cfg["input_size"][0] == channels == len(source.pretrained_cfg["mean"])
        if form in ("wrapped", "legacy"):
            assert source.meta["unwrapped"] == ["state_dict", "module."] and source.meta["extras"] == {"epoch": 3}

    def test_counters_may_be_missing(self, tmp_path: Path) -> None:
        model = random_model("resnet20_cifar", num_classes=2)
        state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
        torch.save(state, tmp_path / "w.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            source = open_source(tmp_path / "w.pt")
        assert torch.equal(logits(source.model), logits(model)) and source.meta["absent"] == []

    def test_half_precision_file(self, tmp_path: Path) -> None:
        state = {k: v.half() if v.is_floating_point() else v for k, v in random_model("resnet20_cifar").state_dict().items()}
        torch.save(state, tmp_path / "w.pt")
        model = open_source(tmp_path / "w.pt").model
        assert model.linear.weight.dtype == torch.float32 and torch.equal(model.linear.weight, state["linear.weight"].float())

    def test_tie_is_reported(self, tmp_path: Path) -> None:
        torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "w.pt")
        source = open_source(tmp_path / "w.pt")
        assert source.base["library"] == "timm" and "tv:resnet18" in source.meta["others"]
        assert source.meta["rule"] == "plainest name"
        other = open_source(tmp_path / "w.pt", arch="tv:resnet18")
        assert other.base == {"library": "torchvision", "name": "resnet18", "kwargs": {"num_classes": 5}}
        assert torch.allclose(logits(source.model), logits(other.model))

    def test_arch(self, tmp_path: Path) -> None:
        model = random_model("resnet18d", num_classes=3)
        torch.save(model.state_dict(), tmp_path / "w.pt")
        for arch in ("resnet18d", "timm:resnet18d", "timm:resnet18d:num_classes=3"):
            assert torch.equal(logits(open_source(tmp_path / "w.pt", arch=arch).model), logits(model))
        text = fails(tmp_path / "w.pt", "does not fit resnet18: .*unexpected, first conv1.0", arch="resnet18")
        assert "missing" in text and "choose another --arch" in text
        fails(tmp_path / "w.pt", "unknown model timm:resnet18dd: did you mean resnet18d", arch="resnet18dd")
        fails(tmp_path / "w.pt", "name an architecture of timm, torchvision, smp or ultralytics", arch="hf-hub:a/b")

    def test_lightning_style_extras(self, tmp_path: Path) -> None:
        """Metrics and losses beside the network keep the prefix from being common to all names."""
        model = random_model("resnet20_cifar", num_classes=3)
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        torch.save({"state_dict": {**state, "criterion.weight": torch.ones(3)}}, tmp_path / "w.ckpt")
        for arch in (None, "timm:resnet20_cifar", "resnet20_cifar"):
            source = open_source(tmp_path / "w.ckpt", arch=arch)
            assert torch.equal(logits(source.model), logits(model))
            assert source.meta["dropped"] == ["criterion.weight"] and source.meta["unwrapped"] == ["state_dict", "model."]
        fails(tmp_path / "w.ckpt", "does not fit resnet32_cifar: ", arch="resnet32_cifar")

    def test_other_class_count(self, tmp_path: Path) -> None:
        model = random_model("resnet20_cifar", num_classes=3)
        torch.save(model.state_dict(), tmp_path / "w.pt")
        with pytest.warns(SharefoldWarning, match="has 3 classes, not 8: the classifier starts from random weights"):
            source = open_source(tmp_path / "w.pt", num_classes=8)
        assert source.model.linear.out_features == 8 and source.base["kwargs"]["num_classes"] == 8
        assert torch.equal(source.model.layer1[0].conv1.weight, model.layer1[0].conv1.weight)
        fails(tmp_path / "w.pt", "takes 3 input channels, not 1", in_chans=1)

    def test_old_densenet_names(self, tmp_path: Path) -> None:
        model = torchvision.models.densenet121(num_classes=3).eval()
        state = {
            key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2.") if "denselayer" in key else key: value
            for key, value in model.state_dict().items()
        }
        assert any(".norm.1." in key for key in state)
        torch.save(state, tmp_path / "w.pt")
        source = open_source(tmp_path / "w.pt")
        assert source.name == "densenet121" and torch.allclose(logits(source.model), logits(model), atol=1e-5)

    def test_no_match(self, tmp_path: Path) -> None:
        state = random_model("resnet18").state_dict()
        del state["layer4.1.conv2.weight"]
        torch.save(state, tmp_path / "w.pt")
        text = fails(tmp_path / "w.pt", r"nearest are timm:resnet18 \(1 missing, first layer4\.1\.conv2\.weight\) \|")
        assert text.count(" | ") == 2

    def test_paths(self, tmp_path: Path) -> None:
        fails(tmp_path / "absent.pth", "does not exist: check the path")
        fails(tmp_path, "directory without a model")
        fails("~nosuchuser/w.pt", "no such home folder: write the path in full")
        # The second one begins with the opcode of an extension code, which alone makes no pickle.
        for noise in (bytes(range(1, 256)), b"\x84\x01\x02\x03\x84" + bytes(range(1, 200))):
            (tmp_path / "w.pt").write_bytes(noise)
            fails(tmp_path / "w.pt", "damaged or not")
        (tmp_path / "w.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
        fails(tmp_path / "w.safetensors", "damaged or not safetensors")

    def test_nothing_is_written(self, tmp_path: Path) -> None:
        torch.save(random_model("resnet20_cifar").state_dict(), tmp_path / "w.pt")
        open_source(tmp_path / "w.pt")
        assert [file.name for file in tmp_path.iterdir()] == ["w.pt"]


class TestHubLayout:
    """A folder as timm's ``save_for_hf`` writes it."""

    def folder(self, tmp_path: Path, **config: Any) -> Path:
        model = random_model("resnet18", num_classes=3)
        save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
        content = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"mean": [0.5] * 3}, **config}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return tmp_path

    def test_opens(self, tmp_path: Path) -> None:
        source = open_source(self.folder(tmp_path))
        assert source.base == {"library": "timm", "name": "resnet18", "kwargs": {"num_classes": 3}}
        assert source.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)

    def test_how_pictures_are_cut(self, tmp_path: Path) -> None:
        source = open_source(self.folder(tmp_path, pretrained_cfg={"crop_mode": "border", "crop_pct": 1.0}))
        assert source.pretrained_cfg["crop_mode"] == "border"

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"architecture": "os.system"}, "unknown model timm:os.system"),
            ({"architecture": 3}, "names neither timm's 'architecture' nor smp's '_model_class'"),
            ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "not allowed"),
            ({"model_args": {"frills": 1}}, "cannot be built"),
        ],
    )
    def test_refusals(self, tmp_path: Path, config: dict[str, Any], words: str) -> None:
        fails(self.folder(tmp_path, **config), words)

    def test_damaged_configuration(self, tmp_path: Path) -> None:
        (self.folder(tmp_path) / "config.json").write_text("{")
        fails(tmp_path, r"config\.json is not JSON")


class TestPickles:
    def save(self, model: nn.Module, file: Path) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(model, file)
        return file

    def test_library_model(self, tmp_path: Path) -> None:
        model = torchvision.models.resnet18(num_classes=5).eval()
        file = self.save(model, tmp_path / "w.pt")
        fails(file, r"run code: .*torchvision\.models\.resnet\.ResNet: pass --trust-pickle")
        source = open_source(file, trust_pickle=True)
        assert source.kind == "checkpoint" and source.base["name"] == "resnet18"
        assert torch.allclose(logits(source.model), logits(model))

    def test_own_model(self, tmp_path: Path) -> None:
        model = OwnNet()
        file = self.save(model, tmp_path / "w.pt")
        fails(file, rf"{OwnNet.__module__}\.OwnNet")
        source = open_source(file, trust_pickle=True)
        assert source.kind == "pickle" and source.base == {} and source.name == "OwnNet"
        assert source.pretrained_cfg["num_classes"] == 6 and not source.model.training
        assert torch.equal(logits(source.model), logits(model))


class TestSharefoldFiles:
    """Found by their own marks and handed to the loader of the package."""

    def opened(self, path: Path, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> Source:
        model = OwnNet().train()
        base = {"library": "timm", "name": "resnet18", "kwargs": {}}
        carry_config(model, FileConfig(Plan([], 0, 0), base, {"mean": (0.1,)}))
        seen: list[Path] = []
        monkeypatch.setattr(sharefold.checkpoint, "load", lambda p, **more: (seen.append(p), model)[1])
        source = open_source(path, **kwargs)
        assert seen == [path] and source.model is model
        return source

    def check(self, source: Source) -> None:
        assert source.shared and source.kind == "sharefold" and not source.model.training
        assert source.name == "resnet18" and source.pretrained_cfg["mean"] == (0.1,)
        assert source.pretrained_cfg["num_classes"] == 6 and "crop_pct" in source.pretrained_cfg

    def test_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "sharefold_config.json").write_text("{}")
        self.check(self.opened(tmp_path, monkeypatch))

    def test_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_file({"a": torch.ones(1)}, str(tmp_path / "m.safetensors"), {"sharefold": "{}"})
        self.check(self.opened(tmp_path / "m.safetensors", monkeypatch))
        fails(tmp_path / "m.safetensors", "leave --arch out", arch="resnet18")
        fails(tmp_path / "m.safetensors", "leave --in-chans out", in_chans=1)

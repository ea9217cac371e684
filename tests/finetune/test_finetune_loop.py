from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from finetune_nets import digest, images_and_labels, shared_net
from networks import Block, Boxes, Small
from torch import Tensor, nn

import sharefold.finetune.step
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.finetune import FinetuneReport
from sharefold.finetune.interrupt import Interrupted
from sharefold.finetune.log import read_log
from sharefold.finetune.run_state import read_state
from sharefold.format import FileConfig, carry_config
from sharefold.plans import Plan


def tune(model, train=None, val=None, **settings) -> FinetuneReport:
    defaults = {"epochs": 2, "batch_size": 16, "lr": 1e-2, "quiet": True, "log_steps": 1, "workers": 0, "device": "cpu"}
    return sharefold.finetune(model, images_and_labels() if train is None else train, val, **{**defaults, **settings})


def test_it_learns_from_labels_and_reports():
    data, held_out = images_and_labels(256), images_and_labels(100, seed=1)
    report = tune(shared_net(), data, held_out, epochs=4)
    assert report.top1_after is not None and report.top1_before is not None
    assert report.top1_after > 0.9 > report.top1_before
    assert (report.epochs, report.updates) == (4, 64)
    assert [record["epoch"] for record in report.history] == [1, 2, 3, 4]
    assert report.history[-1]["top1"] == report.top1_after
    assert report.seconds > 0 and report.images_per_second > 0 and report.output is None


def test_it_learns_from_a_teacher_without_labels():
    data = images_and_labels(256)
    teacher = Small()
    tune(teacher, data, epochs=4)
    report = tune(
        shared_net(seed=2),
        data[0],
        images_and_labels(100, seed=1),
        teacher=teacher,
        labels=False,
        epochs=8,
        block_match=0.5,
        temperature=2.0,
    )
    assert report.teacher_top1 is not None and report.teacher_top1 > 0.9
    assert report.top1_after is not None and report.top1_after > 0.85
    assert not teacher.training
    assert all(not m._forward_hooks for m in teacher.modules())


def test_every_part_of_the_loss_reaches_the_log(tmp_path):
    tune(shared_net(), teacher=Small(), run_dir=tmp_path / "run", block_match=0.5, distill=0.25, orthogonality=3.0)
    for line in (r for r in read_log(tmp_path / "run" / "log.jsonl") if r["event"] == "train"):
        total = 0.75 * line["labels"] + 0.25 * line["distill"] + 0.5 * line["blocks"] + 3 * line["orthogonality"]
        assert line["loss"] == pytest.approx(total, rel=1e-4)


def test_the_global_generators_come_back_and_the_model_is_the_callers():
    model = shared_net()
    state = torch.get_rng_state()
    before = digest(model)
    tune(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(model) != before and not model.training


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    models = [shared_net() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        tune(model, seed=seed)
    assert digest(models[0]) == digest(models[1]) != digest(models[2])


def test_accumulation_changes_nothing_where_images_do_not_meet():
    class Still(Small):
        def __init__(self):
            super().__init__()
            self.drop = nn.Identity()

    def fresh():
        torch.manual_seed(3)
        return Still()

    whole, sliced = fresh(), fresh()
    tune(whole, freeze_norm=True, optimizer="sgd")
    tune(sliced, freeze_norm=True, optimizer="sgd", accumulate=4)
    for a, b in zip(whole.parameters(), sliced.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_small_images_come_first_and_both_networks_see_them():
    model, teacher, sides = shared_net(), Small(), {"model": [], "teacher": []}
    model.register_forward_pre_hook(lambda module, inputs: sides["model"].append(inputs[0].shape[-1]))
    teacher.register_forward_pre_hook(lambda module, inputs: sides["teacher"].append(inputs[0].shape[-1]))
    images, labels = images_and_labels(64)
    images = nn.functional.interpolate(images.float(), 16)
    tune(model, (images, labels), teacher=teacher, small_images=0.5, augment="none", ema=0.0)
    assert all(seen[-8:] == [12, 12, 12, 12, 16, 16, 16, 16] for seen in sides.values()), sides


def test_freeze_norm_keeps_the_statistics():
    model = shared_net()
    tune(model, freeze_norm=True)
    assert torch.equal(model.bn.running_mean, torch.zeros(8)) and int(model.bn.num_batches_tracked) == 0


def test_frozen_norms_run_inside_of_the_convolutions_and_learn_the_same(monkeypatch):
    settings = {"teacher": Small(), "freeze_norm": True, "optimizer": "sgd", "epochs": 1, "ema": 0.0}
    fused, plain = shared_net(), shared_net()
    start = fused.layer1[0].bn1.weight.detach().clone()
    passes = []
    handle = fused.layer1[0].bn1.register_forward_hook(lambda module, inputs, output: passes.append(output is inputs[0]))
    tune(fused, **settings)
    handle.remove()
    assert len(passes) > 4 and all(passes[-4:]), "once training begins the norm hands on what the convolution gave"
    monkeypatch.setattr(sharefold.finetune.step, "norms_fused", lambda *_, **__: nullcontext())
    tune(plain, **settings)
    assert not torch.equal(fused.layer1[0].bn1.weight, start)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(fused.state_dict()[name].float(), tensor.float(), atol=1e-5), name
    images = torch.rand(2, 3, 8, 8)
    assert torch.allclose(fused.eval()(images), plain.eval()(images), atol=1e-4)


class Past(nn.Module):
    """Untraceable; what the convolution gives goes past the norm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.conv(x) if float(x.abs().max()) < 1e9 else x
        return self.head((torch.relu(self.norm(y)) - y).mean((2, 3)))


class Behind(Past):
    """It can be traced, and the norm alone reads what the convolution gives."""

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(("make", "blocks"), [(Past, {}), (Behind, {"block_match": 1.0, "block_names": "conv"})])
def test_norms_run_inside_of_convolutions_only_where_networks_and_matched_blocks_stay_the_same(make, blocks):
    torch.manual_seed(0)
    teacher = make()
    nn.init.normal_(teacher.norm.running_mean)
    nn.init.uniform_(teacher.norm.weight, 0.5, 4.0)
    teacher.eval()
    copied, other = copy.deepcopy(teacher), copy.deepcopy(teacher)
    other.__class__ = type("Other", (make,), {})
    images = images_and_labels(64)[0].float() / 255
    with torch.no_grad():
        data = images, teacher(images).argmax(1)
    settings = {"optimizer": "sgd", "lr": 1e-9, "epochs": 1, "ema": 0.0, "temperature": 1.0, "freeze_norm": True, **blocks}
    report = tune(other, images, teacher=teacher, labels=False, **settings)
    assert report.history[-1]["train_loss"] < 1e-6
    report = tune(copied, data, data, teacher=teacher, **settings)
    assert report.top1_before == report.top1_after == 1.0


class Aided(nn.Module):
    """Auxiliary heads help it train; ``answer`` makes of the logits and theirs what it returns meanwhile."""

    def __init__(self, answer: Callable[[Tensor, list[Tensor]], Any]) -> None:
        super().__init__()
        self.answer = answer
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.aux = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))
        self.stem, self.drop, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x):
        x, aided = self.stem(x), []
        for block, head in zip(self.blocks, self.aux, strict=True):
            x = block(x)
            if self.training:
                aided.append(head(x.mean((2, 3))))
        logits = self.head(self.drop(x.mean((2, 3))))
        return self.answer(logits, aided) if self.training else logits


@pytest.mark.parametrize(
    "settings", [{}, {"labels": False, "block_match": 0.5}, {"ema": 0.0, "freeze_norm": True, "block_match": 0.5}]
)
def test_networks_that_return_more_while_they_train_learn_by_their_logits(settings):
    """As one that returns its logits alone, wherever they are among the others; the heads stay as they are."""
    answers = [
        lambda logits, aided: logits,
        lambda logits, aided: (logits, *aided),
        lambda logits, aided: {"aux": aided, "output": logits},
    ]
    found = []
    for answer in answers:
        torch.manual_seed(0)
        model = Aided(answer)
        before, heads = digest(model), digest(model.aux)
        tune(model, teacher=copy.deepcopy(model), epochs=1, **settings)
        assert digest(model) != before and digest(model.aux) == heads
        found.append(digest(model))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("answer", "words"),
    [(lambda logits, aided: (logits[:, :3], aided[0].T), r"returns \(2, 3\), \(4, 2\), in eval mode logits \(2, 4\)"),
     (lambda logits, aided: None, "returns NoneType without a tensor")],
)  # fmt: skip
def test_networks_that_do_not_return_their_logits_while_they_train_are_refused(answer, words):
    model = Aided(answer)
    before = digest(model)
    with pytest.raises(SharefoldError, match=f"finetune: in training mode the model {words}"):
        tune(model)
    assert digest(model) == before


def test_the_average_is_that_of_the_weights_along_the_way(monkeypatch):
    seen = []
    from timm.utils import ModelEmaV3

    original = ModelEmaV3.update

    def spy(self, model, step=None):
        original(self, model, step)
        seen.append((self.get_decay(step), model.head.weight.detach().clone()))

    monkeypatch.setattr(ModelEmaV3, "update", spy)
    model = shared_net()
    expected = model.head.weight.detach().clone()
    tune(model, ema=0.8)
    assert len(seen) == 8
    for decay, weight in seen:
        expected = decay * expected + (1 - decay) * weight
    assert {d for d, _ in seen if d} and torch.allclose(model.head.weight, expected, atol=1e-6)
    last = shared_net()
    tune(last, ema=0.0)
    assert torch.equal(last.head.weight, seen[-1][1])


def test_keep_best_returns_the_best_weights_seen():
    held_out = images_and_labels(100, seed=1)
    model = shared_net()
    report = tune(model, images_and_labels(256), held_out, epochs=3, keep="best", ema=0.0, schedule="constant", lr=0.3)
    assert report.top1_after == max(r["top1"] for r in report.history)
    again = tune(model, images_and_labels(), held_out, epochs=1, lr=1e-12, freeze_norm=True)
    assert again.top1_before == pytest.approx(report.top1_after)


def test_mixing_erasing_smoothing_clipping_and_tensorboard_run(tmp_path):
    report = tune(
        shared_net(),
        mixup=0.5,
        cutmix=0.5,
        random_erase=0.25,
        label_smoothing=0.1,
        clip=1.0,
        tensorboard=True,
        run_dir=tmp_path,
    )
    assert report.updates == 8
    assert list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SharefoldError, match="use an even batch size"):
        tune(shared_net(), mixup=0.5, batch_size=15)


@pytest.mark.parametrize("amp", ["bf16", "off"])
def test_it_learns_with_and_without_autocast(amp):
    report = tune(shared_net(), images_and_labels(256), images_and_labels(100, seed=1), epochs=4, amp=amp)
    assert report.top1_after is not None and report.top1_after > 0.9


class Exploding(Small):
    """Its output becomes infinite at the eleventh training batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.batches += 1
        return super().forward(x) / (self.batches < 11)


def test_a_loss_that_is_not_finite_stops_at_its_step_and_leaves_the_last_good_state(tmp_path):
    with pytest.raises(SharefoldError, match=r"not finite at update 11 \(epoch 3\).*state\.pt"):
        tune(Exploding(), run_dir=tmp_path, checkpoint_steps=3, epochs=9)
    state = read_state(tmp_path / "state.pt")
    assert state["updates"] == 8  # saved at 3, 4 (the epoch's end), 7 and 8; the 11th came first
    assert all(torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point())


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    model = shared_net()
    counter = iter(range(1, 100))
    model.head.weight.register_hook(lambda gradient: gradient * float("nan") if next(counter) == 5 else gradient)
    with pytest.raises(SharefoldError, match="not finite"):
        tune(model, run_dir=tmp_path, checkpoint_steps=1)
    state = read_state(tmp_path / "state.pt")
    assert state["updates"] == 4 and torch.isfinite(state["model"]["head.weight"]).all()


def _interrupting(model, at, number=signal.SIGINT):
    counter = iter(range(1, 1000))

    def hook(module, inputs, output):
        if module.training and next(counter) == at:
            os.kill(os.getpid(), number)

    model.head.register_forward_hook(hook)
    return model


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_the_resumed_run_ends_bit_identical(tmp_path, number, code):
    straight, handler = shared_net(), signal.getsignal(signal.SIGINT)
    reference = tune(straight, val=images_and_labels(32, seed=1), run_dir=tmp_path / "a")
    with pytest.raises(Interrupted) as stopped:
        tune(_interrupting(shared_net(), 6, number), val=images_and_labels(32, seed=1), run_dir=tmp_path / "b")
    assert stopped.value.exit_code == code
    assert read_state(tmp_path / "b" / "state.pt")["updates"] == 6
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = shared_net(seed=5)  # its own weights do not matter
    report = tune(resumed, val=images_and_labels(32, seed=1), run_dir=tmp_path / "b", resume=True)
    assert digest(resumed) == digest(straight)
    assert report.history == reference.history and report.top1_before == reference.top1_before
    logs = [read_log(tmp_path / run / "log.jsonl") for run in "ab"]
    timeless = [
        [{k: v for k, v in r.items() if k not in {"seconds", "images_per_second"}} for r in log] for log in logs
    ]
    assert timeless[0] == timeless[1]


def test_a_finished_run_resumes_to_its_result(tmp_path):
    model, again = shared_net(), shared_net(seed=2)
    first = tune(model, val=images_and_labels(32, seed=1), run_dir=tmp_path)
    second = tune(again, val=images_and_labels(32, seed=1), run_dir=tmp_path, resume=True)
    assert digest(model) == digest(again)
    assert (second.top1_after, second.updates) == (first.top1_after, first.updates)


def test_resume_refuses_other_settings_other_data_and_damaged_files(tmp_path):
    tune(shared_net(), run_dir=tmp_path)
    with pytest.raises(SharefoldError, match=r"lr was 0\.01 and is now 0\.5"):
        tune(shared_net(), run_dir=tmp_path, resume=True, lr=0.5)
    with pytest.raises(SharefoldError, match="had 64 training images, now there are 48"):
        tune(shared_net(), images_and_labels(48), run_dir=tmp_path, resume=True)
    with pytest.raises(SharefoldError, match="other tensors"):
        tune(shared_net(rank=5), run_dir=tmp_path, resume=True)
    with pytest.raises(SharefoldError, match="holds a run"):
        tune(shared_net(), run_dir=tmp_path)
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(SharefoldError, match="not a readable run state"):
        tune(shared_net(), run_dir=tmp_path, resume=True)
    tune(shared_net(), run_dir=tmp_path, force=True)
    with pytest.raises(SharefoldError, match="no run folder"):
        tune(shared_net(), resume=True)


def test_resume_without_a_run_begins_one(tmp_path):
    assert tune(shared_net(), run_dir=tmp_path / "new", resume=True).updates == 8


def test_the_state_loads_without_unpickling_objects_and_holds_no_more_than_it_says(tmp_path):
    tune(shared_net(), run_dir=tmp_path, keep="best", val=images_and_labels(32))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {"model", "optimizer", "ema", "scaler", "updates", "config", "best"} <= set(state)
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]


def test_running_out_of_memory_names_the_batch_size_to_try(tmp_path):
    class Hungry(Small):
        def forward(self, x):
            if self.training:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    with pytest.raises(SharefoldError, match=r"with 16 images at a time: try --batch-size 8, or --accumulate 2"):
        tune(Hungry())


def test_impossible_requests(tmp_path):
    model = Small()
    for settings, message in (
        ({"teacher": model}, "teacher is the model itself"),
        ({"block_match": 0.5}, "block_match=0.5: there is no teacher whose blocks to match"),
        ({"keep": "best"}, "keep=best: there are no validation images to tell by"),
        ({"labels": False}, "there must be a teacher"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(192, 7))}, "7 classes, the model 4"),
        ({"teacher": Boxes(Small())}, "the teacher does not return logits"),
        ({"device": "cuda:7"}, "no usable CUDA"),
        ({"device": "toaster"}, "use auto, cpu, cuda"),
    ):
        if message.startswith("no usable") and torch.cuda.is_available():
            continue
        with pytest.raises(SharefoldError, match=message):
            tune(model, **settings)
    with pytest.raises(SharefoldError, match="the model returns probabilities, and the loss is of logits: take its softmax off"):
        tune(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Softmax(1)))
    with pytest.raises(SharefoldError, match="does not return logits"):
        tune(nn.Conv2d(3, 4, 3))
    (tmp_path / "here").mkdir()
    with pytest.raises(SharefoldError, match="exists"):
        tune(model, out=tmp_path / "here")


def _converted() -> Small:
    model = shared_net()
    carry_config(model, FileConfig(Plan([], 1, 1, "by hand")))
    return model


def _with_complex_doubles() -> Small:
    model = _converted()
    model.register_buffer("z", torch.zeros(1, dtype=torch.complex128))
    return model


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (_converted, {"out": "o.pt"}, "a network is written as a folder or as a .safetensors file: call it o"),
        (_converted, {"out": "mine", "force": True}, "output mine is a folder that sharefold did not write"),
        (_converted, {"out": "mine", "resume": True}, "output mine is a folder that sharefold did not write"),
        (_converted, {"out": "afile/o"}, r"output afile/o cannot be written \(Not a directory\)"),
        (_converted, {"out": "no/o"}, "folder .*no does not exist"),
        (_converted, {"out": "o", "metrics": {"a": float("nan")}}, "metric 'a' is float: give finite numbers"),
        (_converted, {"out": "o", "metrics": [1]}, "metrics must map names to figures, not be list"),
        (shared_net, {"out": "o"}, "the model is not a sharefold network"),
        (_with_complex_doubles, {"out": "o"}, "tensor 'z' is of torch.complex128"),
        (_converted, {"run_dir": "afile"}, "afile: is a file: choose another folder for the run"),
        (_converted, {"run_dir": "afile/o"}, r"afile/o/log.jsonl: cannot be written \(Not a directory\)"),
        (_converted, {"run_dir": "x" * 300}, "is no name of a file"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_training(tmp_path, monkeypatch, make, settings, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my notes")
    model = make()
    before = digest(model)
    with pytest.raises(SharefoldError, match=words):
        tune(model, **settings)
    assert digest(model) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["afile", "mine"]


def test_a_teacher_of_other_pixels_is_warned_about():
    teacher = Small()
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.4, 0.4, 0.4)}
    with pytest.warns(SharefoldWarning, match=r"expects images of mean \(0\.4"):
        tune(shared_net(), teacher=teacher)


def test_the_verb_is_there_without_an_import_of_its_package():
    code = (
        "import sys, sharefold\nassert 'sharefold.finetune' not in sys.modules\nverb = sharefold.finetune\n"
        "assert callable(verb) and verb is sharefold.finetune is sys.modules['sharefold.finetune']\n"
        "assert verb.FinetuneConfig().epochs > 0 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Fine-tuning on another device than the CPU, where data, teacher and model have to meet."""

from __future__ import annotations

import pytest
import torch
from finetune_nets import images_and_labels, shared_net
from other_device import other_device

from sharefold.finetune import finetune


@pytest.mark.parametrize("augment", ["crop1", "none"])
def test_fine_tuning(augment: str) -> None:
    data, teacher = images_and_labels(64), shared_net(1)
    results = []
    for where in ("cpu", "meta"):
        with other_device():
            model = shared_net()
            report = finetune(
                model, data, data, teacher=teacher, epochs=2, batch_size=16, lr=0.01, augment=augment, ema=0, device=where,
                quiet=True,
            )  # fmt: skip
            results.append((report, model.cpu().state_dict()))
    (here, tuned), (there, again) = results
    assert there.top1_after == pytest.approx(here.top1_after, abs=0.05)
    for name, tensor in tuned.items():
        assert torch.allclose(again[name], tensor, atol=1e-2), name

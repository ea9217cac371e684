"""One process of a fine-tuning run under torchrun; its first process writes log and weights' hash.

usage: finetune_ranks.py FOLDER EPOCHS [stop-after-update]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from finetune_nets import Norm, digest, images_and_labels, shared_net
from torch import nn

import sharefold.finetune
from sharefold.finetune.interrupt import Interrupted


def main(folder: Path, epochs: int, stop_after: int = 0) -> int:
    model, teacher = shared_net(norm=Norm), shared_net(seed=1, norm=Norm)
    model.drop = nn.Identity()  # each process draws its own dropout
    seen = iter(range(1, 1000))
    if stop_after and os.environ.get("RANK", "0") == "0":
        model.head.register_forward_hook(
            lambda m, i, o: os.kill(os.getpid(), signal.SIGINT) if m.training and next(seen) == stop_after else None
        )
    try:
        report = sharefold.finetune(
            model,
            images_and_labels(160),
            images_and_labels(50, seed=1),
            teacher=teacher,
            block_match=0.2,
            epochs=epochs,
            batch_size=16,
            run_dir=folder,
            resume=True,
            log_steps=1,
            quiet=True,
            device="cpu",
        )
    except Interrupted as stopped:
        return stopped.exit_code
    rank = os.environ.get("RANK", "0")
    (folder / f"digest{rank}").write_text(digest(model))
    (folder / f"top1_{rank}").write_text(str(report.top1_after))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))

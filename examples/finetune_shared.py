"""Recover what a small budget costs: convert a trained network to 8 %, then fine-tune it with the original as teacher.

python examples/finetune_shared.py      # needs scikit-learn for its data: pip install 'sharefold[demo]'
"""

import sys

import torch

import sharefold
from sharefold import finetune
from sharefold.data import calibration_images, open_data
from sharefold.measure import evaluate

output = sys.argv[1] if len(sys.argv) > 1 else "finetuned-shared"
epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 12
source = sharefold.open_source("timm:digits_resnet")  # trained, comes with sharefold
model, cfg = source.model, source.pretrained_cfg
train, test = (open_data("digits", split, transform_cfg=cfg) for split in ("train", "test"))
images = calibration_images("digits", cfg, count=300)


def accuracy(network: torch.nn.Module) -> float:
    return evaluate(network, torch.utils.data.DataLoader(test, batch_size=256))["top1"]


print(f"original:   {accuracy(model):.2%}")
cal = sharefold.calibrate(model, images)
plan = sharefold.plan(model, "8%", cal)
original = sharefold.convert_(model, plan, cal).original
print(f"converted:  {accuracy(model):.2%} with {plan.size:.1%} of the parameters")
report = finetune(model, train, test, teacher=original, epochs=epochs, quiet=True)
print(f"fine-tuned: {report.top1_after:.2%}")
sharefold.save(model, output, force=True)

"""Half the parameters of a timm model: plan, convert, save, load, and back to the stock architecture.

python examples/quickstart.py timm:resnet18 resnet18-shared      # downloads the pretrained weights
python examples/quickstart.py                                    # a small network, offline
"""

import sys

import torch

import sharefold

source = sys.argv[1] if len(sys.argv) > 1 else "timm:digits_resnet"
output = sys.argv[2] if len(sys.argv) > 2 else "quickstart-shared"

model = sharefold.open_source(source).model
size = model.pretrained_cfg["input_size"]

cal = sharefold.calibrate(model)  # no images given: procedural ones; real ones do better
plan = sharefold.plan(model, "50%", cal)
print(plan)
result = sharefold.convert_(model, plan, cal)  # in place
if result.report_images:  # there were 200 images or more
    print(f"top-1 agrees with the original on {result.agreement:.1%} of {result.report_images} report images")

sharefold.save(model, output, force=True)  # safetensors, JSON and a model card
loaded = sharefold.load(output)
dense = sharefold.expand(loaded)  # the stock architecture again

images = torch.randn(4, *size)
with torch.no_grad():
    assert torch.equal(loaded(images), model(images))
    print(f"stock twin differs by {(dense(images) - loaded(images)).abs().max():.1e}")
print(f"{sum(p.numel() for p in loaded.parameters()):,} parameters in {output}")

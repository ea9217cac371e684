"""Networks of the five published systems that timm lacks, and that of the demo; importing registers them with timm.

After ``import sharefold.models``, ``timm.create_model("resnet20_cifar")`` works like any other timm model.
"""

from __future__ import annotations

from sharefold.models import cifar_resnet as cifar_resnet
from sharefold.models import convmixer_cifar as convmixer_cifar
from sharefold.models import digits_resnet as digits_resnet
from sharefold.models import lrunet as lrunet
from sharefold.models import preact_resnet as preact_resnet
from sharefold.models import se_resnet_cifar as se_resnet_cifar

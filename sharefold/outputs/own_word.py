"""What a network says about its own task: timm's and torchvision's class counts, ultralytics' task and names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

# Of keys of an output, and of the names of last layers; matched between the words of a name.
HINTS = {
    "logits": r"logits?|cls|class(es|ifier|ification)?|labels?|segmentation|semantic",
    "regression": r"bbox|box(es)?|reg(ression)?|deltas?|depth|offsets?|landmarks?|keypoints?|heatmaps?|hm|ages?|pose|flow",
    "embedding": r"emb(ed(ding)?s?)?|features?|pooled|descriptors?|pooler",
    "image": r"images?|rgb|recon(struction)?s?|restored|denoised|sr",
}


@dataclass(frozen=True)
class OwnWord:
    """What is known of a network's task.

    Attributes:
        classes: number of classes that it says it tells apart; 0 for a backbone without classifier, None where it does not say.
        detected: number of classes of a detector whose boxes and scores share a tensor.
        segments: it gives class logits a pixel on axis 1.
    """

    classes: int | None = None
    detected: int | None = None
    segments: bool = False


def own_word(model: nn.Module) -> OwnWord:
    """Read from attributes of ``model``, and of its class; nothing is imported or run."""
    classes = getattr(model, "num_classes", None)
    task, names = getattr(model, "task", None), getattr(model, "names", None)
    detected = None
    if isinstance(names, (dict, list, tuple)) and task in ("detect", "segment", "pose", "obb", None) and hasattr(model, "stride"):
        detected = len(names)
    segments = type(model).__module__.startswith("torchvision.models.segmentation") or hasattr(model, "segmentation_head")
    plain = isinstance(classes, int) and not isinstance(classes, bool)
    return OwnWord(classes if plain else None, detected, segments)


def hint_of(name: str) -> str | None:
    """What a name suggests, by its last telling word: ``"roi_heads.bbox_pred"`` regression, ``"cls_logits"`` logits."""
    words = re.split(r"[._\W\d]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
    for word in reversed(words):
        for kind, pattern in HINTS.items():
            if re.fullmatch(pattern, word):
                return kind
    return None

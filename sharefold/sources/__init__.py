"""Where networks come from: registries, the Hub, sharefold's own files, and checkpoints in the wild."""

from __future__ import annotations

from sharefold.architectures.bases import base_of
from sharefold.architectures.build import build_base
from sharefold.sources.opening import Source, open_source
from sharefold.sources.read import read_state_dict

__all__ = ["Source", "base_of", "build_base", "open_source", "read_state_dict"]

"""Checkpoints pickled with numpy 1 (``numpy.core``) and numpy 2 (``numpy._core``) load with either."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sharefold.sources.read import read_state_dict


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_both_names_of_numpys_core(tmp_path: Path, module: bytes, archive: bool) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    stored = {"state_dict": {"w": weight, "n": torch.tensor(3)}, "best_acc": np.float64(0.5), "mean": np.array([0.25, 0.75])}
    memory = io.BytesIO()
    torch.save(stored, memory, _use_new_zipfile_serialization=archive)

    def renamed(data: bytes) -> bytes:
        found = data.replace(b"cnumpy._core.", b"cnumpy.core.").replace(b"cnumpy.core.", b"c" + module + b".")
        assert b"c" + module + b".multiarray\n" in found
        return found

    path = tmp_path / "w.pt"
    if archive:
        with zipfile.ZipFile(memory) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, renamed(data) if name.endswith("data.pkl") else data)
    else:
        path.write_bytes(renamed(memory.getvalue()))
    state, notes = read_state_dict(path)
    assert torch.equal(state["w"], weight) and state["n"] == 3
    assert notes["extras"]["best_acc"] == 0.5

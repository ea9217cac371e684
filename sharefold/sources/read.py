"""Reading checkpoint files without running anything that is in them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.sources.pickle_sizes import TooLarge, Unclear
from sharefold.sources.pickles import UNREAD, check_sizes, globals_of, harmless_globals, is_archive
from sharefold.sources.unwrap import check_finite, unwrap
from sharefold.untrusted import printable

SUFFIXES = (".pt", ".pth", ".th", ".t7", ".bin", ".ckpt", ".tar", ".safetensors", ".pkl")


def read_state_dict(path: str | Path, trust_pickle: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a checkpoint file, whatever they are wrapped in.

    Args:
        path: a ``.safetensors`` file or anything that ``torch.save`` wrote (zip or the older format).
        trust_pickle: run the code in the file when it cannot be read otherwise.

    Returns:
        name -> tensor (CPU, finite, dtype as stored), and notes: ``file``, ``format`` (``safetensors`` | ``torch`` |
        ``pickle``), ``unwrapped``, ``extras``, ``also``, ``dropped`` (see :func:`sharefold.sources.unwrap.unwrap`), and
        ``module``, the module itself, when a trusted pickle held one.

    Raises:
        SharefoldError: missing, empty, damaged, no checkpoint, would run code, NaN or infinity. One line each.
    """
    file = Path(path)
    content, form = _read(file, trust_pickle)
    found, notes = unwrap(content, str(file))
    notes.update(file=str(file), format=form)
    if isinstance(found, nn.Module):
        notes["module"] = found
        found = {name: tensor.detach() for name, tensor in found.state_dict().items()}
    if not found:
        raise SharefoldError(f"no tensors in {file}: save model.state_dict() instead")
    check_finite(found, str(file))
    return found, notes


def check_file(file: Path) -> None:
    """Refuses what is no readable, non-empty file.

    Raises:
        SharefoldError: missing, a directory, empty or unreadable.
    """
    if not file.exists():
        raise SharefoldError(f"{file} does not exist: check the path, or prefix a model name with timm: or tv:")
    if file.is_dir():
        raise SharefoldError(f"{file} is a directory without a model: name the checkpoint file inside it")
    try:
        with file.open("rb") as stream:
            if not stream.read(1):
                raise SharefoldError(f"{file} is empty (0 bytes): download or save it again")
    except OSError as error:
        raise SharefoldError(f"{file} cannot be read ({error.strerror}): check its permissions") from None


def _read(file: Path, trust_pickle: bool) -> tuple[Any, str]:
    check_file(file)
    if file.suffix == ".safetensors":
        return _read_safetensors(file), "safetensors"
    zipped = is_archive(file)
    if zipped:
        _check_kind(file, check_archive(file))
    reason: Exception | None = None if trust_pickle else _unclear(file)
    try:
        if reason is None:
            with torch.serialization.safe_globals(harmless_globals()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols; what matters becomes an error
                # torch maps what is in the file, so only what is stored as it is.
                return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped and is_stored(file)), "torch"
    except Exception as error:
        # Any exception type can come out of a damaged stream; each becomes one line below.
        reason = error
    imports = globals_of(file)
    if imports and trust_pickle and UNREAD in imports:
        raise SharefoldError(
            f"{file} is damaged, or hides what it would run ({', '.join(imports)}): download it again, or save model.state_dict()"
        ) from None
    if imports and trust_pickle:
        return _read_trusted(file), "pickle"
    if imports:
        raise SharefoldError(
            f"{file} is a pickle that would import and run code: {', '.join(imports)}: "
            "pass --trust-pickle only if you trust its author, or save model.state_dict() instead"
        ) from None
    raise SharefoldError(
        f"{file} is damaged or not a PyTorch checkpoint ({_reason(reason)}): download or save it again"
    ) from None


def _unclear(file: Path) -> Unclear | None:
    """What forbids to load ``file`` without trust."""
    try:
        check_sizes(file)
        return None
    except Unclear as error:
        return error
    except TooLarge as error:
        raise SharefoldError(
            f"{file} would take far more memory or time than its size explains ({printable(str(error))}): "
            "it is damaged or hostile"
        ) from None


def check_archive(file: Path) -> list[str]:
    """The names in a zip archive. Refuses those that are damaged, or that would inflate to more than the file.

    Raises:
        SharefoldError: as above.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len({entry.filename.lower() for entry in entries}) < len(entries):
                raise SharefoldError(f"{file} is damaged: two of its entries have one name: download or save it again")
            # torch writes without compression, and does not look at the checksums when it reads.
            if sum(entry.file_size for entry in entries) > 2 * file.stat().st_size + (1 << 20):
                raise SharefoldError(f"{file} is damaged: it claims to hold more bytes than it has: download or save it again")
            # All zero where torch was told to leave checksums out (torch.serialization.set_crc32_options).
            damaged = archive.testzip() if any(entry.CRC for entry in entries) else None
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, ValueError, EOFError, zlib.error) as error:
        reason = _first_line(error)
        raise SharefoldError(f"{file} is damaged or not a PyTorch checkpoint ({reason}): download or save it again") from None
    if damaged is not None:
        raise SharefoldError(f"{file} is damaged: the checksum of {printable(damaged)} does not hold: download or save it again")
    return [entry.filename for entry in entries]


def is_stored(file: Path) -> bool:
    """Whether all entries of a zip archive are stored as they are, as torch writes them."""
    with zipfile.ZipFile(file) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _check_kind(file: Path, names: list[str]) -> None:
    names = [name.lower() for name in names]
    if any(name.endswith("constants.pkl") for name in names):
        raise SharefoldError(f"{file} is a TorchScript program, which holds code: save its state_dict() instead")
    if not any(name.endswith("data.pkl") for name in names):
        raise SharefoldError(f"{file} is a zip archive but not a PyTorch checkpoint: check that it is the right file")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(file), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = _first_line(error)
        raise SharefoldError(f"{file} is damaged or not safetensors ({reason}): download or save it again") from None


def _read_trusted(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, RuntimeError):
        pass
    except Exception as error:
        raise _cannot_unpickle(file, error) from None
    try:
        with file.open("rb") as stream:
            return pickle.load(stream)  # a plain pickle that torch.save did not write
    except Exception as error:
        raise _cannot_unpickle(file, error) from None


def _cannot_unpickle(file: Path, error: Exception) -> SharefoldError:
    reason = f"{type(error).__name__}: {_first_line(error)}"
    return SharefoldError(f"{file} cannot be unpickled ({reason}): install or make importable what it names")


def _reason(error: Exception | None) -> str:
    return "it cannot be read" if error is None else printable(_first_line(error))


def _first_line(error: Exception) -> str:
    # torch wraps its reason in advice on its Python interface, which a command-line user does not have.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    lines = text.splitlines()
    return lines[0].split(". This is an internal")[0][:160].rstrip(" .:") if lines else type(error).__name__

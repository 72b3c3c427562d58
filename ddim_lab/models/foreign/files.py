"""What a checkpoint's file holds, read without running anything that is in it; whatever can't be is one line."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

__all__ = ["read_content", "read_state"]

_ZIP: Final = b"PK\x03\x04"
_OLD: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch.save begin: today's, and those before torch 1.6, which begin with a pickled number."""

_OTHERS: Final = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file that it stands for: fetch that (git lfs pull)"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it first"),
    (b"\x89HDF", "is an HDF5 file, of another framework: a file of torch.save or .safetensors is needed"),
    (b"\x93NUMPY", "is an array of numpy: a file of torch.save or .safetensors is needed"),
)
"""How files begin that get here by mistake, and what they are."""


def read_content(path: str) -> dict[str, Any] | list[Any]:
    """What a file of torch.save (either format) or a .safetensors file holds.

    Tensors are on the CPU, those of a zip file mapped from disk where torch can. Whatever is no tensor, number, string
    or container of these is refused: nothing is unpickled.

    Args:
        path: the file; what it is is told by its first bytes, not by its name.

    Raises:
        ValueError: it isn't there or can't be read so; one line that begins with the path and says what to do.
    """
    file = Path(path)
    head = _head(file)
    if head.startswith((_ZIP, _OLD)):
        content = _torch_content(file, zipped=head.startswith(_ZIP))
    elif head[8:9] == b"{":
        content = _tensors(file)
    else:
        raise ValueError(f"{file} {_mistaken(head)}")
    if isinstance(content, Mapping):
        return dict(content)
    if isinstance(content, list | tuple):
        return list(content)
    kind = "one tensor" if isinstance(content, torch.Tensor) else f"a {type(content).__name__}"
    raise ValueError(f"{file} holds {kind}: tensors by name (a state dict) are needed")


def read_state(path: str) -> Mapping[str, Any]:
    """As `read_content`, of a file that holds entries by name: a state dict, or one in a training's checkpoint.

    Raises:
        ValueError: as there, or it holds a list, or nothing, or entries that have no name.
    """
    content = read_content(path)
    if isinstance(content, list):
        raise ValueError(f"{path} holds a list of {len(content)}: tensors by name (a state dict) are needed")
    if not content:
        raise ValueError(f"{path} holds an empty state dict: there are no weights in it")
    if not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} holds entries without a name: tensors by name (a state dict) are needed")
    return content


def _head(file: Path) -> bytes:
    """The first bytes of a file that is there and not empty."""
    if file.is_dir():
        further = "; model=pretrained reads a folder of diffusers" if (file / "config.json").is_file() else ""
        raise ValueError(f"{file} is a folder: give the checkpoint's file{further}")
    if not file.exists():
        raise ValueError(f"{file} is not there")
    try:
        with file.open("rb") as opened:
            head = opened.read(256)
    except OSError as error:
        raise ValueError(f"{file} can't be read: {error.strerror}") from None
    if not head:
        raise ValueError(f"{file} is empty: download it again")
    return head


def _mistaken(head: bytes) -> str:
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return "is a web page, not a checkpoint: the download failed; fetch it again"
    if head.startswith(b"\x80"):
        recipe = "torch.save(pickle.load(open('FILE', 'rb'))['KEY'].state_dict(), 'OUT.pt')"
        return (
            "is a pickle that torch.save did not write (as NVIDIA's .pkl), and only running code would load it; where"
            " you trust it and have that code, write the state dict of its network (KEY: where it is) by"
            f' python -c "import pickle, torch; {recipe}" and give OUT.pt'
        )
    for beginning, told in _OTHERS:
        if head.startswith(beginning):
            return told
    return "is no checkpoint: neither a file of torch.save nor .safetensors"


def _torch_content(file: Path, zipped: bool) -> Any:
    try:
        with warnings.catch_warnings():  # torch's, of what it then refuses, and of storages of old files
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises whatever a damaged file leads it to
        raise ValueError(f"{file} {_fault(file, str(error), error)}") from None


def _fault(file: Path, text: str, error: Exception) -> str:
    if "TorchScript" in text:
        return "is a TorchScript program, which would be run: save its state_dict() with torch.save and give that"
    if "not in a subdirectory" in text:
        return "is a zip archive, not one of torch.save: if a checkpoint was packed in it, unpack it first"
    named = re.search(r"GLOBAL ([\w.]+)|Trying to load \w+ ([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and (named or "Unsupported" in text):
        what = f"an object of {named[1] or named[2]}" if named else "objects"
        recipe = f"python -c \"import torch; torch.save(torch.load('{file}', weights_only=False)['KEY'], 'OUT.pt')\""
        return (
            f"holds more than tensors: {what}, which only running code would load; where you trust it and have that"
            f" code, write its state dict alone (KEY: where it is) by {recipe} and give OUT.pt"
        )
    return "is damaged or cut short: compare its size with the source's, and download it again"


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except Exception:  # as torch
        raise ValueError(f"{file} is a damaged .safetensors file, or cut short: download it again") from None

"""Checkpoints of an unfinished training: there whole or not at all, verified before they are read, never unpickled."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, Final, final

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from ddim_lab.store import set_aside, write_bytes

__all__ = ["VerifiedCheckpoints", "usable"]

MARK: Final = b"ddim_lab checkpoint, SHA-256 of what follows: "
HEADER_BYTES: Final = len(MARK) + 64 + 1


def _header(payload: bytes | memoryview) -> bytes:
    return MARK + hashlib.sha256(payload).hexdigest().encode() + b"\n"


@final
class VerifiedCheckpoints(CheckpointIO):
    """Lightning's checkpoints as torch.save writes them, behind a line with their hash.

    Lightning's own way goes through the system's temporary folder, which need not be on the same disk, and syncs
    nothing.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        payload = buffer.getbuffer()
        write_bytes(Path(path), _header(payload), payload)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors and plain values only, whatever `weights_only` says.

        Raises:
            ValueError: the file is not what was written.
        """
        content = memoryview(Path(path).read_bytes())
        if _fault(content) is not None:
            raise ValueError(f"{path} is damaged: {_fault(content)}")
        loaded = torch.load(io.BytesIO(content[HEADER_BYTES:]), map_location=map_location, weights_only=True)
        assert isinstance(loaded, dict)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _fault(content: memoryview) -> str | None:
    if content[:HEADER_BYTES] != _header(content[HEADER_BYTES:]):
        return "it does not have the content it was written with"
    return None


def usable(path: Path) -> Path | None:
    """The checkpoint, or None where there is none; a damaged one is set aside. The caller holds the model's lock."""
    for stale in path.parent.glob(f".{path.name}.*"):  # of a process that was killed as it wrote
        stale.unlink(missing_ok=True)
    if not path.is_file():
        return None
    if (fault := _fault(memoryview(path.read_bytes()))) is not None:
        set_aside(path, fault)
        return None
    return path

"""Pictures of the cells as data URIs, within a size budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddim_lab.store import fault


@dataclass(frozen=True)
class Embedded:
    """A picture inside the page: its data URI, the file's size in pixels, and whether it was compressed."""

    uri: str
    width: int
    height: int
    reduced: bool

    @property
    def shown_width(self) -> int:
        """CSS pixels on a wide screen: a whole multiple of the picture's own, near 640, so that pixels stay square."""
        return self.width * max(1, round(640 / self.width))


def embed(paths: Sequence[Path], budget: int) -> list[Embedded | None]:
    """The pictures as data URIs of `budget` bytes in all at most; None where a file is absent or damaged.

    A picture within its equal share of the budget is embedded byte for byte. One beyond it becomes a JPEG, of
    half the size again and again until it fits; the file itself stays as it is.
    """
    share = budget // max(1, len(paths)) * 3 // 4  # base64 makes 4 bytes of 3
    return [_embed(path, share) for path in paths]


def _embed(path: Path, share: int) -> Embedded | None:
    from PIL import Image, UnidentifiedImageError

    if fault(path.parent, only=[path.name]) is not None:
        return None
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            kind, width, height = (image.format or "PNG").lower(), image.width, image.height
            reduced = len(data) > share
            scaled, scale = image.convert("RGB"), 1
            while len(data) > share and min(width, height) // scale >= 4:
                small = scaled.resize((max(1, width // scale), max(1, height // scale)), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=85)
                data, kind, scale = buffer.getvalue(), "jpeg", scale * 2
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return Embedded(uri, width, height, reduced)

"""LSUN bedroom."""

from __future__ import annotations

from typing import Literal, final

from ddim_lab.data.lsun import Lsun

__all__ = ["LsunBedroom"]


@final
class LsunBedroom(Lsun):
    """conf/data/lsun_bedroom: colour, 256x256."""

    name: Literal["lsun_bedroom"]

    @property
    def category(self) -> str:
        return "bedroom"

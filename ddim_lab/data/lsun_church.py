"""LSUN church."""

from __future__ import annotations

from typing import Literal, final

from ddim_lab.data.lsun import Lsun

__all__ = ["LsunChurch"]


@final
class LsunChurch(Lsun):
    """conf/data/lsun_church: colour, 256x256."""

    name: Literal["lsun_church"]

    @property
    def category(self) -> str:
        return "church_outdoor"

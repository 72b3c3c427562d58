"""conf/study: what the report says of a sweep, and the published numbers that stand beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BeforeValidator, Field, StrictStr, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ddim_lab.config.folders import config_folder
from ddim_lab.config.options import (
    NonNegative,
    Number,
    Options,
    PositiveInt,
    StepsKey,
)
from ddim_lab.config.schedule import ScheduleConfig
from ddim_lab.schedule import SPACINGS
from ddim_lab.transitions import Clip, Variance

__all__ = ["ElsewhereConfig", "PublishedConfig", "RowConfig", "StudyConfig"]


def _spacings(given: Any) -> Any:
    """One spacing, or one by S: checked here, where the message can say both."""
    by_steps = given if isinstance(given, dict) else {} if given is None else {1: given}
    if all(str(steps).isdecimal() and name in list(SPACINGS) for steps, name in by_steps.items()):
        return given
    raise PydanticCustomError("spacing", "must be one of {known}, or S: one of them", {"known": ", ".join(SPACINGS)})


class RowConfig(Options):
    """What the sampler of a published row is: its noise and its clipping."""

    eta: NonNegative
    variance: Variance
    clip: Clip


class PublishedConfig(Options):
    """study.published: known numbers to stand beside ours, and what they were taken with.

    A number stands beside the cells whose sampler is its row's, whatever the cell's preset is called. A difference is
    given where all that is said here of the numbers holds for the cell, too.

    Attributes:
        source: where they were published.
        metric: what they are, as the report names it: "FID", "FD (digits classifier)", "Reconstruction MSE".
        data, num_samples: of what data and how many images.
        reference: the split of real images that a Fréchet distance is to.
        weights: of the network.
        spacing: of the timesteps, one for all or by S.
        schedule: as conf/schedule.
        rows: preset of conf/sampler -> S -> number.
        samplers: what the sampler of a row is; conf/sampler says it where it has the preset.
    """

    source: StrictStr
    metric: StrictStr
    data: StrictStr | None = None
    num_samples: PositiveInt | None = None
    reference: Literal["train", "held_out", "all"] = "train"
    weights: Literal["ema", "raw"] | None = None
    spacing: Annotated[StrictStr | dict[StepsKey, StrictStr] | None, BeforeValidator(_spacings)] = None
    schedule: ScheduleConfig | None = None
    rows: Annotated[dict[StrictStr, dict[StepsKey, Number]], Field(min_length=1)]
    samplers: Annotated[dict[StrictStr, RowConfig], Field(default_factory=dict, validate_default=True)]

    @field_validator("samplers", mode="before")
    @classmethod
    def _look_up_presets(cls, given: Any, info: ValidationInfo) -> Any:
        """The rows' presets as conf/sampler has them, under what is given."""
        if not isinstance(given, dict):
            return given
        found = {}
        for name in info.data.get("rows", {}):
            file = config_folder() / "sampler" / f"{name}.yaml"
            if name not in given and Path(name).name == name and file.is_file():
                preset = OmegaConf.to_container(OmegaConf.load(file))
                assert isinstance(preset, dict)
                found[name] = {field: preset[field] for field in RowConfig.model_fields}
        return {**found, **given}


class ElsewhereConfig(Options):
    """Published numbers that no row of the study was taken as, to stand in a table of their own.

    Attributes:
        metric: what they are, as its authors call it.
        source: where they were published.
        protocol: of which network, timesteps, images and reference they are, in words.
        unit: what `rows` goes by: steps (S), or forwards (NFE).
        rows: a name -> steps or forwards -> number.
    """

    metric: StrictStr
    source: StrictStr
    protocol: StrictStr
    unit: Literal["S", "NFE"] = "S"
    rows: Annotated[dict[StrictStr, Annotated[dict[StepsKey, Number], Field(min_length=1)]], Field(min_length=1)]


class StudyConfig(Options):
    """What the report says of a sweep: title, notes, and known numbers to stand beside ours, or apart from them."""

    title: StrictStr | None
    notes: StrictStr | None
    published: PublishedConfig | None
    elsewhere: tuple[ElsewhereConfig, ...] | None = None

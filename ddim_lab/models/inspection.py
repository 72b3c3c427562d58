"""A checkpoint of any format, as its own reader finds it."""

from __future__ import annotations

from ddim_lab.config.model import (
    AdmConfig,
    CheckpointOptions,
    EdmConfig,
    OfficialConfig,
    PretrainedConfig,
    ScoreSdeConfig,
)
from ddim_lab.config.schedule import ScheduleConfig
from ddim_lab.models.pretrained import Pretrained

__all__ = ["inspect_pretrained"]


def inspect_pretrained(
    options: CheckpointOptions, schedule: ScheduleConfig, data: str, shape: tuple[int, int, int]
) -> Pretrained:
    """Find a checkpoint, read it whole once, and check that it is for these images and this schedule.

    Args:
        options: which, and of what format.
        schedule: the configured schedule, which must be the checkpoint's; taken where the checkpoint names none.
        data: name of the data set, for messages.
        shape: (C, H, W) of its images.

    Raises:
        ConfigError: it is not there, is damaged or does not fit; one line with both values.
    """
    if isinstance(options, PretrainedConfig):
        from ddim_lab.models.folder import read_folder

        return read_folder(options, schedule, data, shape)
    if isinstance(options, EdmConfig | ScoreSdeConfig):
        from ddim_lab.models.foreign.song import read_song

        return read_song(options, schedule, data, shape)
    assert isinstance(options, OfficialConfig | AdmConfig)
    from ddim_lab.models.foreign.checkpoints import read_file

    return read_file(options, schedule, data, shape)

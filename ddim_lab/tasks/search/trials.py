"""Lists of timesteps that are tried: the built-in ones, then warps of the best, proposed by Optuna."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, final

import torch

from ddim_lab.schedule import WHOLE_SPACINGS, spaced_timesteps
from ddim_lab.store import sealed_line, unsealed_line
from ddim_lab.tasks.search.gaps import log_gaps, timesteps_of_log_gaps, warped

__all__ = ["RememberedScores", "Timesteps", "Trial", "builtin_timesteps", "search"]

log = logging.getLogger("ddim_lab")

HARMONICS: Final = 4
"""Cosines of a warp, at most. With every gap on its own (S + 1 numbers) a search fits the noise of its samples: at
S = 10 it found lists that were far better there and worse than the spacings on other noise."""

RANDOM_WARPS: Final = 10
"""Warps drawn at random before the Gaussian process proposes."""

Timesteps = tuple[int, ...]


@final
@dataclass(frozen=True)
class Trial:
    """One list that was tried.

    Attributes:
        proposed_by: the spacings that give the list, or "search".
        timesteps: ascending.
        fd: its Fréchet distance at the search's noise; infinite where the samples are not finite.
    """

    proposed_by: str
    timesteps: Timesteps
    fd: float


def builtin_timesteps(nfe: int, num_timesteps: int) -> dict[str, Timesteps]:
    """Every built-in spacing with exactly `nfe` distinct timesteps, ascending; spacings that agree under one name.

    Those of whole timesteps: a search goes by gaps, which are whole numbers.

    A spacing that drops repeats takes the smallest S that leaves `nfe` of them, and is left out where none does.

    Args:
        nfe: forwards a sample, from 1 to T.
        num_timesteps: T.
    """
    names: dict[Timesteps, str] = {}
    for spacing in WHOLE_SPACINGS:
        for steps in range(nfe, num_timesteps + 1):
            timesteps = tuple(spaced_timesteps(spacing, steps, num_timesteps).tolist())
            if len(timesteps) == nfe:
                names[timesteps] = f"{names[timesteps]}, {spacing}" if timesteps in names else spacing
                break
    return {name: timesteps for timesteps, name in names.items()}


def search(
    score: Callable[[Timesteps], float], starts: Mapping[str, Timesteps], num_timesteps: int, trials: int, seed: int
) -> list[Trial]:
    """Look for the list with the lowest score: every start, then warps of the best of them (see `gaps`).

    The warps are proposed by a Gaussian process (Optuna) on the scores so far. The same arguments give the same trials,
    so a search is repeated, or resumed, by remembering scores.

    Args:
        score: timesteps -> what is minimised; a deterministic function.
        starts: the lists that are tried first, all of one length, by name.
        num_timesteps: T.
        trials: lists tried, `starts` included.
        seed: of the optimiser, 0 <= seed < 2^32.

    Returns:
        The trials in their order, the starts first; the first of those with the lowest score is what was found.
    """
    import optuna

    tried = [Trial(name, timesteps, score(timesteps)) for name, timesteps in starts.items()]
    best = min(tried, key=lambda trial: trial.fd)
    z = log_gaps(best.timesteps, num_timesteps)
    ranges = _ranges(len(best.timesteps))
    # The Gaussian process is fitted by gradients, also where the caller samples without.
    with _quiet(optuna), torch.inference_mode(False), torch.enable_grad():
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=RANDOM_WARPS, deterministic_objective=True)
        study = optuna.create_study(sampler=sampler)
        study.add_trial(  # no warp at all: what is known already
            optuna.trial.create_trial(
                value=best.fd,
                params=dict.fromkeys(ranges, 0.0),
                distributions={
                    name: optuna.distributions.FloatDistribution(low, high) for name, (low, high) in ranges.items()
                },
            )
        )
        while len(tried) < trials:
            trial = study.ask()
            bottom, top, *coefficients = (trial.suggest_float(name, low, high) for name, (low, high) in ranges.items())
            timesteps = timesteps_of_log_gaps(warped(z, bottom, top, coefficients), num_timesteps)
            tried.append(Trial("search", timesteps, score(timesteps)))
            study.tell(trial, tried[-1].fd)
    return tried


def _ranges(steps: int) -> dict[str, tuple[float, float]]:
    """The numbers of a warp, and how far each may go."""
    harmonics = range(1, min(HARMONICS, steps - 2) + 1)
    return {"bottom": (-2.0, 3.0), "top": (-2.0, 1.0), **{f"a{k}": (-1.5 / k, 1.5 / k) for k in harmonics}}


@final
class RememberedScores:
    """Scores by list, on disk as they come: one JSON record a line."""

    def __init__(self, path: Path) -> None:
        self._path: Final = path
        self._scores: Final[dict[Timesteps, float]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = unsealed_line(line)
                except ValueError:  # as a kill leaves it
                    log.warning("%s has a damaged line: that list is scored again", path)
                else:
                    self._scores[tuple(record["timesteps"])] = float(record["fd"])

    def get(self, timesteps: Timesteps) -> float | None:
        return self._scores.get(timesteps)

    def add(self, timesteps: Timesteps, fd: float) -> None:
        self._scores[timesteps] = fd
        with self._path.open("ab+") as file:
            if self._torn(file):  # what is appended to a torn line is lost with it
                file.write(b"\n")
            file.write(sealed_line({"timesteps": timesteps, "fd": fd}).encode())
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _torn(file: BinaryIO) -> bool:
        """Whether a file that is open at its end does not end in a newline, as a kill leaves it."""
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without Optuna's line a trial, and its warning that a sampler is experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)

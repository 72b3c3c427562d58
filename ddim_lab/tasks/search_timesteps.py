"""Task `search_timesteps`: the list of S timesteps with the lowest Fréchet distance on one model.

1. Search. Every built-in spacing of whole timesteps, then warps of the best of them that Optuna proposes (see `gaps`),
   are scored by the distance of `task.search_samples` samples at the noise of `task.search_seed`, in
   `task.search_features`: every list starts from the same x_T. What is found is no worse than any spacing there.
2. Score. The found list and each of these spacings sample `num_samples` images at `seed`, noise that the search has not
   seen, and are compared in `metrics.features`, the first of several (and in those of the search). The distances are
   paired by x_T: their differences are far more certain than each of them.

The search is kept under outputs/references; one that was killed goes on, to the list it would have found. The list
becomes a preset, outputs/presets/sampler/NAME.yaml.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, final

import torch
from pydantic import Field, StrictInt, StrictStr
from torch import Tensor, nn

from ddim_lab.config.folders import config_folder
from ddim_lab.config.job import Config
from ddim_lab.config.options import PositiveInt, Seed
from ddim_lab.console import Progress
from ddim_lab.data.images import NonFiniteError
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.base import BY_INFLUENCE
from ddim_lab.metrics.estimates import Estimate
from ddim_lab.metrics.extractor import Extractor
from ddim_lab.metrics.features import Features, obtain_features
from ddim_lab.metrics.frechet import FrechetDistance
from ddim_lab.metrics.references import obtain_reference, reference_of
from ddim_lab.sampler import Sampler
from ddim_lab.schedule import WHOLE_SPACINGS
from ddim_lab.store import content_key, read_json, sealed_text, write_json, write_text
from ddim_lab.store.records import Pictured, Tabled, Value
from ddim_lab.tasks.base import Job, Outcome, Task, need_error
from ddim_lab.tasks.search.shown import FOUND, finite, search_chart, timesteps_chart, trials_table, write_trials
from ddim_lab.tasks.search.trials import RememberedScores, Timesteps, Trial, builtin_timesteps, search
from ddim_lab.tasks.walks import Batches, network_in_place, sample_uint8

__all__ = ["SearchTimesteps", "Trial", "builtin_timesteps", "preset_path", "publish", "search"]

log = logging.getLogger("ddim_lab")

SEARCH_VERSION: Final = 1
"""Raised whenever the same settings would search otherwise."""

PRESET_FILE: Final = "preset.yaml"


@final
@dataclass(frozen=True)
class _Yardstick:
    """Features, the distance to the real images in them, and their network on the job's device."""

    features: Features
    distance: FrechetDistance
    network: Extractor


@final
@dataclass(frozen=True)
class _Score:
    """The Fréchet distance of one list at the final noise by one yardstick."""

    name: str
    timesteps: Timesteps
    found: Estimate

    @property
    def fd(self) -> float:
        return self.found.value

    @property
    def se(self) -> float:
        assert self.found.se is not None
        return self.found.se

    def above(self, other: _Score) -> tuple[float, float]:
        """FD of this list minus the other's, and the paired standard error of that difference."""
        return self.fd - other.fd, self.found.paired_se(other.found)


@final
class SearchTimesteps(Task):
    """conf/task/search_timesteps: the timesteps with the lowest distance on this model, kept as a preset."""

    any_formula: ClassVar[bool] = False
    extra: ClassVar[tuple[str, str] | None] = ("search", "optuna")

    name: Literal["search_timesteps"]
    trials: PositiveInt
    search_features: Literal["classifier", "pixels"] | None
    search_samples: Annotated[StrictInt, Field(ge=2)]
    search_seed: Seed
    preset: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

    def check(self, config: Config) -> None:
        total = config.build_schedule().num_timesteps
        if config.sampler.timesteps is not None:
            raise ConfigError(
                "task=search_timesteps looks for the timesteps: leave sampler.timesteps=null and set steps"
            )
        if config.nfe is not None:
            raise ConfigError(
                "task=search_timesteps searches a list of as many timesteps as steps=: give that, not nfe="
            )
        if config.steps >= total:
            raise ConfigError(
                f"task=search_timesteps has nothing to choose at steps={config.steps}:"
                f" set steps below the schedule's {total} timesteps"
            )
        if config.sampler.variance == "analytic":
            raise ConfigError(
                "task=search_timesteps tries many lists of timesteps, and sampler.variance=analytic is estimated for"
                " one: set sampler.variance=posterior"
            )
        if config.sampler.eta > 1:
            raise ConfigError(f"task=search_timesteps needs sampler.eta from 0 to 1, got {config.sampler.eta:g}")
        if self.trials < len(WHOLE_SPACINGS):
            raise ConfigError(
                f"task.trials={self.trials}: must be at least {len(WHOLE_SPACINGS)}, the built-in spacings are the"
                " first"
            )
        if self.search_seed == config.seed:
            raise ConfigError(
                f"task.search_seed={self.search_seed} is the seed of the final score, too: make them differ"
            )
        need_error(config)
        if (config_folder() / "sampler" / f"{self.preset}.yaml").exists():
            raise ConfigError(f"task.preset={self.preset} is a built-in preset: choose another name")

    def forwards(self, config: Config) -> int:
        searched = self.trials * self.search_samples
        return (searched + (len(WHOLE_SPACINGS) + 1) * config.num_samples) * config.steps

    def finished(self, job: Job, cell: Path) -> Path:
        publish(job, cell)
        return cell

    def identity(self, job: Job) -> dict[str, Any]:
        """The search, and what the samples are compared with."""
        return {
            "search": content_key(_search_identity(job)),
            "features": job.features[0].digest,
            "reference": reference_of(job.config.metrics, job.features[0], job.data),
        }

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Search (or take the search that is there), then score; writes preset.yaml, trials.csv and pictures."""
        searched_by = _yardstick(job, _search_features(job))
        yardsticks = [searched_by]
        if searched_by.features.digest != job.features[0].digest:
            yardsticks.insert(0, _yardstick(job, job.features[0]))
        builtin = _builtin(job)
        clock = time.perf_counter()
        with network_in_place(job) as network:
            tried = _obtain_search(job, network, searched_by, builtin)
            searched = time.perf_counter()
            found = min(tried, key=lambda trial: trial.fd).timesteps
            walks = {**builtin, FOUND: found}
            by_yardstick = _score_all(job, network, yardsticks, walks)
        phases = {"search": searched - clock, "score": time.perf_counter() - searched}
        *spacings, own = by_yardstick[0]
        best = min(spacings, key=lambda score: score.fd)
        gain, gain_se = best.above(own)
        outcome = (
            f"{gain:.3g} ± {gain_se:.2g} below {best.name}, the best built-in spacing"
            if gain > 0
            else f"NOT below {best.name} ({best.fd:.4g}, which is {-gain:.2g} ± {gain_se:.2g} less)"
        )
        quality = f"{job.features[0].name} {own.fd:.4g} ± {own.se:.2g}"
        name = searched_by.features.name
        write_trials(folder / "trials.csv", tried)
        timesteps_chart(folder / "timesteps.png", walks, job.sampler.schedule.num_timesteps)
        search_chart(folder / "search.png", tried, name)
        _write_preset(folder / PRESET_FILE, job, found, f"{quality} at N = {job.config.num_samples}, {outcome}")
        return Outcome(
            nfe=len(found),
            headline=f"{quality}, {outcome}; use it: {_command(job)}",
            values=[
                Value(
                    name="found_fd",
                    value=own.fd,
                    heading="Fréchet distance of the timesteps that were found",
                    facts="at noise that the search has not seen; the cell's table has every spacing and the paired"
                    " differences",
                    se=own.se,
                    error=BY_INFLUENCE,
                    count=job.config.num_samples,
                    better="lower",
                    level="best_builtin_fd",
                    level_says="Of the best built-in spacing at the same NFE",
                ),
                Value(name="best_builtin", value=best.name),
                Value(name="best_builtin_fd", value=best.fd),
                Value(name="found_gain", value=gain, se=gain_se, error=f"{BY_INFLUENCE}, paired"),
                Value(name="found_images", value=job.config.num_samples),
                Value(name="spacings_beaten", value=sum(score.fd > own.fd for score in spacings)),
                Value(name="spacings", value=len(spacings)),
                Value(name="timesteps", value=" ".join(map(str, found))),
            ],
            phases=phases,
            tables=[
                *(_score_table(job, yard, scores) for yard, scores in zip(yardsticks, by_yardstick, strict=True)),
                trials_table(f"Search: {name} at N = {self.search_samples}, seed {self.search_seed}", tried),
            ],
            pictures=[
                Pictured(
                    title="Where the timesteps lie",
                    file="timesteps.png",
                    caption=f"{len(found)} timesteps of every built-in spacing, and those found",
                ),
                Pictured(
                    title="The search",
                    file="search.png",
                    caption=f"each list tried, at the noise of seed {self.search_seed} alone",
                ),
            ],
        )


def preset_path(job: Job) -> Path:
    """Where the preset lies: <outputs_dir>/presets/sampler/NAME.yaml, for --config-dir <outputs_dir>/presets."""
    return job.store.root / "presets" / "sampler" / f"{_task(job).preset}.yaml"


def publish(job: Job, cell: Path) -> None:
    """Put the preset of a finished cell where --config-dir finds it, in place of an older one of its name."""
    path, text = preset_path(job), sealed_text((cell / PRESET_FILE).read_text(encoding="utf-8"))
    if path.is_file() and path.read_bytes() != text.encode():
        log.warning("%s held another search's timesteps: replaced; task.preset=NAME keeps both", path)
    write_text(path, text)


# -- the search, kept ------------------------------------------------------------------------------------


def _task(job: Job) -> SearchTimesteps:
    task = job.config.task
    assert isinstance(task, SearchTimesteps)
    return task


def _builtin(job: Job) -> dict[str, Timesteps]:
    return builtin_timesteps(job.config.steps, job.sampler.schedule.num_timesteps)


def _search_features(job: Job) -> Features:
    kind = _task(job).search_features
    if kind is None:
        return job.features[0]
    return obtain_features(job.config.metrics.network_named(kind), job.data, job.store)


def _yardstick(job: Job, features: Features) -> _Yardstick:
    split, device = job.config.metrics.reference, job.runtime.torch_device
    reference = obtain_reference(features, job.data, split, job.store, device=device).moments
    return _Yardstick(features, FrechetDistance(reference, device), features.load().to(device))


def _search_identity(job: Job) -> dict[str, Any]:
    config, task, sampler, features = job.config, _task(job), job.sampler, _search_features(job)
    return {
        "version": SEARCH_VERSION,
        "optimiser": f"optuna {importlib.metadata.version('optuna')} GPSampler",
        "model": job.model.recipe(),
        "schedule": sampler.schedule.digest,
        "sampler": {"eta": sampler.eta, "variance": sampler.variance, "clip": sampler.clip},
        "starts": {name: list(timesteps) for name, timesteps in _builtin(job).items()},
        "trials": task.trials,
        "samples": task.search_samples,
        "seed": task.search_seed,
        "batch_size": config.batch_size,
        "runtime": job.runtime.recipe(),
        "features": features.digest,
        "reference": reference_of(job.config.metrics, features, job.data),
    }


def _obtain_search(
    job: Job, network: nn.Module, yardstick: _Yardstick, builtin: Mapping[str, Timesteps]
) -> list[Trial]:
    """The trials, from the store or searched for now; the scores of an unfinished search are taken up again."""
    task = _task(job)
    wanted = _search_identity(job)
    key = content_key(wanted)

    def build(folder: Path) -> None:
        known = RememberedScores(job.store.work_folder("references", key) / "scores.jsonl")
        with Progress(f"{job.progress} search", task.trials, "list") as progress:

            def score(timesteps: Timesteps) -> float:
                fd = known.get(timesteps)
                if fd is None:
                    try:
                        (features,) = _features(
                            job, network, [yardstick], timesteps, task.search_samples, task.search_seed
                        )
                        fd = yardstick.distance.value(features)
                    except NonFiniteError:  # no list to look near; anything else ends the search
                        fd = math.inf
                    known.add(timesteps, fd)
                progress.update()
                return fd

            tried = search(score, builtin, job.sampler.schedule.num_timesteps, task.trials, task.search_seed % 2**32)
        records = [{"proposed_by": t.proposed_by, "timesteps": t.timesteps, "fd": finite(t.fd)} for t in tried]
        write_json(folder / "search.json", {"schema": 1, "identity": wanted, "trials": records})

    folder, _ = job.store.obtain("references", key, build)
    return [
        Trial(record["proposed_by"], tuple(record["timesteps"]), math.inf if record["fd"] is None else record["fd"])
        for record in read_json(folder / "search.json")["trials"]
    ]


def _score_all(
    job: Job, network: nn.Module, yardsticks: Sequence[_Yardstick], walks: Mapping[str, Timesteps]
) -> list[list[_Score]]:
    """Every list at the final noise: scores in the order of `walks`, one list a yardstick."""
    scores: list[list[_Score]] = [[] for _ in yardsticks]
    with Progress(f"{job.progress} score", len(walks), "list") as progress:
        for name, timesteps in walks.items():
            found = _features(job, network, yardsticks, timesteps, job.config.num_samples, job.config.seed)
            for kept, yardstick, features in zip(scores, yardsticks, found, strict=True):
                kept.append(_Score(name, timesteps, yardstick.distance.of(features)))
            progress.update()
    return scores


def _features(
    job: Job, network: nn.Module, yardsticks: Sequence[_Yardstick], timesteps: Timesteps, count: int, seed: int
) -> list[Tensor]:
    """The first `count` samples at `seed` as each yardstick's network sees them, float32 [count, D] on the CPU.

    Raises:
        NonFiniteError: as `check_finite`.
    """
    config, device, noise = job.config, job.runtime.torch_device, job.runtime.noise(seed)
    sampler = Sampler(
        job.sampler.schedule,
        eta=config.sampler.eta,
        variance=config.sampler.variance,
        clip=config.sampler.clip,
        timesteps=timesteps,
        prediction=job.model.prediction,
    )
    found: list[list[Tensor]] = [[] for _ in yardsticks]
    for indices in Batches(job, count, bar=False):
        images = sample_uint8(sampler, network, indices, job.data.shape, noise, device)
        for yardstick, parts in zip(yardsticks, found, strict=True):
            with torch.inference_mode():
                parts.append(yardstick.network(images).cpu())
    return [torch.cat(parts) for parts in found]


# -- what is written -------------------------------------------------------------------------------------


def _command(job: Job) -> str:
    presets = Path(job.config.outputs_dir) / "presets"
    return shlex.join(["python", "-m", "ddim_lab", "--config-dir", str(presets), f"sampler={_task(job).preset}"])


def _write_preset(path: Path, job: Job, timesteps: Timesteps, quality: str) -> None:
    sampler, task = job.config.sampler, _task(job)
    write_text(
        path,
        f"""# {len(timesteps)} timesteps found by task=search_timesteps for one model ({job.model.digest[:12]}).
# {quality}.
#   {_command(job)}
name: {task.preset}
eta: {sampler.eta}
variance: {sampler.variance}
spacing: {sampler.spacing}    # not used: the list is
clip: {sampler.clip}
timesteps: {list(timesteps)}
timesteps_as: given
guidance: null
""",
    )


def _score_table(job: Job, yardstick: _Yardstick, scores: Sequence[_Score]) -> Tabled:
    """Lowest distance first; each spacing's difference to the found list, paired by x_T."""
    own = scores[-1]
    rows = []
    for score in sorted(scores, key=lambda score: score.fd):
        difference = (None, None) if score is own else score.above(own)
        timesteps = " ".join(map(str, score.timesteps))
        rows.append((score.name, len(score.timesteps), score.fd, score.se, *difference, timesteps))
    where = f"N = {job.config.num_samples}, seed {job.config.seed} (not the search's)"
    return Tabled(
        title=f"{yardstick.features.name} at {where}",
        columns=("spacing", "NFE", "FD", "±", "above the found list", "± (paired)", "timesteps"),
        rows=tuple(rows),
    )

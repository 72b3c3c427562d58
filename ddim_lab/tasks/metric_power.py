"""Task `metric_power`: how well each metric sees planted degradations of real images, and to which it is blind.

Real images are split at random, draw by draw, into a reference and sets of N. One set is made worse in known ways
(`ddim_lab.tasks.degradations`) and scored beside itself. With d the difference of a metric's value in the direction
that it calls worse,

    z = mean of d over draws / standard deviation of d over draws

is how many standard deviations one comparison of N images sees: measured, not by the metric's own error.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, final

import numpy as np
import torch
from pydantic import Field, StrictInt
from torch import Tensor

from ddim_lab.config.job import Config
from ddim_lab.config.options import PositiveInt
from ddim_lab.console import Progress
from ddim_lab.data.images import from_uint8
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.estimates import paired_se
from ddim_lab.metrics.extractor import features_by
from ddim_lab.metrics.quality import Quality, Seen
from ddim_lab.metrics.references import Reference
from ddim_lab.metrics.statistics import FeatureSums
from ddim_lab.store import Store, content_key, read_json, write_json
from ddim_lab.store.chunks import kept
from ddim_lab.store.records import Pictured, Tabled, Value
from ddim_lab.tasks.base import Job, Outcome, Task
from ddim_lab.tasks.degradations import AGAIN, GAUSSIAN, MISSING, degradations, draw, moment_matched
from ddim_lab.tasks.pictures import preview, sheet
from ddim_lab.tasks.walks import Batches, network_in_place, sample_uint8

if TYPE_CHECKING:
    from ddim_lab.sampler import Sampler

__all__ = ["MetricPower", "power", "verdict"]

MEASURED_VERSION: Final = 1
"""Raised whenever the same cell would be measured otherwise."""

MOST_PIXELS: Final = 4096
"""Values of an image, at most: their covariance is taken apart."""

SHOWN: Final = 12

ROUNDING: Final = 1e-9
"""A spread over draws that is no larger, as a part of the mean, is none: shares of images move by whole images."""

SEEN: Final = 2.0
"""Standard deviations from which a metric sees something."""

BATCH: Final = 512

PLAIN: Final = "plain"

Differences = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Of one draw: degradation -> value's heading -> (worse by, the same in the value's own paired standard errors)."""


@final
class MetricPower(Task):
    """conf/task/metric_power: how well each metric sees planted degradations, and to which it is blind."""

    name: Literal["metric_power"]
    draws: Annotated[StrictInt, Field(ge=2)]
    reference_images: Annotated[StrictInt, Field(ge=2)]
    fewer_steps: PositiveInt | None

    def further_walks(self, config: Config) -> Iterator[Sampler]:
        if self.fewer_steps is not None:
            yield config.build_sampler(steps=self.fewer_steps)

    def check(self, config: Config) -> None:
        if math.prod(config.data.shape) > MOST_PIXELS:
            raise ConfigError(
                f"task=metric_power takes images of {MOST_PIXELS:,} values at most, whose covariance it takes apart,"
                f" and data={config.data.name} has {math.prod(config.data.shape):,}"
            )
        if self.fewer_steps is None:
            return
        try:
            fewer = config.forwards_at(self.fewer_steps)
        except ValueError as error:
            raise ConfigError(f"task.fewer_steps={self.fewer_steps}: {error}") from None
        if fewer >= config.forwards:
            raise ConfigError(
                f"task.fewer_steps={self.fewer_steps} must cost fewer forwards than the cell's own walk, and it takes"
                f" {fewer} beside {config.forwards}: raise steps, or set task.fewer_steps=null"
            )

    def forwards(self, config: Config) -> int:
        if self.fewer_steps is None:
            return 0
        each = config.forwards + config.forwards_at(self.fewer_steps)
        return config.num_samples * self.draws * each

    def identity(self, job: Job) -> dict[str, Any]:
        """The real images, what looks at them, which metrics, and the walk of fewer steps."""
        fewer = None if self.fewer_steps is None else job.sampler_at(self.fewer_steps).recipe()
        return {
            "version": MEASURED_VERSION,
            **job.config.metrics.identity(),
            "data": job.data.digest,
            "features": [features.digest for features in job.features],
            "fewer": fewer,
        }

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Sample, degrade and score, draw by draw; writes preview.png and degraded.png into `folder`.

        A draw that is done is kept in `work`.
        """
        count, total = job.config.num_samples, len(job.data.split("all"))
        reference = min(self.reference_images, total // 2)
        if reference + 2 * count > total:
            raise ConfigError(
                f"num_samples={count} is too many for task=metric_power: of the {total:,} images of"
                f" data={job.data.name}, {reference:,} are compared with, and two sets of N are taken of the rest: N is"
                f" at most {(total - reference) // 2:,}"
            )
        clock = time.perf_counter()
        samples = self._samples(job, work)
        sampled = time.perf_counter()
        found = [self._draw(job, number, reference, samples, work, folder) for number in range(self.draws)]
        columns = list(found[0]["differences"])
        z, own = power([each["differences"] for each in found])
        unpaired, _ = power([each["unpaired"] for each in found])
        blindness = {GAUSSIAN: {name: of.get(GAUSSIAN) for name, of in z.items()}}
        if unpaired:
            blindness[MISSING] = {name: unpaired[name].get(MISSING) for name in z if name in unpaired}
        blind = {
            what: [name for name, seen in of.items() if seen is not None and seen < SEEN]
            for what, of in blindness.items()
        }
        n = f"N = {count:,}, {self.draws} draws, {reference:,} images compared with"
        tables = [
            Tabled(
                title=f"Blind to what? Beside real images drawn again; {n}",
                columns=("value", *blindness),
                rows=tuple((name, *(verdict(of.get(name)) for of in blindness.values())) for name in z),
            ),
            _table(f"z of degraded against plain images, measured over draws; {n}", columns, z),
            _table(f"The same by the values' own paired standard errors, mean over draws; {n}", columns, own),
        ]
        left = statistics.fmean(each["left"] for each in found)
        return Outcome(
            nfe=job.sampler.nfe,
            headline="; ".join(f"blind to {what}: {', '.join(who) or 'none'}" for what, who in blind.items()),
            values=_values(len(z), blind, left, self.draws, reference, count),
            phases={"sampling": sampled - clock, "metrics": time.perf_counter() - sampled},
            tables=[table for table in tables if table.rows],
            pictures=[
                Pictured(
                    title="Images of the first draw, degraded",
                    file="degraded.png",
                    caption=f"From top to bottom: plain, {', '.join(columns)}.",
                )
            ],
        )

    def _samples(self, job: Job, work: Path) -> list[tuple[Tensor, Tensor]]:
        """Of each draw, N samples of the job's steps and the same x_T at fewer; uint8 [N, C, H, W] each."""
        if self.fewer_steps is None:
            return []
        count, size = job.config.num_samples, job.config.batch_size
        noise, device = job.runtime.noise(job.config.seed), job.runtime.torch_device

        def sampled(sampler: Sampler, number: int) -> Tensor:
            first, end = number * count, (number + 1) * count
            batches = [range(start, min(start + size, end)) for start in range(first, end, size)]
            parts = [
                sample_uint8(sampler, network, indices, job.data.shape, noise, device).cpu()
                for indices in Batches(job, batches)
            ]
            return torch.cat(parts)

        samplers = job.sampler, job.sampler_at(self.fewer_steps)
        found = []
        with network_in_place(job) as network:
            for number in range(self.draws):
                one, other = (
                    kept(work, f"samples_{number}_{which}", lambda s=sampler, n=number: sampled(s, n))  # type: ignore[misc]
                    for which, sampler in enumerate(samplers)
                )
                found.append((one, other))
        return found

    def _draw(
        self, job: Job, number: int, reference: int, samples: Sequence[tuple[Tensor, Tensor]], work: Path, folder: Path
    ) -> dict[str, Any]:
        """The differences of one draw: from `work`, or measured; the first writes its pictures into `folder`.

        Returns:
            "differences", paired with the plain images, "unpaired", with real images drawn again, and "left", the
            distance that matching left.
        """
        record, seed = work / f"draw_{number}.json", job.config.seed
        if number > 0 and record.is_file():
            return dict(read_json(record))
        drawn = draw(job.data.split("all"), job.config.num_samples, reference, np.random.default_rng([seed, number]))
        gaussian, left = moment_matched(drawn.again, np.random.default_rng([seed, number, 0]))
        sets = {PLAIN: drawn.plain}
        for name, degrade in degradations(job.data.num_classes).items():
            # the levels of one kind are by the same generator: what is worse is worse in the same places
            kind = sum(map(ord, name.partition(",")[0]))
            try:
                sets[name] = degrade(drawn, gaussian, np.random.default_rng([seed, number, kind]))
            except ValueError as error:
                raise ConfigError(f"task=metric_power: {name}: {error}: set num_samples to less") from None
        many, fewer = f"S = {job.config.steps}", f"S = {self.fewer_steps}"
        if samples:
            sets[many], sets[fewer] = samples[number]
        if number == 0:
            preview(folder, from_uint8(drawn.plain))
            shown = [from_uint8(images[:SHOWN]) for name, images in sets.items() if name != many]
            sheet(folder / "degraded.png", torch.stack(shown))
        if not record.is_file():
            values = _scored(job, number, drawn.reference, sets, work)
            beside = {name: many if name == fewer else PLAIN for name in sets if name not in (PLAIN, many)}
            found = {name: _worse_by(values[plain], values[name]) for name, plain in beside.items()}
            unpaired = {MISSING: _worse_by(values[AGAIN], values[MISSING])} if MISSING in values else {}
            write_json(record, {"differences": found, "unpaired": unpaired, "left": left})
        return dict(read_json(record))


# -- scoring ------------------------------------------------------------------------------------------------


def _scored(
    job: Job, number: int, reference: Tensor, sets: Mapping[str, Tensor], work: Path
) -> dict[str, dict[str, Value]]:
    """The values of every set of images, by the set's name and their heading with the network's name."""
    metrics, device = job.config.metrics, job.runtime.torch_device
    found = {}
    with tempfile.TemporaryDirectory(dir=work) as folder, torch.inference_mode():
        store, seen = Store(Path(folder) / "store"), []
        for options, features in zip(metrics.networks, job.features, strict=True):
            network = features.load().to(device)
            vectors = torch.cat([network(part.to(device)).cpu() for part in torch.split(reference, BATCH)])
            name = f"{job.data.name}, draw {number}, n={len(reference)}"
            key = content_key({"features": features.digest, "draw": name})
            moments = FeatureSums.of([vectors]).moments()
            real = Reference(name, key, moments, vectors.numpy(), None)
            seen.append(Seen(options.name, features, network, real, None))
        with Progress(f"{job.progress} draw {number}", len(sets), "set") as progress:
            for name, images in sets.items():
                quality = Quality(metrics, seen, len(images), Path(folder), store, device)
                for part in torch.split(images, BATCH):
                    on_device = part.to(device)
                    quality.update(features_by([one.network for one in seen], on_device))
                by_network = quality.values()
                found[name] = {
                    _label(value, one.features.sees): value
                    for one in seen
                    for value in by_network[one.name]
                    if value.number is not None
                }
                progress.update(1)
    return found


def _label(value: Value, sees: str) -> str:
    """What a value is called in a table of several networks: a heading names its network, a column does not."""
    return value.heading or f"{value.column or value.name} ({sees})"


def _worse_by(plain: Mapping[str, Value], degraded: Mapping[str, Value]) -> dict[str, tuple[float, float | None]]:
    """By how much each value says worse, and that in its own paired standard errors; by the value's heading.

    A value that does not say which way is better is a distance of some kind: more is worse.
    """
    found = {}
    for name in plain:
        if name not in degraded:
            continue
        one, other = plain[name], degraded[name]
        assert one.number is not None
        assert other.number is not None
        sign = -1.0 if one.better == "higher" else 1.0
        change, own = sign * (other.number - one.number), None
        if one.replicates and other.replicates:
            error = paired_se(one.replicates, other.replicates, one.interactions, other.interactions)
            own = change / error if error > 0.0 else None
        found[name] = change, own
    return found


# -- what comes of it -----------------------------------------------------------------------------------------

Z = dict[str, dict[str, float | None]]
"""Value's heading -> degradation -> z; None where it is not known."""


def power(differences: Sequence[Differences]) -> tuple[Z, Z]:
    """z of every value and degradation, measured over draws, and the mean over draws of z by the value's own error.

    Infinite where a difference is the same in every draw; None where a value was not measured in every one. Values that
    no degradation moves are left out; so are those without an error of their own, of the second.

    Args:
        differences: of each draw, at least two.
    """
    measured: Z = {}
    own: Z = {}
    for what in differences[0]:
        for name in differences[0][what]:
            of_draws = [each[what][name] for each in differences if name in each[what]]
            changes = [change for change, _ in of_draws if change is not None]
            errors = [z for _, z in of_draws if z is not None]
            every = len(changes) == len(differences)
            measured.setdefault(name, {})[what] = _z(changes) if every else None
            own.setdefault(name, {})[what] = statistics.fmean(errors) if len(errors) == len(differences) else None
    moved = [name for name, of in measured.items() if any(of.values())]
    return (
        {name: measured[name] for name in moved},
        {name: own[name] for name in moved if any(z is not None for z in own[name].values())},
    )


def _z(changes: Sequence[float]) -> float:
    mean, deviation = statistics.fmean(changes), statistics.stdev(changes)
    if deviation <= ROUNDING * abs(mean):
        return 0.0 if mean == 0.0 else math.copysign(math.inf, mean)
    return mean / deviation


def verdict(z: float | None) -> str:
    """What a metric makes of images that are no real ones, beside real ones, in words."""
    if z is None:
        return "not measured"
    told = f"z = {_told(z)}"
    if z >= SEEN:
        return f"sees it, {told}"
    return f"blind, {told}" if z > -SEEN else f"blind: takes it for better, {told}"


def _told(z: float) -> str:
    return f"{z:.1f}".replace("-", "−") if math.isfinite(z) else ("∞" if z > 0 else "−∞")


def _values(
    measured: int, blind: Mapping[str, Sequence[str]], left: float, draws: int, reference: int, count: int
) -> list[Value]:
    """What results.csv says: how many values were measured, how many are blind, and what that goes by."""
    shown: dict[str, Any] = {"section": "Power of the metrics", "table": "Values that are blind", "count": count}
    is_blind = f"Blind: not scored worse than real images drawn again by {SEEN:g} standard deviations at this N."
    is_left = "Left: the Fréchet distance in pixels of the Gaussian images to those whose moments they are to have."
    names = {GAUSSIAN: "power_blind_to_gaussian", MISSING: "power_blind_to_missing_class"}
    return [
        Value(name="power_values", value=measured, column="values", **shown),
        *(
            Value(name=names[what], value=len(who), column=f"blind to: {what}", notes=(is_blind,), **shown)
            for what, who in blind.items()
        ),
        Value(name="power_gaussian_left", value=left, column="left by matching", notes=(is_left,), **shown),
        Value(name="power_draws", value=draws),
        Value(name="power_reference_images", value=reference),
    ]


def _table(title: str, columns: Sequence[str], z: Z) -> Tabled:
    """A row a value, to a tenth; None where it is not known."""
    rows = []
    for name, of in z.items():
        found = [of.get(column) for column in columns]
        rows.append(
            (name, *(_told(each) if each is not None and math.isinf(each) else _tenths(each) for each in found))
        )
    return Tabled(title=title, columns=("value", *columns), rows=tuple(rows))


def _tenths(z: float | None) -> float | None:
    return None if z is None else round(z, 1) + 0.0  # no -0.0

"""Task `order`: does a sampler do what it says? On models that are known exactly, and with the numbers it announces.

The cell's model and data play no part: the models are the task's own (`ddim_lab.metrics.exactness`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self, final

import torch
from pydantic import Field, StrictInt

from ddim_lab.config.job import Config
from ddim_lab.config.options import PositiveInt
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.estimates import fit_line
from ddim_lab.metrics.exactness import (
    TARGET,
    Errors,
    Moments,
    OnePoint,
    Watched,
    ddpm_moments,
    errors_on_a_mixture,
    even_in_lambda,
    gaussian_gamma,
    mixture,
    moments_of,
    on_one_point,
    one_thread,
    starts,
)
from ddim_lab.sampler import Ddim, Sampler
from ddim_lab.store import content_key
from ddim_lab.store.records import Tabled, Value
from ddim_lab.tasks.base import Job, Outcome, Task

if TYPE_CHECKING:
    from ddim_lab.schedule import NoiseSchedule
    from ddim_lab.transitions import Gamma

__all__ = ["Order"]

VERSION: Final = 2
"""Raised whenever the same cell would be measured otherwise."""

FINITE_TO: Final = 50
"""Every NFE up to this one is tried."""

TOLERANCE: Final = 0.15
"""An order counts as reached from this much below it."""

FINE: Final = 0.15
"""Steps in lambda must not exceed this at the largest S, or the errors are not in their asymptotic range."""

SURE: Final = 4.5
"""Standard errors that a moment may be off: of five moments one in 30,000 runs is, by chance."""

ROUNDING: Final = {torch.float64: 1e-11, torch.float32: 2e-5}
"""Errors that are not fitted, since rounding may be in them: a hundred times what it does to a walk."""

ALIKE: Final = {torch.float64: 1e-10, torch.float32: 1e-5}
"""What images of one batch and of another may differ by."""

EXACT: Final = {torch.float64: 1e-6, torch.float32: 1e-3}
"""What a walk on a single point may be off by."""

BETWEEN: Final = 1e-2
"""What a state may be off by on a single point where t lies between whole timesteps, whose level is a convention."""

FEWEST: Final = 3
"""Errors that an order is fitted to, at least."""

SECTION: Final = "Does it do what it says?"
CHECKS: Final = "On exact models"
CONVERGENCE: Final = "Convergence to the ODE's solution"


@final
@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `holds` is None where it does not apply."""

    name: str
    column: str
    holds: bool | None
    found: str

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return "not applicable"
        return "holds" if self.holds else f"fails: {self.found}"


@final
class Order(Task):
    """conf/task/order: errors over NFE, the order they fall with, and what else a sampler announces."""

    reads_images: ClassVar[bool] = False
    samples_model: ClassVar[bool] = False

    name: Literal["order"]
    steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    fitted_from: PositiveInt
    starts: Annotated[StrictInt, Field(ge=2)]
    draws: Annotated[StrictInt, Field(ge=100)]

    def check(self, config: Config) -> None:
        if config.sampler.timesteps is not None:
            raise ConfigError("task=order looks at many numbers of steps, and sampler.timesteps lists one: drop it")
        if len({steps for steps in self.steps if steps >= self.fitted_from}) < FEWEST:
            raise ConfigError(
                f"task.steps needs {FEWEST} different numbers from task.fitted_from={self.fitted_from} on"
            )
        if max(self.steps) > (most := config.build_schedule().num_timesteps):
            raise ConfigError(f"task.steps={max(self.steps)} exceeds the schedule's {most} timesteps")
        for steps in (min(steps for steps in self.steps if steps >= self.fitted_from), max(self.steps)):
            try:
                _walk(config, steps)
            except ValueError as error:
                raise ConfigError(f"task.steps={steps}: {error}") from None

    def own_gamma(self, schedule: NoiseSchedule) -> Gamma:
        """Of the Gaussian, on which the moments are looked at."""
        return gaussian_gamma(schedule)

    def forwards(self, config: Config) -> int:
        return 0  # of the cell's model

    def identity(self, job: Job) -> dict[str, Any]:
        """Beyond the task's own settings: how it measures, and the walks of other numbers of steps than the cell's."""
        return {"version": VERSION, "walks": content_key({"of": [walk.recipe() for walk in self._walks(job)]})}

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Walk on the exact models; writes no file."""
        clock = time.perf_counter()
        sampler, walks = job.sampler, list(self._walks(job))
        noisy = walks[-1].is_random
        x_T = starts(self.starts)
        with one_thread():
            errors = [] if noisy else [errors_on_a_mixture(walk, x_T) for walk in walks]
            order = _fitted(errors, self.fitted_from, sampler.formula.dtype)
            checks = [
                self._order(walks[-1], errors, order),
                self._moments(job)
                if noisy and not sampler.formula.noise_is_dear
                else Check("moments", "mean, covariance", None, ""),
                *_walked(job, sampler),
            ]
        told = [check for check in checks if check.holds is not None]
        failed = [check for check in told if not check.holds]
        return Outcome(
            nfe=sampler.nfe,
            headline=(f"order {order[0]:.2f} ± {order[1]:.2f}{_unjudged(checks[0])}, " if order else "")
            + (f"{len(failed)} of {len(told)} checks fail: " if failed else f"all {len(told)} checks hold")
            + "; ".join(f"{check.column}: {check.found}" for check in failed),
            values=[
                *_convergence(sampler, errors, order, self.fitted_from),
                *(Value(name=check.name, value=check.verdict, column=check.column, **_CHECKED) for check in checks),
                Value(
                    name="checks_failed",
                    value=len(failed),
                    heading="Checks that fail",
                    facts=f"of {len(told)} that apply" if len(told) == len(checks) else "of those that apply",
                    against=None,
                    better="lower",
                ),
            ],
            phases={"walks": time.perf_counter() - clock},
            tables=[_table(errors)] if errors else [],
        )

    def _walks(self, job: Job) -> Iterator[Sampler]:
        """The sampler at each of `steps`, but for those that are too few for it."""
        for steps in sorted(set(self.steps)):
            with contextlib.suppress(ValueError):
                yield _walk(job.config, steps)

    def _order(self, walk: Sampler, errors: Sequence[Errors], order: tuple[float, float] | None) -> Check:
        """Judged where all steps are small, and states at the level that the model is told."""
        claimed = walk.formula.claimed_order(walk.transitions)
        coarse = bool(errors) and errors[-1].largest_step > FINE
        few = len(_above_rounding(errors, walk.formula.dtype, self.fitted_from)) < FEWEST
        if claimed is None or order is None or coarse or few:
            return Check("order_reached", "order", None, f"{order[0]:.2f}" if order else "")
        off = on_one_point(walk, starts(2)).off_level
        holds = order[0] >= claimed - TOLERANCE if off is not None and off <= EXACT[walk.formula.dtype] else None
        return Check("order_reached", "order", holds, f"{order[0]:.2f}, said {claimed}")

    def _moments(self, job: Job) -> Check:
        """Mean and covariance of a Gaussian's samples: exactly known of the DDIM family; others near the target."""
        sampler = job.sampler
        if isinstance(sampler.formula, Ddim) and sampler.formula.clip == "none":
            exact = ddpm_moments(sampler.schedule, sampler.transitions)
            off = _furthest(sampler, exact, self.draws)
            return Check("moments", "mean, covariance", off <= SURE, f"{off:.1f} standard errors from the exact ones")
        steps = min(steps for steps in self.steps if steps >= self.fitted_from), max(self.steps)
        draws = self.draws if sampler.formula.noise_from is None else self.draws // 10  # a generator for each
        few, many = (_furthest(_walk(job.config, count), TARGET, draws) for count in steps)
        told = f"{many:.1f} standard errors from the target at S = {steps[1]}, {few:.1f} at {steps[0]}"
        return Check("moments", "mean, covariance", many <= max(SURE, few / 2.0), told)


def _walk(config: Config, steps: int) -> Sampler:
    """The cell's walk with that many steps; of a formula that chooses its timesteps, one that must visit them all.

    Such a formula can't be put on a grid on which all steps shrink together. The schedule is made to be that grid,
    evenly spaced in lambda, of as many timesteps as steps; or of one more, where it visits one twice for leaving out
    the last.
    """
    found = config.build_sampler(steps=steps)
    if found.formula.visits is None:
        return found
    walks = []
    for total in (steps, steps + 1):
        schedule = even_in_lambda(found.schedule, total)
        with contextlib.suppress(ValueError):  # some can't take as many steps as there are timesteps
            walks.append(Sampler(schedule, steps, config.sampler.eta, formula=config.sampler.build_formula()))
            if len({transition.t for transition in walks[-1].transitions}) >= steps:
                return walks[-1]
    if not walks:
        raise ValueError(f"{found.formula} can't visit all timesteps of a schedule")
    return walks[0]


def _furthest(sampler: Sampler, expected: Moments, draws: int) -> float:
    return max(map(abs, moments_of(sampler, draws).deviations(expected, draws)))


_CHECKED: Final[dict[str, Any]] = {
    "section": SECTION,
    "table": CHECKS,
    "notes": (
        f"order: measured at least what its authors say less {TOLERANCE}. Not applicable with noise, where they say"
        f" nothing, where the largest step in lambda at the largest S exceeds {FINE}, which is not asymptotic yet,"
        " where rounding leaves fewer than three errors to fit, or where states are off their level.",
        "mean, covariance: of a Gaussian's samples, what the DDIM family's steps make of it exactly; of other samplers"
        " the target, at the largest S, or half as far from it as where the fit begins."
        f" {SURE} standard errors are granted.",
        "noise left, levels: of data that are a single point images are that point, and each state is where"
        " it should be at the t that the model is told with it, to 1e-6 of the images' half range (1e-3 where a sampler"
        f" computes in float32, {BETWEEN:g} where t lies between whole timesteps, whose level is a convention); where"
        " noise is added, its variance is, as far as 256 samples tell.",
        "timesteps, NFE: those announced are those that the model was asked for.",
        "batch, repeats: the same images one by one, to 1e-10 (1e-5 in float32), and once more, bitwise.",
        "finite: the images are.",
        f"All but order, mean and covariance, batch and repeats are looked at for every NFE up to {FINITE_TO}, and told"
        " of for the fewest steps at which they fail.",
    ),
}


def _unjudged(order: Check) -> str:
    return " (not judged)" if order.holds is None else ""


def _fitted(errors: Sequence[Errors], fitted_from: int, dtype: torch.dtype) -> tuple[float, float] | None:
    """The order and its standard error: minus the slope of log error over log NFE, where rounding is far below.

    Where rounding leaves fewer than three errors from `fitted_from` on, the last four above it.
    """
    points = _above_rounding(errors, dtype, fitted_from)
    if len(points) < FEWEST and dtype != torch.float64:
        points = _above_rounding(errors, dtype)[-FEWEST - 1 :]
    line = fit_line([math.log(e.nfe) for e in points], [math.log(e.before) for e in points])
    return None if line is None or line.slope_se is None else (-line.slope, line.slope_se)


def _above_rounding(errors: Sequence[Errors], dtype: torch.dtype, steps_from: int = 1) -> list[Errors]:
    return [e for e in errors if e.steps >= steps_from and ROUNDING[dtype] < e.before < math.inf]


def _convergence(
    sampler: Sampler, errors: Sequence[Errors], order: tuple[float, float] | None, fitted_from: int
) -> list[Value]:
    if not errors or order is None:
        return []
    shared: dict[str, Any] = {
        "section": SECTION,
        "table": CONVERGENCE,
        "notes": (
            "error: root mean square, on a mixture of three Gaussians, to the probability-flow ODE's solution from the"
            " same x_T, at the last level before the image.",
            f"order: minus the slope of log error over log NFE from S = {fitted_from} on, ± its standard"
            " error by the scatter about the line.",
            "last step: to alpha_bar = 1, by itself: from the walk's own state, to the ODE's solution from there. It is"
            " of first order by nature.",
            "largest step: in lambda, the half log-SNR, at the largest S.",
        ),
    }
    ten = next((e for e in errors if e.steps == 10), errors[0])
    last = errors[-1]
    claimed = sampler.formula.claimed_order(sampler.transitions)
    return [
        Value(name="order_claimed", value=claimed, column="order said", **shared),
        Value(name="order", value=order[0], se=order[1], column="order", **shared),
        Value(name="largest_step", value=last.largest_step, column="largest step", **shared),
        Value(name="error_before_few", value=ten.before, column=f"error, S = {ten.steps}", **shared),
        Value(name="error_before_many", value=last.before, column=f"error, S = {last.steps}", **shared),
        Value(name="error_last_step_few", value=ten.last_step, column=f"last step, S = {ten.steps}", **shared),
        Value(name="error_last_step_many", value=last.last_step, column=f"last step, S = {last.steps}", **shared),
    ]


def _table(errors: Sequence[Errors]) -> Tabled:
    return Tabled(
        title="Errors over NFE",
        drawn=("NFE", "before the last step"),
        columns=("S", "NFE", "before the last step", "of the last step", "image", "largest step in lambda"),
        rows=tuple((e.steps, e.nfe, e.before, e.last_step, e.image, e.largest_step) for e in errors),
    )


def _walked(job: Job, sampler: Sampler) -> list[Check]:
    """What it announces, and what every sampler must do: of this walk, and of those up to FINITE_TO forwards."""
    dtype, x_T = sampler.formula.dtype, starts(6)
    images = sampler.sample(mixture(sampler.schedule), x_T)
    one_by_one = torch.cat(
        [sampler.sample(mixture(sampler.schedule), x_T[i : i + 1], indices=torch.tensor([i])) for i in range(len(x_T))]
    )
    apart = float((one_by_one - images).abs().max())
    again = torch.equal(images, sampler.sample(mixture(sampler.schedule), x_T))
    walks = [_Looked.at(walk) for walk in {walk.nfe: walk for walk in (*_up_to(job, FINITE_TO), sampler)}.values()]
    exact = EXACT[dtype]

    def check(name: str, column: str, fails: Callable[[_Looked], str | None], applies: bool = True) -> Check:
        found = [(walk, told) for walk in walks if (told := fails(walk)) is not None] if applies else []
        if not found:
            return Check(name, column, True if applies else None, "")
        (first, told), last = found[0], found[-1][0]
        many = f", and at {len(found) - 1} more of {len(walks)} up to S = {last.steps}" if len(found) > 1 else ""
        return Check(name, column, False, f"S = {first.steps}: {told}{many}")

    return [
        check("noise_left", "noise left", lambda walk: walk.left(exact)),
        check(
            "levels",
            "levels",
            lambda walk: walk.off(exact if walk.whole else BETWEEN),
            walks[0].point.off_level is not None,
        ),
        check("timesteps_visited", "timesteps", _Looked.astray),
        check("nfe_done", "NFE", _Looked.miscounted),
        Check("batch_alike", "batch", apart <= ALIKE[dtype], f"{apart:.1e} apart"),
        Check("repeats", "repeats", again, "another image"),
        check("finite", "finite", lambda walk: None if walk.finite else "infinite or NaN"),
    ]


@final
@dataclass(frozen=True)
class _Looked:
    """What was seen of a walk of `steps`."""

    steps: int
    said: int
    done: int
    whole: bool
    strange: tuple[float, ...]
    finite: bool
    point: OnePoint

    @classmethod
    def at(cls, sampler: Sampler) -> Self:
        model, x_T = Watched(sampler), starts(2)
        images = sampler.sample(model, x_T)
        # Noise of another size than the posterior's is chosen for other data than one point.
        formula = sampler.formula
        levels = sampler.variance == "posterior" and formula.keeps_levels and not formula.noise_is_dear
        return cls(
            steps=sampler.steps,
            said=sampler.nfe,
            done=len(model.asked),
            whole=sampler.whole,
            strange=tuple(sorted(set(model.asked) ^ model.announced)),
            finite=bool(torch.isfinite(images).all()),
            point=on_one_point(sampler, starts(256) if sampler.is_random and levels else x_T, levels=levels),
        )

    def astray(self) -> str | None:
        return ", ".join(f"{t:g}" for t in self.strange[:3]) or None

    def miscounted(self) -> str | None:
        return None if self.done == self.said else f"{self.done}, said {self.said}"

    def left(self, most: float) -> str | None:
        """What is too much of the noise; an image that is not finite is told of elsewhere."""
        return f"{self.point.noise_left:.1e}" if most < self.point.noise_left < math.inf else None

    def off(self, most: float) -> str | None:
        off, at = self.point.off_level, self.point.off_at
        return f"{off:.1e} at t = {at:g}" if off is not None and most < off < math.inf else None


def _up_to(job: Job, most: int) -> Iterator[Sampler]:
    """The walks that cost 1 to `most` forwards, the fewest steps first; those that it can't take are left out."""
    tried = set()
    for asked in range(1, most + 1):
        try:
            sampler = job.config.build_sampler(steps=job.config.steps_for(asked))
            _ = sampler.is_random  # or it fails
        except (ConfigError, ValueError):  # fewer than it can do
            continue
        if sampler.nfe not in tried:
            tried.add(sampler.nfe)
            yield sampler

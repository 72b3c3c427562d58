"""Any scheduler of the installed diffusers as a `Formula`: its own timesteps and steps, on our betas, x_T and noise."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final, Self, final

import numpy as np
import torch
from torch import Tensor

from ddim_lab.errors import one_line
from ddim_lab.sampler import Draw, Formula, Predict, State
from ddim_lab.schedule import CLEAN, NoiseSchedule, to_timestep
from ddim_lab.schedulers.classes import ASTRAY, OF_THE_PROCESS, OTHERS, claimed_order, process_of
from ddim_lab.transitions import Transition

__all__ = ["DiffusersScheduler", "Walk", "scheduler_names"]

SEEDED: Final = "a generator for each sample"


def scheduler_names() -> list[str]:
    """Names of all scheduler classes that the installed diffusers exports, whether or not they can run here."""
    import diffusers

    return sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))


@final
class DiffusersScheduler(Formula):
    """A scheduler of the installed diffusers, with its own timesteps and steps.

    Its betas are the schedule's and its model predicts eps, whatever the network predicts. Where its walk is random it
    takes z(seed, sample, timestep) of `ddim_lab.noise` if its `step` has the argument `variance_noise`; if not, a
    `torch.Generator` for each sample, whose seed is read off the same noise at t = T, which no walk visits. The state
    is what the model is given, `scale_model_input` of theirs. Their coefficients are float32.

    Bound to a schedule and a number of steps by `Sampler`; a probe on two pixels finds its timesteps and faults first.

    Args:
        scheduler: the class's name, as "UniPCMultistepScheduler".
        options: arguments of the class, but those that say of which process it is.
        eta: given to `step` where that takes one.

    Raises:
        ValueError: there is no such class, it walks no discrete variance-preserving process from noise to image, it
            takes no such option or another value instead; one line.
    """

    dtype = torch.float32

    def __init__(self, scheduler: str, options: Mapping[str, Any] | None = None, eta: float = 0.0) -> None:
        self.scheduler: Final = scheduler
        self.options: Final = dict(options or {})
        self.eta: Final = eta
        kind = _class_of(scheduler)
        _check_options(scheduler, kind, self.options)
        if eta and "eta" not in _arguments(kind.step):
            raise ValueError(f"sampler.eta={eta:g}: the step of diffusers' {scheduler} takes none; drop it")
        self._bound: Walk | None = None

    @classmethod
    def shipped(cls, scheduler: str, config: Mapping[str, Any], options: Mapping[str, Any], eta: float) -> Self:
        """As a scheduler_config.json has it; entries that the class does not know are left out, as by diffusers.

        Args:
            scheduler: the class's name.
            config: the file's entries.
            options: in the place of its entries.
            eta: as in `DiffusersScheduler`.
        """
        known = inspect.signature(_class_of(scheduler).__init__).parameters
        settings = {name: value for name, value in config.items() if name in known and not _of_the_process(name)}
        return cls(scheduler, {**settings, **options}, eta)

    def bind(self, schedule: NoiseSchedule, steps: int, timesteps: Sequence[float] | None = None) -> DiffusersScheduler:
        bound = DiffusersScheduler(self.scheduler, self.options, self.eta)
        given = None if timesteps is None else json.dumps([to_timestep(t) for t in timesteps])
        settings = {**betas_of(schedule), **self.options}
        bound._bound = _walk_of(self.scheduler, json.dumps(settings), self.eta, steps, given)
        return bound

    @property
    def visits(self) -> Sequence[float] | None:
        return None if self._bound is None else self._bound.timesteps

    @property
    def noise_from(self) -> str | None:
        own = self.is_random(()) and "variance_noise" not in _arguments(_class_of(self.scheduler).step)
        return SEEDED if own else None

    @property
    def noise_is_dear(self) -> bool:
        return "noise_sampler_seed" in _arguments(_class_of(self.scheduler).__init__)

    def is_random(self, transitions: Sequence[Transition]) -> bool:
        return self._bound is not None and self._bound.random

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        raise NotImplementedError("its steps are taken in walks alone")

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        return None if self.is_random(transitions) else claimed_order(self.scheduler, self.options)

    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        assert self._bound is not None, "a Sampler binds it"
        yield from self._bound.states(predict, x_T, draw)

    def recipe(self) -> dict[str, Any]:
        from diffusers import __version__

        steps = {} if self._bound is None else {"steps": self._bound.steps}
        return {
            "name": "diffusers",
            "scheduler": self.scheduler,
            "options": self.options,
            "eta": self.eta,
            "version": __version__,
            **steps,
        }

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"diffusers' {self.scheduler}({f'eta={self.eta:g}' if self.eta else ''}{settings})".replace("(, ", "(")


@final
@dataclass(frozen=True)
class Walk:
    """A scheduler with its settings on a number of steps, or on timesteps.

    Attributes:
        name: of the class.
        settings: its arguments.
        eta: as `DiffusersScheduler`.
        steps: S, as given to its `set_timesteps`.
        given: the timesteps given to it instead.
        timesteps: at which it asks the model, in order.
        random: whether its images depend on more than x_T.
    """

    name: str
    settings: Mapping[str, Any]
    eta: float
    steps: int
    given: Sequence[float] | None
    timesteps: tuple[float, ...] = ()
    random: bool = True

    def scheduler(self, device: torch.device) -> Any:
        """A new scheduler, its timesteps set."""
        made = _class_of(self.name)(**self.settings, prediction_type="epsilon")
        if self.given is None:
            made.set_timesteps(self.steps, device=device)
        else:
            made.set_timesteps(timesteps=list(self.given), device=device)
        return made

    def states(self, predict: Predict, x_T: Tensor, draw: Draw) -> Iterator[State]:
        """The states, as `Formula.walk`; x as the model is given it."""
        scheduler = self.scheduler(x_T.device)
        accepted = _arguments(scheduler.step)
        named = self.random and "variance_noise" in accepted
        settings: dict[str, Any] = {"eta": self.eta} if "eta" in accepted else {}
        if self.random and not named:
            seeds = _seeds(draw(float(len(scheduler.betas)), x_T.new_empty(len(x_T), 1, dtype=torch.float64)))
            if hasattr(scheduler, "noise_sampler_seed"):  # a Brownian path for each sample
                scheduler.noise_sampler_seed = seeds
            elif "generator" in accepted:
                settings["generator"] = [torch.Generator(x_T.device).manual_seed(seed) for seed in seeds]
        x, visited, predicted = x_T * scheduler.init_noise_sigma, Counter[float](), None
        for given in scheduler.timesteps:
            t = to_timestep(float(given))
            state = scheduler.scale_model_input(x, given)
            yield State(t, state, predicted)
            eps = predict(state, t)
            if named:  # no noise is taken twice where a timestep is
                settings["variance_noise"] = draw(t + visited[t] * 2.0**-16, x)
            visited[t] += 1
            x = scheduler.step(eps, given, x, **settings).prev_sample
            predicted = functools.partial(_x0, scheduler.alphas_cumprod, t, state, eps)
        yield State(CLEAN, x, predicted)


def betas_of(schedule: NoiseSchedule) -> dict[str, Any]:
    """A schedule in diffusers' words: by name where it has one that makes the same betas, or as a list."""
    total = schedule.num_timesteps
    start, end = (float(f"{beta:.12g}") for beta in schedule.betas[[0, -1]])
    named = {"linear": NoiseSchedule.linear, "scaled_linear": NoiseSchedule.scaled_linear}
    for name, make in named.items():
        with contextlib.suppress(ValueError):  # ends that no schedule of that name has
            if not np.array_equal(make(total, start, end).betas, schedule.betas):
                continue
            return {"num_train_timesteps": total, "beta_schedule": name, "beta_start": start, "beta_end": end}
    return {"num_train_timesteps": total, "trained_betas": schedule.betas.tolist()}


def _x0(alphas_cumprod: Tensor, t: float, state: Tensor, eps: Tensor) -> Tensor:
    """The image that eps stands for; alpha_bar of the nearest whole timestep."""
    ab = alphas_cumprod[round(t)].to(state)
    return (state - (1.0 - ab).sqrt() * eps) / ab.sqrt()


def _seeds(z: Tensor) -> list[int]:
    """A seed for each sample: the bits of its noise, float64 [B, 1]."""
    bits = z.cpu().view(torch.int64).flatten() & (2**63 - 1)
    return [int(seed) for seed in bits]


# -- what runs here ------------------------------------------------------------------------------------------------


@functools.cache
def _class_of(name: str) -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # what it warns of is refused here, or is nobody's business
    names = scheduler_names()
    if name not in names:
        near = get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else "a name such as DDIMScheduler is needed"
        raise ValueError(f"sampler.scheduler={name}: diffusers {diffusers.__version__} has no such scheduler; {hint}")
    refused = f"sampler.scheduler={name} can't run here"
    if (process := process_of(name)) in OTHERS:
        raise ValueError(f"{refused}: it is of {process}")
    if name in ASTRAY:
        raise ValueError(f"{refused}: it {ASTRAY[name]}")
    found = getattr(diffusers, name)
    if backends := getattr(found, "_backends", None):  # diffusers' stand-in for a class that needs another package
        missing = [backend for backend in backends if backend != "torch"]
        raise ValueError(f"{refused}: it needs {', '.join(missing)}; pip install {' '.join(missing)}")
    if process is None:  # a class that is newer than the tables
        if lacking := sorted({"num_train_timesteps", "trained_betas"} - _arguments(found.__init__)):
            raise ValueError(f"{refused}: it takes no {lacking[0]}, and so walks another process")
        if lacking := [part for part in ("set_timesteps", "scale_model_input", "step") if not hasattr(found, part)]:
            raise ValueError(f"{refused}: it has no {lacking[0]}")
    return found


def _arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _of_the_process(option: str) -> bool:
    return option in OF_THE_PROCESS or option.startswith(("flow_", "use_flow_"))


PLAIN: Final = (bool, int, float, str, type(None))


def _check_options(name: str, kind: Any, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(kind.__init__).parameters
    for option, value in options.items():
        place = f"sampler.options.{option}"
        if _of_the_process(option):
            raise ValueError(
                f"{place}: it says of which process a scheduler is, which the schedule and model do; drop it"
            )
        if option not in parameters or option in ("self", "args", "kwargs"):
            near = get_close_matches(option, [*parameters], 1)
            raise ValueError(
                f"{place}: diffusers' {name} has no such option" + (f"; did you mean {near[0]}?" if near else "")
            )
        annotation = str(parameters[option].annotation)
        if "Callable" in annotation or "Path" in annotation or "path" in option or "file" in option:
            raise ValueError(f"{place}: a function or a file can't be given here; drop it")
        if not all(isinstance(each, PLAIN) for each in (value if isinstance(value, list | tuple) else [value])):
            raise ValueError(f"{place}: must be a number, a word, true, false, null or a list of these")


# -- the probe -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _walk_of(name: str, settings: str, eta: float, steps: int, given: str | None) -> Walk:
    """The walk with what a probe on two pixels finds of it: its timesteps, and whether it is random.

    Raises:
        ValueError: it can't be taken; one line.
    """
    walk = Walk(name, json.loads(settings), eta, steps, None if given is None else json.loads(given))
    at = f"{steps} steps" if given is None else f"sampler.timesteps={given}"
    if given is not None and "timesteps" not in _arguments(_class_of(name).set_timesteps):
        raise ValueError(f"sampler.timesteps: diffusers' {name} takes no list of timesteps; drop it")
    global_state = torch.get_rng_state()
    try:
        made = walk.scheduler(torch.device("cpu"))
        timesteps = tuple(to_timestep(float(t)) for t in made.timesteps)
        images = [_probe(walk, made.alphas_cumprod, seed) for seed in (0, 0, 1)]
    except Exception as error:
        raise ValueError(f"diffusers' {name} fails at {at}: {one_line(error)}") from error
    finally:
        drawn = not torch.equal(torch.get_rng_state(), global_state)
        torch.set_rng_state(global_state)
    for option, value in walk.settings.items():
        taken = made.config.get(option, value)
        if option in OF_THE_PROCESS or taken == value or (isinstance(value, list) and list(taken) == value):
            continue
        raise ValueError(f"sampler.options.{option}={value}: diffusers' {name} takes {taken} for it; give that")
    if drawn or not torch.equal(images[0], images[1]):
        raise ValueError(f"diffusers' {name} draws from torch's global generator: its images could not be repeated")
    return Walk(name, walk.settings, eta, steps, walk.given, timesteps, not torch.equal(images[0], images[2]))


def _probe(walk: Walk, alphas_cumprod: Tensor, seed: int) -> Tensor:
    """An image by the exact eps of N(0, 1/4); NaN counts as a number here."""

    def predict(x: Tensor, t: float) -> Tensor:
        ab = float(alphas_cumprod[round(t)])
        return torch.mul(x, (1.0 - ab) ** 0.5 / (0.25 * ab + 1.0 - ab))

    def draw(t: float, like: Tensor) -> Tensor:
        name = int(np.float64(t).view(np.int64)) ^ seed
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(name & (2**63 - 1)), dtype=like.dtype)

    with torch.no_grad():
        *_, last = walk.states(predict, torch.tensor([[[[0.7, -1.1]]]]), draw)
    return torch.nan_to_num(last.x)

"""Any scheduler of the installed diffusers as a `Formula`: its own timesteps and steps, on our betas, x_T and noise."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any, Final, Self, final

import numpy as np
import torch
from torch import Tensor

from ddim_lab.diffusion import x0_from_eps
from ddim_lab.errors import one_line
from ddim_lab.sampler import Draw, Formula, Predict, State
from ddim_lab.schedule import CLEAN, NoiseSchedule, to_timestep
from ddim_lab.schedulers.classes import ASTRAY, OF_THE_PROCESS, OTHERS, claimed_order, process_of
from ddim_lab.transitions import Transition

__all__ = ["DiffusersScheduler", "Walk", "scheduler_names"]

SEEDED: Final = "a generator for each sample"
BROWNIAN: Final = "a Brownian path for each sample"


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

    Bound to a schedule and a number of steps by `Sampler`. Whether its walk is random, fails or diverges is found by a
    probe on two pixels, when it is first asked for.

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
        if str(kind_of := self.options.get("variance_type")).startswith("learned"):
            raise ValueError(
                f"{scheduler}: variance_type={kind_of} wants what a network learned beside eps, and is given eps alone:"
                " set sampler=ddpm sampler.variance=learned, or another variance_type"
            )
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
        settings = {
            name: value
            for name, value in config.items()
            if name in known and not _of_the_process(name) and value not in (None, known[name].default)
        }
        _check_options(scheduler, _class_of(scheduler), settings, "scheduler_config.json: ")
        return cls(scheduler, {**settings, **options}, eta)

    def bind(self, schedule: NoiseSchedule, steps: int, timesteps: Sequence[float] | None = None) -> DiffusersScheduler:
        bound = copy.copy(self)
        given = None if timesteps is None else tuple(sorted(map(to_timestep, timesteps), reverse=True))
        settings = json.dumps({**betas_of(schedule), **self.options})
        found = _walk_of(self.scheduler, settings, tuple(self.options), self.eta, steps, given)
        if isinstance(found, str):
            raise ValueError(found)
        bound._bound = found
        return bound

    @property
    def visits(self) -> Sequence[float] | None:
        return None if self._bound is None else self._bound.timesteps

    @property
    def noise_from(self) -> str | None:
        if not self.is_random(()) or "variance_noise" in _arguments(_class_of(self.scheduler).step):
            return None
        return BROWNIAN if self.noise_is_dear else SEEDED

    @property
    def keeps_levels(self) -> bool:
        return "large" not in str(self.options.get("variance_type"))

    @property
    def diverges(self) -> str | None:
        if self._bound is None or self._bound.probed.finite:
            return None
        return f"{self} gives no finite image at {self._bound.at}, not even of a Gaussian: choose other settings"

    @property
    def noise_is_dear(self) -> bool:
        return "noise_sampler_seed" in _arguments(_class_of(self.scheduler).__init__)

    def is_random(self, transitions: Sequence[Transition]) -> bool:
        return self._bound is not None and self._bound.probed.random

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        raise NotImplementedError("its steps are taken in walks alone")

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        return None if self.is_random(transitions) else claimed_order(self.scheduler, self.options)

    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        assert self._bound is not None, "a Sampler binds it"
        yield from self._bound.states(predict, x_T, draw, random=self.is_random(transitions))

    def recipe(self) -> dict[str, Any]:
        from diffusers import __version__

        steps = {} if self._bound is None else {"steps": self._bound.steps}
        other = {"torchsde": version("torchsde")} if self.noise_is_dear else {}
        return {
            "name": "diffusers",
            "scheduler": self.scheduler,
            "options": self.options,
            "eta": self.eta,
            "version": __version__,
            **other,
            **steps,
        }

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"diffusers' {self.scheduler}({f'eta={self.eta:g}' if self.eta else ''}{settings})".replace("(, ", "(")


@final
@dataclass(frozen=True)
class Probe:
    """What two walks on two pixels show: whether images depend on more than x_T, and are finite."""

    random: bool
    finite: bool


@final
@dataclass(frozen=True)
class Walk:
    """A scheduler with its settings on a number of steps, or on timesteps.

    Attributes:
        name: of the class.
        settings: its arguments, as JSON.
        eta: as `DiffusersScheduler`.
        steps: S, as given to its `set_timesteps`.
        given: the timesteps given to it instead.
        timesteps: at which it asks the model, in order.
    """

    name: str
    settings: str
    eta: float
    steps: int
    given: tuple[float, ...] | None
    timesteps: tuple[float, ...] = ()

    @property
    def at(self) -> str:
        """Its steps in words."""
        return f"{self.steps} steps" if self.given is None else f"sampler.timesteps={list(self.given)}"

    @property
    def probed(self) -> Probe:
        """What a probe finds of it.

        Raises:
            ValueError: it can't be taken; one line.
        """
        found = _probed(self)
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def scheduler(self, device: torch.device) -> Any:
        """A new scheduler, its timesteps set."""
        made = _class_of(self.name)(**json.loads(self.settings), prediction_type="epsilon")
        if self.given is None:
            made.set_timesteps(self.steps, device=device)
        else:
            made.set_timesteps(timesteps=list(self.given), device=device)
        return made

    def states(self, predict: Predict, x_T: Tensor, draw: Draw, *, random: bool) -> Iterator[State]:
        """The states, as `Formula.walk`; x as the model is given it, noise where it is random."""
        scheduler = self.scheduler(x_T.device)
        accepted = _arguments(scheduler.step)
        named = random and "variance_noise" in accepted
        settings: dict[str, Any] = {"eta": self.eta} if "eta" in accepted else {}
        if random and not named:
            seeds = _seeds(draw(float(len(scheduler.betas)), x_T.new_empty(len(x_T), 2, dtype=torch.float32)))
            if hasattr(scheduler, "noise_sampler_seed"):  # a Brownian path for each sample
                scheduler.noise_sampler_seed = seeds
            elif "generator" in accepted:
                settings["generator"] = [torch.Generator(x_T.device).manual_seed(seed) for seed in seeds]
        x, visited, predicted = x_T * scheduler.init_noise_sigma, Counter[float](), None
        for given, t in zip(scheduler.timesteps, self.timesteps, strict=True):  # theirs stay on the device
            state = scheduler.scale_model_input(x, given)
            yield State(t, state, predicted)
            eps = predict(state, t)
            if named:  # no noise is taken twice where a timestep is
                settings["variance_noise"] = draw(t + visited[t] * 2.0**-16, x)
            visited[t] += 1
            found = scheduler.step(eps, given, x, **settings)
            x, gone_by = found.prev_sample, getattr(found, "pred_original_sample", None)
            predicted = functools.partial(_x0, scheduler.alphas_cumprod, t, state, eps, gone_by)
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


def _x0(alphas_cumprod: Tensor, t: float, state: Tensor, eps: Tensor, gone_by: Tensor | None) -> Tensor:
    """The image that the step went by, where it says so; or the one that eps stands for."""
    if gone_by is not None:
        return gone_by
    below = int(t)
    logs, weight = alphas_cumprod[below : below + 2].double().log().tolist(), t - below
    return x0_from_eps(state, eps, math.exp(logs[0] if not weight else (1.0 - weight) * logs[0] + weight * logs[1]))


def _seeds(z: Tensor) -> list[int]:
    """A seed for each sample: the bits of its noise, float32 [B, 2], whose last bit no device changes."""
    bits = z.cpu().contiguous().view(torch.int64).flatten() & (2**63 - 1)
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


def _check_options(name: str, kind: Any, options: Mapping[str, Any], place: str = "sampler.options.") -> None:
    parameters = inspect.signature(kind.__init__).parameters
    for option, value in options.items():
        at = f"{place}{option}"
        if _of_the_process(option):
            raise ValueError(f"{at}: it says of which process a scheduler is, which the schedule and model do; drop it")
        if option not in parameters or option in ("self", "args", "kwargs"):
            near = get_close_matches(option, [*parameters], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{at}: diffusers' {name} has no such option{hint}")
        if option == "noise_sampler_seed":
            raise ValueError(f"{at}: seed names the noise; drop it")
        annotation = str(parameters[option].annotation)
        if "Callable" in annotation or "Path" in annotation or "path" in option or "file" in option:
            raise ValueError(f"{at}: a function or a file can't be given here; drop it")
        if not all(isinstance(each, PLAIN) for each in (value if isinstance(value, list | tuple) else [value])):
            raise ValueError(f"{at}: must be a number, a word, true, false, null or a list of these")
        if (needed := _lacking(parameters[option], value)) is not None:
            raise ValueError(f"{at}={value}: must be {needed}")


def _lacking(parameter: inspect.Parameter, value: Any) -> str | None:
    """What a value must be by its parameter, where it is not: one of the words, or of the default's type."""
    words = re.search(r"Literal\[(.*?)\]", str(parameter.annotation))
    if words is not None and repr(value) not in (choices := words[1].replace('"', "'").split(", ")):
        return f"one of {', '.join(choices)}"
    default = parameter.default
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        whole = isinstance(default, int)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and (not whole or value == int(value))
        return None if fits else "a whole number" if whole else "a number"
    return None if not isinstance(default, str) or isinstance(value, str) else "a word"


# -- the probe -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _walk_of(
    name: str, settings: str, options: tuple[str, ...], eta: float, steps: int, given: tuple[float, ...] | None
) -> Walk | str:
    """The walk with its timesteps; or in one line why it can't be taken."""
    walk = Walk(name, settings, eta, steps, given)
    if given is not None and "timesteps" not in _arguments(_class_of(name).set_timesteps):
        return f"sampler.timesteps: diffusers' {name} takes no list of timesteps; drop it"
    try:
        made = walk.scheduler(torch.device("cpu"))
    except Exception as error:
        return f"diffusers' {name} fails at {walk.at}: {one_line(error)}"
    for option in options:
        asked, taken = json.loads(settings)[option], made.config.get(option)
        if taken != asked and not (isinstance(asked, list) and list(taken) == asked):
            return f"sampler.options.{option}={asked}: diffusers' {name} takes {taken} for it; give that"
    timesteps = tuple(to_timestep(float(t)) for t in made.timesteps)
    total = len(made.betas)
    if astray := [t for t in timesteps if not 0 <= t <= total - 1]:
        return f"diffusers' {name} visits t = {astray[0]:g} at {walk.at}, and the schedule has 0 to {total - 1}"
    if given is not None and sorted(set(timesteps), reverse=True) != list(dict.fromkeys(given)):
        return f"sampler.timesteps={list(given)}: diffusers' {name} takes {list(timesteps)} for them; give others"
    return replace(walk, timesteps=timesteps)


@functools.lru_cache(maxsize=4096)
def _probed(walk: Walk) -> Probe | str:
    """What a probe on two pixels finds; or in one line why the walk can't be taken."""
    global_state = torch.get_rng_state()
    try:
        alphas_cumprod = walk.scheduler(torch.device("cpu")).alphas_cumprod
        first, second = (_probe(walk, alphas_cumprod, seed) for seed in (0, 1))
        drawn = not torch.equal(torch.get_rng_state(), global_state)
    except Exception as error:
        return f"diffusers' {walk.name} fails at {walk.at}: {one_line(error)}"
    finally:
        torch.set_rng_state(global_state)
    if drawn:
        return f"diffusers' {walk.name} draws from torch's global generator: its images could not be repeated"
    finite = bool(torch.isfinite(first).all())
    return Probe(random=not finite or not torch.equal(first, second), finite=finite)


def _probe(walk: Walk, alphas_cumprod: Tensor, seed: int) -> Tensor:
    """An image by the exact eps of N(0, 1/4)."""

    def predict(x: Tensor, t: float) -> Tensor:
        ab = float(alphas_cumprod[round(t)])
        return torch.mul(x, (1.0 - ab) ** 0.5 / (0.25 * ab + 1.0 - ab))

    def draw(t: float, like: Tensor) -> Tensor:
        name = int(np.float64(t).view(np.int64)) ^ seed
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(name & (2**63 - 1)), dtype=like.dtype)

    with torch.no_grad():
        *_, last = walk.states(predict, torch.tensor([[[[0.7, -1.1]]]]), draw, random=True)
    return last.x

"""One audit from what was asked to its record: subject, claims, plan, trials, what follows."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import final

from ddim_lab.config.job import Config
from ddim_lab.config.study import PublishedConfig
from ddim_lab.console import duration, show_progress
from ddim_lab.conventions.explanation import explain, read_claims
from ddim_lab.conventions.factors import SCORING, Subject, of_network, scoring
from ddim_lab.conventions.passes import Cost, Passes, Real
from ddim_lab.conventions.protocol import PLAIN, Factor
from ddim_lab.conventions.records import Audited, Claim, Tried, Untried
from ddim_lab.conventions.sampling import CONVENTIONS
from ddim_lab.conventions.source import FileSource, Source
from ddim_lab.conventions.trials import PAIRS_AT_LEAST, Point, Trials
from ddim_lab.data.base import load_data
from ddim_lab.data.images import ImageData
from ddim_lab.data.samples import Samples, read_samples, shape_in_words
from ddim_lab.device.runtime import Runtime
from ddim_lab.errors import ConfigError
from ddim_lab.jobs.compose import quoted
from ddim_lab.jobs.plan import check_outputs, checked_config
from ddim_lab.jobs.run import describe, environment
from ddim_lab.metrics.features import Features, feature_network, obtain_features
from ddim_lab.metrics.references import fits, read_moments
from ddim_lab.models.obtain import obtain_model, with_batch_size
from ddim_lab.score import reference_in
from ddim_lab.store import Store
from ddim_lab.store.housekeeping import working
from ddim_lab.tasks.base import Job

__all__ = ["Asked", "carry_out"]


@final
@dataclass(frozen=True)
class Asked:
    """What is asked: the arguments of `ddim_lab.audit.audit`, and whether the plan is all that is wanted."""

    path: Path | None = None
    options: tuple[str, ...] = ()
    claimed: str | None = None
    claimed_samples: int | None = None
    paper: str | None = None
    reference: Path | None = None
    factors: tuple[str, ...] | None = None
    budget: float | None = None
    plan_only: bool = False
    command: str = ""


def carry_out(asked: Asked, say: Callable[[str], None] = lambda text: None) -> Audited:
    """The audit.

    Args:
        asked: what is asked.
        say: is given what the user should read before and during the work, a line at a time.

    Raises:
        ConfigError: something of it can't be used; one line.
    """
    began = time.monotonic()
    steps, options = _steps(asked)
    configs = [checked_config([quoted(text) for text in [*options, *one]]) for one in steps]
    config = configs[0]
    show_progress(config.progress)
    store, runtime = Store(Path(config.outputs_dir)), Runtime.resolve(config.runtime)
    check_outputs(store)
    data = load_data(config.data)
    samples = None if asked.path is None else read_samples(asked.path)
    claims = _claims(asked, configs, config.num_samples if samples is None else len(samples.images))
    variants = feature_network(config.metrics.networks[0]).variants(data, store)
    _check_names(asked.factors, [*SCORING, *of_network(variants, "split"), *(one.factor() for one in CONVENTIONS)])
    with working(store), ExitStack() as stack:
        networks = [obtain_features(network, data, store) for network in config.metrics.networks]
        features = networks[0]
        if asked.paper is not None:
            _check_published(asked.paper, config, features)
        real = _real(asked, config, data, networks)
        if samples is not None:
            _check_shape(samples.name, samples.images.shape, real, config, data)
        if len(networks) > 1:
            say(f"the distance in {features.sees} is audited, the first of metrics.features")
        sources, subject = _sources(samples, configs, data, store, runtime, asked.plan_only, say)
        points = _points(sources, claims, configs)
        teller = next((one for one in networks if one.tells_classes), None)
        stack.enter_context(runtime.applied())
        passes = Passes(features, variants, teller, real, store, runtime.torch_device)
        described = Subject(
            count=sources[0].count,
            channels=sources[0].shape[0],
            keeps_levels=sources[0].keeps_levels and passes.takes_levels,
            reference=real.kind,
            reference_count=None if real.kind == "statistics" else len(real.images(PLAIN)[0]),
            held_out=len(data.held_out),
            tells_classes=teller is not None,
            num_features=features.num_features,
        )
        factors = [*scoring(described), *of_network(variants, real.kind), *sources[0].factors()]
        chosen = [factor for factor in factors if asked.factors is None or factor.name in asked.factors]
        trials = Trials(points, chosen, passes, features.name)
        for factor in (factor for factor in factors if factor not in chosen):
            why = "--factors does not ask for it"
            trials.untried.append(Untried(factors=(factor.name,), label=factor.label, why_not=why, left=True))
        if not variants and asked.factors is None:
            trials.untried.append(
                Untried(
                    factors=("resize",),
                    label="another resize, or another network",
                    why_not=f"{features.sees} looks at images as they are, and is nobody else's",
                )
            )
        usable = trials.usable()
        plan = trials.cost(usable)
        say(_planned(plan, len(usable), asked.budget))
        if asked.plan_only:
            for line in _plan_table(trials, usable, plan):
                say(line)
        else:
            trials.measure_plain()
            trials.try_singles(usable, None if asked.budget is None else asked.budget - (time.monotonic() - began))
            if claims:
                spent = time.monotonic() - began
                left = max(PAIRS_AT_LEAST, plan.seconds) if asked.budget is None else asked.budget - spent
                trials.try_pairs(claims, left)
        facts = f"features: {_short(features.digest)}"
        if not asked.plan_only:  # its name comes with its statistics, which a plan does not take
            facts += f" · reference: {passes.reference(PLAIN).name}"
        spent = time.monotonic() - began
        return _record(asked, trials, claims, points, features, subject, facts, spent, store.used)


def _steps(asked: Asked) -> tuple[list[list[str]], list[str]]:
    """The overrides of each number of steps that a model is to sample with, and the other options."""
    options = list(asked.options)
    if asked.paper is not None:
        if asked.path is not None:
            raise ConfigError("--paper is for samples of a model, whose steps and sampler are known: drop it, or PATH")
        if asked.claimed is not None:
            raise ConfigError("--paper says what was claimed: drop --claimed")
        options = [f"+experiments={asked.paper}", *options]
    if asked.path is not None:
        return [[]], options
    given = [text.removeprefix("steps=") for text in options if text.startswith("steps=")]
    options = [text for text in options if not text.startswith("steps=")]
    keyed = asked.claimed is not None and ":" in asked.claimed
    if keyed and given:
        raise ConfigError("--claimed says the numbers of steps: drop steps=")
    if keyed:
        assert asked.claimed is not None
        return [[f"steps={part.partition(':')[0].strip()}"] for part in asked.claimed.split(",")], options
    return [[f"steps={each}"] for each in given[-1].split(",")] if given else [[]], options


def _sources(
    samples: Samples | None,
    configs: Sequence[Config],
    data: ImageData,
    store: Store,
    runtime: Runtime,
    plan_only: bool,
    say: Callable[[str], None],
) -> tuple[list[Source], str]:
    """The samples of each number of steps, or those in the file; and what they are, in words."""
    if samples is not None:
        told = f"{samples.name}: {shape_in_words(samples.images.shape)}, SHA-256 {samples.digest[:12]}"
        return [FileSource(samples)], told
    from ddim_lab.tasks.remade import JobSource

    configs = [with_batch_size(config, runtime) for config in configs]

    def training() -> AbstractContextManager[Callable[[dict[str, float], int], None]]:
        if plan_only:
            raise ConfigError(
                "--plan is of samples that a model makes, and this one is not trained yet: train it by python -m"
                " ddim_lab with these options, or leave --plan out"
            )
        say("the model is not stored: it is trained first, which no plan or budget counts")
        return nullcontext(lambda values, step: None)

    model = obtain_model(configs[0], data, runtime, store, training)
    jobs = [Job(config, data, model, runtime, store, f"audit {describe(config)}") for config in configs]
    weights = f"{model.weights} weights" if model.elsewhere or model.fingerprint else model.kind
    named = ", ".join(describe(config) for config in configs)
    return [JobSource(job) for job in jobs], f"{named} of the {configs[0].data.name} model ({weights})"


def _claims(asked: Asked, configs: Sequence[Config], there: int) -> tuple[Claim, ...]:
    """What is claimed, before any work; `there` is N of ours."""
    count = asked.claimed_samples or there
    if asked.claimed_samples is not None and asked.path is not None and ":" in (asked.claimed or ""):
        raise ConfigError("--claimed says of how many images each number is: drop --claimed-samples")
    if asked.claimed is not None:
        claims = read_claims(asked.claimed, count, "N" if asked.path is not None else "S")
        if asked.path is not None and (many := [c for c in claims if c.at and c.num_samples > there]):
            raise ConfigError(f"--claimed: {many[0].at} is more than the {there:,} images of {asked.path.name}")
        return claims
    if asked.claimed_samples is not None:
        raise ConfigError("--claimed-samples says of how many images the claimed number is: give --claimed, too")
    if asked.paper is None:
        return ()
    published = configs[0].study.published
    if published is None:
        raise ConfigError(f"--paper={asked.paper}: the study has no published numbers")
    found = [_published(asked.paper, published, config, count) for config in configs]
    return tuple(found) if len(found) > 1 else (found[0].model_copy(update={"at": ""}),)


def _published(paper: str, published: PublishedConfig, config: Config, count: int) -> Claim:
    """The published number of a configuration."""
    sampler = config.sampler
    ours = sampler.eta, sampler.variance, sampler.clip
    rows = [name for name, row in published.samplers.items() if (row.eta, row.variance, row.clip) == ours]
    by_steps = {int(steps): value for name in rows for steps, value in published.rows[name].items()}
    if not by_steps:
        known = ", ".join(published.rows)
        raise ConfigError(f"--paper={paper} has no row for sampler={sampler.name}: choose one of {known}")
    if config.steps not in by_steps:
        known = ", ".join(map(str, sorted(by_steps)))
        raise ConfigError(f"--paper={paper} has no number at steps={config.steps}: choose of {known}")
    digits = max(_digits(value) for row in published.rows.values() for value in row.values())
    return Claim(
        value=by_steps[config.steps],
        at=f"S = {config.steps}",
        num_samples=published.num_samples or count,
        half_digit=0.5 * 10.0**-digits,
        source=published.source,
    )


def _check_published(paper: str, config: Config, features: Features) -> None:
    """Raise ConfigError where the published numbers are of something else than what is measured here."""
    published = config.study.published
    assert published is not None
    if published.metric.casefold() != features.name.casefold():
        raise ConfigError(
            f"--paper={paper} is of {published.metric}, and this is {features.name}: choose another metrics.features"
        )
    if published.data not in (None, config.data.name):
        raise ConfigError(f"--paper={paper} is of {published.data}, and this is data={config.data.name}")


def _digits(value: float) -> int:
    """Decimals that a number was written with."""
    return len(repr(float(value)).partition(".")[2].rstrip("0"))


def _points(sources: Sequence[Source], claims: Sequence[Claim], configs: Sequence[Config]) -> list[Point]:
    """What is compared: the source of each number of steps, or so many images of the one."""
    if len(sources) == 1 and len(claims) > 1:
        return [Point(claim.at, sources[0], claim.num_samples, claim) for claim in claims]
    if claims:  # of fewer images than ours: FD falls with N, so that as many of ours are taken
        return [
            Point(claim.at, source, min(source.count, claim.num_samples), claim)
            for source, claim in zip(sources, claims, strict=True)
        ]
    named = [""] if len(sources) == 1 else [f"S = {config.steps}" for config in configs]
    return [Point(at, source, source.count, None) for at, source in zip(named, sources, strict=True)]


def _real(asked: Asked, config: Config, data: ImageData, networks: Sequence[Features]) -> Real:
    """What samples are compared with: statistics that fit the network before images, as `ddim_lab.score` does.

    Raises:
        ConfigError: they can't be used.
    """
    metrics, features = config.metrics, networks[0]
    samples: Samples | None = None
    statistics, option = None, "--reference"
    if asked.reference is not None:
        samples, statistics = reference_in(asked.reference)
        if samples is not None and statistics is not None and not fits(statistics, features):
            statistics = None
        alike = [one for one in networks if one.statistics == features.statistics]
        if statistics is not None and samples is None and len(alike) > 1:
            raise ConfigError(
                f"--reference={asked.reference}: its {' and '.join(features.statistics)} are of one network's features,"
                f" and may be of {len(alike)} of those that metrics.features names: name one"
            )
    elif metrics.reference_statistics is not None:
        statistics, option = Path(metrics.reference_statistics), "metrics.reference_statistics"
    if statistics is not None:
        samples = None
        read_moments(statistics, features, option)
    keep = metrics.needs_vectors(metrics.networks[0].name)
    real = Real(data, metrics.reference, samples, statistics, option, keep)
    if samples is not None:
        _check_shape(samples.name, samples.images.shape, real, config, data)
    return real


def _check_shape(name: str, shape: tuple[int, int, int], real: Real, config: Config, data: ImageData) -> None:
    """Raise ConfigError where images do not fit what they are compared with, or the network."""
    of_data = not feature_network(config.metrics.networks[0]).takes_any_images or real.kind == "split"
    wanted = data.shape if of_data else shape if real.samples is None else real.samples.images.shape
    if shape != wanted:
        what = f"data={data.name}" if of_data else "the reference"
        raise ConfigError(
            f"{name} holds images of {shape_in_words(shape)}, {what} of {shape_in_words(wanted)}: they can't be"
            " compared"
        )


def _check_names(names: Sequence[str] | None, factors: Sequence[Factor]) -> None:
    """Raise ConfigError where no convention has one of these names."""
    known = [factor.name for factor in factors]
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            told = f"did you mean {near[0]}?" if near else "--list shows them"
            raise ConfigError(f"--factors: there is no convention {name}; {told}")


def _record(
    asked: Asked,
    trials: Trials,
    claims: Sequence[Claim],
    points: Sequence[Point],
    features: Features,
    subject: str,
    facts: str,
    seconds: float,
    objects: Collection[tuple[str, str]],
) -> Audited:
    count = max(point.count for point in points)
    told = None
    if claims and not asked.plan_only:
        told = explain(
            claims,
            trials.plain,
            trials.singles,
            trials.pairs,
            metric=features.name,
            num_samples=count,
            facts=facts,
            untried=trials.untried,
        )
    fitting = set() if told is None else set(told.explained)
    return Audited(
        command=asked.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        subject=subject,
        metric=features.name,
        facts=facts,
        num_samples=count,
        points=tuple(point.at for point in points),
        claims=tuple(claims),
        plain=trials.plain,
        tried=(*trials.singles, *(pair if pair.factors in fitting else _short_of(pair) for pair in trials.pairs)),
        untried=tuple(trials.untried),
        verdict="" if told is None else told.verdict,
        paragraph="" if told is None else told.paragraph,
        explained=() if told is None else told.explained,
        forwards=trials.forwards,
        seconds=round(seconds, 3),
        environment=environment(),
        objects=tuple(sorted(objects)),
    )


def _short_of(pair: Tried) -> Tried:
    """A pair that explains nothing, without what its errors were taken from: there are hundreds."""
    measured = tuple(one.model_copy(update={"replicates": (), "interactions": ()}) for one in pair.measured)
    return pair.model_copy(update={"measured": measured})


def _short(digest: str) -> str:
    return digest[:12] if len(digest) >= 32 else digest


# -- the plan ---------------------------------------------------------------------------------------------


def _planned(plan: Cost, conventions: int, budget: float | None) -> str:
    images = sum(one.images for one in plan.passes)
    text = (
        f"plan: the distance as the field takes it and with {conventions} conventions changed, one at a time:"
        f" {len(plan.passes)} passes over {images:,} images, {plan.forwards:,} image-forwards and {plan.distances}"
        f" distances, about {duration(plan.seconds)}; what is stored costs nothing"
    )
    return text if budget is None else f"{text}; the budget is {duration(budget)}"


def _plan_table(trials: Trials, factors: Sequence[Factor], whole: Cost) -> list[str]:
    """What the plain distance costs, and what each convention adds to it; passes that several share count in each."""
    plain = trials.cost(None)

    def row(label: str, forwards: int, images: int, seconds: float) -> str:
        return f"  {label:<60} {forwards:>14,} {images:>12,} {duration(seconds):>8}"

    seen = sum(one.images for one in plain.passes)
    rows = [row("as the field takes it", plain.forwards, seen, plain.seconds)]
    for factor in factors:
        cost = trials.cost([factor])
        images = sum(one.images for one in cost.passes) - seen
        rows.append(row(factor.label, cost.forwards - plain.forwards, images, cost.seconds - plain.seconds))
    total = row("all of it, each pass once", whole.forwards, sum(one.images for one in whole.passes), whole.seconds)
    return [f"  {'convention':<60} {'image-forwards':>14} {'images seen':>12} {'time':>8}", *rows, total]

"""The values of a table over seeds: mean and spread over trained networks, over sampling seeds, or over both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ddim_lab.metrics.estimates import Components, variance_components
from ddim_lab.report.numbers import DASH, decimals, number
from ddim_lab.report.series import Row
from ddim_lab.report.tables import Entry, TextTable, ValueTable

_Origin = tuple[str, Any]
"""The network (a digest) and the sampling seed that a value is of."""

_GIVEN = "given"
"""The network of rows that trained none: whatever the training seed says, it is the same one."""

_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


def over_seeds(of: ValueTable) -> TextTable | None:
    """The mean of the table's values over the seeds of each row, ± their standard deviation.

    Another sampling seed is other samples; another training seed is another network, only where something is trained.
    None where no row has two of either, and where the values have no replicates: then it is not the samples that
    decide, or it is not known what of their error all networks share.

    Over sampling seeds the minimum stands beside the mean, under its name: Karras et al., Elucidating the Design Space
    of Diffusion-Based Generative Models (NeurIPS 2022), print the minimum of three.

    Over both, a sampling seed is the same x_T for every network, so seeds are crossed with networks, not nested:
    the spread between networks, that of one network over seeds, and the mean's error are of the two-way layout
    (`variance_components`), over the seeds that every network has.
    """
    if not any(value.replicates for value in of.values.values()):
        return None
    families: dict[str, list[Row]] = {}
    for row in of.table.rows:
        families.setdefault(row.series.family, []).append(row)
    origins = {name: [_origin(row) for row in rows] for name, rows in families.items()}
    known = {name: {each for each in found if each is not None} for name, found in origins.items()}
    families = {name: rows for name, rows in families.items() if len(known[name]) > 1}
    if not families:
        return None
    # a row without a result would have been an origin of its own
    planned = {name: len(known[name]) + origins[name].count(None) for name in families}
    networks = _counts({network for network, _ in known[name]} for name in families)
    seeds = _counts({seed for _, seed in known[name]} for name in families)
    trained, sampled = max(networks) > 1, max(seeds) > 1
    if trained and not sampled:
        networks = sorted(set(planned.values()))
    elif sampled and not trained:
        seeds = sorted(set(planned.values()))
    over = [f"{_or(networks)} training seeds"] if trained else []
    over += [f"{_or(seeds)} sampling seeds"] if sampled else []

    found = {
        (name, column): _values(of, rows, origins[name], column)
        for name, rows in families.items()
        for column in of.table.columns
    }
    spreads = {
        place: statistics.stdev(v for v, _ in pairs.values()) for place, pairs in found.items() if len(pairs) > 1
    }
    means = {place: statistics.fmean(v for v, _ in found[place].values()) for place in spreads}
    places = decimals(means.values(), spreads.values())

    def entry(place: tuple[str, int | None]) -> Entry:
        if place not in spreads:
            return Entry(DASH)
        pairs, of_all = found[place], planned[place[0]]
        mean, spread, more = means[place], spreads[place], []
        if trained and sampled:
            parts = _crossed(pairs)
            if parts is not None:
                mean, spread = parts.mean, math.sqrt(parts.rows + parts.columns + parts.rest)
                within = math.sqrt(parts.columns + parts.rest)
                more += [f"between networks {number(math.sqrt(parts.rows), places)}"]
                more += [f"over seeds {number(within, places)}", f"se of the mean {number(parts.se, places)}"]
        elif trained:
            errors = [se for _, se in pairs.values() if se is not None]
            more += [f"se {number(statistics.fmean(errors), places)}"] if errors else []
        elif of.value.better == "lower":
            least = min(value for value, _ in pairs.values())
            more += [f"minimum of {_WORDS.get(len(pairs), len(pairs))} {number(least, places)}"]
        more += [f"{len(pairs)} of {of_all}"] if len(pairs) != of_all else []
        text = f"{number(mean, places)} ± {number(spread, places)}"
        return Entry(text, mean, aside="; ".join(more) or None)

    return TextTable(
        f"{of.heading} over {' and '.join(over)}",
        of.facts,
        of.table.headings,
        tuple((name, tuple(entry((name, column)) for column in of.table.columns)) for name in families),
        _notes(of, trained, sampled),
        field=of.value.name,
        better=of.value.better,
    )


def _notes(of: ValueTable, trained: bool, sampled: bool) -> tuple[str, ...]:
    if trained and sampled:
        return (
            "Mean ± standard deviation of one value: of one network at one sampling seed, not of the mean. Networks"
            " that were trained from other seeds differ by “between networks”, the sampling seeds of one network by"
            " “over seeds”; both are variance components by the method of moments, and rough where seeds are few. All"
            " networks share the x_T of a sampling seed. The mean's standard error is of both.",
        )
    if trained:
        return (
            "Mean ± standard deviation over networks that were trained from other seeds: of one network's value, not "
            "of the mean. All start from the same x_T, so the sampling error is mostly common to them and not in the "
            "deviation. The mean keeps it: se is the standard error of one value, averaged over networks.",
        )
    spread = (
        "Mean ± standard deviation over sampling seeds: of one value, not of the mean. Another seed is other samples,"
        " so the deviation estimates the standard error of one value over again."
    )
    least = (
        "The minimum of three is what Karras et al. (2022) print. It is chosen for being low, on average 0.85 standard"
        " deviations below the mean: compare it with a minimum of as many, never with a mean."
    )
    return (spread, least) if of.value.better == "lower" else (spread,)


def _origin(row: Row) -> _Origin | None:
    """What the row's cells with a result share; None where there is none, or they don't share it."""
    found = {
        (str(cell.recipe("model", "digest")) if cell.recipe("model", "training_seed") is not None else _GIVEN)
        for cell in row.cells.values()
        if cell.result is not None
    }
    seeds = {cell.labels.get("seed") for cell in row.cells.values()}
    return (found.pop(), seeds.pop()) if len(found) == len(seeds) == 1 else None


def _values(
    of: ValueTable, rows: Sequence[Row], origins: Sequence[_Origin | None], column: int | None
) -> dict[_Origin, tuple[float, float | None]]:
    """Value and standard error in a column, of each origin that has a value there."""
    found = {}
    for row, origin in zip(rows, origins, strict=True):
        cell = row.cells.get(column)
        if origin is not None and cell is not None and (value := of.number_of(cell)) is not None:
            found[origin] = value, of.se_of(cell)
    return found


def _crossed(pairs: Mapping[_Origin, tuple[float, float | None]]) -> Components | None:
    """The components of the seeds that every network has; None where these are no two of either."""
    networks = list(dict.fromkeys(network for network, _ in pairs))
    seeds = [s for s in dict.fromkeys(seed for _, seed in pairs) if all((network, s) in pairs for network in networks)]
    if len(networks) < 2 or len(seeds) < 2:
        return None
    return variance_components([[pairs[network, seed][0] for seed in seeds] for network in networks])


def _counts(sets: Iterable[set[Any]]) -> list[int]:
    return sorted({len(found) for found in sets})


def _or(counts: Sequence[int]) -> str:
    return " or ".join(map(str, counts))

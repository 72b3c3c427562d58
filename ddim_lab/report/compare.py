"""Several sweeps beside each other: one sweep made of their cells, each with the name of the sweep it is from.

Two checkpoints, two machines, two versions of the code. What can't be compared is refused: a Fréchet distance means
nothing beside one of other data, another network, other reference statistics or another N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddim_lab.config.options import user_path
from ddim_lab.report.cells import Cell
from ddim_lab.report.read import ReportError, Sweep
from ddim_lab.store.records import Plan

_WORDS = {"name": "metric", "features": "feature network", "reference": "reference statistics", "num_samples": "N"}
"""What readers call a part of `Value.comparable`, where not by its own name."""


def join_sweeps(sweeps: Mapping[str, Sweep], folder: Path) -> Sweep:
    """The cells of `sweeps` as one sweep, numbered through, labelled with the sweep's name.

    Args:
        sweeps: by name, at least two.
        folder: where the comparison's report will be.

    Raises:
        ReportError: one has no finished cell, or none that the first could be compared with; says why.
    """
    names = list(sweeps)
    for name in names[1:]:
        _refuse_incomparable(names[0], sweeps[names[0]], name, sweeps[name])
    cells = _numbered(sweeps)
    numbers = [sweep.plan.published for sweep in sweeps.values() if sweep.plan.published is not None]
    apart = [of for sweep in sweeps.values() for of in sweep.plan.elsewhere]
    plan = Plan(
        title=f"Comparison of {', '.join(names[:-1])} and {names[-1]}",
        published=numbers[0] if numbers and all(one == numbers[0] for one in numbers) else None,
        elsewhere=tuple(of for at, of in enumerate(apart) if of not in apart[:at]),
        environment=_join_environments({name: sweep.plan.environment for name, sweep in sweeps.items()}),
        cells=tuple(cell.plan for cell in cells),
    )
    joined = Sweep(folder, plan, cells, members=dict(sweeps))
    rules = [sweep.plan.stop for sweep in sweeps.values()]
    if any(rule != rules[0] for rule in rules):
        told = "N of some of these sweeps was come to by looking at them; p is not corrected for that here."
        return replace(joined, plan=plan.model_copy(update={"notes": told}))
    if rules[0] is None:
        return joined
    earlier = [
        _numbered(dict(zip(names, looks, strict=True)))
        for looks in zip(*(sweep.earlier for sweep in sweeps.values()), strict=True)
    ]
    plan = plan.model_copy(update={"stop": rules[0]})
    return replace(joined, plan=plan, earlier=tuple(replace(joined, plan=plan, cells=each) for each in earlier))


def _numbered(sweeps: Mapping[str, Sweep]) -> tuple[Cell, ...]:
    """The cells of all sweeps, numbered through and labelled."""
    cells: list[Cell] = []
    for name, sweep in sweeps.items():
        for cell in sweep.cells:
            labels = {**cell.labels, "sweep": name}
            cells.append(replace(cell, plan=cell.plan.model_copy(update={"number": len(cells), "labels": labels})))
    return tuple(cells)


def _traits(cell: Cell) -> dict[str, Any]:
    """What two cells must share to be compared, as readers call it."""
    traits: dict[str, Any] = {"data": (cell.labels.get("data"), cell.recipe("data", "digest")), "task": cell.plan.task}
    value = cell.compared_by
    if value is None:
        return traits | {"N": cell.labels.get("num_samples")}
    parts = {_WORDS.get(part, part.replace("_", " ")): given for part, given in value.comparable.items()}
    return traits | {"value": value.name} | parts


def _refuse_incomparable(first_name: str, first: Sweep, second_name: str, second: Sweep) -> None:
    found = []
    for name, sweep in ((first_name, first), (second_name, second)):
        found.append([_traits(cell) for cell in sweep.cells if cell.status == "done"])
        if not found[-1]:
            raise ReportError(f"{name} has no finished cell, so there is nothing to compare it by")
    if any(ours == theirs for ours in found[0] for theirs in found[1]):
        return
    why = "no cell of the one has all that makes cells comparable in common with a cell of the other"
    for trait in dict.fromkeys(trait for side in found for traits in side for trait in traits):
        ours, theirs = ({traits.get(trait) for traits in side} for side in found)
        if not ours & theirs:
            why = f"their {trait} differs: {_spell(ours)} against {_spell(theirs)}"
            break
    raise ReportError(f"{first_name} and {second_name} can't be compared: {why}")


def _spell(values: set[Any]) -> str:
    def word(value: Any) -> str:
        if isinstance(value, tuple):  # a name and a digest
            return f"{value[0]} ({value[1][:12]})" if value[1] else str(value[0])
        return f"{value:,}" if isinstance(value, int) else str(value)[:40]

    return ", ".join(sorted(map(word, values)))


def _join_environments(environments: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Values that all sweeps share, once; values that differ, listed by sweep."""
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for environment in environments.values() for key in environment):
        if key in ("git_dirty", "packages"):
            continue
        values = {name: environment.get(key) for name, environment in environments.items()}
        if key == "git_commit":
            dirty = {True: " with uncommitted changes", False: ", clean"}
            for name, environment in environments.items():
                if values[name]:
                    values[name] = f"{values[name]}{dirty.get(environment.get('git_dirty'), '')}"  # type: ignore[arg-type]
        distinct = set(map(str, values.values()))
        joined[key] = (
            next(iter(values.values()))
            if len(distinct) == 1
            else "; ".join(f"{name}: {value}" for name, value in values.items())
        )
    return joined


def name_folders(given: Sequence[str]) -> dict[str, Path]:
    """Sweep folders by name, from `DIR` (its name is the folder's) or `NAME=DIR`.

    Raises:
        ReportError: a name or a folder occurs twice.
    """
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        named = bool(equals) and not Path(text).exists()
        folder = user_path(rest if named else text)
        label = name if named else folder.resolve().name
        if label in folders:
            raise ReportError(f"two sweeps are called {label}: give them names, as NAME=DIR")
        if any(folder.resolve() == other.resolve() for other in folders.values()):
            raise ReportError(f"{folder} is given twice")
        folders[label] = folder
    return folders

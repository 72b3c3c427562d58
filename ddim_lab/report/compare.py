"""Several sweeps beside each other: one sweep made of their cells, each with the name of the sweep it is from.

Two checkpoints, two machines, two versions of the code. What can't be compared is refused: a Fréchet distance means
nothing beside one of other data, another network, other reference statistics or another N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddim_lab.report.series import Metric
from ddim_lab.report.sweep import Cell, Plan, ReportError, Sweep

_FIELDS = ("data", "task", "metric", "feature network", "reference statistics", "N")


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
    cells: list[Cell] = []
    for name, sweep in sweeps.items():
        for cell in sweep.cells:
            labels = {**cell.plan.labels, "sweep": name}
            cells.append(replace(cell, plan=cell.plan.model_copy(update={"number": len(cells), "labels": labels})))
    references = [sweep.plan.reference for sweep in sweeps.values() if sweep.plan.reference is not None]
    plan = Plan(
        title=f"Comparison of {', '.join(names[:-1])} and {names[-1]}",
        reference=references[0] if references and all(one == references[0] for one in references) else None,
        environment=_join_environments({name: sweep.plan.environment for name, sweep in sweeps.items()}),
        cells=tuple(cell.plan for cell in cells),
    )
    return Sweep(folder=folder, outputs=folder, plan=plan, cells=tuple(cells), members=dict(sweeps))


def _traits(cell: Cell) -> tuple[Any, ...]:
    """What two cells must share to be compared, in the order of _FIELDS."""
    result = cell.result
    assert result is not None
    data = cell.plan.labels.get("data"), result.recipe_value("data", "digest")
    if cell.quality is None:
        return data, cell.plan.task, None, None, None, cell.plan.labels.get("num_samples")
    metric = Metric.of(cell.quality)
    reference = metric.reference, cell.quality.reference_key
    return data, cell.plan.task, metric.name, metric.features, reference, metric.num_samples


def _refuse_incomparable(first_name: str, first: Sweep, second_name: str, second: Sweep) -> None:
    found = []
    for name, sweep in ((first_name, first), (second_name, second)):
        found.append({_traits(cell) for cell in sweep.cells if cell.status == "done"})
        if not found[-1]:
            raise ReportError(f"{name} has no finished cell, so there is nothing to compare it by")
    if found[0] & found[1]:
        return
    why = "no cell of the one has the data, metric, feature network, reference and N of a cell of the other"
    for index, field in enumerate(_FIELDS):
        ours, theirs = ({traits[index] for traits in traits_of} for traits_of in found)
        if not ours & theirs:
            why = f"their {field} differs: {_spell(ours)} against {_spell(theirs)}"
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
        folder = Path(rest if named else text)
        label = name if named else folder.resolve().name
        if label in folders:
            raise ReportError(f"two sweeps are called {label}: give them names, as NAME=DIR")
        if any(folder.absolute() == other.absolute() for other in folders.values()):
            raise ReportError(f"{folder} is given twice")
        folders[label] = folder
    return folders

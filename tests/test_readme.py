"""The READMEs: commands that compose, options that exist, all of them named; links, pictures and Python that work."""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import hydra
import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import ddim_lab
from ddim_lab.config.folders import config_folder
from ddim_lab.config.job import Config
from ddim_lab.jobs.compose import compose, composer, split_cells
from ddim_lab.report.rows import CONTRACT

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / folder / "README.md" for folder in ("conf", "experiments", "outputs", "ddim_lab"))]
PAGES += [ROOT / "experiments" / "table1_fashion_mnist.md", ROOT / "ddim_lab" / "metrics" / "README.md"]

MOST_LINES = 170
"""Of the first page."""

STANDS_FOR = {"+experiments=NAME": "+experiments=table1_digits", "sampler=NAME": "sampler=searched_digits_S10"}
"""Words that the reader fills in; a FOLDER or SWEEP may be called so."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """What stands `so` in it, on one line or broken over two."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def command_lines(page: Path) -> list[list[str]]:
    """Every command of a page in words: those of its bash blocks, and those that stand in the text with arguments."""
    lines = [
        line
        for block in blocks(page, "bash")
        for joined in re.sub(r"\\\n", " ", block).splitlines()
        for line in joined.split("&&")
    ]
    lines += [span for span in spans(prose(page)) if re.match(r"python -m ddim_lab(\.\w+)? \S", span)]
    split = [shlex.split(line, comments=True) for line in lines]
    return [[STANDS_FOR.get(word, word) for word in words] for words in split if words]


COMMANDS = sorted({tuple(words) for page in PAGES for words in command_lines(page)})
JOBS = [words[3:] for words in COMMANDS if words[:3] == ("python", "-m", "ddim_lab")]
OTHERS = [words[2:] for words in COMMANDS if len(words) > 2 and words[2].startswith("ddim_lab.")]


# commands


def test_there_are_commands_and_no_others() -> None:
    """One of an unknown kind would stand unchecked."""
    assert len(JOBS) >= 20
    assert {words[0] for words in OTHERS} == {
        f"ddim_lab.{name}" for name in ("report", "score", "store", "dashboard", "convert", "audit")
    }
    known = ("python -m ddim_lab", "python -m pytest", "python3 -m venv", ". .venv/bin/activate", "pip install -e")
    strange = [" ".join(words) for words in COMMANDS if not " ".join(words).startswith(known)]
    assert [text for text in strange if not text.startswith(("wandb sync", "wandb sweep", "wandb agent"))] == []


def cells_of(words: Sequence[str], *, every: bool = False) -> list[Config]:
    """Cells of a command line, composed and checked as they are written; its files need not be there.

    Of a sweep `every` cell, or as many as show each value that the command line lists once: what an experiment's file
    sweeps is composed in test_experiments.py.
    """
    asked = get_args_parser().parse_intermixed_args(words)
    with composer(asked):
        parse = OverridesParser.create()
        overrides = parse.parse_overrides(asked.overrides)
        base = compose([o.input_line for o in overrides if not o.is_sweep_override()], hydra_too=True)
        many = asked.multirun or str(base.hydra.mode) == "RunMode.MULTIRUN"
        assert many or not any(o.is_sweep_override() for o in overrides), "a list needs -m"
        cells = split_cells(base, overrides, parse) if many else [asked.overrides]
        listed = {str(o.get_key_element()) for o in overrides if o.is_sweep_override()}
        seen: set[str] = set()
        chosen = []
        for cell in cells:
            values = {text for text in cell if text.partition("=")[0] in listed}
            if every or not chosen or not values <= seen:
                chosen.append(Config.from_hydra(compose([text for text in cell if not text.startswith("hydra")])))
            seen |= values
        return chosen


@pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher/\w+' is validated")  # as in ddim_lab.config.trust
@pytest.mark.parametrize("words", JOBS, ids=" ".join)
def test_every_job_composes(words: tuple[str, ...], tmp_path: Path) -> None:
    preset = OmegaConf.load(config_folder() / "sampler" / "ddim.yaml")
    preset.name = "searched_digits_S10"
    (tmp_path / "sampler").mkdir()
    OmegaConf.save(preset, tmp_path / "sampler" / "searched_digits_S10.yaml")
    here = [str(tmp_path) if word == "outputs/presets" else word for word in words]
    if "hydra/launcher=ray" in words and find_spec("hydra_plugins.hydra_ray_launcher") is None:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):  # which asks for no plugin
            assert compose(here, hydra_too=True).hydra.launcher.ray
        here = [word for word in here if not word.startswith("hydra")]
    assert all(config.build_sampler().nfe > 0 for config in cells_of(here))


class Parsed(BaseException):
    """Ends a command where its arguments are read; no `except` in it is meant for that."""


@pytest.mark.parametrize("words", OTHERS, ids=" ".join)
def test_the_arguments_of_every_other_command_parse(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[argparse.Namespace] = []

    def stopping(name: str) -> Any:
        real = getattr(argparse.ArgumentParser, name)

        def parse(self: argparse.ArgumentParser, arguments: Any = None, namespace: Any = None) -> NoReturn:
            asked.append(real(self, arguments, namespace))
            raise Parsed

        return parse

    package = find_spec(words[0])
    assert package is not None
    module = importlib.import_module(words[0] + (".__main__" if package.submodule_search_locations else ""))
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(name))
    monkeypatch.setattr(sys, "argv", [words[0], *words[1:]])
    with pytest.raises(Parsed):
        module.main()
    monkeypatch.undo()
    if overrides := getattr(asked[0], "overrides", []):
        first = str(getattr(asked[0], "path", ""))  # an audit's is an option where it has no PATH
        cells_of(["-m", *([first] if "=" in first else []), *overrides])  # and steps may be a list


def test_every_extra_is_one() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = {name for page in PAGES for name in re.findall(r"'\.\[(\w+)\]'", page.read_text(encoding="utf-8"))}
    assert {"dev", "joblib", "search"} <= asked
    assert asked <= set(extras)


# options

GROUPS = sorted(
    str(folder.relative_to(config_folder()))
    for folder in (*config_folder().iterdir(), config_folder() / "hydra" / "launcher")
    if folder.is_dir() and folder.name != "experiments" and any(folder.glob("*.yaml"))
)


def read(file: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def flat(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of all values in a configuration, groups of values left out."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def own_options() -> set[str]:
    """Every option of ours: those of config.yaml, and of every file of every group."""
    top = {name for name in flat(read(config_folder() / "config.yaml")) if not name.startswith(("hydra.", "defaults"))}
    return top | {name for group in GROUPS if not group.startswith("hydra") for name in options_of(group)}


def options_of(group: str) -> set[str]:
    files = (config_folder() / group).glob("*.yaml")
    names = {name for file in files for name in flat(read(file), f"{group.replace('/', '.')}.")}
    return {name for name in names if not name.endswith((".defaults", "._target_"))}


def choices(group: str) -> set[str]:
    return {file.stem for file in (config_folder() / group).glob("*.yaml")}


def section(group: str) -> str:
    """What conf/README.md says of a group."""
    (found,) = re.findall(rf"^## {group}: .*?(?=^## |\Z)", prose(ROOT / "conf" / "README.md"), re.DOTALL | re.MULTILINE)
    return found


def test_every_option_is_named() -> None:
    named = set(spans(prose(ROOT / "conf" / "README.md")))
    options = own_options()
    assert {"steps", "study.title", "sampler.eta", "task.many_steps", "runtime.compile"} <= options
    assert sorted(options - named) == []


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_is_named(group: str) -> None:
    """In the words before the group's table, or as `group=choice`."""
    text = section(group)
    named = set(spans(text.partition("\n|")[0])) | {span for span in spans(text) if span.startswith(f"{group}=")}
    assert sorted(choices(group) - {span.removeprefix(f"{group}=") for span in named}) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_named_option_exists(page: Path) -> None:
    """`group.option`, `group.option=value`, `group=choice` and `option=value` in the text name what there is."""
    options = own_options() | options_of("hydra/launcher")
    options |= {"hydra.mode", "hydra.sweeper.params", "hydra.sweep.dir"}  # Hydra's, named for what they may do
    tops = {name.partition(".")[0] for name in options}
    wrong = []
    for span in spans(prose(page)):
        if not (found := re.fullmatch(r"([a-z_]+(?:/[a-z]+)?(?:\.[a-z_0-9]+)*)(=\S+)?", span)):
            continue
        name, value = found.group(1), (found.group(2) or "")[1:]
        if name in GROUPS and value and value.isidentifier() and not value.isupper():
            wrong += [span] if value not in choices(name) else []
        elif name not in GROUPS and (("." in name and name.partition(".")[0] in tops) or value):
            wrong += [span] if name not in options and name not in NO_OPTIONS else []
    assert wrong == []


NO_OPTIONS = {"data.py"}
"""Names in the text that look like an option."""


# the first page


def test_the_first_page_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_test_command_stands_where_it_is_looked_for() -> None:
    (marked,) = re.findall(
        r"<!-- test command -->\n```bash\n(.*?)\n```\n<!-- end -->", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert marked.endswith("python -m pytest")


@pytest.mark.slow
def test_what_a_sweep_of_wandb_runs_composes() -> None:
    """Each value that its YAML lists, and both ends of a range, in a command as W&B's agent writes it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    (text,) = blocks(ROOT / "conf" / "README.md", "yaml")
    sweep = OmegaConf.to_container(OmegaConf.create(text.replace("${", "$-{")))
    assert isinstance(sweep, dict)
    assert sweep["metric"]["name"] in CONTRACT
    assert [sweep["program"], *sweep["command"][2:]] == ["ddim_lab", "-m", "$-{program}", "$-{args_no_hyphens}"]
    listed = [
        [(name, value) for value in options.get("values") or [options.get(end) for end in ("value", "min", "max")]]
        for name, options in sweep["parameters"].items()
    ]
    chosen = [[pair for pair in pairs if pair[1] is not None] for pairs in listed]
    for pairs in itertools.product(*chosen):
        arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in pairs}})
        (config,) = cells_of(arguments["args_no_hyphens"])
        assert config.steps == 20


# the rest of the pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_runs(page: Path) -> None:
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), {"__name__": "readme"})


def test_the_first_page_has_python() -> None:
    (code,) = blocks(README, "python")
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["between"].shape == found["x_0"][:1].shape


def anchors(page: Path) -> set[str]:
    """Its headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_is_there(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def test_every_study_is_named() -> None:
    named = {span for page in (README, ROOT / "experiments" / "README.md") for span in spans(prose(page))}
    assert sorted(choices("experiments") - named) == []


def test_the_study_of_ones_own_is_one(tmp_path: Path) -> None:
    (study,) = [text for text in blocks(ROOT / "experiments" / "README.md", "yaml") if text.startswith("# @package")]
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(study, encoding="utf-8")
    cells = cells_of(["--config-dir", str(tmp_path), "+experiments=mine"], every=True)
    assert [(config.sampler.name, config.steps) for config in cells] == [
        ("ddim", 10), ("ddim", 50), ("ddim_eta1", 10), ("ddim_eta1", 50)
    ]  # fmt: skip
    assert {(config.data.name, config.sampler.spacing) for config in cells} == {("fashion_mnist", "trailing")}
    reference = cells[0].study.published
    assert reference is not None
    assert reference.rows["ddim"] == {"10": 21.3, "50": 8.4}


def test_the_map_has_every_room() -> None:
    package = Path(ddim_lab.__file__).parent
    rooms = {file.stem for file in package.glob("*.py")} - {"__init__"}
    rooms |= {f"{folder.parent.name}/" for folder in package.glob("*/__init__.py")}
    assert {"sampler", "tasks/", "report/"} <= rooms
    assert sorted(rooms - set(spans(prose(package / "README.md")))) == []

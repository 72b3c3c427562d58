"""`python -m ddim_lab.audit`: why a Fréchet distance is not the one that somebody claims.

PATH is a samples.npz or a folder of images, ours or anyone's; without it the samples are made by the model that the
options name. Nothing is changed but one convention at a time, then two; what fits the claim is said, and what does not.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ddim_lab.config.options import path_argument
from ddim_lab.errors import ConfigError, exit_status

if TYPE_CHECKING:
    from ddim_lab.conventions.records import Audited

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python -m ddim_lab.audit --help")


def _seconds(text: str) -> float:
    """A time as 90s, 30m or 2h, or in seconds."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text)
    if found is None or not float(found[1]) > 0:
        raise ConfigError(f"--budget={text} is no time: write it as 90s, 30m or 2h")
    return float(found[1]) * {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m ddim_lab.audit",
        description="Why is my FID different? One convention of the field is changed at a time, then two, and what fits"
        " a claimed number is named, with what can't be told apart.",
        epilog="python -m ddim_lab.audit samples.npz data=cifar10 metrics.features=inception --claimed 4.16  |  "
        "python -m ddim_lab.audit model=pretrained model.path=FOLDER --paper table1_cifar10 steps=100",
    )
    parser.add_argument("path", type=path_argument, nargs="?", help="samples.npz (arr_0, uint8, NHWC) or a folder")
    parser.add_argument("--claimed", metavar="NUMBER", help="4.16; several by N, or of a model by S: 10:13.36,50:4.67")
    parser.add_argument(
        "--claimed-samples", type=int, metavar="N", help="of how many images that is (default: as many as are audited)"
    )
    parser.add_argument(
        "--paper", metavar="STUDY", help="a study of experiments/ whose published numbers are the claim"
    )
    parser.add_argument(
        "--reference", type=path_argument, help="compare with these images or statistics instead of the data set"
    )
    parser.add_argument("--budget", metavar="TIME", help="30m: the most telling first, and what was left is said")
    parser.add_argument("--factors", metavar="NAME,...", help="these conventions alone; --list shows their names")
    parser.add_argument("--plan", action="store_true", help="say what each convention would cost, and end")
    parser.add_argument("--list", action="store_true", help="every convention, who follows it, and where to read that")
    parser.add_argument("--output", type=path_argument, metavar="DIR", help="where audit.json and report.html go")
    parser.add_argument(
        "overrides", nargs="*", metavar="OPTION=VALUE", help="as python -m ddim_lab: data, model.*, metrics.*, ..."
    )
    return parser


def _main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_intermixed_args(arguments)
    path, overrides = asked.path, list(asked.overrides)
    if path is not None and "=" in str(path) and not path.exists():  # no PATH: the first option stands in its place
        path, overrides = None, [str(path), *overrides]
    if more := [text for text in overrides if "=" not in text and not text.startswith("~")]:
        raise ConfigError(f"{more[0]} is no OPTION=VALUE: to compare with it, give --reference {more[0]}")
    budget = None if asked.budget is None else _seconds(asked.budget)
    if asked.claimed_samples is not None and asked.claimed_samples < 2:
        raise ConfigError(f"--claimed-samples={asked.claimed_samples}: a Fréchet distance is of 2 images at least")
    if asked.list:
        return _list(overrides)
    if asked.output is not None and not asked.plan:
        _check_output(asked.output)
    from ddim_lab.audit.auditing import Asked, carry_out

    found = carry_out(
        Asked(
            path=path,
            options=tuple(overrides),
            claimed=asked.claimed,
            claimed_samples=asked.claimed_samples,
            paper=asked.paper,
            reference=asked.reference,
            factors=None if asked.factors is None else tuple(name.strip() for name in asked.factors.split(",")),
            budget=budget,
            plan_only=asked.plan,
            command=shlex.join(["python", "-m", "ddim_lab.audit", *arguments]),
        ),
        say=lambda line: print(f"ddim_lab: {line}" if not line.startswith(" ") else line, file=sys.stderr, flush=True),
    )
    if asked.plan:
        return 0
    named = [] if asked.paper is None else [f"+experiments={asked.paper}"]
    return _leave(found, asked.output, [*named, *overrides])


def _check_output(folder: Path) -> None:
    """Raise ConfigError now, rather than after the work, where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
            pass
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"--output={folder} can't be written: {why}; give another folder") from None


def _leave(found: Audited, output: Path | None, overrides: Sequence[str]) -> int:
    """Write audit.json and report.html, mirror them, and print what was found."""
    from ddim_lab.audit.page import page
    from ddim_lab.audit.told import console, mirror
    from ddim_lab.jobs.compose import quoted
    from ddim_lab.jobs.plan import composed_config
    from ddim_lab.jobs.tracking import TrackingConfig
    from ddim_lab.store import write_record, write_text
    from ddim_lab.store.housekeeping import AUDIT, AUDITS

    config = composed_config([quoted(text) for text in overrides if not text.startswith("steps=")])
    name = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    folder = Path(config.outputs_dir) / AUDITS / name if output is None else output
    print(console(found), flush=True)
    try:
        write_record(folder / AUDIT, found.content())
        write_text(folder / "report.html", page(found))
    except OSError as error:
        raise ConfigError(f"{folder} can't be written: {error.strerror or error}") from None
    print(f"report: {folder / 'report.html'}")
    logger = config.logger
    tracking = TrackingConfig(logger.name, folder, logger.project, logger.entity, logger.mode)
    if (hint := mirror(found, tracking, group=folder.name, page=folder / "report.html")) is not None:
        print(f"W&B runs are offline; to upload them: {hint}")
    return 0


def _list(overrides: Sequence[str]) -> int:
    from ddim_lab.audit.listing import known, listed
    from ddim_lab.jobs.compose import quoted
    from ddim_lab.jobs.plan import composed_config
    from ddim_lab.store import Store

    config = composed_config([quoted(text) for text in overrides])
    print(listed(known(config, Store(Path(config.outputs_dir)))))
    return 0


def main() -> None:
    """Entry point. Exit status: 0, 1 failed, 2 wrong input (one line says what), 130 interrupted, 143 terminated."""
    sys.exit(exit_status(lambda: _main(sys.argv[1:]), resumes=True))


if __name__ == "__main__":
    main()

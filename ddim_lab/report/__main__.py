"""Build a sweep's report again from its files, or lay several sweeps beside each other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ddim_lab.config.options import path_argument, user_path
from ddim_lab.errors import exit_status
from ddim_lab.report import ReportError, build_comparison, read_sweep, write, write_figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the report, print its path; return the exit status (2 for input that can't be used)."""
    parser = argparse.ArgumentParser(
        prog="python -m ddim_lab.report",
        description=__doc__,
        epilog="One sweep: its own files are replaced. Several: sweeps of the same data, feature network, reference "
        "and N are laid beside each other in --output.",
    )
    parser.add_argument(
        "sweeps",
        nargs="+",
        metavar="[NAME=]DIR",
        help="a sweep's folder, as outputs/sweeps/<date-time>; a comparison calls it NAME",
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        metavar="DIR",
        help="folder of the comparison, made or replaced (default: comparison)",
    )
    parser.add_argument(
        "--figures", type=path_argument, metavar="DIR", help="write one sweep's charts there, too, as SVG files"
    )
    asked = parser.parse_args(arguments)
    return exit_status(lambda: _main(asked))


def _main(asked: argparse.Namespace) -> int:
    if asked.figures is not None and len(asked.sweeps) > 1:
        raise ReportError("--figures is for one sweep: give one, or drop it")
    if len(asked.sweeps) > 1:
        from ddim_lab.report.compare import name_folders

        print(build_comparison(name_folders(asked.sweeps), asked.output or Path("comparison")))
        return 0
    if asked.output is not None:
        raise ReportError("--output is for a comparison: give several sweeps, or drop it")
    sweep = read_sweep(user_path(asked.sweeps[0]))
    print(write(sweep))
    if asked.figures is not None:
        print(*write_figures(sweep, asked.figures), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

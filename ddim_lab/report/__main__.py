"""`python -m ddim_lab.report DIR`: rebuild a sweep's report from its files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ddim_lab.report import ReportError, build


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the report of one sweep, print its path; return the exit status (2 for input that can't be used)."""
    parser = argparse.ArgumentParser(prog="python -m ddim_lab.report", description=__doc__)
    parser.add_argument("sweep", type=Path, metavar="DIR", help="a sweep's folder, as outputs/sweeps/<date-time>")
    try:
        print(build(parser.parse_args(arguments).sweep))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

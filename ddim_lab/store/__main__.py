"""`python -m ddim_lab.store list|verify|prune`: what an outputs folder holds, whether it is whole, what may go."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ddim_lab.config.options import path_argument
from ddim_lab.errors import ConfigError, exit_status
from ddim_lab.store.housekeeping import Item, forget, inventory, no_new_jobs, prunable, registered, remove, verify
from ddim_lab.store.objects import Store

DAMAGED: Final = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit status: 0, 1 something was damaged, 2 it can't be done."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    asked = _parser().parse_args(arguments)
    return exit_status(lambda: _main(asked))


def _main(asked: argparse.Namespace) -> int:
    store = Store(asked.outputs_dir)
    if not store.root.is_dir():
        raise ConfigError(f"there is no outputs folder {store.root}; give --outputs-dir")
    if asked.command == "list":
        _print_items(inventory(store))
        return 0
    if asked.command == "verify":
        count, damaged = verify(store)
        print(f"{count} verified, {len(damaged)} damaged")
        return DAMAGED if damaged else 0
    return _prune(store, asked)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ddim_lab.store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--outputs-dir", type=path_argument, default=Path("outputs"), help="default: outputs")
    commands.add_parser("list", parents=[common], help="everything that is there, with size, date and users")
    commands.add_parser("verify", parents=[common], help="read all of it; set aside what is damaged")
    prune = commands.add_parser("prune", parents=[common], help="remove what no sweep and no audit refers to")
    prune.add_argument("--unfinished", action="store_true", help="also work that could be resumed (*.partial)")
    prune.add_argument(
        "--samples", action="store_true", help="also samples that sweeps use: reports stay, growing starts anew"
    )
    prune.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    prune.add_argument(
        "--forget",
        metavar="PATH",
        type=Path,
        action="append",
        default=[],
        help="the sweep that lay at PATH, outside the outputs folder, keeps nothing any longer",
    )
    prune.add_argument("--yes", action="store_true", help="don't ask")
    return parser


def _prune(store: Store, asked: argparse.Namespace) -> int:
    forgotten = _forgotten(store, asked.forget)
    with no_new_jobs(store):
        items = prunable(store, unfinished=asked.unfinished, samples=asked.samples, forgotten=forgotten)
        _print_items(items)
        if cost := sum(item.holds.forwards or 0 for item in items if item.holds is not None):
            print(f"making these samples again takes {cost:,} image-forwards")
        if asked.dry_run or not (items or forgotten):
            return 0
        if items and not asked.yes:
            try:
                answer = input(f"remove these {len(items)}? [y/N] ")
            except EOFError:
                raise ConfigError("nobody to ask: give --yes or --dry-run") from None
            if answer.strip().lower() not in ("y", "yes"):
                return 0
        forget(store, forgotten)
        for item in items:
            remove(item)
    print(f"{len(items)} removed")
    return 0


def _forgotten(store: Store, asked: Sequence[Path]) -> set[Path]:
    """The registered sweeps that are asked for, by the path that was given or the one that it leads to."""
    known, found = registered(store), set()
    for path in asked:
        named = {path.expanduser().absolute(), path.expanduser().resolve()} & known.keys()
        if not named:
            there = ", ".join(map(str, known)) or "none is"
            raise ConfigError(f"--forget {path}: no such sweep is registered; those outside {store.root}: {there}")
        found |= named
    return found


def _print_items(items: Sequence[Item]) -> None:
    for item in items:
        head, _, tail = item.name.partition(".")
        name = ".".join([head[:12] if len(head) == 64 else head, *([tail] if tail else [])])
        counts = {"sweep(s)": len(item.users) - len(item.audits), "audit(s)": len(item.audits)}
        used = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        size = f"{item.bytes / 1e6:.2f} MB"
        line = f"{item.kind:<10}  {item.state:<10}  {size:>12}  {item.changed:%Y-%m-%d %H:%M}  {name}  {used}".rstrip()
        if item.holds is not None:
            cells = ", ".join(key[:12] for key in item.cells)
            line += f"  {item.holds}{f'; of cells {cells}' if cells else ''}"
        print(line)
    print(f"{len(items)} in all, {sum(item.bytes for item in items) / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())

"""Shared by all tests: small, quiet, away from the user's outputs and accounts; all cores for the whole suite."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import shared_composing
import tiny
import torch
from filelock import FileLock
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)  # the same cases every time, however busy it is
settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker a core, of 1 to 2 GB each, for the whole suite; none for what is named, or on the one GPU."""
    named = config.option.keyword or any(".py" in argument for argument in config.args)
    if named or config.option.markexpr == "gpu":
        return 0
    return min(len(os.sched_getaffinity(0)), 8) if hasattr(os, "sched_getaffinity") else 2


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """No search for garbage among what imports and collecting leave: a million objects of the whole suite, none of it.

    Each search would take 0.3 s, then and from there on.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B never goes online from a test unless the test says so."""
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(1)  # two threads on two busy cores wait for each other: ten times slower
    # The first gradient settles for good whether autograd has threads, and with them no fork (tests/forked.py) can
    # train: without a GPU it starts none now, but a thread for each of eight devices once a network was compiled.
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True, scope="session")
def _shared_composing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shared_composing.share(patch)
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Makes an outputs folder that holds what jobs on the digits share, as after another sweep there.

    That is the classifier whose features are compared, and the statistics of real images; the training of the one
    takes longer than all else that a tiny job does, so all workers share it.
    """
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "digits"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            started = made.with_name("digits-started")
            assert tiny.run(started, "model=gaussian", "steps=2", "logger=csv", settings=tiny.SMALL) == 0
            started.rename(made)

    def copy(outputs: Path) -> Path:
        for kind in ("models", "references"):
            shutil.copytree(made / kind, outputs / kind)
        return outputs

    return copy


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each walk of this process began with."""
    from ddim_lab.sampler import Sampler

    found: list[int] = []
    original = Sampler.sample

    def counted(sampler: Any, model: Any, x_T: Any, **named: Any) -> Any:
        found.append(len(x_T))
        return original(sampler, model, x_T, **named)

    monkeypatch.setattr(Sampler, "sample", counted)
    return found

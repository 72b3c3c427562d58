"""Shared by all tests: small, quiet, away from the user's outputs and accounts."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B never goes online from a test unless the test says so."""
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(1)  # two threads on two busy cores wait for each other: ten times slower

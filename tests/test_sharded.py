"""A cell that several processes sample together: each sample once, from the same x_T, the same numbers."""

from __future__ import annotations

import pickle
from pathlib import Path

import forked
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from ddim_lab.sampler import Sampler
from ddim_lab.schedule import NoiseSchedule
from ddim_lab.tasks import measuring
from ddim_lab.tasks.cannot_skip import DDPMFormula

LINE = ("sampler.eta=0.5", "steps=3", "model=gaussian", "metrics.features=pixels", "logger=csv", "batch_size=8")


@pytest.mark.slow
def test_one_two_and_three_processes_give_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that are started as always, and three that are forked."""
    seen: dict[int, list[str]] = {}
    original = measuring.sample_on_ranks

    def look(job: measuring.Job, work: Path, missing: list[range], sampler: Sampler) -> None:
        original(job, work, missing, sampler)
        names = [name for file in sorted(work.glob("*.safetensors")) for name in load_file(file)]
        seen[job.config.sampling_devices] = [name for name in names if ".images." in name]

    monkeypatch.setattr(measuring, "sample_on_ranks", look)
    rows = {}
    for count in (1, 2, 3):
        outputs = tmp_path / str(count)
        if count == 3:
            forked.ranks(monkeypatch)
        assert tiny.run(outputs, *LINE, f"sampling_devices={count}", settings=("num_samples=36",)) == 0
        rows[count] = tiny.numbers(tiny.sweeps(outputs)[0])
    assert all(found == rows[1] for found in rows.values())
    for names in seen.values():  # 36 samples in batches of 8: five, which can't be shared evenly, each once
        assert sorted(int(name.split(".")[0]) for name in names) == [0, 8, 16, 24, 32]
    assert set(seen) == set(rows) - {1}


def test_a_solver_with_a_memory_is_shared_and_its_samples_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """UniPC at timesteps that are not whole, by one process and by two: the same images, bit by bit."""
    forked.ranks(monkeypatch)
    line = ("sampler=unipc", "sampler.spacing=logsnr", "nfe=5", *LINE[2:], "save_samples=true")
    kept = []
    for count in (1, 2):
        outputs = tmp_path / str(count)
        assert tiny.run(outputs, *line, f"sampling_devices={count}", settings=("num_samples=44",)) == 0
        (file,) = outputs.glob("cells/*/samples.npz")
        kept.append(np.load(file)["arr_0"])
    assert kept[0].shape == (44, 8, 8, 1)
    assert np.array_equal(*kept)


@pytest.mark.parametrize("name", ["heun", "dpm_solver_2", "pndm", "ipndm", "deis", "dpmpp_3m", "dpmpp_2m_sde", "unipc"])
def test_solvers_go_to_the_processes(name: str) -> None:
    sampler = tiny.configure(f"sampler={name}", "steps=5").build_sampler()
    x_T, models = torch.randn(2, 1, 4, 4), lambda x, t: 0.1 * x
    there = pickle.loads(pickle.dumps(sampler))
    assert torch.equal(there.sample(models, x_T), sampler.sample(models, x_T))
    assert there.recipe() == sampler.recipe()


def test_the_formula_of_a_lesson_goes_to_the_processes() -> None:
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    sampler = Sampler(schedule, steps=3, eta=1.0, formula=DDPMFormula(schedule, "per_step"))
    x_T, models = torch.randn(2, 1, 4, 4), lambda x, t: 0.1 * x
    there = pickle.loads(pickle.dumps(sampler))
    assert torch.equal(there.sample(models, x_T), sampler.sample(models, x_T))
    assert there.recipe() == sampler.recipe()

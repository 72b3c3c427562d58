"""Training: named by (seed, step), so that a killed run goes on as if nothing had been; EMA is the average it says."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddim_lab.config.job import Config
from ddim_lab.config.model import UNetConfig
from ddim_lab.data.base import load_data
from ddim_lab.data.images import DiskImages, ImageData, MemoryImages
from ddim_lab.data.loaders import TrainingBatches, _StepBatches
from ddim_lab.models.checkpoints import VerifiedCheckpoints
from ddim_lab.models.training import READ_EVERY, DiffusionModule, _Average, train
from ddim_lab.models.unet import weights_digest

DECAY = 0.9


def settings(*overrides: str) -> Config:
    """A few steps of a tiny network on digits, with everything random switched on."""
    return tiny.configure(
        "training.max_steps=9",
        "training.warmup_steps=0",
        "training.learning_rate_decay=constant",
        "training.checkpoint_every=4",
        "training.batch_size=16",
        f"training.ema_decay={DECAY}",
        "training.random_flip=true",
        "model.block_out_channels=[8,8]",
        "model.dropout=0.3",
        *overrides,
    )


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(settings().data)


def fit(
    config: Config, data: ImageData, work: Path, precision: str = "fp32", accelerator: str = "cpu", rank: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Averaged weights, raw weights, and the function that writes the curve."""
    assert isinstance(config.model, UNetConfig)
    averaged, raw, write = train(
        data,
        config.model,
        config.build_schedule(),
        config.training,
        accelerator=accelerator,
        rank=rank,
        precision=precision,
        compiled=config.training.compile is True,
        deterministic=False,
        work=work,
        mirror=lambda values, step: None,
    )
    return averaged.state_dict(), raw.state_dict(), write


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def undisturbed(data: ImageData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[Any], Any]:
    """Averaged, raw, (step, batch) of every step, and the curve's writer, of a run that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        averaged, raw, write = fit(settings(), data, tmp_path_factory.mktemp("whole"))
    return averaged, raw, seen, write


def watch(patch: pytest.MonkeyPatch, die_at: int | None = None) -> list[tuple[int, list[int]]]:
    """(global step, sum of each image) of every training step, as the module is given them."""
    seen: list[tuple[int, list[int]]] = []
    step = DiffusionModule.training_step

    def watched(self: DiffusionModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == die_at:
            raise RuntimeError("the power went")
        seen.append((self.global_step, batch["images"].long().flatten(1).sum(1).tolist()))
        return step(self, batch, batch_idx)

    patch.setattr(DiffusionModule, "training_step", watched)
    return seen


@pytest.mark.parametrize("die_at", [2, 4, 6])
def test_a_run_that_failed_and_resumed_ends_in_the_same_weights(
    die_at: int, undisturbed: Any, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first checkpoint, on one and between two: bitwise, with no batch skipped and none seen twice."""
    averaged, raw, whole, write = undisturbed
    with monkeypatch.context() as patch:
        before = watch(patch, die_at)
        with pytest.raises(RuntimeError, match="the power went"):
            fit(settings(), data, tmp_path)
    after = watch(monkeypatch)
    averaged_after, raw_after, write_after = fit(settings(), data, tmp_path)
    checkpoint = die_at // 4 * 4
    assert [step for step, _ in before] == list(range(die_at))
    assert before[:checkpoint] + after == whole
    assert same(raw_after, raw)
    assert same(averaged_after, averaged)
    curves = []
    for name, writer in (("whole", write), ("resumed", write_after)):
        writer(tmp_path / name)
        with (tmp_path / name).open() as file:
            curves.append([(row["step"], row["loss"], row["learning_rate"]) for row in csv.DictReader(file)])
    assert curves[0] == curves[1]
    assert [step for step, _, _ in curves[0]] == [str(step) for step in range(1, 10)]


@pytest.mark.slow
def test_a_compiled_training_takes_the_steps_of_an_uncompiled_one_and_resumes(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 the loss of every step to rounding; cut and resumed, bitwise the same weights.

    The graphs, forward and backward, are captured and run; making C++ of them, a minute's work, is left out.
    """
    compile_it = torch.nn.Module.compile
    compiled_as: list[dict[str, Any]] = []

    def without_code(network: torch.nn.Module, **asked: Any) -> None:
        compiled_as.append(asked)
        compile_it(network, backend="aot_eager", **asked)

    monkeypatch.setattr(torch.nn.Module, "compile", without_code)
    small = ("model.block_out_channels=[8,8]", "model.dropout=0.0", "training.learning_rate=2.0e-3")
    losses, ends = [], []
    for compiled in ("false", "true"):
        config = settings(*small, f"training.compile={compiled}")
        averaged, raw, write = fit(config, data, tmp_path / compiled, precision="bf16")
        ends.append((averaged, raw))
        write(tmp_path / compiled / "curve.csv")
        with (tmp_path / compiled / "curve.csv").open() as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
        assert compiled_as == [{"dynamic": False, "fullgraph": True}] * (compiled == "true")
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, die_at=6)
        with pytest.raises(RuntimeError, match="the power went"):
            fit(config, data, tmp_path / "cut", precision="bf16")
    averaged, raw, _ = fit(config, data, tmp_path / "cut", precision="bf16")
    assert same(averaged, ends[1][0])
    assert same(raw, ends[1][1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_compiled_what_it_trains_uncompiled(data: ImageData, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        config = settings("model.dropout=0.0", f"training.compile={str(compiled).lower()}")
        _, _, write = fit(config, data, tmp_path / str(compiled), precision="bf16", accelerator="gpu")
        write(tmp_path / "curve.csv")
        with (tmp_path / "curve.csv").open() as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.parametrize("option", ["schedule", "training.compile"])
def test_what_makes_other_weights_makes_another_name(
    option: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of betas counts by what is in it; whether the training is compiled, by what that comes to here."""
    from ddim_lab.device.runtime import Runtime
    from ddim_lab.models.obtain import training_recipe

    monkeypatch.setattr("ddim_lab.device.runtime._missing_for_compiling", lambda on_gpu: None)
    file = tmp_path / "betas.txt"
    file.write_text("\n".join(map(repr, settings().build_schedule().betas.tolist())))

    def recipe(*overrides: str) -> dict[str, Any]:
        config = settings(*overrides)
        return training_recipe(config, data, Runtime.resolve(config.runtime))

    if option == "training.compile":
        cpu = "runtime.device=cpu"
        assert recipe(cpu, f"{option}=auto") == recipe(cpu, f"{option}=false") != recipe(cpu, f"{option}=true")
        here = Runtime.resolve(settings(cpu).runtime)
        for deterministic in (False, True):  # cells of either kind share one training
            on_a_gpu = dataclasses.replace(here, device="cuda:0", deterministic=deterministic)
            assert [on_a_gpu.training_compiled(asked) for asked in ("auto", False, True)] == [True, False, True]
        return
    from_file = ("schedule=file", f"schedule.path={file}")
    before = recipe(*from_file)
    file.rename(tmp_path / "moved.txt")
    assert recipe("schedule=file", f"schedule.path={tmp_path}/moved.txt") == before == recipe()
    file.write_text("\n".join(["0.01"] * 1000))
    assert recipe(*from_file) != before


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_files(tmp_path: Path) -> None:
    """SIGKILL in the middle of training, the same command again: the stored files of an undisturbed run."""
    line = (
        *("training.max_steps=20", "training.checkpoint_every=5", "steps=2"),
        *("logger=csv", "metrics.features=pixels"),
    )
    step = DiffusionModule.training_step

    def killed() -> int:
        def watched(self: DiffusionModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if self.global_step == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, batch, batch_idx)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DiffusionModule, "training_step", watched)
            return tiny.run(tmp_path / "killed", *line)

    status, printed = forked.run(killed, tmp_path / "log")
    assert status == -signal.SIGKILL, printed
    assert list((tmp_path / "killed").glob("models/*.partial/last.ckpt"))
    assert not stored(tmp_path / "killed")
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        assert tiny.run(tmp_path / "killed", *line) == 0
        assert [step for step, _ in seen] == list(range(10, 20))
        seen.clear()
        assert tiny.run(tmp_path / "whole", *line) == 0
        assert [step for step, _ in seen] == list(range(20))
    killed_files, whole = stored(tmp_path / "killed"), stored(tmp_path / "whole")
    assert set(whole) == {"diffusion_pytorch_model.safetensors", "raw/diffusion_pytorch_model.safetensors"}
    assert killed_files == whole
    assert not list((tmp_path / "killed" / "models").glob("*.partial"))


def stored(outputs: Path) -> dict[str, bytes]:
    """The safetensors files of the finished U-Net under an outputs folder."""
    models = [file.parent for file in outputs.glob("models/*/model.json") if not file.parent.name.startswith(".")]
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for folder in models
        for file in folder.rglob("diffusion_pytorch_model.safetensors")
    }


def rank_of_two(rank: int, values: dict[str, Any], work: Path) -> None:
    from safetensors.torch import save_file

    config = Config.model_validate(values)
    averaged, raw, write = fit(config, load_data(config.data), work, rank=rank)
    save_file(raw, work / f"raw-{rank}.safetensors")
    save_file(averaged, work / f"averaged-{rank}.safetensors")
    if rank == 0:
        write(work / "curve.csv")


@pytest.mark.slow
def test_ranks_that_train_together_take_the_steps_of_one(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout the same batches, flips, timesteps and noise: the weights of one process, to rounding."""
    from safetensors.torch import load_file

    from ddim_lab.device.ranks import on_ranks

    alone, alone_raw, write = fit(settings("model.dropout=0.0"), data, tmp_path / "one")
    config = settings("model.dropout=0.0", "training.devices=2")
    (tmp_path / "two").mkdir()
    for cluster in CLUSTERS.values():
        for name, value in cluster.items():
            monkeypatch.setenv(name, value)
    on_ranks(2, rank_of_two, config.model_dump(mode="json"), tmp_path / "two")
    first, second = (load_file(tmp_path / "two" / f"averaged-{rank}.safetensors") for rank in range(2))
    assert same(first, second)
    together = load_file(tmp_path / "two" / "raw-0.safetensors")
    # Adam divides a gradient by its size: where it is nothing but rounding (a shift that the next norm takes away) the
    # steps, of 2e-3 each, differ by all they can. Elsewhere they agree.
    for one, two in ((alone_raw, together), (alone, first)):
        apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
        assert float(apart.median()) < 1e-6
        assert float(apart.quantile(0.95)) < 5e-4
    write(tmp_path / "curve.csv")
    curves = []
    for path in (tmp_path / "curve.csv", tmp_path / "two" / "curve.csv"):
        with path.open() as file:
            curves.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


CLUSTERS = {
    "Slurm": {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"},
    "torchrun": {
        **{"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "7"},
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    },
    "LSF": {
        **{"LSB_JOBID": "7", "LSB_DJOB_RANKFILE": "/dev/null", "JSM_NAMESPACE_LOCAL_RANK": "1"},
        **{"JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_RANK": "1"},
    },
    "Kubeflow": {
        **{"KUBERNETES_PORT": "1", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1", "WORLD_SIZE": "4", "RANK": "1"},
    },
    "Lightning's own": {"PL_TRAINER_NUM_NODES": "4", "PL_TRAINER_LIMIT_TRAIN_BATCHES": "1", "NODE_RANK": "1"},
}
"""What a job finds in its environment that was started as one of several tasks, or beside them."""


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_training_is_one_process_whatever_a_cluster_says(
    cluster: str, data: ImageData, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    for name, value in CLUSTERS[cluster].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning finds it when it is imported
    averaged, raw, _ = fit(settings(), data, tmp_path)
    assert same(averaged, undisturbed[0])
    assert same(raw, undisturbed[1])
    assert {name: os.environ[name] for name in CLUSTERS[cluster]} == CLUSTERS[cluster]


class Questions(TorchDispatchMode):
    """Counts what makes the host wait for the device: each number that it reads from there."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_averaging_asks_the_device_nothing_after_the_first_step(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    update = _Average.update_parameters

    def counted(self: _Average, model: torch.nn.Module) -> None:
        with Questions() as questions:
            update(self, model)
        asked.append(questions.asked)

    monkeypatch.setattr(_Average, "update_parameters", counted)
    fit(settings("training.max_steps=4"), data, tmp_path)
    assert asked[0] > 0  # torch's own update asks
    assert asked[1:] == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_no_training_step_waits_for_the_device(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DiffusionModule.training_step

    def watched(self: DiffusionModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        torch.cuda.set_sync_debug_mode("warn" if 2 <= self.global_step < 7 else "default")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", watched)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(settings("training.checkpoint_every=9"), data, tmp_path, precision="bf16", accelerator="gpu")
    waits = [f"{each.filename}:{each.lineno}" for each in caught if "called a synchronizing" in str(each.message)]
    assert waits == []


def test_ema_is_the_average_of_the_weights_after_each_step(data: ImageData, tmp_path: Path) -> None:
    """EMA_1 = w_1, EMA_k = d EMA_(k-1) + (1 - d) w_k, with the w_k of runs that stop after k steps."""
    weights = []
    for steps in range(1, 6):
        averaged, raw, _ = fit(settings(f"training.max_steps={steps}"), data, tmp_path / str(steps))
        weights.append({name: tensor.double() for name, tensor in raw.items()})
    expected = weights[0]
    for later in weights[1:]:
        expected = {name: DECAY * expected[name] + (1 - DECAY) * later[name] for name in expected}
    distance = max(float((averaged[name] - expected[name]).abs().max()) for name in expected)
    apart = max(float((averaged[name] - weights[-1][name]).abs().max()) for name in expected)
    assert distance < 1e-6
    assert apart > 1e-3  # the raw weights would not pass for it


def test_what_is_loaded_is_what_was_stored(data: ImageData, undisturbed: Any, tmp_path: Path) -> None:
    """weights=ema loads the average and weights=raw the last weights, bitwise."""
    from ddim_lab.device.runtime import Runtime
    from ddim_lab.models.obtain import obtain_model
    from ddim_lab.store import Store

    averaged, raw, _, _ = undisturbed
    digests = {}
    for name, expected in (("ema", averaged), ("raw", raw)):
        config = settings(f"model.weights={name}")
        model = obtain_model(config, data, Runtime.resolve(config.runtime), Store(tmp_path), _no_mirror)
        loaded = model.load()
        assert same(loaded.state_dict(), expected), name
        assert model.digest == weights_digest(loaded)
        digests[name] = model.digest
        assert model.trained == (name == "ema")  # the second one finds the first one's training
    assert digests["ema"] != digests["raw"]


def _no_mirror() -> Any:
    import contextlib

    return contextlib.nullcontext(lambda values, step: None)


def test_a_training_leaves_torchs_switches_as_they_were(data: ImageData, tmp_path: Path) -> None:
    """Left on, cuDNN's search for fast algorithms would change what is measured after a training, and only then."""
    cudnn = torch.backends.cudnn
    assert (cudnn.benchmark, cudnn.deterministic) == (False, False)
    cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        fit(settings("training.max_steps=1"), data, tmp_path)
        assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        cudnn.deterministic = False
        torch.use_deterministic_algorithms(False)


def test_workers_share_the_cores_a_process_may_use(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk = DiskImages(["a"], torch.zeros(1, dtype=torch.int64), data.shape, lambda name: torch.zeros(1), "")
    batches = TrainingBatches(on_disk, 4, seed=0)

    def workers(ranks: int) -> int:
        batches.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=ranks)
        return batches.train_dataloader().num_workers

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert [workers(ranks) for ranks in (1, 4, 24)] == [12, 3, 1]
    monkeypatch.delattr(os, "sched_getaffinity")
    assert [workers(ranks) for ranks in (1, 8)] == [16, 8]


def test_another_seed_is_another_training(data: ImageData, undisturbed: Any, tmp_path: Path) -> None:
    _, raw, seen, _ = undisturbed
    with pytest.MonkeyPatch.context() as patch:
        other = watch(patch)
        _, raw_other, _ = fit(settings("training.seed=1"), data, tmp_path)
    assert not same(raw, raw_other)
    assert seen != other


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (7, 7), (5, 12), (1437, 128)])
def test_batches_are_a_chain_of_permutations(size: int, batch: int) -> None:
    """Cut anywhere: step k is the same however many steps were taken before, and every epoch sees every image once."""
    steps = 3 * size // batch + 2
    whole = list(itertools.islice(_StepBatches(size, batch, seed=3, first_step=0), steps))
    assert {len(indices) for indices in whole} == {batch}
    chain = torch.cat(whole)
    for epoch in range(len(chain) // size):
        assert chain[epoch * size : (epoch + 1) * size].sort().values.tolist() == list(range(size))
    for first in range(1, steps, max(1, steps // 5)):
        rest = itertools.islice(_StepBatches(size, batch, seed=3, first_step=first), steps - first)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[first:], strict=True))
    assert not torch.equal(chain[:size], next(iter(_StepBatches(size, size, seed=4, first_step=0))))


def test_batches_in_memory_and_on_disk_are_the_same() -> None:
    from ddim_lab.data.images import DiskImages

    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    memory = MemoryImages(images, torch.arange(20))
    disk = DiskImages([str(i) for i in range(20)], torch.arange(20), (1, 4, 4), lambda name: images[int(name)], "x")
    for first, second in zip(_batches(memory), _batches(disk), strict=True):
        assert torch.equal(first["images"], second["images"])
        assert torch.equal(first["labels"], second["labels"])
        assert torch.equal(first["images"], images[first["labels"]])


def _batches(images: Any) -> Iterator[dict[str, Tensor]]:
    module = TrainingBatches(images, 6, seed=0)
    for batch in itertools.islice(iter(module.train_dataloader()), 5):
        yield module.transfer_batch_to_device(batch, torch.device("cpu"), 0)


@pytest.mark.parametrize("at", [2, 6])
def test_a_loss_that_is_not_finite_ends_training_by_name_and_is_never_saved(
    at: int, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are read every READ_EVERY steps; a checkpoint that is due before that waits for them."""
    assert READ_EVERY > 9
    step = DiffusionModule.training_step

    def poisoned(self: DiffusionModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return step(self, batch, batch_idx) * (float("nan") if self.global_step + 1 == at else 1.0)

    monkeypatch.setattr(DiffusionModule, "training_step", poisoned)
    with pytest.raises(FloatingPointError, match=rf"the training loss is nan at step {at}$"):
        fit(settings(), data, tmp_path)
    kept = list(tmp_path.glob("*.ckpt"))
    assert len(kept) == (at > 4)
    for file in kept:
        state = VerifiedCheckpoints().load_checkpoint(file)["state_dict"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_a_run_that_was_killed_after_its_last_checkpoint_has_the_weights_of_its_end(
    data: ImageData, tmp_path: Path
) -> None:
    averaged, raw, _ = fit(settings("training.max_steps=8"), data, tmp_path)
    averaged_again, raw_again, write = fit(settings("training.max_steps=8"), data, tmp_path)
    assert same(raw_again, raw)
    assert same(averaged_again, averaged)
    assert not same(raw, averaged)
    write(tmp_path / "curve")
    assert len((tmp_path / "curve").read_text().splitlines()) == 9


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_checkpoint_is_set_aside_and_the_training_starts_over(
    damage: str, undisturbed: Any, data: ImageData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    averaged, raw, _, _ = undisturbed
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, die_at=6)
        with pytest.raises(RuntimeError, match="the power went"):
            fit(settings(), data, tmp_path)
    last = tmp_path / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes({"flip": bytes(content), "truncate": bytes(content[:-7]), "empty": b""}[damage])
    with pytest.raises(ValueError, match="is damaged"):
        VerifiedCheckpoints().load_checkpoint(last)
    averaged_after, raw_after, _ = fit(settings(), data, tmp_path)
    assert f"{last} is damaged" in caplog.text
    assert len(list(tmp_path.glob("last.ckpt.damaged-*"))) == 1
    assert same(raw_after, raw)
    assert same(averaged_after, averaged)


def test_a_checkpoint_can_not_run_code(tmp_path: Path) -> None:
    """One with the right hash that holds more than tensors and plain values is refused, not unpickled."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    VerifiedCheckpoints().save_checkpoint({"callbacks": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        VerifiedCheckpoints().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()

"""The LightningModule: the eps-network, its training and its sampling for evaluation."""

from __future__ import annotations

import copy
import csv
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, WeightAveraging
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddim_lab.config.model import UNetConfig
from ddim_lab.config.training import TrainingConfig
from ddim_lab.console import Progress
from ddim_lab.data.images import ImageData, from_uint8
from ddim_lab.data.loaders import TrainingBatches, rank_part
from ddim_lab.device.engine import compile_whole, too_many_compilations
from ddim_lab.device.lightning import interruptible, trainer
from ddim_lab.device.precision import ends_without_autocast
from ddim_lab.device.switches import switches_kept
from ddim_lab.diffusion import eps_loss, q_sample, timestep_shares, timesteps_by_share
from ddim_lab.errors import ConfigError
from ddim_lab.models.checkpoints import VerifiedCheckpoints, usable
from ddim_lab.schedule import NoiseSchedule

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

__all__ = ["DiffusionModule", "train"]

READ_EVERY: Final = 25
"""Training steps between readings of the loss: on a GPU each one waits until the device has caught up."""


@final
class DiffusionModule(pl.LightningModule):
    """Trains the eps-network (Ho et al. 2020, Algorithm 1) and samples from it under a Trainer.

    Everything random in a training step (timesteps, flips, eps, dropout) is drawn from a generator seeded by
    (training.seed, global step): a run that is killed and resumed takes the very same steps. Of several ranks each
    draws for the whole batch and takes its rows, so that their number changes no flip, timestep or eps.

    Args:
        network: eps-network, (x_t [B, C, H, W], t [B]) -> eps or an object with `.sample`.
        schedule: the noise schedule.
        training: how to train; None for a module that only evaluates.
        evaluate: called with a batch of sample indices in `test_step`; see `ddim_lab.tasks`.
        ranks: processes that train together; each is given its part of a batch.
        channels_last: give the network its x_t as [B, H, W, C] in memory, as its weights are then.
        null_class: of a class-conditional network, which is given the images' labels, or this one instead in
            `training.label_dropout` of the cases, independently (Ho and Salimans 2021, Algorithm 1); None of another.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        training: TrainingConfig | None = None,
        evaluate: Callable[[Tensor], None] | None = None,
        ranks: int = 1,
        channels_last: bool = False,
        null_class: int | None = None,
    ) -> None:
        super().__init__()
        self._null_class = null_class
        self._ranks = ranks
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network
        self.schedule = schedule
        self.training_config = training
        self._evaluate = evaluate
        # A plain attribute, not a buffer: it is derived from the schedule and belongs in no checkpoint.
        self._alpha_bars = torch.tensor(schedule.alpha_bars)
        self._shares = timestep_shares(self._alpha_bars)

    def on_train_start(self) -> None:
        """Put the schedule where the steps are: a copy in every step would make the host wait for the device."""
        self._alpha_bars, self._shares = self._alpha_bars.to(self.device), self._shares.to(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.training_config is not None
        seed, step = self.training_config.seed, self.global_step
        rank = self.global_rank
        torch.manual_seed(_step_seed(seed, step, 0))
        x_0 = from_uint8(batch["images"])
        total = len(x_0) * self._ranks
        mine = rank_part(total, rank, self._ranks)
        if self.training_config.random_flip:
            flip = torch.rand(total, device=x_0.device)[mine] < 0.5
            x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
        t, weights = self._timesteps(total, mine, x_0.device)
        eps = torch.randn(total, *x_0.shape[1:], device=x_0.device)[mine]
        if rank > 0:  # dropout has no rows to take: each rank has its own
            torch.manual_seed(_step_seed(seed, step, rank))
        x_t = q_sample(x_0, eps, self._alpha_bars[t, None, None, None])
        output = self.network(x_t.contiguous(memory_format=self._layout), t, *self._labels(batch, total, mine, step))
        return eps_loss(output if isinstance(output, Tensor) else output.sample, eps, weights)

    def _labels(self, batch: dict[str, Tensor], total: int, mine: slice, step: int) -> tuple[Tensor, ...]:
        """What a class-conditional network is told, int64 [B]; drawn by a generator of its own, on the CPU."""
        if self._null_class is None:
            return ()
        assert self.training_config is not None
        labels, training = batch["labels"], self.training_config
        generator = torch.Generator().manual_seed(_step_seed(training.seed, step, -1))
        dropped = torch.rand(total, generator=generator)[mine] < training.label_dropout
        return (torch.where(dropped.to(labels.device, non_blocking=True), self._null_class, labels),)

    def _timesteps(self, total: int, mine: slice, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Timesteps of the rows `mine` of a batch of `total`, and their losses' weights; None where all are 1."""
        assert self.training_config is not None
        if self.training_config.timesteps == "uniform":
            return torch.randint(0, self.schedule.num_timesteps, (total,), device=device)[mine], None
        return timesteps_by_share(self._shares, torch.rand(total, device=device)[mine])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        config = self.training_config
        assert config is not None
        # Fused Adam is fastest, but unscales gradients itself, which mixed precision does not combine with clipping.
        fused = self.trainer.precision == "32-true"
        optimizer = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(config, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def test_step(self, indices: Tensor, batch_idx: int) -> None:
        assert self._evaluate is not None
        self._evaluate(indices)


def _rate(config: TrainingConfig, step: int) -> float:
    """Share of the learning rate at an optimiser step: linear warm-up, then constant or cosine to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.learning_rate_decay == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(f"ddim_lab training step {seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@final
class _Curve(Callback):
    """Keeps loss and learning rate of every step, in the checkpoint too, and shows progress.

    Losses stay on the device until they are read, every `READ_EVERY` steps and before anything is saved; the first
    one that is not finite ends the training there, so that no checkpoint holds what came after it.
    """

    def __init__(self, total: int, mirror: Callable[[dict[str, float], int], None]) -> None:
        self.rows: list[tuple[int, float, float, float]] = []
        self._unread: list[tuple[int, Tensor, float, float]] = []
        self._total, self._mirror = total, mirror
        self._progress: Progress | None = None
        self._started = 0.0
        self._begun_at = 0
        self._spent = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        self._begun_at = trainer.global_step
        self._spent = self.rows[-1][3] if self.rows else 0.0
        shown = trainer.global_rank == 0
        self._progress = Progress("training", self._total, "step", done=trainer.global_step, shown=shown).__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        seconds = self._spent + time.perf_counter() - self._started
        self._unread.append((trainer.global_step, outputs["loss"].detach(), rate, round(seconds, 3)))
        if self._progress is not None:
            # The first one compiles the network and chooses kernels.
            self._progress.update(in_rate=trainer.global_step > self._begun_at + 1)
        if trainer.global_step % READ_EVERY == 0 or trainer.global_step == self._total:
            self._read()
            step, loss, rate, _ = self.rows[-1]
            self._mirror({"loss": loss, "learning_rate": rate}, step)
            if self._progress is not None:
                self._progress.note(f"loss {loss:.4f}")

    def _read(self) -> None:
        """Bring the losses of the last steps to the host.

        Raises:
            FloatingPointError: one of them is NaN or infinite; names the step.
        """
        if not self._unread:
            return
        losses = torch.stack([loss for _, loss, _, _ in self._unread])
        if torch.distributed.is_initialized():  # the mean over a batch is that of its parts, which are of equal size
            torch.distributed.all_reduce(losses)
            losses /= torch.distributed.get_world_size()
        for (step, _, rate, seconds), loss in zip(self._unread, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the training loss is {loss} at step {step}")
            self.rows.append((step, loss, rate, seconds))
        self._unread.clear()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._progress is not None:
            self._progress.__exit__()

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"rows": [list(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [tuple(row) for row in state_dict["rows"]]

    def write(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "loss", "learning_rate", "seconds"])
            writer.writerows(self.rows)


@final
class _Average(AveragedModel):
    """torch's running average, whose updates ask the device nothing.

    torch's own looks up on the device, in every update, whether it is the first one: there the host waits until the
    step is done, and launches no part of the next one meanwhile. Here only the first update since the start is torch's.
    The arithmetic is the same. A U-Net has no buffers, which torch would bring along.
    """

    _pairs: tuple[list[Tensor], list[Tensor]] | None = None

    def update_parameters(self, model: nn.Module) -> None:
        if self._pairs is None:
            super().update_parameters(model)
            # Kept: to look up a U-Net's 300 parameters was two thirds of the host's time for an update.
            averages, latest = ([each.detach() for each in of.parameters()] for of in (self.module, model))
            self._pairs = averages, latest
            return
        assert self.multi_avg_fn is not None
        self.multi_avg_fn(*self._pairs, self.n_averaged)
        self.n_averaged += 1


@final
class _Averaging(WeightAveraging):
    """Lightning's averaging, and its part of the checkpoints, with that average."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._average_model = _Average(pl_module, self._device, use_buffers=self._use_buffers, **self._kwargs)


@final
class _LastRaw(Callback):
    """Copies the raw parameters at the end of training, before Lightning's averaging puts its own in their place."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = pl_module.network
        assert isinstance(network, nn.Module)
        self.state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}


@switches_kept()
def train(
    data: ImageData,
    model: UNetConfig,
    schedule: NoiseSchedule,
    training: TrainingConfig,
    *,
    accelerator: str,
    device_indices: Sequence[int] = (),
    rank: int = 0,
    precision: str,
    compiled: bool,
    deterministic: bool,
    work: Path,
    mirror: Callable[[dict[str, float], int], None],
) -> tuple[UNet2DModel, UNet2DModel, Callable[[Path], None]]:
    """Train an eps-network; resume from the checkpoint in `work` if there is one.

    With training.devices above 1 it is called in as many processes, started by `ddim_lab.device.ranks.on_ranks`.

    Args:
        data, model, schedule, training: what to train, on what, how.
        accelerator: Lightning's name of the device: "cpu" or "gpu".
        device_indices: which of the GPUs, one a rank; empty on a CPU.
        rank: of this process among those that train together.
        precision: "fp32" or "bf16" (mixed).
        compiled: torch.compile the network, in channels-last layout; uncompiled, a GPU's group norm would turn each of
            its inputs and outputs over.
        deterministic: only deterministic kernels, for weights that are bitwise the same on a GPU too (uncompiled: what
            a compiler chooses there may differ from run to run); else the fastest ones found there.
        work: durable folder for checkpoints.
        mirror: called with (values, step) now and then.

    Returns:
        The network with EMA weights, the network with the last raw weights, and a function that writes the
        training curve to a path.

    Raises:
        FloatingPointError: the loss is NaN or infinite; names the step.
        ConfigError: an image can't be read; names it.
        RuntimeError: this process has compiled too many networks.
    """
    classes = data.num_classes if model.conditional else None
    network = _initialised(model, data.shape, classes, training.seed, precision, compiled)
    curve, raw = _Curve(training.max_steps, mirror), _LastRaw()
    average = _Averaging(
        device="cuda" if accelerator == "gpu" else "cpu",
        use_buffers=False,
        # The averaging function of EMAWeightAveraging, in its form of a few kernels for all parameters.
        multi_avg_fn=get_ema_multi_avg_fn(training.ema_decay),  # type: ignore[no-untyped-call]
    )
    callbacks: list[Callback] = [raw, average, curve]
    fitter = _trainer(training, accelerator, device_indices, rank, precision, deterministic, work, callbacks)
    module = DiffusionModule(
        network, schedule, training, ranks=training.devices, channels_last=compiled, null_class=classes
    )
    try:
        with interruptible():
            fitter.fit(
                module,
                datamodule=TrainingBatches(data.train, training.batch_size, training.seed),
                ckpt_path=usable(work / "last.ckpt"),
                weights_only=True,
            )
    except ConfigError as error:  # from a process that decodes images, with the traceback there in front
        raise ConfigError(str(error).strip().splitlines()[-1].removeprefix("ddim_lab.errors.ConfigError: ")) from None
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        raise too_many_compilations("training.compile") from None
    if not raw.state:  # it was killed after its last checkpoint: where no step is left, Lightning leaves its hooks out
        raw.on_train_end(fitter, module)
        average.on_train_end(fitter, module)
    averaged = copy.deepcopy(network).to("cpu", memory_format=torch.contiguous_format).eval()  # a copy is not compiled
    last_raw = copy.deepcopy(averaged)
    last_raw.load_state_dict(raw.state)
    return averaged, last_raw, curve.write


def _initialised(
    model: UNetConfig, shape: tuple[int, int, int], classes: int | None, seed: int, precision: str, compiled: bool
) -> UNet2DModel:
    """The network before its first step, named by the seed; prepared for bf16, or for the compiler, where asked."""
    from ddim_lab.models.unet import build_unet  # diffusers takes half a second, and who only samples has no need of it

    torch.manual_seed(_step_seed(seed, -1, 0))
    network = build_unet(model, shape, classes)
    if precision == "bf16":
        ends_without_autocast(network)
    if compiled:
        network.to(memory_format=torch.channels_last)
        compile_whole(network)
    return network


def _trainer(
    training: TrainingConfig,
    accelerator: str,
    device_indices: Sequence[int],
    rank: int,
    precision: str,
    deterministic: bool,
    work: Path,
    callbacks: list[Callback],
) -> pl.Trainer:
    """Lightning's Trainer for `train`, whose arguments these are; it keeps its checkpoint in `work`."""
    checkpoint = ModelCheckpoint(dirpath=work, filename="last", every_n_train_steps=training.checkpoint_every)
    checkpoint.CHECKPOINT_JOIN_CHAR = "="
    return trainer(
        rank=rank,
        accelerator=accelerator,
        devices=list(device_indices) or training.devices,
        strategy="ddp" if training.devices > 1 else "auto",
        max_steps=training.max_steps,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        gradient_clip_val=training.gradient_clip,
        deterministic=deterministic,
        benchmark=not deterministic,
        callbacks=[*callbacks, checkpoint],
        plugins=[VerifiedCheckpoints()],
    )

"""The LightningModule: the eps-network, its training and its sampling for evaluation."""

from __future__ import annotations

import csv
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from tqdm import tqdm

from ddim_lab.config import TrainingConfig, UNetConfig
from ddim_lab.data import ImageData, from_uint8
from ddim_lab.diffusion import eps_loss, per_sample
from ddim_lab.loaders import TrainingBatches
from ddim_lab.schedule import NoiseSchedule

__all__ = ["DiffusionModule", "build_unet", "load_unet", "train", "weights_digest"]


def build_unet(config: UNetConfig, shape: tuple[int, int, int]) -> UNet2DModel:
    """A diffusers U-Net for images of `shape` (C, H, W), freshly initialised from torch's global generator."""
    channels, height, width = shape
    down = tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention)
    up = tuple("AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(config.attention))
    return UNet2DModel(
        sample_size=(height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        add_attention=any(config.attention),
    )


def load_unet(folder: Path) -> nn.Module:
    """A stored U-Net, on the CPU, in evaluation mode, without gradients. Safetensors only: nothing is unpickled."""
    network: nn.Module = UNet2DModel.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
    )
    return network.eval().requires_grad_(False)


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over a network's tensors in order of name: (name, dtype, shape, bytes)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@final
class DiffusionModule(pl.LightningModule):
    """Trains the eps-network (Ho et al. 2020, Algorithm 1) and samples from it under a Trainer.

    Everything random in a training step (timesteps, flips, eps, dropout) is drawn from a generator seeded by
    (training.seed, global step): a run that is killed and resumed takes the very same steps.

    Args:
        network: eps-network, (x_t [B, C, H, W], t [B]) -> eps or an object with `.sample`.
        schedule: the noise schedule.
        training: how to train; None for a module that only evaluates.
        evaluate: called with a batch of sample indices in `test_step`; see `ddim_lab.tasks`.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        training: TrainingConfig | None = None,
        evaluate: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.training_config = training
        self._evaluate = evaluate
        # Plain attributes, not buffers: they are derived from the schedule, and EMA must not average them.
        alpha_bars = torch.tensor(schedule.alpha_bars)
        self._signal, self._noise = alpha_bars.sqrt().float(), (1.0 - alpha_bars).sqrt().float()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.training_config is not None
        torch.manual_seed(_step_seed(self.training_config.seed, self.global_step, self.global_rank))
        x_0 = from_uint8(batch["images"])
        if self.training_config.random_flip:
            flip = torch.rand(len(x_0), device=x_0.device) < 0.5
            x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
        t = torch.randint(0, self.schedule.num_timesteps, (len(x_0),), device=x_0.device)
        eps = torch.randn_like(x_0)
        signal, noise = self._signal.to(x_0.device), self._noise.to(x_0.device)
        x_t = per_sample(signal[t], x_0) * x_0 + per_sample(noise[t], x_0) * eps
        output = self.network(x_t, t)
        loss = eps_loss(output if isinstance(output, Tensor) else output.sample, eps)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss.item()} at step {self.global_step}")
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        config = self.training_config
        assert config is not None
        optimizer = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, fused=True)
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
    """Keeps loss and learning rate of every step, in the checkpoint too, and shows progress."""

    def __init__(self, total: int, mirror: Callable[[dict[str, float], int], None]) -> None:
        self.rows: list[tuple[int, float, float, float]] = []
        self._total, self._mirror = total, mirror
        self._bar: tqdm[Any] | None = None
        self._started = 0.0
        self._spent = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        self._spent = self.rows[-1][3] if self.rows else 0.0
        self._bar = tqdm(
            total=self._total, initial=trainer.global_step, desc="training", unit="step", disable=None, leave=False
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(outputs["loss"])
        rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        seconds = self._spent + time.perf_counter() - self._started
        self.rows.append((trainer.global_step, loss, rate, round(seconds, 3)))
        if self._bar is not None:
            self._bar.update(1)
            if trainer.global_step % 20 == 0:
                self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if trainer.global_step % 25 == 0 or trainer.global_step == self._total:
            self._mirror({"loss": loss, "learning_rate": rate}, trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [list(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [tuple(row) for row in state_dict["rows"]]

    def write(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "loss", "learning_rate", "seconds"])
            writer.writerows(self.rows)


def train(
    data: ImageData,
    model: UNetConfig,
    schedule: NoiseSchedule,
    training: TrainingConfig,
    *,
    accelerator: str,
    precision: str,
    work: Path,
    mirror: Callable[[dict[str, float], int], None],
) -> tuple[UNet2DModel, UNet2DModel, Callable[[Path], None]]:
    """Train an eps-network; resume from the checkpoint in `work` if there is one.

    Args:
        data, model, schedule, training: what to train, on what, how.
        accelerator: Lightning's name of the device: "cpu" or "gpu".
        precision: "fp32" or "bf16" (mixed).
        work: durable folder for checkpoints.
        mirror: called with (values, step) now and then.

    Returns:
        The network with EMA weights, the network with the last raw weights, and a function that writes the
        training curve to a path.

    Raises:
        FloatingPointError: the loss is NaN or infinite; names the step.
    """
    torch.manual_seed(_step_seed(training.seed, -1, 0))
    module = DiffusionModule(build_unet(model, data.shape), schedule, training)
    curve = _Curve(training.max_steps, mirror)
    checkpoint = ModelCheckpoint(dirpath=work, filename="last", every_n_train_steps=training.checkpoint_every)
    checkpoint.CHECKPOINT_JOIN_CHAR = "="
    ema = EMAWeightAveraging(
        device="cuda" if accelerator == "gpu" else "cpu", use_buffers=False, decay=training.ema_decay
    )
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=training.max_steps,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        gradient_clip_val=training.gradient_clip,
        callbacks=[ema, curve, checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    last = work / "last.ckpt"
    batches = TrainingBatches(data.train, training.batch_size, training.seed)
    raw = _LastRaw()
    trainer.callbacks.insert(0, raw)  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=batches, ckpt_path=last if last.is_file() else None, weights_only=True)
    averaged = module.network
    assert isinstance(averaged, UNet2DModel)
    raw_network = build_unet(model, data.shape)
    raw_network.load_state_dict(raw.state)
    return averaged.eval(), raw_network.eval(), curve.write


@final
class _LastRaw(Callback):
    """Copies the raw weights at the end of training, before the EMA callback puts the average in their place."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = pl_module.network
        assert isinstance(network, nn.Module)
        self.state = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}

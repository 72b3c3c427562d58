"""Training of the classifier whose features `metrics.features=classifier` compares: on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn

from ddim_lab.console import Progress
from ddim_lab.data.images import ImageData
from ddim_lab.data.loaders import TrainingBatches
from ddim_lab.device.lightning import interruptible, trainer
from ddim_lab.metrics.classifier import Classifier

__all__ = ["train_classifier"]


@final
class _ClassifierTraining(pl.LightningModule):
    def __init__(self, network: Classifier, recipe: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = network
        self._recipe = recipe

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network.head(self.network(batch["images"])), batch["labels"])

    def configure_optimizers(self) -> Any:
        rate = self._recipe["learning_rate"]
        optimizer = torch.optim.Adam(self.parameters(), lr=rate)
        if "learning_rate_schedule" not in self._recipe:
            return optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=self._recipe["steps"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_classifier(network: Classifier, data: ImageData, recipe: Mapping[str, Any]) -> float:
    """Train in place on the training split; return the accuracy on the held-out split.

    Args:
        network: freshly made; its weights are drawn again from the recipe's seed.
        data: the data set.
        recipe: `recipe_for` these data.
    """
    torch.manual_seed(recipe["seed"])
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            layer.reset_parameters()
    fitter = trainer(accelerator="cpu", devices=1, max_steps=recipe["steps"], enable_checkpointing=False)
    progress = Progress("training the classifier", recipe["steps"], "step")
    fitter.callbacks.append(LambdaCallback(on_train_batch_end=lambda *_: progress.update()))  # type: ignore[attr-defined]
    batches = TrainingBatches(data.train, recipe["batch_size"], recipe["seed"])
    with interruptible(), progress:
        fitter.fit(_ClassifierTraining(network, recipe), datamodule=batches)
    network.eval()
    with torch.no_grad():
        guesses = torch.cat([network.head(network(part)).argmax(1) for part in data.held_out.batches(512)])
    return float((guesses == data.held_out.labels).double().mean())

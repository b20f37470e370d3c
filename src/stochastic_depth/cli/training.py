"""One training run, on Lightning."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy

from stochastic_depth import Branch

from .models import Network
from .seeds import derive


class Classifier(L.LightningModule):
    """A classifier of uint8 images: AdamW, and one cycle of the learning rate."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, lr: float, seed: int) -> None:
        super().__init__()
        self.model = network.model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.lr = lr
        self.seed = seed
        for name in ("mean", "std"):
            value = 255 * torch.tensor(getattr(network, name)).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images - self.mean) / self.std
        output = self.model(pixels.contiguous(memory_format=torch.channels_last))
        logits: Tensor = getattr(output, "logits", output)  # transformers' outputs have a name
        return logits

    def on_train_epoch_start(self) -> None:
        # What is drawn in an epoch depends on the seed and the epoch alone, so a resumed run
        # repeats the uninterrupted one without a saved random state. Each process has coins of
        # its own.
        rank = (self.global_rank,) if self.global_rank else ()
        torch.manual_seed(derive("epoch", self.seed, self.current_epoch, *rank))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        count = len(labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        images, labels = batch
        logits = self(images)
        error = (logits.argmax(1) != labels).float().mean()
        count = len(labels)
        self.log(f"{split}_error", error, prog_bar=True, batch_size=count, sync_dist=True)
        loss = cross_entropy(logits, labels)
        self.log(f"{split}_loss", loss, batch_size=count, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.lr,
            total_steps=int(self.trainer.estimated_stepping_batches),
            cycle_momentum=False,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Recorder(L.Callback):
    """What a run measured: seconds of every step, and after each epoch errors and depth.

    Lightning keeps it in the checkpoint, so a resumed run reports on all of its epochs.
    """

    def __init__(self, branches: Sequence[Branch], depth: int) -> None:
        self.branches = branches
        self.depth = depth
        self.step_seconds: list[float] = []
        self.history: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.counts = [(branch.decided, branch.dropped) for branch in self.branches]

    def on_train_batch_start(self, *args: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.step_seconds.append(time.perf_counter() - self.started)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        realised = self.depth - sum(
            (branch.dropped - dropped) / max(branch.decided - decided, 1)
            for branch, (decided, dropped) in zip(self.branches, self.counts, strict=True)
        )
        metrics["realised_depth"] = realised
        if trainer.world_size > 1:
            everywhere = trainer.strategy.reduce(torch.tensor(realised, device=module.device))
            metrics["realised_depth"] = float(everywhere)
        self.history.append(metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"step_seconds": self.step_seconds, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_seconds = state["step_seconds"]
        self.history = state["history"]


def trainer(
    epochs: int, recorder: Recorder, folder: Path, devices: int, strategy: str
) -> L.Trainer:
    """A Lightning trainer that keeps the last two epochs' checkpoints in ``folder``."""
    checkpoint = ModelCheckpoint(
        folder,
        "{epoch:04d}",
        monitor="epoch",
        mode="max",
        save_top_k=2,  # should the last one be cut short
        save_on_train_epoch_end=True,
    )
    return L.Trainer(
        max_epochs=epochs,
        devices=devices,
        strategy=strategy,
        use_distributed_sampler=False,  # the batches are shared already
        callbacks=[recorder, checkpoint, RichProgressBar()],
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )

"""Training several variants of a model by turns, on Lightning."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

import stochastic_depth as sd

from . import depth
from .names import slug
from .seeds import derive

BINS = 15  # of the calibration error
EVALUATION_COST = 1.0  # of a batch, four times as large as in training, without gradients

Tick = Callable[[float], None]


class Variant(nn.Module):
    """A model that is trained at one rate, and what was measured of it.

    It takes uint8 images. ``flops`` are the shares of the branches in the model's, in their order.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        p: float,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        flops: Sequence[float] = (),
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.p, self.name = p, name or slug(p)
        self.model = model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.branches: list[sd.Branch] = sd.branches(model)
        self.flops = list(flops)
        self.seconds: list[float] = []  # of every step
        self.history: list[dict[str, float]] = []  # of every epoch
        self.best: dict[str, Any] = {"epoch": 0, "error": float("inf"), "state": {}}
        for key, values in (("mean", mean), ("std", std)):
            value = 255 * torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(key, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images - self.mean) / self.std
        output = self.model(pixels.contiguous(memory_format=torch.channels_last))
        logits: Tensor = getattr(output, "logits", output)  # transformers' outputs have a name
        return logits

    def dropped(self) -> list[float]:
        """The share of its decisions in which each branch was dropped so far."""
        return [branch.dropped / max(branch.decided, 1) for branch in self.branches]

    def extra(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        return {
            "seconds": self.seconds,
            "history": self.history,
            "best": self.best,
        }

    def load_extra(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`extra`."""
        self.seconds, self.history = state["seconds"], state["history"]
        self.best = state["best"]


class Turns(L.LightningModule):
    """Trains its variants by turns: each batch by one after the other, who is first by rotation.

    So a step of each is measured at the same moment, on the same batch, on the same machine.
    AdamW, and one cycle of the learning rate, for each variant alone.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        classes: int,
        lr: float,
        seed: int,
        tick: Tick = lambda cost: None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.variants = list(variants)
        self.lr = lr
        self.seed = seed
        self.tick = tick
        self.wrapped: list[nn.Module] = list(variants)
        self.scores = [
            MetricCollection(
                {
                    "accuracy": MulticlassAccuracy(classes, average="micro"),
                    "calibration_error": MulticlassCalibrationError(classes, BINS),
                    "nll": MeanMetric(),
                }
            )
            for _ in variants
        ]
        self.registered = nn.ModuleList([*self.variants, *self.scores])

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.AdamW(variant.parameters(), self.lr, fused=True)
            for variant in self.variants
        ]
        steps = int(self.trainer.estimated_stepping_batches)
        schedulers = [
            torch.optim.lr_scheduler.OneCycleLR(o, self.lr, total_steps=steps, cycle_momentum=False)
            for o in optimizers
        ]
        return optimizers, schedulers

    def on_fit_start(self) -> None:
        if self.trainer.world_size > 1:
            self.wrapped = [DistributedDataParallel(v) for v in self.variants]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        count = len(self.variants)
        optimizers, schedulers = as_list(self.optimizers()), as_list(self.lr_schedulers())
        # What is drawn in a step depends on the seed and the step alone, so all variants draw the
        # same, and a resumed run repeats the uninterrupted one. Each process has its own draws.
        rank = (self.global_rank,) if self.global_rank else ()
        seed = derive("step", self.seed, self.current_epoch, index, *rank)
        for place in range(count):
            number = (index + place) % count
            variant = self.variants[number]
            torch.manual_seed(seed)
            started = now(self.device)
            loss = cross_entropy(self.wrapped[number](images), labels)
            optimizers[number].zero_grad()
            self.manual_backward(loss)
            optimizers[number].step()
            schedulers[number].step()
            variant.seconds.append(now(self.device) - started)
            self.log(
                f"{variant.name}/train_loss",
                loss.detach(),
                on_step=False,
                on_epoch=True,
                batch_size=len(labels),
                sync_dist=True,
            )
        self.tick(1.0)

    def on_validation_epoch_start(self) -> None:
        if self.trainer.world_size > 1:  # each has its own statistics since the last step
            for buffer in (b for variant in self.variants for b in variant.buffers()):
                distributed.broadcast(buffer, 0)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.evaluate(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.evaluate(batch)

    def evaluate(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        for variant, scores in zip(self.variants, self.scores, strict=True):
            logits = variant(images).float()
            scores["accuracy"].update(logits, labels)
            scores["calibration_error"].update(logits.softmax(1), labels)
            scores["nll"].update(cross_entropy(logits, labels, reduction="none"))
        self.tick(EVALUATION_COST)

    def on_validation_epoch_end(self) -> None:
        for variant, scores in zip(self.variants, self.results(), strict=True):
            for key, value in scores.items():
                self.log(f"{variant.name}/val_{key}", value, rank_zero_only=True)
            variant.history.append({f"val_{key}": value for key, value in scores.items()})
            if scores["error"] < variant.best["error"]:
                state = {k: v.cpu().clone() for k, v in variant.model.state_dict().items()}
                epoch = self.current_epoch + 1
                variant.best = {"epoch": epoch, "error": scores["error"], "state": state}

    def on_train_epoch_end(self) -> None:
        for variant in self.variants:
            loss = self.trainer.callback_metrics[f"{variant.name}/train_loss"]
            variant.history[-1]["train_loss"] = float(loss)

    def on_test_epoch_end(self) -> None:
        self.tested = self.results()

    def results(self) -> list[dict[str, float]]:
        """The scores of each variant on the images since the last call, of all processes."""
        found = []
        for scores in self.scores:
            computed = {key: float(value) for key, value in scores.compute().items()}
            scores.reset()
            found.append({"error": 1.0 - computed.pop("accuracy"), **computed})
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["variants"] = [variant.extra() for variant in self.variants]
        mine = [depth.random_state(variant.model) for variant in self.variants]
        checkpoint["random"] = of_all_processes(mine)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        random = checkpoint["random"][self.global_rank]
        for variant, extra, state in zip(
            self.variants, checkpoint["variants"], random, strict=True
        ):
            variant.load_extra(extra)
            depth.set_random_state(variant.model, state)


class EachItsOwn(DDPStrategy):
    """Several processes; each variant is wrapped by itself, as it has a backward of its own."""

    def configure_ddp(self) -> None:
        pass


def of_all_processes(mine: Any) -> list[Any]:
    """What each process has, in the order of their ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [mine]
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, mine)
    return found


def as_list(found: Any) -> list[Any]:
    """Lightning gives one alone where there is one alone."""
    return found if isinstance(found, list) else [found]


def now(device: torch.device) -> float:
    """The time, when what was started on a GPU has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def trainer(
    epochs: int, folder: Path, devices: int, strategy: str, logger: Any, batches: int
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
    several = devices > 1 or strategy == "ddp"
    return L.Trainer(
        max_epochs=epochs,
        devices=devices,
        strategy=EachItsOwn() if several else "auto",
        use_distributed_sampler=False,  # the batches are shared already
        callbacks=[checkpoint],
        logger=logger or False,
        log_every_n_steps=min(50, batches),
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )

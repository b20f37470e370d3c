"""Stochastic depth under Lightning: one callback.

    torchrun --nproc-per-node 2 examples/on_lightning.py

or without torchrun: Lightning then starts the second process itself.
"""

import sys

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from stochastic_depth.integrations.lightning import StochasticDepthCallback
from task import Network, images, report


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Network()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, labels = batch
        self.loss = cross_entropy(self.model(x), labels)
        return self.loss

    def on_train_end(self) -> None:
        weights = nn.utils.parameters_to_vector(self.model.parameters())
        report(self.global_rank, self.loss, weights, self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(folder: str = "lightning-run") -> None:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=3,
        devices=2,
        strategy="ddp",
        default_root_dir=folder,
        callbacks=[StochasticDepthCallback("linear", steps=8, p=0.3)],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), DataLoader(images(), batch_size=16, shuffle=True))


if __name__ == "__main__":
    main(*sys.argv[1:])

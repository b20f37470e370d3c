"""Stochastic depth under transformers' Trainer: one callback.

torchrun --nproc-per-node 2 examples/hf_trainer.py
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from stochastic_depth.integrations.transformers import StochasticDepthCallback
from task import Network, images, report


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.loss = cross_entropy(self.network(images), labels)
        return {"loss": self.loss}


class Images(Dataset):
    data = images()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.data[index]
        return {"images": image, "labels": label}


def main(folder: str = "trainer-run") -> None:
    torch.manual_seed(0)
    model = Classifier()
    arguments = TrainingArguments(
        folder,
        num_train_epochs=3,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
    )
    callbacks = [StochasticDepthCallback("linear", steps=8, p=0.3)]
    trainer = Trainer(model, arguments, train_dataset=Images(), callbacks=callbacks)
    trainer.train()
    weights = nn.utils.parameters_to_vector(model.parameters())
    report(arguments.process_index, model.loss, weights, model)


if __name__ == "__main__":
    main(*sys.argv[1:])

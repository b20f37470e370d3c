"""Batches of images, the same ones whenever the seed is the same."""

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from .seeds import derive, permutation


class Images(Dataset[tuple[Tensor, int]]):
    """Images as uint8 tensors of one size."""

    def __init__(self, images: Dataset[Any], size: int) -> None:
        from torchvision.transforms import v2

        self.images = images
        self.prepare = v2.Compose(
            [v2.RGB(), v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.prepare(image), label


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Randomly cropped and mirrored images, indexed by (position, seed of the crop)."""

    def __init__(self, images: Dataset[Any], size: int) -> None:
        from torchvision.transforms import v2

        self.images = images
        self.prepare = v2.Compose(
            [
                v2.RGB(),
                v2.RandomResizedCrop(size, scale=(0.8, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item
        image, label = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.prepare(image), label


class EpochOrder(Sampler[list[tuple[int, int]]]):
    """Positions and crop seeds of an epoch, a function of (seed, epoch) and of nothing else.

    So a resumed run sees the batches of the uninterrupted one. Every image is in one batch of an
    epoch, and the batches differ in size by one at most, so that none is too small for BatchNorm.
    Several devices have equal shares of each batch, so that together they see what one would, and
    the rest of a division by their number is left out. Lightning calls `set_epoch`.
    """

    def __init__(self, count: int, batch_size: int, seed: int, devices: int = 1) -> None:
        self.count = count
        self.seed = seed
        self.devices = devices
        self.epoch = 0
        shares = count // devices  # images of each device in an epoch
        batches = -(-shares * devices // batch_size)  # none, if there are fewer images than devices
        self.sizes = [
            devices * (shares // batches + (number < shares % batches)) for number in range(batches)
        ]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = iter(permutation(self.count, "order", self.seed, self.epoch))
        for size in self.sizes:
            batch = share(list(islice(order, size)))
            yield [
                (position, derive("crop", self.seed, self.epoch, position)) for position in batch
            ]


class EachOnce(Sampler[list[int]]):
    """Batches of about the same size with every position once, shared by several processes.

    All processes have the same number of batches, as they may wait for each other in each.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        self.count = count
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for positions in torch.arange(self.count).tensor_split(len(self)):
            yield share(positions.tolist())


T = TypeVar("T")


def share(positions: list[T]) -> list[T]:
    """The part of a batch that this process computes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return positions
    return positions[distributed.get_rank() :: distributed.get_world_size()]


def training_batches(
    images: Dataset[Any], size: int, batch_size: int, seed: int, devices: int = 1
) -> DataLoader[Any]:
    """Batches to train on, of ``batch_size`` images or somewhat fewer."""
    augmented = AugmentedImages(images, size)
    return DataLoader(
        augmented,
        batch_sampler=EpochOrder(len(augmented), batch_size, seed, devices),
        # An iterator draws a seed for its workers: not out of the stream of the coins.
        generator=torch.Generator(),
        num_workers=worker_count(),
    )


def evaluation_batches(images: Dataset[Any], size: int, batch_size: int) -> DataLoader[Any]:
    """Batches to evaluate on; without gradients there is room for larger ones."""
    prepared = Images(images, size)
    order = EachOnce(len(prepared), 4 * batch_size)
    return DataLoader(prepared, batch_sampler=order, num_workers=worker_count())


def worker_count() -> int:
    """On the CPU loading would only take cores away from training."""
    return min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0

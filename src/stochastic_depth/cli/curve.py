"""The test error against the number of branches left, the least important left out first."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import stochastic_depth as sd

from .errors import first_line
from .training import EVALUATION_COST, Tick, Variant, of_all_processes

POINTS = 6


class Watched:
    """Batches on a device; ``tick`` is told of each that is taken."""

    def __init__(self, batches: DataLoader[Any], device: torch.device, tick: Tick) -> None:
        self.batches, self.device, self.tick = batches, device, tick

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in self.batches:
            self.tick(EVALUATION_COST)
            yield images.to(self.device), labels.to(self.device)


def counts(depth: int) -> list[int]:
    """How many branches are left: fewer than ``depth``, down to 1, at most POINTS numbers."""
    points = min(depth - 1, POINTS)
    return [depth - round((i + 1) * (depth - 1) / points) for i in range(points)]


def cost(depth: int, val: int, test: int) -> float:
    """What :func:`rank` and :func:`curve` cost, in training batches."""
    return EVALUATION_COST * ((depth + 1) * val + len(counts(depth)) * test)


def rank(variant: Variant, batches: Watched) -> tuple[list[str], dict[str, str]]:
    """The branches, the least important first: those without which the loss is least.

    Args:
        variant: a trained model.
        batches: of validation images; of several processes, each has its share.

    Returns:
        The names, and why others are not among them, by name.
    """

    def loss(_: Any, batch: Any) -> torch.Tensor:
        images, labels = batch
        return cross_entropy(variant(images).float(), labels)

    found: tuple[dict[str, float], dict[str, str]]
    try:
        table = sd.importance(variant.model, batches, "loss", loss=loss)
    except ValueError as error:  # the loss of the whole model is not finite
        found = {}, {"every branch": first_line(error)}
    else:
        found = {row.name: row.value for row in table.rows}, dict(table.unmeasured)
    losses, reasons = zip(*of_all_processes(found), strict=True)
    ranked = [name for name in losses[0] if all(name in each for each in losses)]
    unranked = {name: reason for each in reasons for name, reason in each.items()}
    return sorted(ranked, key=lambda name: sum(each[name] for each in losses)), unranked


def curve(
    variant: Variant, ranking: list[str], depth: int, batches: Watched, example: torch.Tensor
) -> list[dict[str, float]]:
    """The test error with fewer and fewer of ``depth`` branches.

    Args:
        variant: a trained model.
        ranking: its branches, those that are left out first in the beginning.
        depth: how many branches it has.
        batches: of test images; of several processes, each has its share.
        example: what the model takes.
    """
    points: list[dict[str, float]] = []
    for left in counts(depth):
        if depth - left <= len(ranking):
            with sd.skip(variant.model, ranking[: depth - left], example.to(batches.device)):
                tested = of_all_processes(wrong(variant, batches))
            error = sum(bad for bad, _ in tested) / sum(count for _, count in tested)
            points.append({"branches": left, "error": error})
    return points


def wrong(variant: Variant, batches: Watched) -> tuple[int, int]:
    """How many images get a wrong class, and of how many."""
    bad = count = 0
    with torch.no_grad():
        for images, labels in batches:
            bad += int((variant(images).argmax(1) != labels).sum())
            count += len(labels)
    return bad, count

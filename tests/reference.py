"""What stochastic depth should compute, slow and obvious: masks, loops, enumeration.

Written from the formulas of the documentation, not from the library, which never imports it.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Kept = tuple[bool, ...]  # for each row, whether the branch counts there
Path = tuple[Kept, ...]  # the same for each branch of a net


def kept_rows_of_subset(rows: int, p: float) -> int:
    """The number k that is nearest to rows * (1-p), at least 1; of two, the even one."""
    wanted = rows * (1 - p)
    return max(1, min(range(rows + 1), key=lambda k: (abs(k - wanted), k % 2)))


def decisions(rows: int, p: float, mode: str) -> dict[Kept, float]:
    """Every decision that a call can take, with its probability."""
    if mode == "batch":
        return {(False,) * rows: p, (True,) * rows: 1 - p}
    if mode == "row":
        return {
            kept: math.prod(1 - p if k else p for k in kept)
            for kept in itertools.product((False, True), repeat=rows)
        }
    subsets = list(itertools.combinations(range(rows), kept_rows_of_subset(rows, p)))
    return {tuple(i in chosen for i in range(rows)): 1 / len(subsets) for chosen in subsets}


def paths(rows: int, rates: Sequence[float], mode: str) -> dict[Path, float]:
    """Every path through a net whose branches have these rates, with its probability."""
    per_branch = [decisions(rows, p, mode).items() for p in rates]
    return {
        tuple(kept for kept, _ in choice): math.prod(q for _, q in choice)
        for choice in itertools.product(*per_branch)
    }


def survival(rows: int, p: float, mode: str) -> float:
    """The probability that a row is kept."""
    return kept_rows_of_subset(rows, p) / rows if mode == "subset" else 1 - p


def training_weight(rows: int, p: float, mode: str, scale: str) -> float:
    """The weight of a kept branch in training."""
    return 1 / survival(rows, p, mode) if scale == "train" else 1.0


def masked(shortcut: Tensor, output: Tensor, kept: Kept, weight: float, dim: int = 0) -> Tensor:
    """``shortcut + weight * mask * output``, with everything computed."""
    shape = [1] * shortcut.dim()
    shape[dim] = -1
    mask = torch.tensor(kept).view(shape)
    return shortcut + weight * torch.where(mask, output, torch.zeros_like(output))


Net = Sequence[Callable[[Tensor], Tensor]]


def along_path(branches: Net, x: Tensor, path: Path, weights: Sequence[float]) -> Tensor:
    """The output of a residual net on one path."""
    for branch, kept, weight in zip(branches, path, weights, strict=True):
        x = masked(x, branch(x), kept, weight)
    return x


def whole(branches: Net, x: Tensor, weights: Sequence[float]) -> Tensor:
    """The output of a residual net with every branch kept."""
    for branch, weight in zip(branches, weights, strict=True):
        x = x + weight * branch(x)
    return x

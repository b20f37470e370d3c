"""What a decision comes to: which samples are kept, and how much a kept branch weighs."""

from typing import Any

import torch
from torch import Tensor

from ..branch import Branch

__all__ = [
    "choose_samples",
    "draw_mask",
    "draw_subset",
    "is_left_out",
    "kept_weight",
    "subset_size",
]


def is_left_out(branch: Branch) -> bool:
    """Whether evaluation leaves a branch out, which would weigh nothing there, or NaN."""
    return branch.is_always and branch.scale == "eval"


def kept_weight(branch: Branch, training: bool) -> float:
    """The weight of a kept branch: 1/(1-p) in training, 1-p in evaluation, or 1, by its scale."""
    if branch.scale == "eval":
        return 1.0 if training else 1.0 - branch.p
    if branch.scale == "none" or not training or branch.is_always:
        return 1.0
    return 1.0 / (1.0 - branch.p)


def choose_samples(branch: Branch, seed: int, size: int, device: Any) -> tuple[Tensor, float]:
    """The kept samples of a batch, in order, and the weight of the branch on them.

    Uniform numbers are drawn in float64 whatever the dtype of the model (in bfloat16 a rate below
    0.002 would never drop), and on the host, from a generator of their own: ``seed`` is what was
    drawn for this call, so the same call can be made again.
    """
    source = torch.Generator().manual_seed(seed)
    if branch.mode == "subset":
        k = subset_size(size, branch.p)
        kept = torch.randperm(size, generator=source, device="cpu")[:k].sort().values
        weight = size / k if branch.scale == "train" and k else 1.0
    else:
        drawn = torch.rand(size, dtype=torch.float64, generator=source, device="cpu")
        kept = (drawn >= branch.p).nonzero().squeeze(1)
        weight = kept_weight(branch, training=True)
    return kept.to(device, non_blocking=True), weight


def subset_size(size: int, p: float) -> int:
    """How many of ``size`` samples ``"subset"`` keeps: the whole number nearest to size (1-p).

    At least one, unless p is 1 or there is none. The rate that takes effect is 1 - k/size.
    """
    return 0 if p == 1.0 else min(size, max(1, round(size * (1.0 - p))))


def draw_mask(branch: Branch, size: int, device: Any) -> tuple[Tensor, Any]:
    """The same as a part of a compiled graph: booleans, for ``size`` samples or 1 call, and weight.

    The rate is read as a tensor, so one graph holds for any rate.
    """
    kept = torch.rand(size, device=device, dtype=torch.float32) >= branch.rate
    return kept, 1.0 / (1.0 - branch.rate) if branch.scale == "train" else 1.0


def draw_subset(branch: Branch, size: int, device: Any) -> tuple[Tensor, float]:
    """A subset as a part of a compiled graph, whose number of samples is the same every time."""
    k = subset_size(size, branch.p)
    return torch.randperm(size, device=device)[:k], size / k if branch.scale == "train" else 1.0

"""Coins: what one call of a residual branch keeps, and with which weight."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .replay import draw_replayed, may_be_recomputed

__all__ = [
    "DROPPED",
    "PRIVATE_IN_GRAPH",
    "Keep",
    "Mode",
    "Scale",
    "check_mode",
    "check_p",
    "check_scale",
    "decide",
    "subset_size",
]

Mode = Literal["batch", "row", "subset"]
Scale = Literal["train", "eval", "none"]


@dataclass(frozen=True, slots=True)
class Keep:
    """The part of a batch that goes through the branch, and the weight of the branch there.

    ``rows`` is None where every row is kept. A weight of 0 means that nothing is kept and the
    branch is not executed. In a compiled graph the decision is not known when the graph is made:
    ``coins``, one boolean for the call or one for each row, say what is kept when it runs.
    """

    rows: Tensor | None
    weight: float
    coins: Tensor | None = None


DROPPED = Keep(None, 0.0)

PRIVATE_IN_GRAPH = (
    "a generator of your own (seed=..., coins='shared', generator=...) cannot be used inside "
    "torch.compile; use torch's default generator (seed=None and torch.manual_seed), or compile "
    "each branch by itself (branch.compile())"
)


def check_p(p: float, name: str = "p") -> float:
    """``p`` as a float in [0, 1].

    Raises:
        TypeError: ``p`` is not a real number.
        ValueError: ``p`` is NaN or outside [0, 1].
    """
    if isinstance(p, bool | str | bytes | complex):
        raise TypeError(f"{name} must be a number in [0, 1], got {p!r}")
    try:
        value = float(p)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number in [0, 1], got {p!r}") from error
    if not 0.0 <= value <= 1.0:  # false for NaN too
        raise ValueError(f"{name} is the probability to drop and must be in [0, 1], got {p!r}")
    return value


def check_mode(mode: str) -> Mode:
    """``mode``, if it is one of the modes."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    return mode  # type: ignore[return-value]


def check_scale(scale: str) -> Scale:
    """``scale``, if it is one of the scalings."""
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {get_args(Scale)}, got {scale!r}")
    return scale  # type: ignore[return-value]


def decide(
    p: float,
    *,
    training: bool,
    mode: Mode,
    scale: Scale,
    batch: int = 1,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Keep:
    """Toss the coins of one call.

    Uniform numbers are drawn in float32 whatever the dtype of the model (in bfloat16 a rate
    below 0.002 would never drop), and on the host. A forward that gradient checkpointing recomputes
    sees the same coins: see :mod:`stochastic_depth.replay`. p = 0 and p = 1 need no coin and draw
    none.

    Args:
        p: probability to drop, in [0, 1].
        training: whether branches are dropped at all.
        mode: ``"batch"``, one coin for the call; ``"row"``, one for each row; or ``"subset"``, a
            fixed number of rows, drawn without replacement: see :func:`subset_size`.
        scale: ``"train"``: kept branches weigh 1/(1-p) in training (a subset of k rows of B
            weighs B/k); ``"eval"``: branches weigh 1-p outside training; ``"none"``: always 1.
        batch: number of rows, for the modes that choose among them.
        device: where the kept rows are needed; None is the CPU.
        generator: where the coins come from; None is torch's default generator.

    Raises:
        RuntimeError: a recomputed forward does not find its coins again.
    """
    if not training:
        return Keep(None, 1.0 - p if scale == "eval" else 1.0)
    if p == 0.0:
        return Keep(None, 1.0)
    if p == 1.0:
        return DROPPED
    if torch.compiler.is_compiling():
        return _decide_in_graph(p, mode, scale, batch, device, generator)
    count = 1 if mode == "batch" else batch
    source: Any = {"generator": generator, "device": generator.device if generator else "cpu"}
    if may_be_recomputed():
        drawn = draw_replayed(partial(_draw, mode, count, source), (p, mode, count), generator)
    else:
        drawn = _draw(mode, count, source)
    weight = 1.0 / (1.0 - p) if scale == "train" else 1.0
    if mode == "batch":
        return Keep(None, weight) if drawn.item() >= p else DROPPED
    if mode == "row":
        rows = (drawn >= p).nonzero().squeeze(1)
    else:
        k = subset_size(batch, p)
        rows = drawn[:k]
        weight = batch / k if scale == "train" else 1.0
    if len(rows) == 0:
        return DROPPED
    if len(rows) == batch:
        return Keep(None, weight)
    return Keep(rows.to(device or "cpu", non_blocking=True), weight)


def _draw(mode: Mode, count: int, source: Any) -> Tensor:
    if mode == "subset":
        return torch.randperm(count, **source)
    return torch.rand(count, dtype=torch.float32, **source)


def _decide_in_graph(
    p: float,
    mode: Mode,
    scale: Scale,
    batch: int,
    device: torch.device | None,
    generator: torch.Generator | None,
) -> Keep:
    """The same under torch.compile: drawn where the data is, as a part of the graph."""
    if generator is not None:
        raise RuntimeError(PRIVATE_IN_GRAPH)
    weight = 1.0 / (1.0 - p) if scale == "train" else 1.0
    if mode != "subset":
        coins = torch.rand(batch if mode == "row" else 1, device=device, dtype=torch.float32) >= p
        return Keep(None, weight, coins)
    k = subset_size(batch, p)
    if k == batch:
        return Keep(None, weight if scale != "train" else 1.0)
    rows = torch.randperm(batch, device=device)[:k]
    return Keep(rows, batch / k if scale == "train" else 1.0)


def subset_size(batch: int, p: float) -> int:
    """How many of ``batch`` rows ``"subset"`` keeps: the whole number nearest to batch (1-p).

    At least one, unless p is 1. The rate that takes effect is 1 - k/batch.
    """
    return 0 if p == 1.0 else min(batch, max(1, round(batch * (1.0 - p))))

"""What a run of an applied model shows: how many samples branches choose from, and projections."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..branch import Branch
from ..drop.decide import subset_size
from ..drop.force import forced, noting_sizes, plain
from ..drop.layer import StochasticDepth
from ..find.costs import counting
from ..find.state import copied, in_mode, untouched

__all__ = ["projection_shares", "rates_in_effect"]


def rates_in_effect(
    model: nn.Module, branches: Iterable[Branch], args: Any, kwargs: Any
) -> dict[Branch, float]:
    """By branch in ``"subset"`` mode, 1 - k/B, where k of the B samples of this call are kept."""
    chosen = [b for b in branches if b.mode == "subset" and b.is_active and not b.decides_calls]
    if not chosen:
        return {}
    decisions = dict.fromkeys(chosen, (0, 1.0))
    with untouched(model), noting_sizes() as sizes, forced(decisions):
        _run(model, args, kwargs)
    return {b: 1.0 - subset_size(size, b.p) / size for b, size in sizes.items() if size}


def projection_shares(
    model: nn.Module, shares: Mapping[Branch, float], args: Any, kwargs: Any
) -> dict[Branch, float]:
    """What the projections of wrappers take, as shares of the FLOPs of the model without them.

    Args:
        model: the model.
        shares: by branch, what is dropped.
        args: what the model is called with.
        kwargs: the same.
    """
    wrappers = [m for m in model.modules() if isinstance(m, StochasticDepth)]
    own = [w for w in wrappers if w.projection is not None or w.recipe is not None]
    if not own:
        return {}
    found = {}
    with untouched(model):
        with plain():
            total = max(_run(model, args, kwargs), 1)
        for wrapper in own:
            branch = wrapper.branch
            with plain(), forced({branch: (True, 1.0)}):
                if wrapper.recipe is not None:  # the first call makes the projection
                    _run(model, args, kwargs)
                found[branch] = _run(model, args, kwargs) / total + shares[branch] - 1.0
    return found


def _run(model: nn.Module, args: Any, kwargs: Any) -> int:
    """FLOPs of a call in evaluation."""
    args, kwargs = copied((args, kwargs))
    with in_mode(model, False), torch.no_grad(), counting() as counter:
        model(*args, **kwargs)
    return counter.get_total_flops()

"""1 - cosine between what goes into a branch's sum, or a block, and what comes out."""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..branch import Branch, block_of
from ..find.flow import Key
from ..find.functions import SUBTRACT, SUMS
from ..find.meet import record
from ..find.record import Recorder
from ..find.state import copied, in_mode, untouched
from .compare import first_float
from .looks import Inputs, Look

__all__ = ["Influences", "influence_of_blocks", "influence_of_branches"]

# What convolutions and norms call the number of channels.
_CHANNELS = ("in_channels", "out_channels", "num_features", "num_channels")


class Influences:
    """Means over positions, samples and batches."""

    def __init__(self) -> None:
        self.sums: dict[Branch, Tensor] = {}
        self.counts: dict[Branch, int] = {}
        self.failed: dict[Branch, str] = {}

    def add(self, branch: Branch, block: nn.Module, before: Tensor, after: Tensor) -> None:
        """What went in and what came out, once."""
        if before.shape != after.shape or before.dim() == 0:
            self.failed[branch] = (
                f"given a tensor of shape {tuple(before.shape)} it returns {tuple(after.shape)}"
            )
            return
        dim = _features(before, block)
        if dim is None:
            before, after, dim = before.flatten(1), after.flatten(1), -1
        apart = 1.0 - torch.cosine_similarity(before.float(), after.float(), dim=dim)
        apart = apart.cpu().double()
        self.sums[branch] = self.sums.get(branch, torch.zeros_like(apart.sum())) + apart.sum()
        self.counts[branch] = self.counts.get(branch, 0) + apart.numel()

    def values(self, branches: Iterable[Branch]) -> dict[Branch, float]:
        """By branch, of those that were measured; the others are put to the failed."""
        values: dict[Branch, float] = {}
        for branch in branches:
            if branch in self.failed:
                continue
            value = float(self.sums[branch]) / self.counts[branch] if branch in self.sums else None
            if value is None:
                self.failed[branch] = "it does not run on these batches"
            elif value != value:
                self.failed[branch] = "its influence is nan"
            else:
                values[branch] = value
        return values


def _features(x: Tensor, block: nn.Module) -> int | None:
    """The dimension of the features: the last, or the channels', by the block's layers."""
    if x.dim() > 2 and _has_channels(x, block):
        return 1
    sizes = {p.numel() for p in block.parameters() if p.dim() == 1}
    return next(
        (d for d in (x.dim() - 1, 1) if d > 0 and x.dim() > d and x.shape[d] in sizes), None
    )


def _has_channels(x: Tensor, block: nn.Module) -> bool:
    """Whether dimension 1 has the channels, for the block's convolutions and norms."""
    layers: list[Any] = [
        m for m in block.modules() if isinstance(getattr(m, "weight", None), Tensor)
    ]
    if x.dim() == 3:
        layers = layers[:1]  # later ones may be given it transposed
    return any(
        x.shape[1] in [getattr(m, name, None) for name in _CHANNELS]
        for m in layers
        if m.weight.dim() in (1, x.dim())
    )


class _Watching(Recorder):
    """Sees each branch meet its shortcut."""

    def __init__(
        self,
        merges: dict[Key, list[tuple[int, Branch]]],
        result: Influences,
        blocks: dict[Branch, nn.Module],
        model: nn.Module,
        constants: list[Tensor],
    ) -> None:
        self.merges, self.result, self.blocks = merges, result, blocks
        super().__init__(model, constants)

    def before(self, name: str, args: Any, kwargs: Any, given: Any) -> tuple[Any, Any]:
        key = self.key(name, self.now)
        for position, branch in self.merges.get(key, ()):
            others = [t for i, t in enumerate(given) if i != position]
            if name not in SUMS or len(others) != 1:
                self.result.failed[branch] = f"it enters a {name}, which is no sum of two"
                continue
            sign = -1.0 if name in SUBTRACT else 1.0
            alpha = kwargs.get("alpha", 1)
            shortcut, value = others[0], given[position]
            total = torch.add(shortcut, value, alpha=sign * alpha)
            self.result.add(branch, self.blocks[branch], shortcut, total)
        return args, kwargs


def influence_of_branches(
    model: nn.Module, look: Look, branches: list[Branch], calls: Iterable[Inputs]
) -> Influences:
    """Of each branch, on the values of its sum."""
    result = Influences()
    merges: dict[Key, list[tuple[int, Branch]]] = {}
    for branch in branches:
        for merge in look.found.merges[branch]:
            merges.setdefault(merge.key, []).append((merge.position, branch))
    blocks = {b: model.get_submodule(block_of(b)) for b in branches}
    recorder = partial(_Watching, merges, result, blocks)
    for args, kwargs in calls:
        record(model, args, kwargs, False, recorder, constants=look.found.constants)
    return result


def influence_of_blocks(
    model: nn.Module, branches: list[Branch], calls: Iterable[Inputs]
) -> Influences:
    """Of each block, on the first floating-point tensors that it is given and returns."""
    result = Influences()
    kept: dict[Branch, Tensor] = {}

    def before(branch: Branch, block: nn.Module, args: Any, kwargs: Any) -> None:
        if (x := first_float((args, kwargs))) is not None:
            kept[branch] = x.clone()  # the block may overwrite it

    def after(branch: Branch, block: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        x, y = kept.pop(branch, None), first_float(out)
        if x is None or y is None:
            result.failed[branch] = "it is not given, or does not return, a tensor of floats"
        else:
            result.add(branch, block, x, y)

    with ExitStack() as hooks:
        for b in branches:
            block = model.get_submodule(block_of(b))
            for handle in (
                block.register_forward_pre_hook(partial(before, b), with_kwargs=True),
                block.register_forward_hook(partial(after, b), with_kwargs=True),
            ):
                hooks.enter_context(handle)
        for args, kwargs in calls:
            with untouched(model), in_mode(model, False), torch.no_grad():
                args, kwargs = copied((args, kwargs))
                model(*args, **kwargs)
    return result

"""What a model gives with something left out, and whether two results are the same to the bit."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from .._torch import tensor_leaves
from ..branch import Branch, block_of
from ..drop.force import forced
from ..find.state import copied, in_mode, untouched
from .looks import Look, opened

__all__ = ["difference", "first_float", "is_handed_on", "output_of", "running"]


def output_of(
    model: nn.Module,
    look: Look,
    chosen: Iterable[Branch] = (),
    weights: Mapping[Branch, float] | None = None,
    blocks: Mapping[str, str] | None = None,
) -> tuple[Any, dict[str, list[Tensor | None]]]:
    """What the model and its blocks give in evaluation, without these branches.

    A model whose head is still zero gives the same whatever its blocks do, so what these give
    counts, too. All is as before afterwards.

    Args:
        model: the model.
        look: at it.
        chosen: what is left out.
        weights: of branches in evaluation.
        blocks: the names of the blocks now, by what they are called in the result; None takes all.
    """
    chosen, weights = list(chosen), weights or {}
    seen: dict[str, list[Tensor | None]] = {}
    whole = [block_of(branch) for branch in weights if branch.kind == "block"]
    if blocks is None:  # a hook sees what a block gives before it is weighed as a whole
        blocks = {name: name for name in look.blocks if name not in whole}
    with ExitStack() as hooks:
        for key, name in blocks.items():

            def keep(_: Any, args: Any, out: Any, key: str = key) -> None:
                value = first_float(out)  # which may be overwritten
                seen.setdefault(key, []).append(None if value is None else value.clone())

            hooks.enter_context(model.get_submodule(name).register_forward_hook(keep))
        decisions = {b: (False, weight) for b, weight in weights.items()}
        with running(model, look, decisions | dict.fromkeys(chosen, (True, 1.0))):
            args, kwargs = copied(look.inputs)
            return model(*args, **kwargs), seen


@contextmanager
def running(
    model: nn.Module, look: Look, decisions: Mapping[Branch, tuple[bool, float]]
) -> Iterator[None]:
    """Run the model or its blocks in evaluation, with these decisions; all is as before then."""
    with (
        opened(model, look, decisions, in_evaluation=True) as stands,
        untouched(model),
        in_mode(model, False),
        torch.no_grad(),
        forced({stands[b]: decision for b, decision in decisions.items()}),
        BaseTorchFunctionMode(),  # torch's fused kernels, which call no child, stay out
    ):
        yield


def is_handed_on(
    model: nn.Module, look: Look, chosen: Iterable[Branch], blocks: Iterable[str]
) -> set[str]:
    """Which of these blocks hand on their input, to the bit, where branches are left out."""
    same: dict[str, bool] = {}
    with ExitStack() as hooks:
        for name in blocks:

            def watch(_: Any, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
                given, made = first_float((args, kwargs)), first_float(out)
                is_same = given is not None and made is not None and not difference(given, made)
                same[name] = is_same and same.get(name, True)

            block = model.get_submodule(name)
            hooks.enter_context(block.register_forward_hook(watch, with_kwargs=True))
        output_of(model, look, chosen)
    return {name for name, is_same in same.items() if is_same}


def first_float(x: Any) -> Tensor | None:
    """The first tensor of floating-point numbers in it."""
    return next((t for t in tensor_leaves(x) if t.is_floating_point()), None)


def difference(a: Any, b: Any) -> str:
    """How two results differ, or nothing. What has an entry for each block is not compared."""
    compared = [0]
    found = _difference(a, b, compared)
    return found or ("" if compared[0] else "there is no tensor to compare")


def _difference(a: Any, b: Any, compared: list[int]) -> str:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        compared[0] += 1
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} of shape {tuple(a.shape)}, {b.dtype} of shape {tuple(b.shape)}"
        if torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all()):
            return ""
        apart = (a.cpu().double() - b.cpu().double()).abs().nan_to_num().max().item()
        return f"apart by up to {apart:.3g}"
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return f"{type(a).__name__}, {type(b).__name__}"
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        pairs = [(a[key], b[key]) for key in a.keys() & b.keys()]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = list(zip(a, b, strict=True))
    else:
        return ""
    for x, y in pairs:
        if found := _difference(x, y, compared):
            return found
    return ""

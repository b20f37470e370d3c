"""A block that is dropped as a whole: LayerDrop, and a way for forwards that cannot be traced.

The first tensor that the block is given is its shortcut, and the block's output takes its place.
What the block returns beside must be known without running it: constants, and arguments that it
passes on.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..around import AROUND, describe
from .batches import UNKNOWN, batch_dim
from .capture import Call, is_plain
from .examples import Detail, fake_values, no_side_effects
from .program import Branch, Program
from .regions import NotResidual

__all__ = ["WHOLE", "whole_program", "whole_rows"]

WHOLE = "(whole)"  # the label of a branch that is its block; no child can be called so


def whole_rows(block: nn.Module, call: Call) -> tuple[int | None, ...] | None:
    """In which dimension the shortcut and the further values have the batch's rows.

    None where that is not known.
    """
    dim = batch_dim(block)
    if len(call.types) == 1:
        return (dim,)
    main = _first_tensor(call)
    if main is None or call.row_dims is None or call.row_dims[main] != dim:
        return None
    dims = (dim, *call.row_dims[:main], *call.row_dims[main + 1 :])
    return None if UNKNOWN in dims else dims


def _first_tensor(call: Call) -> int | None:
    return next((i for i, kind in enumerate(call.types) if issubclass(kind, Tensor)), None)


def whole_program(block: nn.Module, call: Call) -> Program:
    """The program of ``block`` as one branch, for one form of call.

    Args:
        block: the block.
        call: how it is called, with example values.

    Raises:
        NotResidual: what it returns cannot be known without running it.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "a block that is dropped as a whole has to be seen once: call the model once in "
            "training before you compile it"
        )
    main = _first_tensor(call)
    if main is None:
        raise NotResidual("it is called without a tensor, so it has no shortcut")
    returned = _look(block, call, main)

    def run_branch(block: nn.Module, x: Tensor, *others: Any) -> Any:
        values = [*others[:main], x, *others[main:]]
        leaves, structure = tree_flatten(_forward(block, call, values))
        expected = returned.leaves(values, leaves[returned.output])
        if structure != returned.structure or any(
            leaf is not known and not (is_plain(known) and leaf == known)
            for leaf, known in zip(leaves, expected, strict=True)
        ):
            raise RuntimeError(
                f"{type(block).__name__} returned something else beside its output than when it "
                "was looked at, which a dropped block could not do"
            )
        return leaves[returned.output]

    def run(block: nn.Module, call_branch: Callable[..., Any], *values: Any) -> Any:
        x = values[main]
        output = call_branch(0, x, x, *values[:main], *values[main + 1 :])
        return tree_unflatten(returned.leaves(values, output), returned.structure)

    branch = Branch(
        label=WHOLE,
        run=run_branch,
        sum=AROUND,
        rows=whole_rows(block, call),
        modules=tuple(name for name, _ in block.named_children()),
        parameters=tuple(name for name, _ in block.named_parameters(recurse=False)),
    )
    return Program(run, (branch,), Detail.NOTHING, {})


@dataclass(frozen=True)
class _Argument:
    """A leaf of the result that is an argument, passed on."""

    index: int


@dataclass(frozen=True)
class _Returned:
    """What a block returns: which leaf is its output, and what the others are."""

    structure: TreeSpec
    known: tuple[Any, ...]
    output: int

    def leaves(self, values: Sequence[Any], output: Any) -> list[Any]:
        leaves = [values[k.index] if isinstance(k, _Argument) else k for k in self.known]
        leaves[self.output] = output
        return leaves


def _forward(block: nn.Module, call: Call, values: Sequence[Any]) -> Any:
    given = iter(values)
    leaves = [
        next(given) if is_value else constant
        for is_value, constant in zip(call.is_value, call.constants, strict=True)
    ]
    args, kwargs = tree_unflatten(leaves, call.structure)
    return type(block).forward(block, *args, **kwargs)


def _look(block: nn.Module, call: Call, main: int) -> _Returned:
    """What ``block`` returns, from a run that changes nothing."""
    assert call.examples is not None
    values = [_copied(x) for x in call.examples]
    try:
        with fake_values(block, values) as values:
            result = _forward(block, call, values)
    except Exception:  # of any kind: what it does depends on the data
        values = [_copied(x) for x in call.examples]
        with no_side_effects(block), torch.no_grad():
            result = _forward(block, call, values)
    leaves, structure = tree_flatten(result)
    x = values[main]
    output = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
    if output is None or leaves[output].shape != x.shape:
        got = describe(result if output is None else leaves[output])
        raise NotResidual(
            f"given {describe(x)} it returns {got}: dropped as a whole it would return its input; "
            "wrap it in StochasticDepth with a projection"
        )
    if not (x.is_floating_point() and leaves[output].is_floating_point()):
        raise NotResidual(f"it maps {x.dtype} to {leaves[output].dtype}, not a float tensor")
    known: list[Any] = []
    for i, leaf in enumerate(leaves):
        passed_on = next((j for j, value in enumerate(values) if leaf is value), None)
        if passed_on is not None:
            known.append(_Argument(passed_on))
        elif i == output or is_plain(leaf):
            known.append(None if i == output else leaf)
        else:
            raise NotResidual(
                f"beside its output it returns {describe(leaf)}, which nothing can stand in for "
                "where it is dropped"
            )
    return _Returned(structure, tuple(known), output)


class _CopyTensors(TorchFunctionMode):
    """Deep copies hold copies of tensors also where these are results of other computations."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def _copied(value: Any) -> Any:
    """A copy of an argument that the block may change, a cache for one."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        with _CopyTensors():
            return copy.deepcopy(value)
    except Exception as error:
        raise NotResidual(f"it is given {describe(value)}, which it may change") from error

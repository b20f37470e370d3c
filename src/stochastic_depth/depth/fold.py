"""``scale="eval"`` becomes a part of the weights."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_leaves
from ..branch import Branch, block_of
from .compare import output_of
from .looks import Look
from .surgery import Undo

__all__ = ["fold"]

Place = list[tuple[nn.Module, str]]  # parameters, by who has them


def fold(
    model: nn.Module, look: Look, weights: Mapping[str, float], undo: Undo, is_shared: bool
) -> None:
    """Multiply the last weights of each branch with what it counts in evaluation.

    Args:
        model: the model.
        look: at it.
        weights: by the name of a branch.
        undo: takes note of what changes.
        is_shared: another model has the parameters, too, so this one gets others.

    Raises:
        ValueError: no weights of a branch are linear in its result.
    """
    for branch in look.found.branches:
        weight = weights.get(branch.name, 1.0)
        if weight != 1.0 and not _is_folded(model, look, branch, weight, undo, is_shared):
            raise ValueError(
                f"scale='eval' counts {branch.name} {weight:.3g} times in evaluation, and it has "
                "no weights that this could become a part of: set its p to 0, or train with "
                "scale='train'"
            )


def _is_folded(
    model: nn.Module, look: Look, branch: Branch, weight: float, undo: Undo, is_shared: bool
) -> bool:
    wanted = output_of(model, look, (), {branch: weight})
    for place in _places(model, branch):
        attempt = Undo()
        for holder, key in place:
            parameter: Any = holder._parameters[key]
            if is_shared:
                scaled = nn.Parameter(parameter.detach() * weight, parameter.requires_grad)
                attempt.keep(holder._parameters)[key] = scaled
            else:
                attempt.keep_tensor(parameter)
                with torch.no_grad():
                    parameter.mul_(weight)
        if _is_close(output_of(model, look), wanted):
            undo.add(attempt)
            return True
        attempt.put_back()
    return False


def _places(model: nn.Module, branch: Branch) -> Iterator[Place]:
    """Weights that may be the last of a branch, the most likely first."""
    block = model.get_submodule(block_of(branch))
    for weight in reversed(branch.weights):
        home, _, key = weight.rpartition(".")
        yield [(block.get_submodule(home), key)]
    for name in reversed(branch.modules):
        for module in reversed(list(model.get_submodule(name).modules())):
            own = [key for key, value in module._parameters.items() if value is not None]
            if own:
                yield [(module, key) for key in own]


def _is_close(got: Any, wanted: Any) -> bool:
    a = [t for t in tree_leaves(got) if isinstance(t, Tensor) and t.is_floating_point()]
    b = [t for t in tree_leaves(wanted) if isinstance(t, Tensor) and t.is_floating_point()]
    for x, y in zip(a, b, strict=True):
        eps = torch.finfo(x.dtype).eps
        if not torch.allclose(x, y, rtol=64 * eps, atol=64 * eps * float(y.abs().max())):
            return False
    return True

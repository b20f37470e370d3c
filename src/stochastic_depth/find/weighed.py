"""The plain model, with each branch counted as often as one says: what dropping must agree with."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_map
from ..branch import Branch
from .flow import Flow, Key
from .functions import writes
from .meet import record
from .plan import Findings
from .record import Recorder
from .state import Kept

__all__ = ["AnotherWay", "Weight", "run_weighed"]


Weight = float | Callable[[Tensor], Tensor]  # a number, or what weighs each sample of a value


class AnotherWay(RuntimeError):
    """A run does not come to the sum of a branch that is to be weighed."""


class _Weighing(Recorder):
    """Weighs the branches where they enter what goes on."""

    def __init__(
        self,
        weights: Mapping[Key, list[tuple[int, Weight]]],
        model: nn.Module,
        constants: list[Tensor],
    ) -> None:
        self.weights = weights
        self.done: set[Key] = set()
        super().__init__(model, constants)

    def before(self, name: str, args: Any, kwargs: Any, given: Any) -> tuple[Any, Any]:
        key = self.key(name, self.now)
        to_own = writes(name) and id(given[0]) in self.own  # to a buffer, which makes no value
        if key not in self.weights or to_own:
            return args, kwargs
        self.done.add(key)
        for position, weight in self.weights[key]:
            if name.startswith("lerp"):
                if callable(weight):
                    raise NotImplementedError("the weights of a lerp's samples")
                if len(args) > 2:
                    args = (*args[:2], args[2] * weight, *args[3:])
                else:
                    kwargs = {**kwargs, "weight": kwargs["weight"] * weight}
            elif writes(name) and given[position] is args[0]:
                args[0].copy_(_weighed(args[0], weight))
            else:
                args, kwargs = _with_weighed((args, kwargs), given[position], weight)
        return args, kwargs

    def finish(self, result: Any) -> Flow:
        if missing := self.weights.keys() - self.done:
            _, op, _ = next(iter(missing))
            raise AnotherWay(f"the model does something else in a second run: there is no {op}")
        return super().finish(result)


def _with_weighed(given: Any, branch: Tensor, weight: Weight) -> Any:
    weighed = _weighed(branch, weight)
    return tree_map(lambda x: weighed if x is branch else x, given)


def _weighed(x: Tensor, weight: Weight) -> Tensor:
    if callable(weight):
        return weight(x)
    return torch.zeros_like(x) if weight == 0 else x * weight


def run_weighed(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weights: Mapping[Branch, Weight],
    findings: Findings,
    kept: Kept | None = None,
) -> Any:
    """What the plain model returns in evaluation where a branch counts ``weights[branch]`` times.

    0 leaves it out, and the others count once. The model is called as it was when ``findings`` were
    made; its stochastic depth is left aside.
    """
    at: dict[Key, list[tuple[int, Weight]]] = {}
    for branch, weight in weights.items():
        for merge in findings.merges[branch]:
            at.setdefault(merge.key, []).append((merge.position, weight))
    recorder = partial(_Weighing, at)
    flow = record(model, args, kwargs, False, recorder, findings.constants, kept)
    return flow.result

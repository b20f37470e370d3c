"""What only a look at every operation of a block's forward can tell: parameters, and some sums."""

import sys
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch import tree_leaves, tree_map
from ..branch import Spot
from ..find.spot import is_of_library, spot
from .names import SUMS
from .part import Part, first_part
from .slot import here

__all__ = ["Reads"]


class Reads(TorchFunctionMode):
    """Gives stand-ins for the parameters of branches to functions that a block's forward calls.

    A parameter of a dropped branch is absent. Where a branch calls no module, its parameters carry
    its weight, too. A branch on which a custom autograd.Function works, which passes on the
    gradients of tensors only, is met at its sum.
    """

    def __init__(self, frame: Any) -> None:
        super().__init__()
        self.frame = frame
        self.read = [  # held, as ids of what is gone come again
            (parameter, run)
            for run in frame.runs
            for name, parameter in zip(
                run.branch.weights, frame.site.parameters_of(run.branch), strict=True
            )
            if name in run.branch.parameters
        ]
        self.runs = {id(parameter): run for parameter, run in self.read}
        self.has_sums = any(run.branch.in_function for run in frame.runs)
        self.added: set[tuple[int, Spot]] = set()  # whose sums have been met, by expression

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if here.frame is not self.frame:
            return func(*args, **kwargs)
        is_sum = self.has_sums and func.__name__ in SUMS and first_part(args) is None
        if is_sum and not is_of_library(sys._getframe(1)):
            at = spot()
            run = self._added_at(at)
            if run is not None and run.is_weighed and len(args) > 1:
                terms = list(args)
                position = run.branch.sums[at]
                if isinstance(terms[position], Tensor):
                    terms[position] = Part(run, terms[position], True)
                    return Part.__torch_function__(func, (), tuple(terms), kwargs)
        if self.runs and self._reads((*args, *kwargs.values())):
            swapped = tree_map(self._stand_in, (tuple(args), kwargs))
            if any([type(x) is Part for x in tree_leaves(swapped)]):
                return _call(func, *swapped)
        return func(*args, **kwargs)

    def _added_at(self, at: Spot) -> Any:
        """The branch that is added here: in a loop several are, one after the other.

        What is dropped, or is weighed as a part, comes as one.
        """
        for i, run in enumerate(self.frame.runs):
            branch = run.branch
            is_part = run.dropped and run.in_checkpoint
            comes = not is_part and (branch.in_function or not run.is_weighed)
            if comes and at in branch.sums and (i, at) not in self.added:
                self.added.add((i, at))
                return run
        return None

    def _reads(self, values: Any) -> bool:
        for x in values:
            if isinstance(x, Tensor):
                if id(x) in self.runs:
                    return True
            elif type(x) in (list, tuple) and self._reads(x):
                return True
        return False

    def _stand_in(self, x: Any) -> Any:
        run = self.runs.get(id(x)) if isinstance(x, Tensor) else None
        if run is None:
            return x
        alone = not run.branch.modules
        if run.dropped:
            return Part(run, None, alone, None, lambda: x.detach().to("meta"))
        return Part(run, x, True) if alone and run.is_weighed else x


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` of values among which there are parts."""
    first, name = args[0] if args else None, func.__name__
    if type(first) is Part:
        if name == "__get__":
            return getattr(first, func.__self__.__name__)
        if getattr(Tensor, name, None) is func:
            return getattr(first, name)(*args[1:], **kwargs)
    return Part.__torch_function__(func, (), args, kwargs)

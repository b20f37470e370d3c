"""``StochasticDepth``: the wrapper module, for people who change their model by hand."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .around import AROUND, describe
from .coins import Coins
from .functional import Droppable, combine
from .projections import Recipe, check_recipe, guess_input_shape, make_projection
from .sampling import check_mode, check_p, check_scale, decide

__all__ = ["StochasticDepth"]


class StochasticDepth(nn.Module):
    r"""Wrap a module so that training skips it with probability ``p``.

    With the shortcut :math:`s` (the projection of the input, or the input itself) and the
    wrapped module :math:`m`:

    ======== ======================== ================================
    \        training, dropped        training, kept
    ======== ======================== ================================
    output   :math:`s`                :math:`s + (m(x) - s) / (1 - p)`
    ======== ======================== ================================

    and in evaluation exactly :math:`m(x)`. This is for scale ``"train"``; with ``"none"`` a kept
    output is :math:`m(x)`, and with ``"eval"`` it is :math:`m(x)` in training and
    :math:`s + (1-p)(m(x) - s)` in evaluation. A dropped module is not executed.

    To add stochastic depth to the residual branches that a model already has, and keep its
    parameter names, use :func:`stochastic_depth.apply`.

    Args:
        module: the module to wrap.
        p: probability to drop, in [0, 1].
        projection: what stands in for the module where it is dropped. None: the input. A module
            or function: its output on the input. Or a recipe, for a module that changes the
            shape: ``"shared"``, the wrapped module's own first layer (linear or convolution)
            that maps the input's shape to the output's, with the same weights; ``"copy"``, an
            independent copy of it; ``"new"``, a fresh linear layer or 1x1 convolution with
            the strides inferred. The recipes look at the shapes when the layer is built; where
            these cannot be inferred, at the first batch: then build the optimizer after it.
        mode: ``"batch"``, one coin for the call; ``"row"``, one for each row (dimension 0); or
            ``"subset"``, a fixed number of rows.
        scale: ``"train"``, ``"eval"`` or ``"none"``.

    Shape:
        The module's output must have the structure and shapes of the shortcut. Where the input is
        a tuple, list or dict, every tensor in it is a stream with a shortcut of its own. Further
        arguments go to the module as they are; where rows are chosen, if one of them is a tensor
        that has as many rows as the input, it cannot be known whether these are the rows of the
        batch, so the module is computed on all rows and the dropped ones are left out.

    Raises:
        TypeError, ValueError: a bad argument, or shapes that do not fit (in the forward).

    Example:
        >>> import torch, stochastic_depth as sd
        >>> block = sd.StochasticDepth(torch.nn.Conv2d(8, 16, 3, 2, 1), p=0.2, projection="new")
        >>> block(torch.randn(4, 8, 32, 32)).shape
        torch.Size([4, 16, 16, 16])

    Reference:
        Huang et al., Deep Networks with Stochastic Depth, ECCV 2016 (arXiv:1603.09382).
    """

    def __init__(
        self,
        module: nn.Module,
        p: float = 0.5,
        projection: nn.Module | Callable[[Any], Any] | Recipe | None = None,
        mode: str = "batch",
        scale: str = "train",
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.module = module
        self.p = check_p(p)
        self.mode = check_mode(mode)
        self.scale = check_scale(scale)
        self._coins = Coins()
        self.projection: Callable[[Any], Any] | None = None
        self.recipe: Recipe | None = None  # a recipe that still waits for the first batch
        if isinstance(projection, str):
            self.recipe = check_recipe(projection)
            shape = guess_input_shape(module)
            if shape is not None:
                self._follow_recipe(shape)
        elif projection is None or callable(projection):
            self.projection = projection
        else:
            raise TypeError(
                "projection must be a module, a function, 'shared', 'copy', 'new' or None, got "
                f"{type(projection).__name__}"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        p = check_p(self.p)
        if p == 0.0 or not (self.training or self.scale == "eval"):
            return self.module(*args, **kwargs)
        if not args:
            raise TypeError("StochasticDepth needs its input as the first positional argument")
        x, *more = args
        device, batch, select = None, 1, True
        if self.mode != "batch":
            device, batch, select = self._rows(x, (more, kwargs))
        coins = None
        if self.training and p < 1.0:
            coins = self._coins.of(self.mode, lambda: [self.module], self, "StochasticDepth")
        keep = decide(
            p,
            training=self.training,
            mode=self.mode,
            scale=self.scale,
            batch=batch,
            device=device,
            generator=coins,
        )
        if self.recipe is not None:
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"projection={self.recipe!r} needs a tensor as input, got {describe(x)}; give "
                    "a projection module or function"
                )
            self._follow_recipe(x.shape)
        shortcut = x if self.projection is None else self.projection(x)

        def branch(kept: Any) -> Any:
            return self.module(kept, *more, **kwargs)

        droppable = Droppable(branch, AROUND, lambda: [self.module], select=select)
        return combine(shortcut, (x,), keep, droppable)

    def _follow_recipe(self, shape: torch.Size) -> None:
        assert self.recipe is not None
        self.projection = make_projection(self.module, self.recipe, shape)
        self.recipe = None

    def _rows(self, x: Any, others: Any) -> tuple[torch.device, int, bool]:
        """Where the rows of ``x`` are, how many, and whether all arguments tell them apart."""
        tensors = [t for t in tree_leaves(x) if isinstance(t, Tensor)]
        counts = {t.shape[:1] for t in tensors}
        if len(counts) != 1 or counts <= {(), (0,)}:
            raise ValueError(
                "choosing rows needs an input whose tensors have the same number of rows, at "
                f"least one, in dimension 0, got shapes {[tuple(t.shape) for t in tensors]}; use "
                "mode='batch'"
            )
        ((batch,),) = counts
        ambiguous = any(
            isinstance(t, Tensor) and t.shape[:1] == (batch,) for t in tree_leaves(others)
        )
        if ambiguous:
            warnings.warn(
                "StochasticDepth: a further tensor argument has as many rows as the input, which "
                "may or may not be those of the batch: all rows are computed and the dropped "
                "ones left out. Pass tensors with batch rows together with the input, in "
                "a tuple, to have them selected.",
                stacklevel=3,
            )
        return tensors[0].device, batch, not ambiguous

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}, scale={self.scale!r}"

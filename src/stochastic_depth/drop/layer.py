"""``StochasticDepth``: the wrapper module, for people who change their model by hand."""

import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tensor_leaves, tree_map_only
from ..branch import Branch, Mode, Place, Scale, check_p
from .around import Take, around, describe
from .decide import is_left_out, kept_weight
from .draws import Draws
from .force import check_repeats
from .projections import Recipe, check_recipe, check_shapes, guess_input_shape, make_projection
from .run import Run
from .slot import check_replicas, here

__all__ = ["StochasticDepth"]

_ROWS = Place(0)


def _of_branch(name: str) -> Any:
    return property(attrgetter(f"branch.{name}"), lambda self, x: setattr(self.branch, name, x))


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
            shape: ``"tied"``, the wrapped module's own first layer (linear or convolution)
            that maps the input's shape to the output's, with the same weights; ``"copy"``, an
            independent copy of it; ``"new"``, a fresh linear layer or 1x1 convolution with
            the strides inferred. The recipes look at the shapes when the layer is built; where
            these cannot be inferred, at the first batch: then build the optimizer after it.
        mode: ``"batch"``, one decision for the call; ``"row"``, one for each sample (dimension 0);
            or ``"subset"``, a fixed number of samples.
        scale: ``"train"``, ``"eval"`` or ``"none"``.

    Shape:
        The module's output must have the structure and shapes of the shortcut. Where the input is
        a tuple, list or dict, every tensor in it is a stream with a shortcut of its own. Further
        arguments go to the module as they are; where samples are chosen, if one of them is a
        tensor with as many entries as there are samples, it cannot be known whether these are the
        samples, so the module is computed on all and the dropped ones are left out.

    Raises:
        TypeError, ValueError: a bad argument, or shapes that do not fit.

    Example:
        >>> import torch, stochastic_depth as sd
        >>> block = sd.StochasticDepth(torch.nn.Conv2d(8, 16, 3, 2, 1), p=0.2, projection="new")
        >>> block(torch.randn(4, 8, 32, 32)).shape
        torch.Size([4, 16, 16, 16])

    Reference:
        Huang et al., Deep Networks with Stochastic Depth, ECCV 2016 (arXiv:1603.09382).
    """

    # The branch's own; all may be set at any time.
    p: float = _of_branch("p")
    mode: Mode = _of_branch("mode")
    scale: Scale = _of_branch("scale")

    def __init__(
        self,
        module: nn.Module,
        p: float,
        projection: nn.Module | Callable[[Any], Any] | Recipe | None = None,
        *,
        mode: Mode = "batch",
        scale: Scale = "train",
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.module = module
        self.branch = Branch(
            type(self).__name__, "block", ("module",), mode=mode, scale=scale, target=check_p(p)
        )
        self.draws = Draws()
        self.projection: Callable[[Any], Any] | None = None
        self.recipe: Recipe | None = None  # a recipe that still waits for the first batch
        if isinstance(projection, str):
            self.recipe = check_recipe(projection)
            shape = guess_input_shape(module)
            if shape is not None:
                self._follow_recipe(shape)
        elif projection is None or callable(projection):
            self.projection = projection
            if projection is None:
                check_shapes(module)
        else:
            raise TypeError(
                "projection must be a module, a function, 'tied', 'copy', 'new' or None, got "
                f"{type(projection).__name__}"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        branch = self.branch
        forced = here.forced or {}
        by_hand = branch in forced
        training = self.training or branch in here.sampled
        weighs = branch.is_active and (training or branch.scale == "eval")
        if here.forced == {} or not (by_hand or weighs):
            return self.module(*args, **kwargs)
        check_repeats([branch], self.training)
        if not args:
            raise TypeError("StochasticDepth needs its input as the first positional argument")
        x, *more = args
        select = True
        if branch.mode != "batch":
            select = self._check_samples(x, (more, kwargs))
        device = next((t.device for t in tensor_leaves(x)), torch.device("cpu"))
        decision, weight = forced[branch] if by_hand else self._decide(training)
        run = Run(branch, decision, weight, device, self)
        run.counts = self.training and not by_hand
        if branch.mode == "batch" and not torch.compiler.is_compiling():
            run.count(1)
        if self.recipe is not None:
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"projection={self.recipe!r} needs a tensor as input, got {describe(x)}; give "
                    "a projection module or function"
                )
            self._follow_recipe(x.shape)
        shortcut = x if self.projection is None else self.projection(x)

        def call(take: Take) -> Any:
            taken = x if take is None else tree_map_only(Tensor, lambda t: take(t, _ROWS), x)
            return self.module(taken, *more, **kwargs)

        run.owe((x, more, kwargs))
        return around(run, shortcut, call, select, _ROWS)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what is wrapped, and the projection: a dropped call is skipped as before.

        Args:
            *args: of :func:`torch.compile`.
            **kwargs: the same.
        """
        for module in (self.module, self.projection):
            if isinstance(module, nn.Module):
                module.compile(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> nn.Module:
        check_replicas([self.branch])
        if self.recipe is not None and self.training:
            raise RuntimeError(
                f"StochasticDepth: projection={self.recipe!r} is made in the first call, and a "
                "replica of nn.DataParallel would lose it: call the model once without that"
            )
        replica: nn.Module = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        return replica

    def _decide(self, training: bool) -> tuple[Any, float]:
        if not training:
            return is_left_out(self.branch), kept_weight(self.branch, training=False)
        if torch.compiler.is_compiling() and not self.branch.is_certain:
            self.draws.check_graph(self.branch, [self.module])
            return None, 1.0
        decision = self.draws.decide([self.branch], self)[0]
        return decision, kept_weight(self.branch, training=True)

    def modules_of(self, branch: Branch) -> list[nn.Module]:
        return [self.module]

    def parameters_of(self, branch: Branch) -> list[Tensor]:
        return []

    def _follow_recipe(self, shape: torch.Size) -> None:
        assert self.recipe is not None
        self.projection = make_projection(self.module, self.recipe, shape)
        self.recipe = None

    def _check_samples(self, x: Any, others: Any) -> bool:
        """Whether all arguments tell the samples apart."""
        tensors = tensor_leaves(x)
        counts = {t.shape[:1] for t in tensors}
        if len(counts) != 1 or counts <= {()}:
            raise ValueError(
                "choosing samples needs an input whose tensors have the same number of them in "
                f"dimension 0, got shapes {[tuple(t.shape) for t in tensors]}; use mode='batch'"
            )
        ((size,),) = counts
        ambiguous = any(t.shape[:1] == (size,) for t in tensor_leaves(others))
        if ambiguous:
            warnings.warn(
                "StochasticDepth: another tensor argument has as many entries as the input has "
                "samples, which may or may not be theirs: computing all samples and masking the "
                "dropped ones (correct, but no speed-up). Pass tensors with samples together with "
                "the input, in a tuple, to have them selected.",
                stacklevel=3,
            )
        return not ambiguous

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}, scale={self.scale!r}"

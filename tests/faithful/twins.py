"""A model with stochastic depth beside a plain copy of it, step by step."""

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import stochastic_depth as sd

KEPT = 1e-30  # drops never, while everything that could drop is in place
MODES = ["batch", "row"]


class Output(nn.Module):
    """Has the last call of a branch, and its sum, as in BERT."""

    def __init__(self, wide: int = 4) -> None:
        super().__init__()
        self.g = nn.Linear(wide, 4)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.g(h) + x


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or (6, 4), generator=generator(seed), dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(make: Callable[..., nn.Module], *args: Any, seed: int = 0) -> nn.Module:
    """``make(*args)`` in float64, its weights the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args).double().train()


def run_often(model: nn.Module, x: Tensor) -> None:
    for _ in range(8):
        model(x)


def twins(
    model: nn.Module, *inputs: Any, p: float = KEPT, given: bool = True, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """``model`` with stochastic depth, and a plain copy of it.

    Args:
        model: what it is applied to.
        inputs: an example batch.
        p: the rate of every branch.
        given: whether ``apply`` is given the batch, or has to do without.
        options: of ``apply``. It draws from its own generator if they do not say otherwise.
    """
    plain = copy.deepcopy(model)
    options.setdefault("seed", 0)
    options.setdefault("schedule", "uniform")
    with warnings.catch_warnings():
        if not given:  # that nothing is known for sure before the first batch
            warnings.simplefilter("ignore", UserWarning)
        sd.apply(model, p, example_inputs=inputs if given else None, **options)
    if given:
        assert sd.branches(model)  # else nothing is compared with anything
    return model, plain


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - a model may use it


def outcome(model: nn.Module, *inputs: Any, seed: int = 0) -> dict[str, Any]:
    """Everything that a training step leaves: results, gradients, buffers, random numbers."""
    given = [
        x.detach().clone().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in inputs
    ]
    seed_all(seed)
    model.zero_grad()
    results = [x for x in tree_leaves(model(*[feed(x) for x in given])) if isinstance(x, Tensor)]
    loss = sum(x.double().square().sum() for x in results if x.is_floating_point())
    loss.backward()
    seen = {f"result {i}": x.detach() for i, x in enumerate(results)}
    seen |= {f"type of result {i}": type(x) for i, x in enumerate(results)}
    for i, x in enumerate(given):
        if isinstance(x, Tensor) and x.requires_grad:
            seen[f"gradient of input {i}"] = zeros_if_none(x)
    seen |= {f"gradient of {name}": zeros_if_none(x) for name, x in model.named_parameters()}
    seen |= {f"buffer {name}": x.clone() for name, x in model.named_buffers()}
    seen["next random numbers"] = [torch.rand(2).tolist(), random.random(), np.random.rand()]  # noqa: NPY002
    return seen


def feed(x: Any) -> Any:
    """Not a leaf, so that a model may write into it."""
    return x * 1.0 if isinstance(x, Tensor) and x.requires_grad else x


def zeros_if_none(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad.detach().clone()


def assert_equal_outcomes(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                ours[name],
                value,
                rtol=1e-11,
                atol=1e-11,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        else:
            assert ours[name] == value, name


def assert_same(ours: nn.Module, plain: nn.Module, *inputs: Any, seed: int = 0) -> dict[str, Any]:
    """Both take the same step; returns what it left."""
    mine = outcome(ours, *inputs, seed=seed)
    assert_equal_outcomes(mine, outcome(plain, *inputs, seed=seed))
    return mine


class Weighed(nn.Module):
    """A model ``x + f(x)`` with each sample of f at a weight of its own; f sees all samples."""

    def __init__(self, plain: nn.Module, weights: Tensor, dim: int = 0) -> None:
        super().__init__()
        self.plain, self.weights, self.dim = plain, weights, dim

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return x + self.weights.view(shape) * (self.plain(x.clone(), *rest) - x)


def assert_weighed(
    ours: nn.Module, plain: nn.Module, x: Tensor, *rest: Any, steps: int = 12, dim: int = 0
) -> None:
    """A model ``x + f(x)`` at p = 1/2: a sample's f counts twice or not at all, as decided.

    Which samples were dropped is read off the result; the result, the gradients and the counts
    have to agree with it. Both decisions come up in ``steps``: with fixed seeds, and for fresh
    ones in all but one in 2000 of runs.
    """
    (branch,) = sd.branches(ours)
    assert branch.p == 0.5
    seen = set()
    for step in range(steps):
        before = branch.decided, branch.dropped
        mine = outcome(ours, x, *rest, seed=step)
        decided, dropped = branch.decided - before[0], branch.dropped - before[1]
        kept = (mine["result 0"] != x).movedim(dim, 0).flatten(1).any(1)
        lost = int((~kept).sum())
        if branch.decides_calls:
            assert lost in (0, len(kept))
            assert (decided, dropped) == (1, int(lost > 0))
        else:
            assert (decided, dropped) == (len(kept), lost)
        theirs = outcome(Weighed(plain, 2.0 * kept, dim), x, *rest, seed=step)
        mine.pop("next random numbers")  # fewer are drawn where a branch is left out
        theirs.pop("next random numbers")
        assert_equal_outcomes(mine, {k.replace("plain.", ""): v for k, v in theirs.items()})
        seen |= set(kept.tolist())
    assert seen == {True, False}

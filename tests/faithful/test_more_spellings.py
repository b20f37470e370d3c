"""Kinds of forwards that were met in packages: found, dropped, and nothing else changed."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from find import small
from stochastic_depth.find import find

from .twins import data, net

KINDS: dict[str, Callable[[], nn.Module]] = {
    "asks isinstance": small.Asking,
    "an object that nobody needs": small.Explained,
    "lerp": small.Lerp,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_they_are_dropped_and_verify(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(KINDS[kind](), KINDS[kind]()), torch.randn(4, small.WIDTH)
    sd.apply(model, 0.5, mode=mode, example_inputs=x)
    assert len(sd.branches(model)) == (4 if kind.startswith("an object") else 2)
    assert all(branch.place is not None for branch in sd.branches(model)) == (mode != "batch")
    assert sd.verify(model, x).passed, sd.verify(model, x)


def test_what_an_object_holds_may_be_needed() -> None:
    found = find(small.Explained(used=True), (torch.randn(3, small.WIDTH),), {}, samples=None)
    assert found.branches == []
    assert "used" in found.refused[0].reason


class Noise(nn.Module):
    """Draws numbers in evaluation, too, in its branch (a sampler of tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.f = small.linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.f(x + torch.rand(small.WIDTH))


def test_verify_knows_that_a_dropped_branch_draws_no_numbers() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Noise(), Noise()), torch.randn(4, small.WIDTH)
    sd.apply(model, 0.5, example_inputs=x)
    assert len(sd.branches(model)) == 2
    assert sd.verify(model, x).passed, sd.verify(model, x)


# How a sum is written, and what of it is left without its branch.
SUMS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "alpha of the shortcut": (lambda x, y: torch.add(y, x, alpha=3), lambda x: 3 * x),
    "the same, in place": (lambda x, y: y.add_(x, alpha=3), lambda x: 3 * x),
    "mean of a stack": (lambda x, y: torch.stack([x, y]).mean(0), lambda x: x / 2),
    "the larger": (lambda x, y: x + torch.stack([y, 3 * y]).max(0).values, lambda x: x),
    "scatter_add": (lambda x, y: x.scatter_add(1, torch.zeros_like(x).long(), y), lambda x: x),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_a_dropped_branch_is_absent_from_its_sum(name: str, mode: str) -> None:
    torch.manual_seed(0)
    sum_of, left = SUMS[name]
    model, x = small.Spelled(sum_of), torch.randn(4, small.WIDTH)
    sd.apply(model, 1.0, mode=mode, example_inputs=x)
    torch.testing.assert_close(model(x), left(x))
    (branch,) = sd.branches(model)
    branch.p, seen = 0.5, set()
    doubled = sum_of(x, 2 * model.f(x))
    for _ in range(12):
        out = model(x)
        kept = (out - left(x)).abs().amax(1, keepdim=True) > 1e-6
        torch.testing.assert_close(out, torch.where(kept, doubled, left(x)))
        seen |= set(kept.flatten().tolist())
    assert seen == {True, False}


class Listed(nn.Module):
    """Layers that are parameters, in a list or in one, and no modules."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        layers = torch.randn(3, 4, 4)
        self.layers = nn.Parameter(layers) if stacked else nn.ParameterList(list(layers))

    def forward(self, x: torch.Tensor, weights: tuple[float, ...] = (1, 1, 1)) -> torch.Tensor:
        for i, weight in enumerate(weights):
            x = x + weight * torch.tanh(x @ self.layers[i])
        return x


@pytest.mark.parametrize("stacked", [False, True])
def test_layers_in_a_list_of_parameters_are_branches(stacked: bool) -> None:
    plain = net(Listed, stacked)
    model = sd.apply(copy.deepcopy(plain), 0.5, example_inputs=data(), schedule="uniform", seed=0)
    branches = sd.branches(model)
    assert len(branches) == (1 if stacked else 3)  # one decision for one parameter
    outcomes = set()
    for _ in range(30):
        before = [branch.dropped for branch in branches]
        out = model(data())
        dropped = [b.dropped > n for b, n in zip(branches, before, strict=True)]
        weights = tuple(0.0 if d else 2.0 for d in (dropped * 3)[:3])
        torch.testing.assert_close(out, plain(data(), weights))
        outcomes.add(weights)
    assert len(outcomes) == (2 if stacked else 8)

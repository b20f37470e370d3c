"""A custom autograd.Function keeps its backward, whatever the weight of the branch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.drop.decide import choose_samples
from stochastic_depth.drop.force import forced

from .twins import MODES, assert_same, assert_weighed, data, net, twins


class Reversed(torch.autograd.Function):
    """Gradient reversal; its forward returns its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class ReversedView(Reversed):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)


class Clipped(Reversed):
    """What reaches it is not of degree 1 in what leaves it."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.5, 0.5)


class Squared(torch.autograd.Function):
    """Nor is its value, and it keeps a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * gradient


class Rounded(torch.autograd.Function):
    """A straight-through estimator, with its context in another method."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return (x * factor).round() / factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed": Reversed.apply,
    "reversed view": ReversedView.apply,
    "clipped": Clipped.apply,
    "squared": Squared.apply,
    "rounded": lambda x: Rounded.apply(x, 8.0),
}


class Block(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], place: str, inner: bool) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)
        self.function, self.place, self.inner = function, place, inner
        self.as_module = AsModule(function)

    def forward(self, x: Tensor) -> Tensor:
        function = self.as_module if self.inner else self.function
        match self.place:
            case "before":
                return x + self.g(self.f(function(x)))
            case "within":
                return x + self.g(function(self.f(x)))
            case "after":
                return x + function(self.g(self.f(x)))
            case "after, then scaled":
                return x + 0.5 * function(self.g(self.f(x)))
            case "subtracted":
                return x - function(self.g(self.f(x)))
            case "in place":
                y = x.clone()
                y += function(self.g(self.f(x)))
                return y
            case _:
                return torch.add(function(self.g(self.f(x))), x)


class AsModule(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


PLACES = [
    "before",
    "within",
    "after",
    "after, then scaled",
    "subtracted",
    "in place",
    "torch.add, first",
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_its_backward_runs(function: str, place: str, inner: bool, mode: str) -> None:
    block = net(Block, FUNCTIONS[function], place, inner)
    ours, plain = twins(block, data(), mode=mode)
    mine = assert_same(ours, plain, data())
    plain.function = plain.as_module.function = lambda x: x
    with pytest.raises(AssertionError):
        assert_same(ours, plain, data())
    assert mine["gradient of f.weight"].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_its_backward_runs_at_other_weights(
    function: str, place: str, inner: bool, mode: str
) -> None:
    block = net(Block, FUNCTIONS[function], place, inner)
    ours, plain = twins(block, data(), mode=mode, p=0.5)
    assert_weighed(ours, plain, data(), steps=8)


def test_gradients_are_reversed_also_where_the_sum_is_handed_down() -> None:
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Linear(4, 4)

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return Reversed.apply(self.g(h)) + x

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.output = nn.Linear(4, 4), Output()

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.f(x), x)

    ours, plain = twins(net(Layer), data(), p=0.5)
    assert_weighed(ours, plain, data())


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_gradients_go_through(mode: str) -> None:
    ours, _ = twins(net(Block, torch.sin, "within", False), data(), p=0.5, mode=mode, seed=0)
    (branch,) = sd.branches(ours)
    for step in range(6):
        x = data(seed=step).requires_grad_()
        before = branch.dropped
        output = ours(x * 1.0)
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        if branch.dropped == before and mode == "batch":
            expected = data(seed=step).requires_grad_()
            h = ours.g(torch.sin(ours.f(expected)))
            total = (expected + 2 * h).square().sum()
            (slope,) = torch.autograd.grad(total, expected, create_graph=True)
            slope.square().sum().backward()
            torch.testing.assert_close(x.grad, expected.grad, rtol=1e-10, atol=1e-10)
        assert x.grad.isfinite().all()
    assert branch.dropped > 0


class InALoop(nn.Module):
    """Several branches are added at one expression, not all of them through a custom Function."""

    def __init__(self, functions: list[Callable[[Tensor], Tensor]], first: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in functions])
        self.functions, self.first = functions, first

    def forward(self, x: Tensor) -> Tensor:
        for layer, function in zip(self.layers, self.functions, strict=True):
            h = function(layer(x))
            x = h + x if self.first else x + h
        return x


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("kinds", ["ff", "f-", "-f", "ff-f"])
def test_each_of_several_branches_in_a_loop_has_its_own_decision(
    kinds: str, mode: str, first: bool
) -> None:
    functions = [Reversed.apply if kind == "f" else torch.tanh for kind in kinds]
    ours, plain = twins(net(InALoop, functions, first), data(), p=0.5, mode=mode)
    for step in range(8):
        decisions, weights = {}, []
        for i, branch in enumerate(sd.branches(ours)):
            branch.p = (0.2, 0.8, 0.0, 0.5)[(i + step) % 4]
            weight = torch.ones(6, 1, dtype=torch.float64)
            if branch.p and mode == "row":
                decisions[branch] = 10 * step + i, 1.0
                kept, factor = choose_samples(branch, 10 * step + i, 6, "cpu")
                weight = torch.zeros_like(weight).index_fill(0, kept, factor)
            elif branch.p:
                decisions[branch] = (step + i) % 3 == 0, 1.0 + i
                weight *= 0 if decisions[branch][0] else 1.0 + i
            weights.append(weight)
        x = data(seed=step)
        with forced(decisions):
            got = ours(x)
        expected = x
        for layer, function, weight in zip(plain.layers, functions, weights, strict=True):
            expected = expected + weight * function(layer(expected))
        torch.testing.assert_close(got, expected)

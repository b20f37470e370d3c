"""A custom autograd.Function keeps its backward, whatever the weight of the branch."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from combinations import in_pairs
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
CASES = in_pairs(list(FUNCTIONS), PLACES, [False, True], MODES)


@pytest.mark.parametrize(("function", "place", "inner", "mode"), CASES)
def test_its_backward_runs(function: str, place: str, inner: bool, mode: str) -> None:
    block = net(Block, FUNCTIONS[function], place, inner)
    ours, plain = twins(block, data(), mode=mode)
    mine = assert_same(ours, plain, data())
    plain.function = plain.as_module.function = lambda x: x
    with pytest.raises(AssertionError):
        assert_same(ours, plain, data())
    assert mine["gradient of f.weight"].any()


@pytest.mark.parametrize(("function", "place", "inner", "mode"), CASES)
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


class Adding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


class AddedInFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Adding.apply(x, self.f(x))


def test_a_branch_that_a_function_adds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its sum is in a custom autograd\.Function"):
        sd.apply(AddedInFunction(), 0.5, example_inputs=torch.randn(6, 4))


class Coupling(torch.autograd.Function):
    """A reversible block: its backward computes its inputs and its branches once more."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, f: nn.Module, g: nn.Module
    ) -> tuple[Tensor, Tensor]:
        ctx.f, ctx.g = f, g
        y = a + f(b)
        z = b + g(y)
        ctx.save_for_backward(y.detach(), z.detach())
        return y, z

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_z: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, z = ctx.saved_tensors
        with torch.enable_grad():
            y.requires_grad_()
            gy = ctx.g(y)
        b = z - gy.detach()
        if gy.requires_grad:
            gy.backward(grad_z)
            grad_y = grad_y + y.grad
        with torch.enable_grad():
            b.requires_grad_()
            fb = ctx.f(b)
        if fb.requires_grad:
            fb.backward(grad_y)
            grad_z = grad_z + b.grad
        return grad_y, grad_z, None, None


class Coupled(nn.Module):
    """A block of two streams; plainly, with its branches at a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, a: Tensor, b: Tensor, weights: list[float] | None) -> tuple[Tensor, Tensor]:
        if weights is None:
            return Coupling.apply(a, b, self.f, self.g)
        y = a + weights[0] * self.f(b)
        return y, b + weights[1] * self.g(y)


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Coupled(), Coupled()

    def forward(self, x: Tensor, weights: list[float] | None = None) -> Tensor:
        a, b = self.first(x[:, :2].clone(), x[:, 2:].clone(), weights and weights[:2])
        a, b = self.second(a, b, weights and weights[2:])
        return torch.tanh(a) * b


def test_reversible_blocks_repeat_what_was_decided() -> None:
    ours, _ = twins(net(Reversible), data(), p=0.5)
    plain = net(Reversible)
    seen = set()
    for step in range(40):
        before = [branch.dropped for branch in sd.branches(ours)]
        x, z = data(seed=step).requires_grad_(), data(seed=step).requires_grad_()
        out = ours(x)
        dropped = [b.dropped - n for b, n in zip(sd.branches(ours), before, strict=True)]
        expected = plain(z, [2.0 * (not d) for d in dropped])
        for model, y in ((ours, out), (plain, expected)):
            model.zero_grad()
            y.square().sum().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(x.grad, z.grad)
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(
                mine.grad if mine.grad is not None else torch.zeros_like(theirs), theirs.grad
            )
        seen.add(tuple(dropped))
    assert len(seen) > 8


class Calling(torch.autograd.Function):
    """Calls a module in its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: nn.Linear, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return f(x).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight, None, gradient.t() @ x, gradient.sum(0)


class CalledInALoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for f in self.layers:
            x = x + Calling.apply(x, f, f.weight, f.bias)
        return x


@pytest.mark.parametrize("decisions", [*itertools.product([False, True], repeat=3)])
def test_a_dropped_branch_takes_no_others_turn(decisions: tuple[bool, ...]) -> None:
    ours, plain = twins(net(CalledInALoop), data(), p=0.5)
    with forced({b: (d, 2.0) for b, d in zip(sd.branches(ours), decisions, strict=True)}):
        got = ours(data())
    expected = data()
    for layer, dropped in zip(plain.layers, decisions, strict=True):
        expected = expected + 2.0 * (not dropped) * layer(expected)
    torch.testing.assert_close(got, expected)


class Reversing(torch.autograd.Function):
    """Calls whole blocks, and in its backward what computes their inputs from their outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        ctx.blocks = blocks
        for block in blocks:
            x = block(x)
        ctx.y = x.detach()
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        y = ctx.y
        for block in reversed(ctx.blocks):
            y, gradient = block.inverse(y, gradient)
        return gradient, None


class Invertible(nn.Module):
    """A block of two streams that can compute its input from its output."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        y = a + self.f(b)
        return torch.cat([y, b + self.g(y)], dim=-1)

    def inverse(self, out: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        y, z = (t.detach() for t in out.chunk(2, dim=-1))
        dy, dz = gradient.chunk(2, dim=-1)
        with torch.enable_grad():
            g = self.g(y.requires_grad_())
        if g.requires_grad:
            g.backward(dz)
            dy = dy + y.grad
        b = (z - g).detach()
        with torch.enable_grad():
            f = self.f(b.requires_grad_())
        if f.requires_grad:
            f.backward(dy)
            dz = dz + b.grad
        return torch.cat([y - f, b], dim=-1).detach(), torch.cat([dy, dz], dim=-1)


class Inverting(nn.Module):
    """Reversible in training only, where memory counts, or always."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always
        self.blocks = nn.ModuleList([Invertible(), Invertible()])

    def forward(self, x: Tensor) -> Tensor:
        if self.always or self.training:
            return Reversing.apply(x.clone(), self.blocks)
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_that_are_called_in_a_function_are_refused() -> None:
    with pytest.raises(ValueError, match=r"its block is called in a custom autograd\.Function"):
        sd.apply(net(Inverting, True), 0.5, example_inputs=data())


@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"draw": "balanced"}])
def test_an_inverse_does_not_go_on_from_other_decisions(options: dict[str, Any]) -> None:
    ours = net(Inverting, False)
    sd.apply(ours, 0.5, schedule="uniform", example_inputs=data(), **options)

    def train() -> None:
        for _ in range(8):
            ours(data().requires_grad_()).sum().backward()

    with pytest.raises(RuntimeError, match="not known whether it was dropped"):
        train()


def test_an_inverse_repeats_what_is_certain() -> None:
    ours = sd.apply(net(Inverting, False), 1.0, schedule="uniform", example_inputs=data())
    x = data().requires_grad_()
    out = ours(x)
    torch.testing.assert_close(out, x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))

"""A block's forward may do to a value of a branch what can be done to a tensor, at any time.

What is done only in training was not to be seen when the model was watched.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd

from .test_autograd_functions import Reversed
from .twins import assert_same, assert_weighed, data, net, run_often, twins

MODES = ["batch", "row", "subset"]


def hook(y: Tensor) -> None:
    if y.requires_grad:
        y.register_hook(lambda grad: 0.1 * grad)


def view(y: Tensor) -> None:
    y.view(-1, 2)[:, 0].mul_(0.1)


def entries(y: Tensor) -> None:
    y[..., 0] = 0.5


def alias(y: Tensor) -> None:
    z = y
    z *= 0.5


def through_data(y: Tensor) -> None:
    y.data = y.data.clamp(-0.1, 0.1)


def where_negative(y: Tensor) -> None:
    y[y < 0] = 0.0


WRITES: dict[str, Callable[[Tensor], object]] = {
    "a hook": hook,
    "a method that writes": lambda y: y.clamp_(-0.5, 0.5),
    "a function that writes": lambda y: functional.dropout(y, 1.0, inplace=True),
    "an activation that writes": lambda y: functional.leaky_relu(y, 0.3, inplace=True),
    "through a view": view,
    "some entries": entries,
    "by another name": alias,
    "by what writing returns": lambda y: functional.silu(y, inplace=True).sub_(0.5),
    "through its data": through_data,
    "where it is negative": where_negative,
    "no gradient": lambda y: y.detach_(),
}


class Written(nn.Module):
    """Does something to a value, made by a call or by an activation, in training alone."""

    def __init__(self, write: Callable[[Tensor], object], where: str) -> None:
        super().__init__()
        self.f, self.g, self.write, self.where = nn.Linear(4, 4), nn.Linear(4, 4), write, where

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.where == "activated":
            y = functional.silu(y)
        if self.training and self.where != "last":
            self.write(y)
        y = self.g(y)
        if self.training and self.where == "last":
            self.write(y)
        return x + y


def assert_weighed_at_half(ours: nn.Module, plain: nn.Module, mode: str) -> None:
    (branch,) = sd.branches(ours)
    branch.p = 0.5
    if mode != "subset":
        assert_weighed(ours, plain, data())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["called", "activated", "last"])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_done_to_a_value_is_done(write: str, where: str, mode: str) -> None:
    ours, plain = twins(net(Written, WRITES[write], where), data(), mode=mode)
    assert_same(ours, plain, data())
    if (write, where) == ("a function that writes", "last"):
        return  # kept, it is zero
    assert_weighed_at_half(ours, plain, mode)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = functional.gelu(self.f(x))
        y.masked_fill_(padding, 0.0)
        return x + self.g(y)


def test_a_mask_may_be_empty_in_the_examples() -> None:
    padding = torch.zeros(6, 4, dtype=torch.bool)
    ours, plain = twins(net(Padded), data(), padding, mode="row", p=0.5)
    padding[:, 2:] = True
    assert_weighed(ours, plain, data(), padding)


class Shrinking(nn.Module):
    """Writes to its shortcut after the branch has read it."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = factors
        self.f = nn.Sequential(nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.f(x)
        for factor in self.factors:
            x.mul_(factor)
        return x + y


@pytest.mark.parametrize("mode", MODES)
def test_the_shortcut_may_be_written_to_after_the_branch_has_read_it(mode: str) -> None:
    ours, plain = twins(net(Shrinking, 0.7), data(), mode=mode)
    assert_same(ours, plain, data())
    ours, plain = twins(net(Shrinking, 0.5, 2.0), data(), mode=mode)
    assert_weighed_at_half(ours, plain, mode)


class Checkpointed(nn.Module):
    """Checkpoints what comes after a call of its branch."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.f, self.g, self.way = nn.Linear(4, 4), nn.Linear(4, 4), way

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.way == "a call of what a call made":
            return x + checkpoint(self.g, y, use_reentrant=True)
        if self.way == "a call of what was activated":
            return x + checkpoint(self.g, functional.gelu(y), use_reentrant=True)
        if self.way == "a function, in between":
            return x + self.g(checkpoint(functional.gelu, y, use_reentrant=True))
        return x + checkpoint(functional.silu, self.g(y), use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "way",
    [
        "a call of what a call made",
        "a call of what was activated",
        "a function, in between",
        "a function, at the end",
    ],
)
def test_reentrant_checkpointing_may_be_given_a_value_of_the_branch(way: str, mode: str) -> None:
    ours, plain = twins(net(Checkpointed, way), data(), mode=mode)
    assert_same(ours, plain, data())
    assert_weighed_at_half(ours, plain, mode)


class InTraining(nn.Module):
    """Hands a value to a custom Function, which was not to be seen in evaluation."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.f, self.g, self.last = nn.Linear(4, 4), nn.Linear(4, 4), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.training and not self.last:
            y = Reversed.apply(y)
        y = self.g(y)
        return x + (Reversed.apply(y) if self.training and self.last else y)


@pytest.mark.parametrize(("last", "mode"), [(False, "row"), (True, "row"), (True, "batch")])
def test_a_custom_function_in_training_alone_is_an_error(last: bool, mode: str) -> None:
    ours, _ = twins(net(InTraining, last), data(), mode=mode, p=0.5)
    with pytest.raises(RuntimeError, match="hands one of its values to a custom"):
        run_often(ours, data())


class HandsOn(nn.Module):
    """Hands on what it is given, in training somewhat changed."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self.f(x) + bias, bias * 0.5 if self.training else bias


class HandingOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HandsOn() for _ in range(2))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for layer in self.layers:
            x, bias = layer(x, bias)
        return x + bias


@pytest.mark.parametrize("mode", MODES)
def test_what_a_block_hands_on_may_be_changed_in_training(mode: str) -> None:
    inputs = data(), data(seed=2)
    ours, plain = twins(net(HandingOn), *inputs, mode=mode, blocks=HandsOn)
    assert_same(ours, plain, *inputs)


def test_what_a_block_hands_on_is_changed_for_the_kept_samples() -> None:
    inputs = data(), data(seed=2)
    ours, plain = twins(net(HandingOn), *inputs, mode="row", blocks=HandsOn, scale="none", p=0.5)
    ours.layers[1].f = plain.layers[1].f = nn.Identity()
    sd.branches(ours)[1].p = 0.0
    seen = set()
    for _ in range(8):
        out = ours(*inputs)
        kept = plain(*inputs)
        dropped = inputs[0] + 1.5 * inputs[1]  # half of the bias is handed on by the second
        rows = [torch.equal(a, b) for a, b in zip(out, kept, strict=True)]
        for row, is_kept in enumerate(rows):
            if not is_kept:
                torch.testing.assert_close(out[row], dropped[row])
        seen |= set(rows)
    assert seen == {True, False}


def test_a_copy_in_half_precision_returns_what_the_plain_one_does() -> None:
    model = sd.apply(nn.Sequential(nn.Linear(4, 4), Written(hook, "called")), 0.5, seed=0)
    half = copy.deepcopy(model).bfloat16()
    for _ in range(8):
        assert half(data().bfloat16()).dtype is torch.bfloat16

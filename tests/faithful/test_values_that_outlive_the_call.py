"""A value of a branch that training alone lets out of its block is refused, a tensor or an error.

What is done only in training was not to be seen when the model was watched.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

from .twins import data, net, twins

MODES = ["batch", "row", "subset"]


class Letting(nn.Module):
    """``x + g(f(x))``, which lets f(x) out in training, or where it is given a mask."""

    def __init__(
        self, let_out: Callable[[nn.Module, Tensor], object], masked: bool = False
    ) -> None:
        super().__init__()
        self.f, self.g, self.let_out, self.masked = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            let_out,
            masked,
        )
        self.kept: list[Tensor] = []
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.f(x)
        if self.training and (mask is not None) is self.masked:
            self.let_out(self, h)
        return x + self.g(h)


def keep(block: nn.Module, h: Tensor) -> None:
    block.loss = h.square().mean()


def replace_buffer(block: nn.Module, h: Tensor) -> None:
    block.mean = h.detach().mean(0)


def fill(block: nn.Module, h: Tensor) -> None:
    block.kept.append(h.square().mean())


def average(block: nn.Module, h: Tensor) -> None:
    with torch.no_grad():
        block.mean.mul_(0.9).add_(0.1 * h.mean(0))


def assign_entries(block: nn.Module, h: Tensor) -> None:
    with torch.no_grad():
        block.mean[:2] = h.detach().mean(0)[:2]


WAYS: dict[str, tuple[Callable[[nn.Module, Tensor], object], str]] = {
    "an attribute": (keep, "kept in an attribute"),
    "a buffer": (replace_buffer, "kept in an attribute"),
    "a list": (fill, "kept in an attribute"),
    "a running mean": (average, "not its own"),
    "entries": (assign_entries, "not its own"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_in_training_it_is_refused_with_the_reason(way: str, mode: str) -> None:
    let_out, reason = WAYS[way]
    model = nn.Sequential(net(Letting, let_out), net(Letting, lambda block, h: None))
    sd.apply(model, 0.5, mode=mode, example_inputs=data())
    assert [branch.name for branch in sd.branches(model)] == ["1:f"]
    ((name, told),) = sd.summary(model).refused
    assert name == "0:f"
    assert reason in told


@pytest.mark.parametrize("mode", MODES)
def test_where_the_branch_is_kept_it_is_a_tensor_afterwards(mode: str) -> None:
    ours, plain = twins(net(Letting, keep, True), data(), mode=mode)
    mask = torch.ones(6, 1, dtype=torch.float64)
    total = ours(data(), mask).sum() + ours.loss
    expected = plain(data(), mask).sum() + plain.loss
    assert type(total) is Tensor
    torch.testing.assert_close(total, expected)
    total.backward()
    expected.backward()
    torch.testing.assert_close(ours.f.weight.grad, plain.f.weight.grad)


@pytest.mark.parametrize("mode", MODES)
def test_where_it_is_dropped_it_cannot_be_read_afterwards(mode: str) -> None:
    ours, _ = twins(net(Letting, keep, True), data(), mode=mode, p=1.0)
    out = ours(data(), torch.ones(6, 1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="is dropped, and the value of something"):
        out.sum() + ours.loss
    with pytest.raises(RuntimeError, match="is dropped, and the value of something"):
        ours.loss.backward()


class Mixture(nn.Module):
    """A module of a branch may keep what it likes: its own balancing loss, say."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        self.loss = gates.mean(0).square().sum()
        return sum(gates[:, i : i + 1] * e(x) for i, e in enumerate(self.experts))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixture = Mixture()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixture(x)


def test_a_module_of_a_branch_may_keep_what_it_likes() -> None:
    ours, plain = twins(net(Routed), data())
    for model in (ours, plain):
        (model(data()).sum() + model.mixture.loss).backward()
    assert ours.mixture.router.weight.grad.any()
    torch.testing.assert_close(ours.mixture.router.weight.grad, plain.mixture.router.weight.grad)


class Twofold(nn.Module):
    """Returns what its branch has computed, too, which nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.f(x)
        return x + h, h * 2.0


class First(nn.Module):
    """What its block returns first."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Twofold()

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.block(x)
        return first


@pytest.mark.parametrize("mode", MODES)
def test_what_nobody_reads_is_zeros_where_the_branch_is_dropped(mode: str) -> None:
    x = data()
    model = sd.apply(First().double(), 1.0, mode=mode, example_inputs=x).train()
    first, second = model.block(x)
    assert torch.equal(first, x)
    assert torch.equal(second, torch.zeros_like(x))
    sd.branches(model)[0].p = 0.0
    first, second = model.block(x)
    assert torch.equal(first, x + model.block.f(x))
    assert torch.equal(second, model.block.f(x) * 2.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_value_that_a_block_returns_in_training_alone_is_an_error(mode: str) -> None:
    class Returning(Letting):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> object:
            h = self.f(x)
            out = x + self.g(h)
            return (out, h) if self.masked else out

    block = Returning(lambda block, h: None).double()
    sd.apply(block, 1.0, mode=mode, example_inputs=data())
    block.train().masked = True
    with pytest.raises(RuntimeError, match="returns one of its values from its block"):
        block(data())

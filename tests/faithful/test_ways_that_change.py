"""A call that goes another way than when it was watched drops what it should, or says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd

from .twins import MODES, Output, data, net


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Fused(Block):
    """Takes another way to its sum where it is told to."""

    def __init__(self, fused: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused(self):
            return x + linear(x, self.f.weight, self.f.bias)
        return super().forward(x)


class Direct(nn.Module):
    """Calls the forward of its block in training, as for checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return checkpoint(self.block.forward, x, use_reentrant=False)
        return self.block(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_sum_that_training_does_not_meet_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="in training the model computes it and does not come to"):
        sd.apply(net(Direct), 0.5, mode=mode, example_inputs=data())


@pytest.mark.parametrize("mode", MODES)
def test_a_way_without_the_branch_is_told_once(mode: str) -> None:
    model = net(lambda: Fused(lambda b: getattr(b, "now", False)))
    sd.apply(model, 1.0, mode=mode, example_inputs=data())
    assert torch.equal(model(data()), data())
    model.now = True
    with pytest.warns(UserWarning, match="f was not called in a call of its block"):
        model(data())
    model(data())  # in tests, another warning is an error


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.output = nn.Linear(4, 4), Output()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.g(x), x)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def calls(model: nn.Module, *inputs: Any) -> None:
    for _ in range(20):
        model(*inputs)


@pytest.mark.filterwarnings("ignore:stochastic depth. Wide calls output.inner")
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_a_branch_that_does_not_come_to_its_sum_is_an_error(mode: str) -> None:
    model = sd.apply(net(Wide), 0.5, mode=mode, seed=0, example_inputs=data())
    model.output = Wrapper(model.output)
    with pytest.raises(RuntimeError, match=r"does not come to the sum|reaches another sum"):
        calls(model, data())


class Norms(nn.Module):
    """Which module is the last of the branch depends on a number."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.norms = nn.Linear(4, 4), nn.ModuleList(nn.LayerNorm(4) for _ in range(2))

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return x + self.norms[domain](self.f(x))


@pytest.mark.filterwarnings("ignore:stochastic depth. Norms calls norms.1")
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_another_last_call_of_a_branch_is_weighed_or_an_error(mode: str) -> None:
    model = sd.apply(net(Norms), 0.5, mode=mode, seed=0, example_inputs=(data(), 0))
    (branch,) = sd.branches(model)
    expected = data() + 2.0 * model.norms[1](model.f(data()))
    for _ in range(20):
        before = branch.dropped
        try:
            result = model(data(), 1)
        except RuntimeError as error:
            assert "sum" in str(error)  # noqa: PT017
            return
        assert mode == "batch"
        torch.testing.assert_close(result, data() if branch.dropped > before else expected)


class Readout(nn.Module):
    """A loop whose length is a number, and one more call of its module after it."""

    def __init__(self, readout: bool) -> None:
        super().__init__()
        self.f, self.readout = nn.Linear(4, 4), readout

    def forward(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = x + self.f(x)
        return self.f(x) if self.readout else x


def test_calls_that_may_belong_elsewhere_are_an_error() -> None:
    model = sd.apply(net(lambda: Readout(True)), 0.5, example_inputs=(data(), 3))
    with pytest.raises(RuntimeError, match="more often than when it was watched"):
        calls(model, data(), 5)


def test_more_turns_of_a_loop_are_dropped_with_the_last_and_told_once() -> None:
    model = sd.apply(
        net(lambda: Readout(False)), 1.0, schedule="uniform", example_inputs=(data(), 2)
    )
    with pytest.warns(UserWarning, match="the further calls are dropped when the last one is"):
        assert torch.equal(model(data(), 5), data())
    assert torch.equal(model(data(), 5), data())


class Late(nn.Module):
    """Has a branch that only some calls run."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.on = nn.Linear(4, 4), nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x) if self.on else x


@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_was_not_watched_is_told_once(mode: str) -> None:
    model = sd.apply(net(Late), 1.0, mode=mode, example_inputs=data())
    model.on = True
    with pytest.warns(UserWarning, match="Late calls g, which it did not when it was watched"):
        assert torch.equal(model(data()), data() + model.g(data()))
    model(data())


@pytest.mark.parametrize("mode", MODES)
def test_a_block_with_hooks_that_is_called_in_its_own_call_decides_anew(mode: str) -> None:
    model, inner = net(Block), []
    sd.apply(model, 0.5, schedule="uniform", mode=mode, seed=0, example_inputs=data())
    (branch,) = sd.branches(model)

    def again(module: nn.Module, args: Any, output: Tensor) -> None:
        if not inner:
            inner.append(None)
            inner[0] = module(data(3, 4))

    model.register_forward_hook(again)
    kept = []
    for _ in range(60):
        inner.clear()
        out = model(data())
        kept.append((not torch.equal(out, data()), not torch.equal(inner[0], data(3, 4))))
    decisions = 2 * 60 if mode == "batch" else (6 + 3) * 60
    assert branch.decided == decisions
    if mode == "batch":
        assert {a for a, _ in kept} == {b for _, b in kept} == {True, False}
        assert any(a != b for a, b in kept)  # chance that independent coins never differ: 2 ** -60


class Chunked(nn.Module):
    """One branch, computed in as many parts as its input needs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat([self.f(part) for part in self.norm(x).split(2, 1)], 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_branch_may_have_more_parts_than_were_watched(mode: str) -> None:
    model = sd.apply(net(Chunked), 0.5, mode=mode, seed=0, example_inputs=data(6, 4, 4))
    (branch,) = sd.branches(model)
    x, kept = data(6, 10, 4), 0
    whole = x + 2.0 * model.f(model.norm(x))
    for _ in range(20):
        before = branch.dropped
        rows = list(zip(model(x), x, whole, strict=True))
        alike = [torch.allclose(row, both) for row, _, both in rows]
        assert all(
            a or torch.equal(row, plain) for a, (row, plain, _) in zip(alike, rows, strict=True)
        )
        dropped = branch.dropped - before
        assert alike.count(False) == (6 * dropped if mode == "batch" else dropped)
        kept += alike.count(True)
    assert 0 < kept < 120


class Bypassed(Block):
    """Computes its branch also where it is not added."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return x if getattr(self, "off", False) else x + h


@pytest.mark.parametrize("mode", MODES)
def test_a_branch_that_is_computed_for_nothing_is_told(mode: str) -> None:
    model = sd.apply(net(Bypassed), 0.5, mode=mode, seed=0, example_inputs=data())
    model.off = True
    with pytest.warns(UserWarning, match="does not come to the sum that was found"):
        calls(model, data())
    assert torch.equal(model(data()), data())

"""A block that is called otherwise than when it was watched drops the same branches, or tells."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd

WIDTH = 4


class Layers(nn.Module):
    """Several branches, which are added at one expression."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.shared = shared

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        first = None
        for layer in self.layers:
            h = layer(x)
            first = h if first is None else first
            if mask is not None:
                h = h * mask
            x = x + h
        return x * first.sigmoid() if self.shared and mask is None else x


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.block(x, *rest)


def ran_in(model: nn.Module, modules: list[nn.Module], *inputs: Any) -> list[int]:
    """The numbers of those of the modules that a step of training calls."""
    model.train()
    model(*inputs)  # a new form is watched, and runs
    ran: list[int] = []
    handles = [
        m.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(modules)
    ]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        ({"exclude": "block:layers.0"}, [0]),
        ({"include": "block:layers.2"}, [0, 1]),
        ({"include": "block:layers.0"}, [1, 2]),
    ],
)
def test_what_was_not_chosen_is_not_dropped_there_either(choice: Any, left: list[int]) -> None:
    x, model = torch.randn(4, WIDTH), Model(Layers())
    sd.apply(model, 1.0, schedule="uniform", example_inputs=x, **choice)
    assert ran_in(model, [*model.block.layers], x) == left
    assert ran_in(model, [*model.block.layers], x, torch.ones(4, 1)) == left


def test_what_was_refused_is_not_taken_for_another() -> None:
    x, model = torch.randn(4, WIDTH), Model(Layers(shared=True))
    sd.apply(model, 1.0, schedule="uniform", example_inputs=x)
    assert [branch.name for branch in sd.branches(model)] == ["block:layers.1", "block:layers.2"]
    first, second = sd.branches(model)
    first.p, second.p = 0.0, 1.0
    assert ran_in(model, [*model.block.layers], x, torch.ones(4, 1))[-1] == 1
    assert (first.dropped, second.dropped) == (0, second.decided)


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        return x + (self.g(x) if task else self.f(x))


def test_a_call_that_goes_another_way_is_told_once() -> None:
    x = torch.randn(4, WIDTH)
    model = sd.apply(Model(Either()), 1.0, example_inputs=(x, 0))
    with pytest.warns(UserWarning, match="Either calls g, which it did not"):
        assert ran_in(model, [model.block.f, model.block.g], x, 1) == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, 1)
        assert torch.equal(model(x, 0), x)


class Forces(nn.Module):
    """Takes a gradient inside of its forward, which cannot be watched without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, force: Tensor | None = None) -> Tensor:
        h = self.f(x)
        if force is not None:
            h = h + torch.autograd.grad(self.f(x).sum(), force, create_graph=True)[0]
        return x + h


def test_a_call_that_cannot_be_watched_is_told() -> None:
    x = torch.randn(4, WIDTH, requires_grad=True)
    model = sd.apply(Model(Forces()), 1.0, example_inputs=x.detach())
    with pytest.warns(UserWarning, match="nothing is dropped where Forces is called in this way"):
        assert not torch.equal(model(x, x), x)


def test_a_first_call_that_fails_is_no_reason_not_to_drop_in_later_ones() -> None:
    x = torch.randn(4, WIDTH)
    model = sd.apply(Model(Layers()), 1.0, schedule="uniform", example_inputs=x)
    with pytest.warns(UserWarning, match="could not be watched"), pytest.raises(RuntimeError):
        model(x, torch.ones(4, 3))
    assert torch.equal(model(x, torch.ones(4, 1)), x)


class Packed(nn.Module):
    """Averages over each sequence; without padding, all are in one, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        h = self.f(x)
        if lengths is None:
            return x + h.mean(1, keepdim=True)
        each = [part.mean(0, keepdim=True).expand_as(part) for part in h.split(lengths)]
        return x + torch.cat(each)


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_samples_that_are_elsewhere_are_not_taken_for_rows(mode: Any) -> None:
    model, x = Model(Packed()), torch.randn(5, WIDTH)
    sd.apply(model, 0.5, mode=mode, example_inputs=torch.randn(3, 2, WIDTH))
    with pytest.warns(UserWarning, match=r"block:f is dropped for the whole batch from now on"):
        model(x, [2, 3])
    outcomes = set()
    for _ in range(20):
        kept = (model(x, [2, 3]) != x).all(1)
        outcomes.add(tuple(kept.tolist()))
    assert outcomes == {(False,) * 5, (True,) * 5}


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_was_decided_by_samples_before_is_not_repeated_for_the_whole_batch(
    reentrant: bool,
) -> None:
    model = Model(Packed())
    sd.apply(model, 0.5, mode="row", example_inputs=torch.randn(3, 2, WIDTH))
    x = torch.randn(8, 2, WIDTH, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.warns(UserWarning, match="for the whole batch from now on"):
        model(torch.randn(5, WIDTH), [2, 3])
    with pytest.raises(RuntimeError, match="a call in a new form showed that samples cannot be"):
        y.sum().backward()


def test_the_rows_of_a_nested_tensor_are_not_selected() -> None:
    model = sd.apply(Model(Layers()), 0.5, mode="row", example_inputs=torch.randn(3, 2, WIDTH))
    parts = [torch.randn(n, WIDTH) for n in (2, 5)]
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    with pytest.warns(UserWarning, match="for the whole batch from now on"):
        out = model(x)
    assert [len(part) for part in out.unbind()] == [2, 5]

"""Stochastic depth that a model has already, recognised by what it does."""

import random
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn

from find import small
from find.small import WIDTH
from stochastic_depth.find import find
from stochastic_depth.find.plan import Findings


class Layer(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.f, self.drop = small.linear(), drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.f(x))


def look(model: nn.Module) -> Findings:
    return find(model, (torch.randn(3, WIDTH),), {}, samples=None)


def own(drop: Callable[[Tensor], Tensor]) -> nn.Module:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return drop(x) if self.training else x

    return Own()


DROPS = {
    "torch": lambda x: x * (torch.rand(len(x), 1) > 0.5) / 0.5,
    "bernoulli": lambda x: x.div(0.5) * x.new_empty(len(x), 1).bernoulli_(0.5),
    "batch": lambda x: x * torch.bernoulli(torch.tensor(0.5)),
    "numpy": lambda x: x * torch.tensor(numpy.random.rand(len(x), 1) > 0.5),  # noqa: NPY002
    "python": lambda x: x * 0 if random.random() < 0.5 else x,
    "a number of Python's": lambda x: x * torch.tensor(float(random.random() < 0.5)),
    "floor": lambda x: x * torch.floor(0.5 + torch.rand(len(x), 1)),
}


@pytest.mark.parametrize("name", DROPS)
def test_a_module_that_drops_samples_whatever_its_name(name: str) -> None:
    (branch,) = look(Layer(own(DROPS[name]))).branches
    assert branch.existing == ("drop",)
    found = look(nn.Sequential(Layer(own(DROPS[name]))))
    ((plan,),) = (plans.values() for plans in found.plans.values())
    assert plan.gates["drop"][0].drops
    assert not plan.gates["drop"][0].last
    assert plan.gates["f"][0].last


@pytest.mark.parametrize(
    "drop",
    [
        nn.Dropout(0.5),
        nn.Dropout1d(0.5),
        own(lambda x: x * 1.5),
        own(lambda x: x / torch.sqrt(torch.tensor(2.0))),  # DeBERTa's attention
    ],
)
def test_others_do_not(drop: nn.Module) -> None:
    (branch,) = look(Layer(drop)).branches
    assert branch.existing == ()


def test_a_rate_of_zero_goes_by_its_name() -> None:
    class DropPath(nn.Module):
        drop_prob = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return x

    assert look(Layer(DropPath())).branches[0].existing == ("drop",)


def test_a_function_in_the_forward_is_told_with_its_line() -> None:
    def drop_connect(x: Tensor, training: bool) -> Tensor:
        return x / 0.5 * torch.floor(0.5 + torch.rand(len(x), 1)) if training else x

    class Connected(small.Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + drop_connect(self.f(x), self.training)

    found = look(nn.Sequential(Connected(), small.Block()))
    assert [b.name for b in found.branches] == ["1:f"]
    assert "drops it by itself, in" in found.refused[0].reason
    assert "drop_connect" in found.refused[0].reason


def test_a_coin_that_leaves_layers_out_is_told() -> None:
    class LayerDrop(nn.Module):
        def __init__(self, coin: Callable[[], object]) -> None:
            super().__init__()
            self.layers, self.coin = nn.ModuleList([small.Block(), small.Block()]), coin

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if not self.training or not self.coin():
                    x = layer(x)
            return x

    for coin in (lambda: torch.rand([]) < 0.5, lambda: random.random() < 0.5):
        found = look(nn.Sequential(LayerDrop(coin)))
        assert [b.name for b in found.branches] == ["0.layers.0:f", "0.layers.1:f"]
        assert [(u.name, "goes on dropping" in u.reason) for u in found.unused] == [("0", True)]

"""What a forward reads is read in each step, and what it runs is what stands there then."""

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

from .twins import MODES, assert_same, assert_weighed, data, net, outcome, twins

# A child that came later may be reported as not dropped; what counts here are the results.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

GLOBAL = {"alpha": 1.0}


class Reading(nn.Module):
    """Weighs its branch by a value that it reads somewhere."""

    alpha = 1.0

    def __init__(self, read: Callable[[nn.Module], float]) -> None:
        super().__init__()
        self.f, self.g, self.read = nn.Linear(4, 4), nn.Linear(4, 4), read
        self.config = SimpleNamespace(inner=SimpleNamespace(alpha=1.0))
        self.pair, self.numbers, self.table = (0.0, 1.0), [0.0, 1.0], {"alpha": 1.0}
        self.drop, self.norm = nn.Dropout(0.0), nn.BatchNorm1d(4)
        self.register_buffer("gain", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.read(self) * self.f(x)


class Choosing(Reading):
    """Runs another branch where the value is above 1."""

    def forward(self, x: Tensor) -> Tensor:
        if self.read(self) > 1:
            return x + self.g(x)
        return x + self.f(x)


def set_item(container: object, key: object, value: object) -> None:
    container[key] = value  # type: ignore[index]


PLACES: dict[str, tuple[Callable, Callable]] = {
    "config object": (
        lambda b: b.config.inner.alpha,
        lambda b, v: setattr(b.config.inner, "alpha", v),
    ),
    "another config object": (
        lambda b: b.config.inner.alpha,
        lambda b, v: setattr(b.config, "inner", SimpleNamespace(alpha=v)),
    ),
    "tuple": (lambda b: b.pair[1], lambda b, v: setattr(b, "pair", (0.0, v))),
    "list": (lambda b: b.numbers[1], lambda b, v: set_item(b.numbers, 1, v)),
    "dict": (lambda b: b.table["alpha"], lambda b, v: set_item(b.table, "alpha", v)),
    "class attribute": (lambda b: type(b).alpha, lambda b, v: setattr(type(b), "alpha", v)),
    "global": (lambda b: GLOBAL["alpha"], lambda b, v: set_item(GLOBAL, "alpha", v)),
    "attribute of a child": (lambda b: b.drop.p, lambda b, v: setattr(b.drop, "p", v)),
    "attribute of a branch's child": (
        lambda b: getattr(b.f, "alpha", 1.0),
        lambda b, v: setattr(b.f, "alpha", v),
    ),
    "training flag of a child": (
        lambda b: 1.0 + b.norm.training,
        lambda b, v: b.norm.train(v > 1),
    ),
    "dtype": (
        lambda b: 0.5 if b.kind is torch.float32 else 1.5,
        lambda b, v: setattr(b, "kind", torch.float32 if v > 1 else torch.float64),
    ),
    "buffer": (lambda b: b.gain.item(), lambda b, v: b.gain.fill_(v)),
    "environment variable": (
        lambda b: float(os.environ.get("TESTED_ALPHA", "1")),
        lambda b, v: os.environ.__setitem__("TESTED_ALPHA", str(v)),
    ),
    "number of attributes": (
        lambda b: 1.0 + hasattr(b, "extra"),
        lambda b, v: setattr(b, "extra", v) if v > 1 else b.__dict__.pop("extra", None),
    ),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GLOBAL, "alpha", 1.0)
    monkeypatch.setattr(Reading, "alpha", 1.0)
    monkeypatch.setattr(Reading, "kind", torch.float64, raising=False)
    monkeypatch.setenv("TESTED_ALPHA", "1.0")


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [Reading, Choosing])
@pytest.mark.parametrize("place", PLACES)
def test_a_value_is_read_anew_in_each_step(
    place: str, block: type[nn.Module], mode: str, given: bool
) -> None:
    read, write = PLACES[place]
    ours, plain = twins(net(block, read), data(), mode=mode, given=given)
    results = []
    for value in (1.0, 2.5, 0.0, 2.5):
        for model in (ours, plain):
            write(model, value)
        results.append(assert_same(ours, plain, data())["result 0"])
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["config object", "class attribute", "attribute of a child"])
def test_a_value_that_changes_is_weighed_and_dropped_as_it_is(place: str, mode: str) -> None:
    read, write = PLACES[place]
    ours, plain = twins(net(Reading, read), data(), mode=mode, p=0.5)
    for value in (1.0, 3.0):
        for model in (ours, plain):
            write(model, value)
        assert_weighed(ours, plain, data())


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.act: nn.Module = nn.ReLU()
        self.gamma: Tensor | None = None

    def helper(self, x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = self.act(layer(x))
            if self.gamma is not None:
                h = self.gamma * h
            x = x + self.helper(h)
        return x


def new_forward(self: nn.Module, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = x - 0.5 * layer(x).tanh()
    return x


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a layer is appended": lambda m: m.layers.append(net(nn.Linear, 4, 4, seed=3)),
    "a layer is inserted": lambda m: m.layers.insert(0, net(nn.Linear, 4, 4, seed=3)),
    "a layer is taken out": lambda m: m.layers.pop(1),
    "the layers change places": lambda m: m.layers.append(m.layers.pop(0)),
    "the list is another": lambda m: setattr(
        m, "layers", nn.ModuleList([net(nn.Linear, 4, 4, seed=3)])
    ),
    "a layer is replaced": lambda m: set_item(m.layers, 1, net(nn.Linear, 4, 4, seed=3)),
    "a layer becomes two": lambda m: set_item(
        m.layers, 1, nn.Sequential(m.layers[1], net(nn.Linear, 4, 4, seed=3))
    ),
    "the activation is replaced": lambda m: setattr(m, "act", nn.Tanh()),
    "the activation becomes a function": lambda m: (
        delattr(m, "act"),
        setattr(m, "act", torch.sin),
    ),
    "a parameter comes": lambda m: setattr(
        m, "gamma", nn.Parameter(torch.linspace(0, 3, 4, dtype=torch.float64))
    ),
    "a helper is replaced": lambda m: setattr(m, "helper", lambda x: -x),
    "a helper of the class is replaced": lambda m: setattr(type(m), "helper", lambda self, x: -x),
    "the forward of the class is replaced": lambda m: setattr(type(m), "forward", new_forward),
    "the class is another": lambda m: setattr(
        m, "__class__", type("Other", (type(m),), {"forward": new_forward})
    ),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_after_a_step_runs_in_the_next(change: str, mode: str, given: bool) -> None:
    kind = type("Changed", (Growing,), {})  # a class of its own, which may be patched
    ours, plain = twins(net(kind), data(), mode=mode, given=given)
    first = assert_same(ours, plain, data())["result 0"]
    for model in (ours, plain):
        CHANGES[change](model)
    second = assert_same(ours, plain, data())["result 0"]
    assert not torch.allclose(first, second)
    assert torch.equal(ours.eval()(data()), plain.eval()(data()))
    ours.train()
    plain.train()
    assert_same(ours, plain, data(seed=2))


def test_a_module_that_the_forward_reaches_past_its_own_may_change() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.act = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.act[1](self.f(x))

    ours, plain = twins(net(Outer), data())
    assert_same(ours, plain, data())
    for model in (ours, plain):
        model.act[1] = nn.Tanh()
    assert_same(ours, plain, data())


@pytest.mark.parametrize("mode", MODES)
def test_a_new_size_runs_as_in_the_plain_model(mode: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, 2).permute(2, 0, 3, 1, 4)
            mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
            scores = (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1)
            return x + self.out((scores @ v).transpose(1, 2).reshape(b, t, -1))

    ours, plain = twins(net(Attention), data(3, 5, 4), mode=mode)
    for b, t in [(3, 5), (2, 7), (5, 3), (1, 1), (3, 9), (2, 7)]:
        assert_same(ours, plain, data(b, t, 4))
    (branch,) = sd.branches(ours)
    branch.p = 0.5
    for b, t in [(6, 4), (5, 5)]:
        assert_weighed(ours, plain, data(b, t, 4))


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_that_asks_for_the_batch_size_decides_by_that_of_the_batch(mode: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            f = self.small if len(x) < 4 else self.large
            return x + f(x) / len(x)

    ours, plain = twins(net(Block), data(3, 4), mode=mode)
    for rows in (3, 6, 2, 5):
        assert_same(ours, plain, data(rows, 4))


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_that_looks_at_its_values_decides_by_those_of_the_batch(mode: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.mean() > 0:
                return x + self.f(x)
            return x + self.g(x).relu()

    ours, plain = twins(net(Block), data().abs(), mode=mode)
    for x in (data().abs(), -data().abs(), data().abs()):
        mine = assert_same(ours, plain, x)
        used, unused = ("f", "g") if x.mean() > 0 else ("g", "f")
        assert mine[f"gradient of {used}.weight"].any()
        assert not mine[f"gradient of {unused}.weight"].any()


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_are_frozen_later_get_no_gradient(mode: str) -> None:
    ours, plain = twins(net(Growing), data(), mode=mode)
    assert_same(ours, plain, data())
    for model in (ours, plain):
        model.layers[1].requires_grad_(False)
        model.zero_grad()
    assert_same(ours, plain, data())
    assert ours.layers[1].weight.grad is None
    assert outcome(ours, data())["gradient of layers.0.weight"].any()

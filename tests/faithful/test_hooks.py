"""Hooks of a block and of its children run where they would, with what they would see."""

import functools
import weakref
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

from .twins import KEPT, MODES, Output, assert_same, assert_weighed, data, feed, net, outcome, twins


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.act, self.g = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)

    def forward(self, x: Tensor, *, extra: float = 1.0) -> Tensor:
        return x + self.g(self.act(self.f(x))) * extra


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.output = nn.Linear(4, 4), Output()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.f(x), x)


class Log(list[tuple[str, str, list[Tensor | None]]]):
    is_open = True


def observe(model: nn.Module) -> Log:
    """Everything that hooks of any kind on all modules get to see."""
    log = Log()

    def note(kind: str, name: str, *values: Any) -> None:
        if not log.is_open:  # a value that is kept would count as read elsewhere
            return
        flat: list[Any] = []
        for value in values:
            flat += value if isinstance(value, tuple) else [value]
        for value in flat:
            assert value is None or type(value) is Tensor
        log.append((kind, name, [None if x is None else x.detach().clone() for x in flat]))

    for name, module in model.named_modules():

        def before(_: Any, args: Any, name: str = name) -> None:
            note("before", name, args)

        def after(_: Any, args: Any, output: Any, name: str = name) -> None:
            note("after", name, args, output)

        def backward_before(_: Any, gradient: Any, name: str = name) -> None:
            note("backward, before", name, gradient)

        def backward(_: Any, inputs: Any, outputs: Any, name: str = name) -> None:
            note("backward", name, inputs, outputs)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        module.register_full_backward_pre_hook(backward_before)
        module.register_full_backward_hook(backward)
    return log


@pytest.mark.parametrize("first", ["apply", "hooks"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Block, Layer])
def test_all_hooks_see_what_they_see_in_the_plain_model(
    kind: type[nn.Module], mode: str, first: str
) -> None:
    model, plain = net(kind), net(kind)
    theirs = observe(plain)
    if first == "hooks":
        mine = observe(model)
        mine.is_open = False
        sd.apply(model, 1e-30, mode=mode, seed=0, example_inputs=data())
        mine.is_open = True
    else:
        sd.apply(model, 1e-30, mode=mode, seed=0, example_inputs=data())
        mine = observe(model)
    assert sd.branches(model)
    mine.clear()
    assert_same(model, plain, data())
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in theirs]
    assert len(mine) == 4 * len(list(model.modules()))
    for (*where, ours), (*_, others) in zip(mine, theirs, strict=True):
        for a, b in zip(ours, others, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-11, atol=1e-11, msg=lambda t, w=where: f"{w} {t}"
            )


def test_hooks_of_a_dropped_branch_do_not_run_but_those_of_its_block_do() -> None:
    model, _ = twins(net(Block), data(), p=1.0)
    log = observe(model)
    x = data().requires_grad_()
    model(feed(x)).square().sum().backward()
    assert [entry[:2] for entry in log] == [
        ("before", ""),
        ("after", ""),
        ("backward, before", ""),
        ("backward", ""),
    ]
    torch.testing.assert_close(log[1][2][1], data())
    torch.testing.assert_close(x.grad, 2 * data())


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "a hook changes what a child returns": lambda m: m.f.register_forward_hook(
        lambda _, args, output: output * 2
    ),
    "a hook changes what the last child returns": lambda m: m.g.register_forward_hook(
        lambda _, args, output: output.sin()
    ),
    "a hook changes what a child gets": lambda m: m.g.register_forward_pre_hook(
        lambda _, args: (args[0] + 1,)
    ),
    "a hook takes keywords": lambda m: m.g.register_forward_hook(
        lambda _, args, kwargs, output: output - args[0], with_kwargs=True
    ),
    "a hook changes gradients": lambda m: m.g.register_full_backward_hook(
        lambda _, inputs, outputs: (inputs[0] * 3,)
    ),
    "a hook runs also after errors": lambda m: m.g.register_forward_hook(
        lambda _, args, output: output * 2, always_call=True
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_changes_something_is_heeded(hook: str, mode: str) -> None:
    ours, plain = twins(net(Block), data(), mode=mode)
    unhooked = outcome(plain, data())
    for model in (ours, plain):
        HOOKS[hook](model)
    hooked = assert_same(ours, plain, data())
    key = "gradient of f.weight"
    assert not torch.allclose(hooked[key], unhooked[key])
    sd.branches(ours)[0].p = 0.5
    assert_weighed(ours, plain, data())


def test_a_hook_of_the_block_gets_ordinary_children() -> None:
    ours, plain = twins(net(Block), data(), p=1.0)
    seen = []

    def look(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(module.f(args[0]).detach())
        return output * 2

    ours.register_forward_hook(look)
    ours.register_forward_pre_hook(lambda module, args: seen.append(module.g(args[0]).detach()))
    torch.testing.assert_close(ours(data()), 2 * data())
    torch.testing.assert_close(seen, [plain.g(data()), plain.f(data())])


def test_global_hooks_see_ordinary_tensors() -> None:
    ours, _ = twins(net(Block), data(), p=0.5)
    seen: list[str] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        assert all(type(x) is Tensor for x in (*args, output))
        seen.append(type(module).__name__)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        for step in range(12):
            outcome(ours, data(), seed=step)
    finally:
        handle.remove()
    (branch,) = sd.branches(ours)
    assert 0 < branch.dropped < 12
    assert seen.count("Block") == 12
    assert seen.count("Linear") == 2 * (12 - branch.dropped)


def test_keywords_of_a_call_reach_the_forward() -> None:
    ours, plain = twins(net(Block), data(), p=1e-30)
    for extra in (2.0, 0.0):
        torch.testing.assert_close(ours(data(), extra=extra), plain(data(), extra=extra))
    assert not torch.equal(plain(data(), extra=2.0), plain(data(), extra=0.0))


# --- what hooks collect in the step in which a block is watched

GLOBAL: dict[str, list[Tensor]] = {"features": []}
COLLECTED: ContextVar[dict[str, list[Tensor]] | None] = ContextVar("collected", default=None)


class Masking(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.g(self.act(self.f(x)))
        return x + (h if mask is None else h * mask)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Masking() for _ in range(3)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


class Collector:
    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.calls = 0

    def collect(self, *call: Any) -> None:
        self.calls += 1
        self.features.append(call[2])

    def __call__(self, *call: Any) -> None:
        self.collect(*call)


def closing_over() -> tuple[Any, list[Tensor]]:
    features: list[Tensor] = []
    return lambda module, args, out: features.append(out), features


def bound() -> tuple[Any, list[Tensor]]:
    collector = Collector()
    return collector.collect, collector.features


def an_object() -> tuple[Any, list[Tensor]]:
    collector = Collector()
    return collector, collector.features


def of_the_module() -> tuple[Any, list[Tensor]]:
    GLOBAL["features"] = []
    return lambda module, args, out: GLOBAL["features"].append(out), GLOBAL["features"]


def partly_given() -> tuple[Any, list[Tensor]]:
    features: list[Tensor] = []
    return functools.partial(lambda to, module, args, out: to.append(out), features), features


def of_the_context() -> tuple[Any, list[Tensor]]:
    COLLECTED.set({"features": []})
    return lambda module, args, out: COLLECTED.get()["features"].append(out), COLLECTED.get()[
        "features"
    ]


@pytest.mark.filterwarnings("ignore:.*too little of its inputs:UserWarning")
@pytest.mark.parametrize("when", ["apply", "first batch", "new form"])
@pytest.mark.parametrize(
    "make", [closing_over, bound, an_object, of_the_module, partly_given, of_the_context]
)
def test_hooks_collect_each_call_once(make: Callable, when: str) -> None:
    model, x = net(Stack), data()
    hook, features = make()
    model.blocks[1].register_forward_hook(hook)
    sd.apply(model, 0.5, example_inputs=None if when == "first batch" else x)
    assert features == []
    inputs = (x, torch.ones(6, 1).double()) if when == "new form" else (x,)
    for step in range(2):
        model(*inputs)
        assert len(features) == step + 1
        assert all(feature.grad_fn is not None for feature in features)
    COLLECTED.set(None)


class Gone:
    pass


class Shy:
    """Does not like to be looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("outside of its context")


class Fixed(dict[str, Any]):
    """Cannot be changed as a whole."""

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("update is not supported")


gone = Gone()
PROXY = weakref.proxy(gone)
del gone
SHY, FIXED, QUEUE = Shy(), Fixed(a=1), deque([1, 2])


def names_odd_objects(module: nn.Module, args: Any, out: Any) -> None:
    if out is None:
        print(PROXY, SHY, FIXED)
    QUEUE.append(len(FIXED))


def test_a_hook_may_name_what_it_likes() -> None:
    model = net(Stack)
    model.blocks[1].register_forward_hook(names_odd_objects)
    sd.apply(model, 0.5, example_inputs=data())
    assert len(sd.branches(model)) == 3
    assert len(QUEUE) > 2  # another thread may work with it, so it is let alone


COUNTED = 0


def test_a_hook_counts_no_run_that_is_only_watched() -> None:
    total, array, seen = torch.zeros(()), np.zeros(1), 0

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        global COUNTED
        nonlocal seen
        total.add_(1.0)
        array[0] += 1
        COUNTED += 1
        seen += 1

    model, everywhere = nn.Sequential(net(Block), net(Block)), []
    model[0].register_forward_hook(count)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: everywhere.append(output) if module is model[0] else None
    )
    try:
        sd.apply(model, KEPT, example_inputs=data())
        assert (total.item(), array[0], COUNTED, seen, len(everywhere)) == (0, 0, 0, 0, 0)
        model(data())
        assert (total.item(), array[0], COUNTED, seen, len(everywhere)) == (1, 1, 1, 1, 1)
    finally:
        handle.remove()


def test_a_full_backward_hook_that_would_not_see_a_branch_is_an_error() -> None:
    model = sd.apply(net(Wide), 0.5, seed=0, example_inputs=data())
    model.output.register_full_backward_hook(lambda module, of_input, of_output: None)
    with pytest.raises(RuntimeError, match="a module with a full backward hook; register that on"):
        for_long(model, data().requires_grad_())


class Sum(nn.Module):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return x + h


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.output = nn.Linear(4, 4), Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(x, self.f(x))


def for_long(model: nn.Module, x: Tensor) -> None:
    for _ in range(20):
        model(x)


def test_a_hook_may_read_what_cannot_be_written() -> None:
    known = np.ones(4)
    known.flags.writeable = False
    model, seen = net(Block), []
    model.register_forward_hook(lambda module, args, output: seen.append(float(known.sum())))
    sd.apply(model, KEPT, example_inputs=data())
    model(data())
    assert seen == [4.0]

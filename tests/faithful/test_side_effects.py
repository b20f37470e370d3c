"""What a forward does besides computing is done in each step, and only there."""

import random
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

from .twins import (
    MODES,
    assert_same,
    assert_weighed,
    data,
    net,
    outcome,
    run_often,
    seed_all,
    twins,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # a branch may be left in place


class Residual(nn.Module):
    """Ordinary, so that there is always a branch to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Styled(nn.Linear):
    style: Any = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.style


class Acting(nn.Module):
    """A residual block that does something else in each call."""

    def __init__(self, act: Callable[["Acting", Tensor, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.f, self.child, self.act = nn.Linear(4, 4), Styled(4, 4), act
        self.log: list[Any] = []
        self.counts: dict[str, int] = {}
        self.calls, self.last = 0, None
        self.register_buffer("memory", torch.zeros(3, 4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        changed = self.act(self, x, h)
        return x + self.child(h if changed is None else changed)


class Net(nn.Module):
    def __init__(self, act: Callable) -> None:
        super().__init__()
        self.first, self.acting = Residual(), Acting(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.acting(self.first(x))


def count(block: Acting, x: Tensor, h: Tensor) -> None:
    block.counts["calls"] = block.counts.get("calls", 0) + 1


def append(block: Acting, x: Tensor, h: Tensor) -> None:
    block.log.append(h)


def set_child(block: Acting, x: Tensor, h: Tensor) -> None:
    block.child.style = x.mean(1, keepdim=True)


def set_self(block: Acting, x: Tensor, h: Tensor) -> None:
    block.calls += 1
    block.last = h.detach()


def alternate(block: Acting, x: Tensor, h: Tensor) -> Tensor:
    block.calls += 1
    return h if block.calls % 2 else -h


def write(block: Acting, x: Tensor, h: Tensor) -> None:
    with torch.no_grad():
        block.memory[int(block.seen) % 3] = x.mean(0)
        block.seen += 1


def remember(block: Acting, x: Tensor, h: Tensor) -> Tensor:
    with torch.no_grad():
        block.memory.mul_(0.9).add_(h.mean(0))
    return h - block.memory.mean(0)


def grow(block: Acting, x: Tensor, h: Tensor) -> Tensor:
    block.log.append(x.detach().mean(0))
    return h + torch.stack(block.log).sum(0)


EFFECTS = [count, append, set_child, set_self, alternate, write, remember, grow]


def trace(model: nn.Module) -> list[Any]:
    """What the block keeps, comparable with ==."""

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, Tensor) else value

    block = model.acting
    kept = [plain(x) for x in block.log], dict(block.counts), block.calls, plain(block.last)
    return [*kept, plain(block.memory), int(block.seen), plain(block.child.style)]


def kinds(model: nn.Module) -> set[type]:
    block = model.acting
    values = [*block.log, block.last, block.memory, block.child.style]
    return {type(x) for x in values if not isinstance(x, float | int | None)}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("effect", EFFECTS)
def test_side_effects_happen_once_a_step(effect: Callable, mode: str, given: bool) -> None:
    model = net(Net, effect)
    before = trace(model)
    ours, plain = twins(model, data(), mode=mode, given=given)
    assert trace(ours) == before
    for step in range(3):
        assert_same(ours, plain, data(seed=step))
        for mine, theirs in zip(trace(ours), trace(plain), strict=True):
            if isinstance(mine, list):
                mine, theirs = torch.tensor(mine), torch.tensor(theirs)
                torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
            else:
                assert mine == theirs
    assert kinds(ours) == kinds(plain) <= {Tensor}
    assert trace(ours) != before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("effect", EFFECTS)
def test_what_a_model_keeps_of_a_dropped_branch_is_a_tensor(effect: Callable, mode: str) -> None:
    ours, _ = twins(net(Net, effect), data(), mode=mode, p=0.7)
    for step in range(8):
        outcome(ours, data(seed=step), seed=step)
    assert kinds(ours) <= {Tensor}
    assert sum(branch.dropped for branch in sd.branches(ours)) > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_list_that_is_handed_down_is_filled(mode: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, before: list[Tensor], after: list[Tensor]) -> Tensor:
            before.append(x)
            x = x + self.g(self.f(x))
            after += [x]
            return x

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> dict[str, Any]:
            before: list[Tensor] = []
            after: list[Tensor] = []
            for block in self.blocks:
                x = block(x, before, after)
            return {"x": x, "before": before, "after": after}

    ours, plain = twins(net(Deep), data(), mode=mode)
    assert len(sd.branches(ours)) == 3
    assert_same(ours, plain, data())
    for branch in sd.branches(ours):
        branch.p = 1.0
    results = ours(data())
    assert len(results["before"]) == len(results["after"]) == 3
    for x in [results["x"], *results["before"], *results["after"]]:
        torch.testing.assert_close(x, data())


# --- what apply, summary and verify leave behind


class Fussy(nn.Module):
    """Counts and draws in all the ways there are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = Residual(), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.acting = Acting(append)
        self.generator = torch.Generator().manual_seed(3)
        self.random, self.numpy = random.Random(3), np.random.default_rng(3)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.acting.counts["calls"] = self.acting.counts.get("calls", 0) + 1
        noise = torch.rand(len(x), 1, generator=self.generator, dtype=x.dtype)
        scale = self.random.random() + self.numpy.random() + random.random()
        x = self.drop(self.norm(self.first(x))) * scale + noise * np.random.rand()  # noqa: NPY002
        if self.fails:
            raise KeyError("a fault of the model")
        return self.acting(x)


class WithoutSums(Fussy):
    def forward(self, x: Tensor) -> Tensor:
        return self.first.f(self.acting.f(super().forward(x) * 0))


def state(model: Fussy) -> list[Any]:
    tensors = [(k, v.tolist()) for k, v in model.state_dict().items()]
    kept = [list(model.acting.log), dict(model.acting.counts), model.acting.calls]
    drawn = model.generator.get_state().tolist(), model.random.getstate()
    drawn += str(model.numpy.bit_generator.state), random.getstate()
    drawn += str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    flags = [m.training for m in model.modules()], [p.grad for p in model.parameters()]
    return [tensors, kept, drawn, flags]


@pytest.mark.parametrize("training", [True, False])
def test_apply_summary_and_verify_leave_the_models_state_as_it_was(training: bool) -> None:
    model = net(Fussy).train(training)
    model.norm.eval()
    seed_all(7)
    before, log = state(model), model.acting.log
    sd.apply(model, 0.5, example_inputs=data())
    assert state(model) == before
    sd.summary(model, example_inputs=data())
    assert state(model) == before
    sd.verify(model, data())
    assert state(model) == before
    assert model.acting.log is log


def test_an_apply_that_fails_leaves_everything_as_it_was() -> None:
    model = net(Fussy)
    model.fails = True
    seed_all(7)
    before, contents = state(model), [dict(vars(m)) for m in model.modules()]
    with pytest.raises((KeyError, ValueError), match="a fault of the model"):
        sd.apply(model, 0.5, example_inputs=data())
    assert state(model) == before
    assert [dict(vars(m)) for m in model.modules()] == contents
    assert not sd.is_applied(model)


def test_an_apply_that_is_interrupted_leaves_everything_as_it_was() -> None:
    model = net(Fussy)
    interrupted = model.acting.child.register_forward_hook(interrupt)
    contents = [dict(vars(m)) for m in model.modules()]
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        sd.apply(model, 0.5, example_inputs=data())
    assert state(model) == before
    assert [dict(vars(m)) for m in model.modules()] == contents
    interrupted.remove()
    assert model(data()).shape == (6, 4)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_model_where_nothing_is_found_is_left_as_it_was() -> None:
    model = net(Fussy)
    with pytest.raises(ValueError, match="nowhere"):
        sd.apply(model, 0.5, example_inputs=data(), include="nowhere*")
    assert model.acting.log == []
    assert model.acting.counts == {}
    assert not sd.is_applied(model)


def test_weighing_and_dropping_leave_side_effects_alone() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.log = nn.Linear(4, 4), []

        def forward(self, x: Tensor) -> Tensor:
            self.log.append(x.detach().mean())
            return x + self.f(x)

    ours, plain = twins(net(Counted), data(), p=0.5)
    ours.log.clear()
    assert_weighed(ours, plain, data(), steps=12)
    assert ours.log == [data().mean()] * 12


class Momentum(nn.Module):
    """Writes to parameters that an optimizer does not see: by their data, in place, all at once."""

    def __init__(self, write: Callable[[list[nn.Parameter], list[nn.Parameter]], object]) -> None:
        super().__init__()
        self.fast, self.slow, self.write = Residual(), Residual(), write
        self.slow.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.write(list(self.slow.parameters()), list(self.fast.parameters()))
        return self.fast(x) * self.slow(x)


def by_data(slow: list[nn.Parameter], fast: list[nn.Parameter]) -> None:
    for a, b in zip(slow, fast, strict=True):
        a.data = 0.9 * a.data + 0.1 * b.data


def in_the_data(slow: list[nn.Parameter], fast: list[nn.Parameter]) -> None:
    for a, b in zip(slow, fast, strict=True):
        a.data.mul_(0.9).add_(b.data, alpha=0.1)


def in_place(slow: list[nn.Parameter], fast: list[nn.Parameter]) -> None:
    for a, b in zip(slow, fast, strict=True):
        a.lerp_(b, 0.1)


def at_once(slow: list[nn.Parameter], fast: list[nn.Parameter]) -> None:
    torch._foreach_lerp_(slow, fast, 0.1)


@pytest.mark.parametrize("write", [by_data, in_the_data, in_place, at_once])
def test_parameters_that_a_forward_writes_to_are_left_as_they_were(write: Callable) -> None:
    model = net(Momentum, write)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    memory = {name: p.data_ptr() for name, p in model.named_parameters()}
    sd.apply(model, 0.5, include="fast", example_inputs=data())
    sd.verify(model, data())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.data_ptr() == memory[name]
    model(data())
    assert not torch.equal(model.slow.f.weight, before["slow.f.weight"])


def test_parameters_that_are_views_of_one_memory_are_left_as_they_were() -> None:
    model = net(Momentum, in_place)
    flat = torch.cat([p.detach().flatten() for p in model.slow.parameters()])
    start = 0
    for p in model.slow.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    before = flat.clone()
    sd.apply(model, 0.5, include="fast", example_inputs=data())
    assert torch.equal(flat, before)


class Renormed(nn.Module):
    """Writes to its weights in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, max_norm=0.5)
        self.bag = nn.EmbeddingBag(6, 4, max_norm=0.5)
        self.first, self.second = Residual(), Residual()

    def forward(self, i: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.f.weight.clamp_(-0.1, 0.1)
        weight = self.second.f.weight
        weight.data = weight.data / weight.data.norm()
        return self.second(self.first(self.embedding(i) + self.bag(i)[:, None]))


@pytest.mark.parametrize("mode", MODES)
def test_parameters_that_evaluation_writes_to_are_left_as_they_were(mode: str) -> None:
    model = net(Renormed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sd.apply(model, 0.5, mode=mode, example_inputs=torch.arange(6).view(2, 3))
    sd.summary(model, torch.arange(6).view(2, 3))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


CALLS = 0
SEEN: list[Any] = []
GENERATOR, NUMPY = torch.Generator().manual_seed(1), np.random.default_rng(1)
VARIABLE = ContextVar("VARIABLE", default=0)


class Global(nn.Module):
    """Counts, collects and draws in what its class or its module has for all."""

    calls = 0
    seen: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        super().__init__()
        self.residual = Residual()
        self.old = np.random.RandomState(1)

    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        Global.calls += 1
        SEEN.append(x)
        self.seen.append(x)
        VARIABLE.set(VARIABLE.get() + 1)
        return self.noisy(x)

    def noisy(self, x: Tensor) -> Tensor:
        scale = NUMPY.random() + self.old.rand()
        return self.residual(x) + scale * torch.rand(len(x), 1, generator=GENERATOR, dtype=x.dtype)


class Derived(Global):
    pass


def test_apply_leaves_what_classes_and_modules_have_for_all_as_it_was() -> None:
    def state() -> list[Any]:
        drawn = (
            GENERATOR.get_state().tolist(),
            NUMPY.bit_generator.state,
            str(model.old.get_state()),
        )
        return [CALLS, len(SEEN), Global.calls, len(Global.seen), VARIABLE.get(), drawn]

    model = net(Derived)
    model(data())
    before = state()
    sd.apply(model, 0.5, example_inputs=data())
    assert state() == before
    model(data())
    assert CALLS == len(SEEN) == Global.calls == len(Global.seen) == VARIABLE.get() == 2


class Told(nn.Module):
    """Writes numbers into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(4), Telling(4, 4)

    def forward(self, x: Tensor, told: dict[str, Any]) -> Tensor:
        told["blocks"] += 1
        return x + self.f(self.norm(x), told)


class Telling(nn.Linear):
    def forward(self, x: Tensor, told: dict[str, Any]) -> Tensor:
        told["calls"].append(len(told["calls"]))
        return super().forward(x)


class Tellers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, Any] = {}
        self.blocks = nn.ModuleList(Told() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.told = {"blocks": 0, "calls": []}
        for block in self.blocks:
            x = block(x, self.told)
        return x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [None, "blocks.?"])
def test_numbers_are_written_into_what_a_call_is_given(mode: str, blocks: str | None) -> None:
    model = net(Tellers)
    sd.apply(model, 0.5, mode=mode, blocks=blocks, example_inputs=data(), seed=0)
    assert len(sd.branches(model)) == 3
    for _ in range(8):
        counts = [(b.decided, b.dropped) for b in sd.branches(model)]
        model(data())
        ran = 0
        for branch, (decided, dropped) in zip(sd.branches(model), counts, strict=True):
            ran += branch.dropped - dropped < branch.decided - decided
        assert model.told["calls"] == list(range(ran))
        assert model.told["blocks"] == (ran if blocks else 3)


class Differentiating(nn.Module):
    """Has a backward pass in its forward, and may freeze layers in evaluation."""

    def __init__(self, freezes: bool) -> None:
        super().__init__()
        self.first, self.second, self.freezes = Residual(), Residual(), freezes

    def forward(self, x: Tensor) -> Tensor:
        if self.freezes:
            self.second.requires_grad_(self.training)
        with torch.enable_grad():
            self.first(x.detach()).sum().backward()
        return self.second(self.first(x))


@pytest.mark.parametrize("freezes", [False, True])
@pytest.mark.parametrize("before", [None, 1.0])
def test_gradients_and_whether_they_are_needed_are_left_as_they_were(
    before: float | None, freezes: bool
) -> None:
    model = net(Differentiating, freezes)
    for p in model.parameters():
        p.grad = None if before is None else torch.full_like(p, before)
    sd.apply(model, 0.5, example_inputs=data())
    for p in model.parameters():
        assert p.requires_grad
        assert p.grad is None if before is None else (p.grad == before).all()


class Marking(nn.Linear):
    def forward(self, data: dict[str, Any]) -> Tensor:
        data["calls"] += 1
        return super().forward(data["x"])


class Marked(nn.Module):
    """Its layers are given samples and numbers in one dict, and write the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = Residual(), nn.ModuleList(Marking(4, 4) for _ in range(3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        data = {"x": self.first(x), "calls": 0}
        for layer in self.layers:
            data["x"] = data["x"] + layer(data)
        self.calls = data["calls"]
        return data["x"]


class Collecting(nn.Module):
    """Its branch puts values into a list that it is given, as VoVNet's does, and joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Appending()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        return x + self.f(x, values)


class Appending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, values: list[Tensor]) -> Tensor:
        values.append(self.f(x))
        return self.g(torch.cat(values, 1))


def test_samples_are_selected_where_a_branch_collects_values_that_nobody_else_reads() -> None:
    model = sd.apply(net(Collecting), 0.5, mode="row", example_inputs=data(), seed=0)
    (branch,) = sd.branches(model)
    assert branch.reason == ""
    sizes: list[int] = []
    model.f.f.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    run_often(model, data())
    assert set(sizes) != {6}


@pytest.mark.parametrize("mode", MODES)
def test_numbers_that_are_written_beside_samples_are_not_lost(mode: str) -> None:
    model = net(Marked)
    sd.apply(model, 0.3, mode=mode, example_inputs=data(), schedule="uniform", seed=0)
    assert len(sd.branches(model)) == 4
    for branch in sd.branches(model):
        branch.p = 0.0 if mode == "batch" else 0.3
    model(data())
    assert model.calls == 3


def test_a_gradient_that_torch_would_not_take_again_is_left() -> None:
    model = net(Residual).double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.data = p.data.float()
    before = [p.grad for p in model.parameters()]
    sd.apply(model, 0.5, example_inputs=data().float())
    assert all(p.grad is grad for p, grad in zip(model.parameters(), before, strict=True))


def test_apply_leaves_what_forwards_of_single_modules_count() -> None:
    calls = [0, 0, 0]

    def counting(module: nn.Module, i: int) -> None:
        own, n = module.forward, 0

        def forward(x: Tensor) -> Any:
            nonlocal n
            n += 1
            calls[i] = n
            return own(x)

        module.forward = forward

    model = nn.Sequential(*[Residual() for _ in calls]).double()
    for i, block in enumerate(model):
        counting(block.f, i)
    sd.apply(model, 0.0, example_inputs=data())
    model(data())
    assert calls == [1, 1, 1]


class Scripted(nn.Module):
    @torch.jit.export
    def double(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_script_may_have_no_forward() -> None:
    block = Residual()
    block.script = torch.jit.script(Scripted())
    model = sd.apply(nn.Sequential(block).double(), 0.5, example_inputs=data())
    assert len(sd.branches(model)) == 1

"""Modules may be wrapped, replaced, compiled and applied to again; remove leaves no trace."""

import copy
import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import stochastic_depth as sd
from models import small, small_batch

from .twins import KEPT, MODES, assert_same, assert_weighed, data, net, outcome, run_often, twins


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Words of its own."""
        return x + self.g(self.f(x).tanh())


# --- forwards that are wrapped


def wrap_like_accelerate(module: nn.Module, around: Callable) -> None:
    old = module.forward
    module._old_forward = old

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(module._old_forward, *args, **kwargs)

    module.forward = forward


def wrap_the_class(module: nn.Module, around: Callable) -> None:
    old = type(module).forward
    module.__class__ = type("Wrapped", (type(module),), {})
    type(module).forward = lambda self, *args: around(functools.partial(old, self), *args)


def wrap_the_call(module: nn.Module, around: Callable) -> None:
    kind = type(module)
    call = kind.__call__
    module.__class__ = type("Wrapped", (kind,), {})
    type(module).__call__ = lambda self, *args: around(functools.partial(call, self), *args)


@pytest.mark.parametrize("when", ["before apply", "after apply", "after a step"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", [wrap_like_accelerate, wrap_the_class, wrap_the_call])
def test_a_wrapper_on_the_forward_runs_and_the_branch_is_dropped(
    wrap: Callable, mode: str, when: str
) -> None:
    calls: list[int] = []

    def around(forward: Callable, x: Tensor) -> Tensor:
        calls.append(len(x))
        return forward(x * 1)

    model = net(Block)
    if when == "before apply":
        wrap(model, around)
    sd.apply(model, 0.5, schedule="uniform", mode=mode, seed=0, example_inputs=data())
    if when == "after a step":
        model(data())
    if when != "before apply":
        wrap(model, around)
    calls.clear()
    assert_weighed(model, net(Block), data())
    assert calls == [6] * 12


@pytest.mark.parametrize("wrap", [wrap_like_accelerate, wrap_the_class])
def test_a_wrapper_may_be_put_on_a_child(wrap: Callable) -> None:
    ours, plain = twins(net(Block), data(), p=0.5)
    for model in (ours, plain):
        wrap(model.f, lambda forward, x: forward(x) * 3)
    assert_weighed(ours, plain, data())


# --- calls that return something else than before


class Returning(nn.Module):
    """Returns its value alone, or with something beside it."""

    beside: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.f(x)
        return {None: y, "nothing": (y, None), "a tensor": (y, y.exp())}[self.beside]


class Reading(nn.Module):
    reads = False

    def __init__(self) -> None:
        super().__init__()
        self.attention = Returning()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        if isinstance(y, tuple):
            y, beside = y
            if self.reads and beside is not None:
                return x + y, beside.sum()
        return x + y


class ReadingModel(nn.Module):
    def __init__(self, beside: str | None) -> None:
        super().__init__()
        self.block = Reading()
        self.block.attention.beside = beside

    def forward(self, x: Tensor) -> Any:
        return self.block(x)


@pytest.mark.parametrize("size", [2, 6])  # one sample of two would be broadcast over both
def test_an_attention_may_return_its_weights_after_all(size: int) -> None:
    ours, plain = twins(net(ReadingModel, "nothing"), data(size, 4), mode="row", p=0.5)
    ours.block.attention.beside = plain.block.attention.beside = "a tensor"
    assert_weighed(ours, plain, data(size, 4), steps=20)
    ours.block.reads = True
    with pytest.raises(RuntimeError, match="something else than when it was watched"):
        run_often(ours, data(size, 4))


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("beside", [None, "a tensor"])
def test_selected_samples_do_not_come_out_where_nothing_is_known(
    beside: str | None, size: int
) -> None:
    ours, _ = twins(net(ReadingModel, beside), data(size, 4), mode="row", p=0.5)
    ours.block.attention.beside = None if beside else "a tensor"
    with pytest.raises(RuntimeError, match="something else than when it was watched"):
        run_often(ours, data(size, 4))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Masking()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.attention(x, mask)


class Masking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.f(x) * mask


class MaskedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Masked()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.block(x, mask)


@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize("blocks", [None, "block"])
@pytest.mark.parametrize("rows", [(1, 6), (6, 1), (1, 1)])
def test_one_mask_for_all_may_become_one_for_each(
    rows: tuple[int, int], blocks: str | None, mode: str
) -> None:
    before, after = (data(n, 4, seed=5) for n in rows)
    ours, plain = twins(net(MaskedModel), data(), before, mode=mode, p=0.5, blocks=blocks)
    assert sd.branches(ours)[0].place is not None
    assert_weighed(ours, plain, data(), before, steps=20)
    assert_weighed(ours, plain, data(), after, steps=20)


@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize("blocks", [None, "block"])
@pytest.mark.parametrize("shapes", [((4,), (6, 4)), ((6, 4), (4,)), ((), (6, 1)), ((6, 4), ())])
def test_an_argument_may_have_more_or_fewer_dimensions(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], blocks: str | None, mode: str
) -> None:
    before, after = (data(6, 4, seed=5)[0, 0] if not s else data(*s, seed=5) for s in shapes)
    ours, plain = twins(net(MaskedModel), data(), before, mode=mode, p=0.5, blocks=blocks)
    assert_weighed(ours, plain, data(), after, steps=20)


# --- children that are replaced: a branch is where it is


class Lora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


REPLACEMENTS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": lambda m: parametrizations.weight_norm(m.f),
    "weight_norm on both": lambda m: [parametrizations.weight_norm(x) for x in (m.f, m.g)],
    "a small LoRA": lambda m: setattr(m, "f", net(Lora, m.f, 1)),
    "a LoRA that is larger than the layer": lambda m: setattr(m, "g", net(Lora, m.g, 64)),
    "another layer": lambda m: setattr(m, "g", net(nn.Linear, 4, 4, seed=5)),
    "a larger module": lambda m: setattr(
        m, "f", nn.Sequential(net(nn.Linear, 4, 99, seed=5), net(nn.Linear, 99, 4, seed=6))
    ),
    "the same layer, frozen": lambda m: m.f.requires_grad_(False),
    "layers that change places": lambda m: (
        m.__dict__["_modules"].update(f=m.g, g=m.f),
        None,
    ),
    "a compiled layer": lambda m: m.f.compile(backend="eager"),
}


# Dynamo's, of inputs that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_a_branch_stays_one_when_its_child_is_replaced(
    replacement: str, stepped: bool, mode: str
) -> None:
    ours, plain = twins(net(Block), data(), mode=mode, p=0.5)
    (branch,) = sd.branches(ours)
    if stepped:
        ours(data())
    for model in (ours, plain):
        REPLACEMENTS[replacement](model)
    assert sd.branches(ours) == [branch]
    assert_weighed(ours, plain, data())


@pytest.mark.parametrize("layers", [["conv2"], ["conv1"], ["conv1", "conv2"]])
def test_every_branch_of_a_resnet_drops_after_weight_norm(layers: list[str]) -> None:
    model, plain = small().double(), small().double()
    sd.apply(model, 0.5, example_inputs=small_batch(dtype=torch.float64))
    branches = sd.branches(model)
    for net_ in (model, plain):
        for block in net_.blocks:
            for name in layers:
                parametrizations.weight_norm(getattr(block, name))
    assert sd.branches(model) == branches
    assert len(branches) == 4
    x = small_batch(dtype=torch.float64)
    for i, branch in enumerate(branches):
        for other in branches:
            other.p = float(other is branch)
        expected = plain.stem(x)
        for j, block in enumerate(plain.blocks):
            expected = block.shortcut(expected).relu() if i == j else block(expected)
        expected = plain.head(expected.mean((2, 3)))
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_one_of_two_equal_layers_may_grow() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            return x + self.b(x)

    model = net(Two)
    sd.apply(model, 0.5, example_inputs=data())
    first, second = sd.branches(model)
    for name in ("b", "a"):
        setattr(model, name, net(Lora, getattr(model, name), 8))
        first.p, second.p = 1.0, 0.0
        torch.testing.assert_close(model(data()), data() + model.b(data()))
        first.p, second.p = 0.0, 1.0
        torch.testing.assert_close(model(data()), data() + model.a(data()))


@pytest.mark.filterwarnings("ignore::UserWarning")  # it may be said that the new one never drops
def test_a_block_that_is_added_runs_plainly_until_apply_is_called_again() -> None:
    ours, plain = twins(nn.Sequential(net(Block), net(Block)), data(), p=1.0)
    for model in (ours, plain):
        model.append(net(Block, seed=7))
    torch.testing.assert_close(ours(data()), plain[2](data()))
    sd.apply(ours, 1.0, schedule="uniform", example_inputs=data())
    assert len(sd.branches(ours)) == 3
    torch.testing.assert_close(ours(data()), data())


# --- apply again, remove


def everything(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        for module in model.modules()
    ]


@pytest.mark.filterwarnings("ignore:.*has forward hooks:UserWarning")
@pytest.mark.parametrize("options", [{}, {"mode": "row"}, {"blocks": Block}, {"blocks": "all"}])
@pytest.mark.parametrize("steps", [0, 2])
def test_remove_leaves_each_modules_dict_as_it_was(options: dict[str, Any], steps: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Block(), Block()).double()
    model[1].register_forward_hook(lambda *_: None)
    hooks = model[1]._forward_hooks.copy()
    before, types = everything(model), [type(m) for m in model.modules()]
    sd.apply(model, 0.5, example_inputs=data(), **options)
    assert sd.is_applied(model)
    for step in range(steps):
        outcome(model, data(), seed=step)
    assert everything(model) != before
    sd.remove(model)
    assert not sd.is_applied(model)
    assert sd.branches(model) == []
    assert everything(model) == before
    assert [list(a) for a in everything(model)] == [list(b) for b in before]  # also their order
    assert [type(m) for m in model.modules()] == types
    assert model[1]._forward_hooks == hooks


def test_remove_keeps_what_others_have_changed_meanwhile() -> None:
    model = net(Block)
    sd.apply(model, 1.0, schedule="uniform", example_inputs=data())
    model.f = net(nn.Linear, 4, 4, seed=9)
    wrap_like_accelerate(model, lambda forward, x: forward(x) * 2)
    sd.remove(model)
    torch.testing.assert_close(model(data()), 2 * (data() + model.g(model.f(data()).tanh())))


@pytest.mark.parametrize("stepped", [False, True])
def test_remove_leaves_nothing_in_a_child_that_was_wrapped(stepped: bool) -> None:
    model = net(Block)
    before = set(vars(model.f))
    sd.apply(model, 1.0, schedule="uniform", example_inputs=data())
    model.f = net(Lora, model.f, 1)
    if stepped:
        model(data())
    sd.remove(model)
    assert set(vars(model.f.base)) == before


@pytest.mark.parametrize("mode", MODES)
def test_the_last_apply_counts(mode: str) -> None:
    ours, plain = twins(net(Block), data(), p=1.0, mode=mode)
    ours(data())
    sd.apply(ours, 0.5, schedule="uniform", mode=mode, seed=0, example_inputs=data())
    (branch,) = sd.branches(ours)
    assert (branch.decided, branch.dropped) == (0, 0)
    assert_weighed(ours, plain, data())
    sd.apply(ours, 1e-30, schedule="uniform", seed=0, example_inputs=data())
    assert_same(ours, plain, data())
    sd.remove(ours)
    assert everything(ours) == everything(sd.remove(ours))


def test_a_branch_is_the_same_object_each_time() -> None:
    model, _ = twins(nn.Sequential(net(Block), net(Block)), data())
    for a, b in zip(sd.branches(model), sd.branches(model), strict=True):
        assert a is b
    (inner,) = sd.branches(model[0])
    assert inner is sd.branches(model)[0]


class DropPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop_prob, self.calls = 0.5, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x


class Deep(nn.Module):
    """A branch with a residual block and a drop module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.drop = nn.Linear(4, 4), Block(), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.inner(self.a(x)))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Deep()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@pytest.mark.filterwarnings("ignore:.*goes on dropping:UserWarning")
@pytest.mark.parametrize("way", ["remove", "apply"])
def test_what_is_done_to_a_child_leaves_the_blocks_around_it_alone(way: str) -> None:
    model = nn.Sequential(net(Outer), net(Outer, seed=1))
    sd.apply(model, 1.0, schedule="uniform", example_inputs=data())
    for block in model:
        if way == "remove":
            sd.remove(block.f)
        else:
            sd.apply(block.f, 0.0, example_inputs=data())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(data()), data())
    for branch in sd.branches(model):
        branch.p = KEPT
    model(data())
    assert [block.f.drop.calls for block in model] == [0, 0]


class WithDropPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = nn.Linear(4, 4), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x))


@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_what_takes_the_place_of_a_drop_path_runs(mode: str) -> None:
    model = sd.apply(net(WithDropPath), KEPT, mode=mode, example_inputs=data())
    model.drop_path = net(nn.Linear, 4, 4, seed=5)
    torch.testing.assert_close(model(data()), data() + model.drop_path(model.f(data())))
    sd.branches(model)[0].p = 0.5
    x, kept = data(), 0
    branch = model.drop_path(model.f(x))
    for _ in range(8):
        for out, shortcut, whole in zip(model(x), x, 2.0 * branch, strict=True):
            is_kept = not torch.equal(out, shortcut)
            torch.testing.assert_close(out, shortcut + whole if is_kept else shortcut)
            kept += is_kept
    assert 0 < kept < 8 * len(x)


@pytest.mark.parametrize("change", ["module", "parameter"])
def test_what_is_replaced_is_freed(change: str) -> None:
    model = sd.apply(net(Block), 0.5, example_inputs=data())
    old = weakref.ref(model.f if change == "module" else model.f.weight)
    if change == "module":
        model.f = nn.Linear(4, 4)
    else:
        model.f.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    model.double()(data())
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("given", [True, False])
def test_weights_that_parametrize_caches_have_gradients(given: bool) -> None:
    model, plain = net(Block), net(Block)
    for m in (model, plain):
        parametrizations.weight_norm(m.f)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not given else "error", UserWarning)
        sd.apply(model, KEPT, example_inputs=data() if given else None)
    with torch.nn.utils.parametrize.cached():
        for m in (model, plain):
            m(data()).sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


class OwnWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.w)


def test_a_weight_that_cannot_be_told_any_more_is_told() -> None:
    model = sd.apply(net(OwnWeight), 1.0, example_inputs=data())
    assert torch.equal(model(data()), data())
    parametrizations.weight_norm(model, "w")
    with pytest.warns(UserWarning, match="does not come to the sum that was found"):
        model(data())


def test_who_shares_the_contents_of_a_block_keeps_them() -> None:
    model = nn.Sequential(net(Block), net(Block))
    other = copy.copy(model[0])
    expected = other(data())
    sd.apply(model, 0.5, example_inputs=data())
    assert torch.equal(other(data()), expected)
    assert torch.equal(sd.remove(model).eval()(data()), model[1](expected))


class AsksForTheShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return x + h.reshape(h.shape[0], 4)


def test_a_dropped_branch_that_is_asked_for_its_shape_leaves_no_weight_in_a_cache() -> None:
    model = sd.apply(net(AsksForTheShape), 1.0, example_inputs=data())
    (branch,) = sd.branches(model)
    with torch.nn.utils.parametrize.cached():
        assert torch.equal(model(data()), data())
        branch.p = 0.0
        model(data()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())

"""checkpoint() inside of a forward keeps saving memory, and its gradients stay right."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import stochastic_depth as sd

from .twins import MODES, Output, assert_same, assert_weighed, data, feed, net, seed_all, twins

REENTRANT = [True, False]
# Torch's, of a reentrant checkpoint whose example inputs need no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


class Block(nn.Module):
    """Checkpoints its branch, or a part of it, in one of several ways."""

    def __init__(self, way: str, reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.way, self.reentrant = way, reentrant
        self.f = nn.Sequential(
            nn.Linear(4, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 16), nn.Tanh()
        )
        self.g, self.output = nn.Linear(16, 4), Output(16)

    def checkpointed(self, function: Callable, x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def both(self, x: Tensor) -> Tensor:
        return self.g(self.f(x))

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "a child":
                return x + self.g(self.checkpointed(self.f, x))
            case "all children":
                return x + self.checkpointed(self.both, x)
            case "one after the other":
                return x + self.checkpointed(self.g, self.checkpointed(self.f, x))
            case "one in the other":
                return x + self.checkpointed(lambda y: self.g(self.checkpointed(self.f, y)), x)
            case "a module that has the sum":
                return self.checkpointed(lambda y: self.output(self.f(y), y), x)
            case "the sum as well":
                return self.checkpointed(lambda y: y + self.both(y), x)
            case _:
                h = checkpoint_sequential(self.f, 2, x, use_reentrant=self.reentrant)
                return x + self.g(h)


WAYS = [
    "a child",
    "all children",
    "one after the other",
    "one in the other",
    "the sum as well",
    "a module that has the sum",
    "checkpoint_sequential",
]


def build(way: str, reentrant: bool, dropout: float = 0.0) -> nn.Module:
    return net(Block, way, reentrant, dropout)


@contextmanager
def numbers_saved() -> Iterator[list[int]]:
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


def costs(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """How many numbers a step saves, and how often it runs the branch."""
    runs: list[int] = []
    handle = model.f[0].register_forward_hook(lambda *_: runs.append(1))
    with numbers_saved() as saved:
        output = model(x.clone().requires_grad_() * 1.0)
    output.sum().backward()
    handle.remove()
    return sum(saved), len(runs)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpointed_branch_is_recomputed_and_saves_no_more(
    way: str, reentrant: bool, mode: str, given: bool
) -> None:
    x = data(8, 4)
    ours, plain = twins(build(way, reentrant), x, mode=mode, given=given)
    for step in range(2):
        assert_same(ours, plain, x, seed=step)
    (saved, runs), (plain_saved, plain_runs) = costs(ours, x), costs(plain, x)
    assert runs == plain_runs >= 2
    # The numbers of the kept rows may be saved besides; a checkpoint is worth hundreds.
    assert saved <= plain_saved + 4 + 4 * len(x) * (mode == "row")
    without = build(way, reentrant)
    without.checkpointed = lambda function, x: function(x)
    if way != "checkpoint_sequential":
        assert costs(without, x)[0] > plain_saved + 4 * len(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpointed_branch_is_weighed_and_dropped(way: str, reentrant: bool, mode: str) -> None:
    ours, plain = twins(build(way, reentrant), data(), mode=mode, p=0.5)
    assert_weighed(ours, plain, data())


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("way", WAYS)
def test_dropout_in_a_checkpointed_branch_is_the_same_when_recomputed(
    way: str, reentrant: bool, seed: int | None
) -> None:
    gradients = []
    for checkpointing in (True, False):
        model = build(way, reentrant, dropout=0.3)
        if not checkpointing:
            model.checkpointed = lambda function, x: function(x)
            model.way = "a child" if way == "checkpoint_sequential" else way
        sd.apply(model, 0.5, schedule="uniform", seed=seed, example_inputs=data())
        (branch,) = sd.branches(model)
        for step in range(10):
            seed_all(step)
            x = data(seed=step).requires_grad_()
            output = model(feed(x))
            torch.rand(3)  # the random state moves on before the backward
            output.square().sum().backward()
            gradients.append((checkpointing, output, x.grad))
        assert 0 < branch.dropped < 10
        gradients.append((checkpointing, *[p.grad for p in model.parameters()]))
    half = len(gradients) // 2
    for with_it, without_it in zip(gradients[:half], gradients[half:], strict=True):
        for a, b in zip(with_it[1:], without_it[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_a_dropped_branch_is_not_recomputed_either(reentrant: bool) -> None:
    ours, _ = twins(build("all children", reentrant), data(), p=1.0)
    assert costs(ours, data())[1] == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("way", ["all children", "one after the other"])
def test_blocks_that_checkpoint_inside_may_be_checkpointed_from_outside(
    reentrant: bool, mode: str, way: str
) -> None:
    class Outer(nn.Module):
        def __init__(self, outside: bool) -> None:
            super().__init__()
            self.outside = outside
            self.blocks = nn.ModuleList(
                Block(way, reentrant, 0.2 if mode == "batch" else 0.0) for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant) if self.outside else block(x)
            return x

    results = []
    for outside in (True, False):
        model = net(Outer, outside)
        # With a seed, checkpointing takes numbers of torch's generator to find decisions again.
        sd.apply(model, 0.5, schedule="uniform", mode=mode, example_inputs=data())
        for step in range(6):
            seed_all(step)
            x = data(seed=step).requires_grad_()
            model(feed(x)).square().sum().backward()
            results.append(x.grad)
        results += [p.grad for p in model.parameters()]
        assert sum(b.dropped for b in sd.branches(model)) > 0
    half = len(results) // 2
    assert half > 6
    for a, b in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_two_forwards_may_wait_for_their_backwards_in_any_order() -> None:
    gradients = []
    for order in ((0, 1, 2), (2, 0, 1)):
        model = build("all children", False, dropout=0.3)
        sd.apply(model, 0.5, schedule="uniform", seed=3, example_inputs=data())
        inputs = [data(seed=i).requires_grad_() for i in range(3)]
        outputs = []
        for i, x in enumerate(inputs):
            seed_all(i)  # forwards from one state could not be told apart, which is an error
            outputs.append(model(feed(x)))
        for i in order:
            outputs[i].square().sum().backward()
        gradients.append([x.grad for x in inputs])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_forwards_from_one_state_that_decided_differently_are_an_error() -> None:
    model = build("all children", False)
    sd.apply(model, 0.5, schedule="uniform", seed=3, example_inputs=data())
    (branch,) = sd.branches(model)
    kept = []
    for _ in range(8):
        seed_all(0)  # the decisions have a generator of their own
        before = branch.dropped
        out = model(feed(data().requires_grad_()))
        if branch.dropped == before:  # else nothing is repeated
            kept.append(out)
    assert 1 < len(kept) < 8
    for out in kept:  # whichever comes first
        with pytest.raises(RuntimeError, match="not known whether it was dropped"):
            out.sum().backward()


class Centred(nn.Module):
    """Mixes the samples, so that all are computed and the dropped ones masked."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return self.g(torch.tanh(h - h.mean(0)))


class CheckpointedBody(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.f, self.reentrant = Centred(), reentrant

    def body(self, x: Tensor) -> Tensor:
        out = x + self.f(x)
        return out * torch.ones_like(out)  # which is saved, so that all before it is repeated

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:.*samples cannot be selected:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_all_samples_may_be_dropped_at_the_sum(size: int, reentrant: bool) -> None:
    ours, plain = twins(net(CheckpointedBody, reentrant), data(), mode="row", p=0.5)
    assert_weighed(ours, plain, data(size, 4), steps=24)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("way", ["all children", "the sum as well"])
def test_in_a_compiled_block_gradients_are_those_of_one_that_is_not(
    way: str, reentrant: bool
) -> None:
    torch._dynamo.reset()
    results = []
    for compiles in (True, False):
        model = build(way, reentrant)
        sd.apply(model, 0.5, schedule="uniform", example_inputs=data())
        if compiles:
            for block in [m for m in model.modules() if isinstance(m, Block)]:
                block.compile(backend="eager")
        for step in range(8):
            seed_all(step)
            model.zero_grad()
            x = data(seed=step).requires_grad_()
            model(feed(x)).square().sum().backward()
            results.append([x.grad, *(p.grad for p in model.parameters())])
        assert sum(b.dropped for b in sd.branches(model)) > 0
    for ours, theirs in zip(results[:8], results[8:], strict=True):
        assert [g is None for g in ours] == [g is None for g in theirs]
        for a, b in zip(ours, theirs, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b)


class Widened(nn.Module):
    """After a reentrant checkpoint, its branch gets entries that are none of the checkpoint's."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.f, self.joined = nn.Linear(4, 3), joined
        self.extra = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.f, x, use_reentrant=True)
        if self.joined:
            return x + torch.cat([y, self.extra.expand(len(x), 1)], 1)
        return x + nn.functional.pad(y, (0, 1), value=1.0)


@pytest.mark.parametrize("joined", [True, False])
def test_what_is_joined_to_a_checkpointed_value_is_not_left_unweighed(joined: bool) -> None:
    ours, _ = twins(net(Widened, joined), data(), p=1e-6)
    with pytest.raises(RuntimeError, match="a function that is not linear in it"):
        ours(data().requires_grad_())

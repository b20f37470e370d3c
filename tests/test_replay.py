"""Gradient checkpointing sees the decisions of the forward again, or says that it cannot."""

import gc
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.drop import replay

MODES = ["batch", "row", "subset"]
ROW_MODES = ["row", "subset"]
REENTRANT = [True, False]
ROWS = 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int = 1) -> Tensor:
    x = torch.randn(ROWS, 4, generator=generator(seed), dtype=torch.float64)
    return x.requires_grad_()


class Net(nn.Module):
    """Three residual sums, all of them or each by itself recomputed in the backward."""

    def __init__(self, mode: str, source: torch.Generator | None, p: float = 0.5) -> None:
        super().__init__()
        self.mode, self.source, self.p = mode, source, p
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def block(self, x: Tensor, i: int) -> Tensor:
        options = {"p": self.p, "mode": self.mode, "generator": self.source}
        return sd.residual(x, self.blocks[i], **options).tanh()

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = self.block(x, i)
        return x


def gradients(net: nn.Module, *leaves: Tensor) -> list[Tensor | None]:
    return [t.grad for t in (*leaves, *net.parameters())]


def same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    assert len(ours) == len(theirs) > 0
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


Run = Callable[[Net, Tensor, bool], Tensor]


def whole(net: Net, x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(net, x, use_reentrant=reentrant)


def each(net: Net, x: Tensor, reentrant: bool) -> Tensor:
    for i in range(3):
        x = checkpoint(net.block, x, i, use_reentrant=reentrant)
    return x


def nested(net: Net, x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(each, net, x, False, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("run", [whole, each, nested])
def test_several_forwards_are_replayed_in_any_order(
    run: Run, private: bool, mode: str, reentrant: bool
) -> None:
    for order in itertools.permutations(range(3)):
        results = []
        for recompute in (False, True):
            net, inputs = Net(mode, generator(3) if private else None), [batch(i) for i in range(3)]
            torch.manual_seed(5)
            outputs = [run(net, x, reentrant) if recompute else net(x) for x in inputs]
            for i in order:
                torch.rand(7)  # the random state moves on
                outputs[i].square().sum().backward()
            results.append(gradients(net, *inputs))
        assert same(*results)


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", ["shared", "separate"])
def test_a_seeded_model_trains_as_without_checkpointing(
    ranks: str, mode: str, reentrant: bool
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x))

    weights, counts = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[Block() for _ in range(4)]).double()
        options = {"schedule": "uniform", "mode": mode, "seed": 2, "ranks": ranks}
        sd.apply(model, p=0.5, example_inputs=batch().detach(), **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(8):
            x = batch(step)
            for block in model:
                x = checkpoint(block, x, use_reentrant=reentrant) if recompute else block(x)
            optimizer.zero_grad()
            x.square().mean().backward()
            optimizer.step()
        weights.append(list(model.parameters()))
        counts.append([(b.decided, b.dropped) for b in sd.branches(model)])
    assert same(*weights)
    assert counts[0] == counts[1]
    assert 0 < sum(dropped for _, dropped in counts[0]) < sum(decided for decided, _ in counts[0])


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("mode", ROW_MODES)
@pytest.mark.parametrize("private", [True, False])
def test_without_the_random_state_recomputing_is_an_error(
    private: bool, mode: str, reentrant: bool
) -> None:
    net = Net(mode, generator() if private else None)
    out = checkpoint(net, batch(), use_reentrant=reentrant, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match=r"gradient checkpointing.*preserve_rng_state=True"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("private", [True, False])
def test_without_the_random_state_no_coin_for_the_call_goes_wrong_unseen(
    private: bool, reentrant: bool
) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        net = Net("batch", generator(seed) if private else None)
        out = checkpoint(net, batch(), use_reentrant=reentrant, preserve_rng_state=False)
        with pytest.raises(RuntimeError, match="gradient checkpointing"):
            out.sum().backward()


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("change", [{"p": 0.4}, {"mode": "subset"}])
def test_what_changed_since_the_forward_is_an_error(
    change: dict[str, object], private: bool, reentrant: bool
) -> None:
    net = Net("row", generator() if private else None)
    torch.manual_seed(next(_seeds))  # a random state that no other test was in
    out = checkpoint(net, batch(), use_reentrant=reentrant)
    vars(net).update(change)
    with pytest.raises(RuntimeError, match="the rate or the mode changed since the forward"):
        out.sum().backward()


_seeds = itertools.count(1_000_000)


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("mode", MODES)
def test_forwards_that_cannot_be_told_apart_are_an_error(mode: str, reentrant: bool) -> None:
    net, outputs = Net(mode, generator(8)), []
    for _ in range(4):  # each with other coins, which the same tickets stand for
        torch.manual_seed(0)
        outputs.append(checkpoint(net, batch(), use_reentrant=reentrant))
    for out in outputs:
        with pytest.raises(RuntimeError, match="seed it differently from step to step"):
            out.sum().backward()


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_forwards_with_the_same_coins_need_not_be_told_apart(reentrant: bool) -> None:
    source = generator()
    net, x = Net("row", source), batch()
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        source.manual_seed(8)
        outputs.append(checkpoint(net, x, use_reentrant=reentrant))
    seen = []
    for out in outputs:
        x.grad = None
        net.zero_grad()
        out.sum().backward()
        seen.append([g.clone() for g in gradients(net, x)])
    assert same(*seen)


def test_two_models_may_be_trained_from_the_same_random_state() -> None:
    for seed in range(2):
        torch.manual_seed(0)
        net = Net("row", generator(seed))
        checkpoint(net, batch(), use_reentrant=False).sum().backward()
        assert net.blocks[0].weight.grad is not None


def test_the_record_is_bounded_and_a_replay_beyond_it_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replay, "_MOST", 30)
    source = generator()
    net = Net("row", source)
    outputs = [checkpoint(net, batch(), use_reentrant=False) for _ in range(20)]
    outputs[-1].sum().backward()
    with pytest.raises(RuntimeError, match="not on record"):
        outputs[0].sum().backward()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("private", [True, False])
def test_nothing_is_recorded_or_drawn_beside_where_nothing_is_recomputed(
    private: bool, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[object] = []
    monkeypatch.setattr(replay.Tape, "decide", lambda self, *args, **kw: decided.append(args) or 1)
    net = Net("row", generator() if private else None)
    torch.manual_seed(4)
    if recorded:
        with pytest.raises(Exception, match="iter"):  # the list of decisions is missing
            checkpoint(net, batch(), use_reentrant=False)
    else:
        net(batch()).sum().backward()
    assert bool(decided) is recorded
    if private and not recorded:
        after = torch.get_rng_state()
        torch.manual_seed(4)
        assert torch.equal(torch.get_rng_state(), after)


# --- models that stochastic depth was applied to

# Torch's, of a reentrant checkpoint whose inputs need no gradient, as those that are watched.
no_gradient = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


class Block(nn.Module):
    """Checkpoints nothing, its whole branch, or a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.inside: str | None = None
        self.options: dict[str, bool] = {}

    def branch(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.inside == "branch":
            return x + checkpoint(self.branch, x, **self.options)
        if self.inside == "part":
            h = checkpoint(self.first, x, **self.options)
            return x + self.last(torch.tanh(h))
        return x + self.branch(x)


def applied(mode: str, inside: str | None, seed: int | None = None, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(3)]).double()
    for block in model:
        block.inside, block.options = inside, options
    return sd.apply(model, 0.5, schedule="uniform", mode=mode, seed=seed, example_inputs=batch())


@no_gradient
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["outside", "both", "branch", "part"])
def test_forwards_of_a_model_are_replayed_in_any_order(
    where: str, mode: str, reentrant: bool, seed: int | None
) -> None:
    for order in ((0, 1, 2), (2, 0, 1)):
        results, dropped = [], []
        for recompute in (False, True):
            inside = None if where == "outside" or not recompute else where
            inside = "branch" if inside == "both" else inside
            outside = recompute and where in ("outside", "both")
            model = applied(mode, inside, seed, use_reentrant=reentrant)
            inputs, outputs = [batch(i) for i in range(3)], []
            for x in inputs:
                # A ticket is drawn of torch's generator where decisions come from another one.
                torch.manual_seed(len(outputs))
                out = checkpoint(model, x, use_reentrant=reentrant) if outside else model(x)
                outputs.append(out)
            for i in order:
                torch.rand(7)  # the random state moves on
                outputs[i].square().sum().backward()
            results.append(gradients(model, *inputs))
            dropped.append([(b.decided, b.dropped) for b in sd.branches(model)])
        assert len(results[0]) == len(results[1])
        for ours, theirs in zip(*results, strict=True):
            # Reentrant checkpointing adds up gradients in another order.
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert dropped[0] == dropped[1]


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_are_checkpointed_leave_no_tensor_behind(mode: str, reentrant: bool) -> None:
    model, alive = applied(mode, None), []
    for _ in range(8):
        x = batch()
        for block in model:
            x = checkpoint(block, x, use_reentrant=reentrant)
        x.sum().backward()
        del x
        gc.collect()
        alive.append(sum(type(x) is Tensor for x in gc.get_objects()))
    assert alive[2:] == alive[2:3] * 6


@no_gradient
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpointed_branch_without_the_random_state_is_an_error(
    mode: str, reentrant: bool
) -> None:
    model = applied(mode, "branch", use_reentrant=reentrant, preserve_rng_state=False)
    torch.manual_seed(2)  # by which a branch is kept after which another is decided
    out = model(batch())
    with pytest.raises(RuntimeError, match="keep preserve_rng_state=True"):
        out.square().sum().backward()


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_rate_that_leaves_nothing_to_draw_since_the_forward_is_an_error(
    p: float, mode: str, seed: int | None
) -> None:
    model = applied(mode, None, seed)
    torch.manual_seed(next(_seeds))
    checkpoint(model, batch(), use_reentrant=True).square().sum().backward()
    out = checkpoint(model, batch(), use_reentrant=True)
    for branch in sd.branches(model):
        branch.p = p
    with pytest.raises(RuntimeError, match="the rate or the mode changed since the forward"):
        out.square().sum().backward()
    for _ in range(3):
        checkpoint(model, batch(), use_reentrant=True).square().sum().backward()

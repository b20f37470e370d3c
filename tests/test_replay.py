"""Gradient checkpointing sees the coins of the forward again, or says that it cannot."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth import replay

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
@pytest.mark.parametrize("coins", ["shared", "separate"])
def test_a_seeded_model_trains_as_without_checkpointing(
    coins: str, mode: str, reentrant: bool
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
        sd.apply(model, p=0.5, schedule="uniform", mode=mode, seed=2, coins=coins)
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
    out = checkpoint(net, batch(), use_reentrant=reentrant)
    vars(net).update(change)
    with pytest.raises(RuntimeError, match="the rate, the mode or the batch changed"):
        out.sum().backward()


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
    monkeypatch.setattr(replay, "_MOST_DRAWS", 30)
    source = generator()
    net = Net("row", source)
    outputs = [checkpoint(net, batch(), use_reentrant=False) for _ in range(20)]
    record = replay._of_others[source]
    assert len(record.draws) == 30
    assert record.numbers == 30 * ROWS
    outputs[-1].sum().backward()
    with pytest.raises(RuntimeError, match="not on record"):
        outputs[0].sum().backward()
    monkeypatch.setattr(replay, "_MOST_NUMBERS", 100)
    checkpoint(net, batch(), use_reentrant=False)
    assert record.numbers == 96


def test_nothing_is_recorded_or_drawn_beside_where_nothing_is_recomputed() -> None:
    source = generator()
    net = Net("row", source)
    torch.manual_seed(4)
    before, known = torch.get_rng_state(), len(replay._of_default)
    net(batch()).sum().backward()
    Net("row", None)(batch())
    assert source not in replay._of_others
    assert len(replay._of_default) == known
    torch.set_rng_state(before)
    net(batch())
    assert torch.equal(torch.get_rng_state(), before)

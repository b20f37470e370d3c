"""Balanced decisions of a model: equally many branches every step, each at its own rate.

``test_balance.py`` has the draws themselves. Statistical tests fail by chance with the probability
of at most ALARM over all that they compare, by Hoeffding's bound; seeds are fixed.
"""

import copy
import io
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from ranks import gathered, launch

ALARM = 1e-6
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.linear(x)))


class Stage(nn.Module):
    """Dropped as a whole, it takes the blocks in it along."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def stack(depth: int = 6, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(*[Block() for _ in range(depth)]).double()
    given = {"p": 0.5, "schedule": "uniform", "draw": "balanced", "example_inputs": X}
    return sd.apply(net, **given | options)


def dropped(model: nn.Module, run: Callable[[], Any]) -> list[int]:
    """How many calls of each branch ``run`` drops."""
    branches = sd.branches(model)
    before = [branch.dropped for branch in branches]
    run()
    return [branch.dropped - count for branch, count in zip(branches, before, strict=True)]


def steps(model: nn.Module, count: int) -> list[list[int]]:
    return [dropped(model, lambda: model(X)) for _ in range(count)]


def hoeffding(draws: int, comparisons: int) -> float:
    return math.sqrt(math.log(2 * comparisons / ALARM) / (2 * draws))


# Counts and rates


@pytest.mark.parametrize("blocks", [None, "all"])
def test_every_call_drops_the_sum_of_the_rates_rounded_and_each_branch_its_own(blocks: Any) -> None:
    model, draws = stack(8, p=0.6, schedule="linear", blocks=blocks), 2000
    rates = torch.tensor([branch.p for branch in sd.branches(model)])
    seen = torch.tensor(steps(model, draws))
    assert set(seen.sum(1).tolist()) == {math.floor(rates.sum()), math.ceil(rates.sum())}
    assert (seen.double().mean(0) - rates).abs().max() < hoeffding(draws, len(rates))


def test_branches_that_cost_the_same_are_balanced_among_themselves() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[Block(width) for width in (8, 64) * 4]).double()
    sd.apply(net, 0.5, schedule="uniform", draw="balanced", example_inputs=X)
    for step in steps(net, 50):
        assert sum(step[::2]) == sum(step[1::2]) == 2


def test_independent_draws_are_not_balanced_and_are_the_default_of_a_single_process() -> None:
    for draw in ("independent", "auto"):
        counts = {sum(step) for step in steps(stack(draw=draw), 200)}
        assert len(counts) > 3


def test_never_and_always_are_exact() -> None:
    model = stack(p=0.0)
    plain = sd.remove(copy.deepcopy(model))
    assert torch.equal(model(X), plain(X))
    sd.branches(model)[2].p = 1.0
    assert steps(model, 20) == [[0, 0, 1, 0, 0, 0]] * 20


def test_a_block_in_another_keeps_its_rate_whatever_the_other_does() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[Stage(2) for _ in range(3)]).double()
    options = {"schedule": "uniform", "draw": "balanced", "example_inputs": X}
    sd.apply(net, 0.5, blocks=[Stage, Block], **options)
    blocks = [branch.name.partition(":")[0] for branch in sd.branches(net)]
    outer = [i for i, name in enumerate(blocks) if "." not in name]
    inner = [i for i, name in enumerate(blocks) if "." in name]
    assert (len(outer), len(inner)) == (3, 6)
    before = [branch.decided for branch in sd.branches(net)]
    seen = steps(net, 1500)
    assert {sum(step[i] for i in outer) for step in seen} == {1, 2}
    for i in inner:
        branch = sd.branches(net)[i]
        draws = branch.decided - before[i]  # where the other one is kept
        assert 500 < draws < 1000
        assert abs(branch.dropped / draws - 0.5) < hoeffding(draws, len(inner))


def test_a_block_that_runs_twice_and_a_part_that_runs_alone() -> None:
    model = stack()

    def twice() -> None:
        for number in (0, 1, 1, 2, 3, 4, 5):
            model[number](X)

    for _ in range(50):
        assert 3 <= sum(dropped(model, twice)) <= 4  # one round, and one more call
        dropped(model, lambda: model[3](X))
        assert sum(dropped(model, lambda: model(X))) == 3


def test_what_is_left_of_a_model_is_balanced() -> None:
    model = stack()
    model(X)
    for part in (model[1], model[2]):
        sd.remove(part)
    model(X)
    assert {sum(step) for step in steps(model, 50)} == {2}


def test_what_is_sampled_in_evaluation_leaves_the_decisions_of_training_alone() -> None:
    one, other = stack(seed=1), stack(seed=1)
    for _ in range(20):
        other.eval()
        with sd.sampling(other):
            other(X)
        other.train()
        assert dropped(one, lambda: one(X)) == dropped(other, lambda: other(X))


def test_a_rate_schedule_changes_the_sum_and_nothing_else() -> None:
    model = stack(8, p=0.6, schedule="linear")
    rates = sd.RateSchedule(model, lambda t: max(0.0, 1.0 - t / 50))
    for _ in range(60):
        total = sum(branch.p for branch in sd.branches(model))
        assert abs(sum(dropped(model, lambda: model(X))) - total) < 1.0
        rates.step()


# Seeds, copies, resuming, threads


def test_a_seed_repeats_a_run_and_torch_s_seed_does_where_there_is_none() -> None:
    assert steps(stack(seed=3), 20) == steps(stack(seed=3), 20) != steps(stack(seed=4), 20)
    runs = []
    for seed in (5, 5, 6):
        model = stack()
        torch.manual_seed(seed)
        first = steps(model, 1)
        state = torch.get_rng_state()
        runs.append([*first, *steps(model, 19)])
        assert torch.equal(torch.get_rng_state(), state)  # one number chooses a seed, for good
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("options", [{}, {"draw": "independent", "ranks": "shared"}])
@pytest.mark.parametrize("other", [copy.deepcopy, lambda _: stack()], ids=["copy", "equal model"])
def test_models_that_begin_together_decide_differently(other: Any, options: dict) -> None:
    model = stack(**options)
    twin = other(model)
    torch.manual_seed(5)
    decided = [steps(model, 1) == steps(twin, 1) for _ in range(100)]
    # At 6 branches of rate 0.5 there are at least 20 outcomes; 1 in 20 agrees: P(> 20) < 1e-7.
    assert sum(decided) <= 20


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copy_is_balanced_too(clone: Callable[[nn.Module], nn.Module]) -> None:
    model = stack(seed=3)
    model(X)
    copied = clone(model)
    assert {sum(step) for step in steps(copied, 30)} == {3}
    assert {sum(step) for step in steps(model, 30)} == {3}


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("given", [X, None], ids=["inputs", "first batch"])
def test_a_resumed_run_goes_on_bit_for_bit(given: Tensor | None, seed: int | None) -> None:
    model = stack(seed=seed, example_inputs=given)
    steps(model, 3)
    model[4](X)
    file = io.BytesIO()
    torch.save(sd.state_dict(model), file)
    expected = [dropped(model, lambda: model[2](X)), *steps(model, 20)]
    resumed = stack(seed=seed, example_inputs=given)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    sd.load_state_dict(resumed, state)
    assert [dropped(resumed, lambda: resumed[2](X)), *steps(resumed, 20)] == expected


def test_threads_are_balanced_each_by_itself() -> None:
    model, counts = stack(), []

    def work() -> None:
        for _ in range(50):
            out, absent = X, 0
            for block in model:
                was, out = out, block(out)
                absent += torch.equal(out, was)
            counts.append(absent)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [3] * 100


# Checkpointing and compiling


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_decides_as_the_first_did(reentrant: bool) -> None:
    one, other = stack(seed=2), stack(seed=2)
    x = X.clone().requires_grad_()
    for _ in range(10):
        gradients, counts = [], []
        for model, repeat in ((one, False), (other, True)):
            model.zero_grad(set_to_none=True)

            def run(model: nn.Module = model, repeat: bool = repeat) -> None:
                out = x
                for block in model:
                    out = checkpoint(block, out, use_reentrant=reentrant) if repeat else block(out)
                out.square().sum().backward()

            counts.append(dropped(model, run))
            gradients.append([p.grad for p in model.parameters()])
        assert counts[0] == counts[1]
        assert sum(counts[0]) == 3
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
def test_blocks_that_are_compiled_one_by_one_are_balanced() -> None:
    model = stack()
    for block in model:
        block.compile(backend="eager")
    assert {sum(step) for step in steps(model, 20)} == {3}


def test_a_whole_graph_draws_for_itself_and_says_so() -> None:
    compiled = torch.compile(stack(), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"draw='balanced' .* whole model"):
        compiled(X)
    torch.compile(stack(draw="auto"), backend="eager", fullgraph=True)(X)


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_balanced_is_for_whole_batches(mode: str) -> None:
    with pytest.raises(ValueError, match=f"is for mode='batch', got mode='{mode}'"):
        stack(mode=mode)
    with pytest.raises(ValueError, match=r"draw must be one of .* got 'even'"):
        stack(draw="even")


# Ranks


def train(rank: int) -> None:
    for options in ({}, {"seed": 7}, {"ranks": "shared"}):
        model = stack(12, p=0.6, schedule="linear", draw="auto", **options)
        torch.manual_seed(rank)
        ddp, different = DistributedDataParallel(model), 0
        for _ in range(30):

            def step(ddp: nn.Module = ddp) -> None:
                ddp(X).square().mean().backward()

            seen = torch.tensor(dropped(model, step))
            everyone = torch.stack(gathered(seen))
            assert len(everyone.sum(1).unique()) == 1  # no rank waits for another
            different += len(everyone.unique(dim=0)) > 1
            assert abs(seen.sum().item() - 3.9) < 1.0
        assert different == 0 if "ranks" in options else different > 20


def test_ranks_drop_equally_many_and_different_branches() -> None:
    launch(train, 4)


def shard(rank: int) -> None:
    for inside in (False, True):
        model = stack(8, p=0.45, draw="auto")
        for block in model:
            fully_shard(block.linear if inside else block)
        fully_shard(model)
        seen = []
        for _ in range(10):

            def step(model: nn.Module = model) -> None:
                model(X).square().mean().backward()

            seen.append(torch.tensor(dropped(model, step)))
            assert seen[-1].sum() in (3, 4)
        seen = torch.stack(seen)
        assert all(torch.equal(seen, other) for other in gathered(seen))
        assert len(seen.unique(dim=0)) > 3


def test_ranks_drop_the_same_branches_where_they_gather_each_other_s_weights() -> None:
    launch(shard, 2)


def part_of_the_ranks(rank: int) -> None:
    model = stack(draw="auto")
    if rank == 0:
        model(X)  # no collective is needed for a seed that all have in common
    dist.barrier()
    if rank == 1:
        assert {sum(step) for step in steps(model, 5)} == {3}


def test_ranks_that_come_to_their_first_decision_at_different_times_agree() -> None:
    launch(part_of_the_ranks, 2)


def use_rounds_of_rank_0(rank: int) -> None:
    # As transformers' Trainer: one file of rank 0, which all ranks load, as JSON.
    import json

    from stochastic_depth.applied import draws_of

    model = stack(12, p=0.6, schedule="linear", draw="auto")
    steps(model, 3)
    saved = [json.dumps(draws_of(model)[0].state(), default=Tensor.tolist)]
    expected = steps(model, 20)
    dist.broadcast_object_list(saved, src=0)
    resumed = stack(12, p=0.6, schedule="linear", draw="auto")
    draws_of(resumed)[0].set_state(json.loads(saved[0]))
    assert steps(resumed, 20) == expected


def test_the_state_of_one_rank_resumes_all() -> None:
    launch(use_rounds_of_rank_0, 2)

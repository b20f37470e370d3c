"""DistributedDataParallel on gloo processes: nothing hangs, nothing drifts."""

import itertools
import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from ranks import gathered, launch
from stochastic_depth.drop.draws import Draws

STEPS = 12
MODES = ["batch", "row", "subset"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.gamma * self.linear(x))


def build(mode: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), *[Block() for _ in range(4)]).double()
    return sd.apply(
        model,
        p=0.5,
        schedule="uniform",
        mode=mode,
        example_inputs=batch(0, 0),
        draw="independent",  # from torch's generator, so that one process can repeat it
    )


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(3, 4, generator=generator, dtype=torch.float64)


def same_everywhere(values: Tensor) -> bool:
    return all(torch.equal(values, others) for others in gathered(values))


def local_gradients(model: nn.Module, rank: int, step: int) -> list[Tensor]:
    """What one process computes alone from the decisions of ``rank``; zeros where dropped."""
    model.zero_grad()
    torch.manual_seed(100 * rank + step)
    model(batch(rank, step)).square().mean().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def train(rank: int, mode: str, options: dict, same_decisions: bool, accumulate: bool) -> None:
    model, alone = build(mode), build(mode)
    ddp = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        source = 0 if same_decisions else rank
        if accumulate:
            with ddp.no_sync():
                torch.manual_seed(100 * source + step + STEPS)
                ddp(batch(rank, step + STEPS)).square().mean().backward()
        torch.manual_seed(100 * source + step)
        ddp(batch(rank, step)).square().mean().backward()
        if not same_decisions and not accumulate:
            alone.load_state_dict(model.state_dict())
            expected = [local_gradients(alone, r, step) for r in range(dist.get_world_size())]
            for p, *grads in zip(model.parameters(), *expected, strict=True):
                torch.testing.assert_close(p.grad, sum(grads) / len(grads), rtol=1e-12, atol=1e-14)
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert weights.isfinite().all()
    assert same_everywhere(weights)
    dropped = torch.tensor([float(branch.dropped) for branch in sd.branches(model)])
    assert dropped.sum() > 0
    if mode != "subset":  # whose counts are fixed
        assert same_everywhere(dropped) == same_decisions


def train_all(rank: int, cases: list[tuple[dict, bool, bool]]) -> None:
    for mode in MODES:
        for options, same_decisions, accumulate in cases:
            try:
                train(rank, mode, options, same_decisions, accumulate)
            except BaseException as error:
                error.add_note(f"{mode=}, {options=}, {same_decisions=}, {accumulate=}")
                raise


def test_ddp_without_find_unused_parameters() -> None:
    # All cases in one group of processes: starting them takes longer than the steps.
    cases = [
        ({}, False, False),
        ({}, True, False),
        ({"static_graph": True}, False, False),
        ({"gradient_as_bucket_view": True}, False, False),
        ({}, False, True),
    ]
    launch(train_all, 2, cases)


@pytest.mark.zoo
def test_ddp_on_four_ranks() -> None:
    launch(train_all, 4, [({}, False, False)])


def shard_the_optimizer(rank: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit.script
        from torch.distributed.optim import ZeroRedundancyOptimizer
    for mode in MODES:
        model, twin = build(mode), build(mode)
        wrapped, whole = DistributedDataParallel(model), DistributedDataParallel(twin)
        sharded = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
        plain = torch.optim.AdamW(twin.parameters(), lr=0.01)
        for step in range(STEPS):
            for ddp, optimizer in ((wrapped, sharded), (whole, plain)):
                optimizer.zero_grad()
                torch.manual_seed(100 * rank + step)
                ddp(batch(rank, step)).square().mean().backward()
                optimizer.step()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
            assert same_everywhere(ours.detach())


def test_an_optimizer_whose_state_is_sharded() -> None:
    launch(shard_the_optimizer, 2)


def average_in_hooks(rank: int) -> None:
    """Each gradient when it comes: ranks have to come to them in the same order."""
    model = build("batch")
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
    torch.manual_seed(rank)  # by which they would decide apart
    for step in range(STEPS):
        before = [b.dropped for b in sd.branches(model)]
        model.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        got = [p.grad for p in model.parameters()]
        dropped = [b.dropped - n for b, n in zip(sd.branches(model), before, strict=True)]
        first, *blocks = model
        y = first(batch(rank, step))
        for block, absent in zip(blocks, dropped, strict=True):
            if not absent:
                y = y + 2.0 * torch.tanh(block.gamma * block.linear(y))
        weights = list(model.parameters())
        own = torch.autograd.grad(y.square().mean(), weights, materialize_grads=True)
        for g, total in zip(got, own, strict=True):
            dist.all_reduce(total)
            torch.testing.assert_close(g, total)


def test_gradients_that_are_averaged_in_hooks_are_those_of_the_same_parameters() -> None:
    launch(average_in_hooks, 2)


def load_what_the_first_rank_saved(rank: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[Block() for _ in range(4)]).double()
    options = {"seed": 7, "mode": "subset", "ranks": "separate", "example_inputs": batch(0, 0)}
    sd.apply(net, p=0.3, schedule="uniform", **options)
    net(batch(0, 0))
    saved = [sd.state_dict(net)]
    sd.load_state_dict(net, saved[0])  # its own, without a warning
    before = [net(batch(0, 0)).detach() for _ in range(STEPS)]
    dist.broadcast_object_list(saved)
    with pytest.warns(match="that of rank 0, and this is rank 1") if rank else nullcontext():
        sd.load_state_dict(net, saved[0])
    after = torch.stack([net(batch(0, 0)).detach() for _ in range(STEPS)])
    assert not same_everywhere(after)
    assert torch.equal(after, torch.stack(before)) is (rank == 0)


def test_ranks_that_load_the_state_of_one_go_on_to_decide_apart() -> None:
    launch(load_what_the_first_rank_saved, 2)


# --- one option says whether decisions are shared


class Recomputed(nn.Module):
    def __init__(self, blocks: nn.Sequential, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks, self.reentrant = blocks, reentrant

    def forward(self, x: Tensor) -> Tensor:
        first, *blocks = self.blocks
        x = first(x)
        for block in blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def drops(rank: int, mode: str, reentrant: bool | None = None, **options: object) -> Tensor:
    """What every branch dropped in each step of training under DDP; weights are compared."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), *[Block() for _ in range(4)]).double()
    sd.apply(net, p=0.5, schedule="uniform", mode=mode, example_inputs=batch(0, 0), **options)
    model = DistributedDataParallel(Recomputed(net, reentrant), static_graph=reentrant is True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    branches = sd.branches(model)
    seen = []
    torch.manual_seed(rank)  # the ranks' other random streams
    for step in range(STEPS):
        before = [branch.dropped for branch in branches]
        optimizer.zero_grad()
        torch.rand(rank)
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        seen.append([b.dropped - d for b, d in zip(branches, before, strict=True)])
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert same_everywhere(weights)
    return torch.cat([torch.tensor(seen).double().flatten(), weights])


def share_and_separate(rank: int, ways: list[tuple[str, str]]) -> None:
    for (mode, draw), seed in itertools.product(ways, (None, 7)):
        shared = drops(rank, mode, ranks="shared", seed=seed, draw=draw)
        separate = drops(rank, mode, ranks="separate", seed=seed, draw=draw)
        auto = drops(rank, mode, seed=seed, draw=draw)
        count = len(shared) - sum(p.numel() for p in build(mode).parameters())
        if mode != "subset":
            assert same_everywhere(shared[:count])
            others = [x[:count] for r, x in enumerate(gathered(separate)) if r != rank]
            assert not any(torch.equal(separate[:count], x) for x in others)
        if draw == "balanced":
            steps = separate[:count].view(STEPS, -1)
            assert (steps.sum(1) == 2).all()  # of 4 at .5
            assert same_everywhere(shared[:count].view(STEPS, -1).sum(1))
        assert torch.equal(auto, separate)  # nothing is sharded
        if seed is None:
            continue
        # The same number of ranks and the same seeds repeat a run bit for bit.
        assert torch.equal(shared, drops(rank, mode, ranks="shared", seed=seed, draw=draw))
        assert torch.equal(separate, drops(rank, mode, ranks="separate", seed=seed, draw=draw))
        for reentrant in (True, False):  # which draws tickets from torch's generator
            for how, plain in (("shared", shared), ("separate", separate)):
                again = drops(rank, mode, reentrant, ranks=how, seed=seed, draw=draw)
                # Exact but for the order in which DDP adds up gradients.
                torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.zoo)])
def test_decisions_are_shared_or_separate_and_replayed(ranks: int) -> None:
    ways = [*((mode, "independent") for mode in MODES), ("batch", "balanced")]
    launch(share_and_separate, ranks, ways)


def apply_first(rank: int) -> None:
    for seed in (None, 7):
        torch.manual_seed(rank)
        source = Draws(seed, "shared")
        with mock.patch.object(dist, "is_initialized", return_value=False):  # not yet
            source.generator("shared")
            own = source.generator("separate")
        together = torch.rand(5, generator=source.generator("shared"))
        assert same_everywhere(together)
        if seed is not None:
            apart = torch.rand(5, generator=source.generator("separate"))
            assert not any(
                torch.equal(apart, other) for r, other in enumerate(gathered(apart)) if r != rank
            )
            assert own is not source.generator("separate")


def test_a_model_may_decide_before_there_are_other_ranks() -> None:
    launch(apply_first, 2)


# --- a module inside of a branch that waits for the other ranks


class OnCPU(nn.SyncBatchNorm):
    """SyncBatchNorm and DDP with it refuse the CPU; this waits for the other ranks as it does."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            total = x.detach().mean(0)
            dist.all_reduce(total)
            self.running_mean.lerp_(total / dist.get_world_size(), 0.1)
        return x


class Synchronised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), OnCPU(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.linear(x))


def synchronise(rank: int) -> None:
    for mode, shared in itertools.product(MODES, ("auto", "shared", "separate")):
        torch.manual_seed(0)
        net = nn.Sequential(*[Synchronised() for _ in range(3)]).double()
        options = {"mode": mode, "ranks": shared, "example_inputs": batch(0, 0)}
        sd.apply(net, p=0.5, schedule="uniform", **options)
        torch.manual_seed(rank)
        if mode == "row" or shared == "separate":
            with pytest.raises(RuntimeError, match=r"runs a OnCPU, which waits for the other"):
                net(batch(rank, 0))
            continue
        for step in range(STEPS):
            net(batch(rank, step)).square().mean().backward()
        means = torch.cat([block.norm.running_mean for block in net])
        assert same_everywhere(means)
        assert means.abs().sum() > 0
    layer = sd.StochasticDepth(Synchronised(), p=0.5).double()
    for step in range(STEPS):
        layer(batch(rank, step))
    with pytest.raises(RuntimeError, match="StochasticDepth runs a OnCPU"):
        sd.StochasticDepth(Synchronised(), p=0.5, mode="row").double()(batch(rank, 0))
    x, f = batch(rank, 0), nn.Sequential(nn.Linear(4, 4), OnCPU(4)).double()
    for mode in MODES:
        with pytest.raises(
            RuntimeError, match=r"residual\(\) runs a OnCPU.*generator= of the same"
        ):
            sd.residual(x, f, p=0.5, mode=mode)
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            sd.residual(x, f, p=0.5, mode=mode, generator=generator)
    assert same_everywhere(f[1].running_mean)


def test_synchronised_statistics_make_the_ranks_agree() -> None:
    launch(synchronise, 2)

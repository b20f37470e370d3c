"""FSDP: no collective is missed, and gradients are those of one process with the same decisions."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from ranks import gathered, launch

STEPS, ROWS, P, LR, SEED = 13, 3, 0.5, 0.05, 7
MODES = ["batch", "row", "subset"]
RANKS = ["auto", "shared", "separate"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.gamma * self.linear(x))


class Net(nn.Sequential):
    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        first, *blocks = self
        x = first(x)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


def build(how: str = "") -> nn.Sequential:
    torch.manual_seed(0)
    net = Net(nn.Linear(4, 4), *[Block() for _ in range(4)]).double()
    net.recompute = how.endswith("checkpoint")
    return net


class Draw:
    """The weights that the library's draws come to, drawn again from their definition."""

    def __init__(self, mode: str, source: torch.Generator) -> None:
        self.mode, self.source = mode, source

    def weights(self) -> Tensor:
        unit = 1 << 53
        number = int(torch.randint(unit, (1,), generator=self.source))
        if self.mode == "batch":
            return torch.full((1, 1), float(number / unit >= P) / (1 - P), dtype=torch.float64)
        samples = torch.Generator().manual_seed(number)
        if self.mode == "subset":
            k = round(ROWS * (1 - P))
            rows = torch.randperm(ROWS, generator=samples)[:k]
            return torch.zeros(ROWS, 1).index_fill(0, rows, ROWS / k)
        drawn = torch.rand(ROWS, 1, dtype=torch.float64, generator=samples)
        return (drawn >= P) / (1 - P)


class Masked(nn.Module):
    """The same network by hand, every branch computed and weighed by decisions of ``source``."""

    def __init__(self, mode: str, source: torch.Generator) -> None:
        super().__init__()
        self.net, self.draw = build(), Draw(mode, source)

    def forward(self, x: Tensor) -> Tensor:
        first, *blocks = self.net
        x = first(x)
        for block in blocks:
            x = x + self.draw.weights() * torch.tanh(block.gamma * block.linear(x))
        return x


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)


def expected(mode: str, weights: dict[str, Tensor], step: int, shared: Tensor | None) -> list:
    """The mean gradient over the ranks, from what one process computes with their decisions."""
    total = [torch.zeros_like(w) for w in weights.values()]
    for rank in range(dist.get_world_size()):
        source = torch.Generator().manual_seed(100 * rank + step)
        if shared is not None:
            source.set_state(shared)
        masked = Masked(mode, source)
        leaves = {f"net.{k}": w.clone().requires_grad_() for k, w in weights.items()}
        loss = functional_call(masked, leaves, (batch(rank, step),)).square().mean()
        for t, g in zip(total, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            t += g / dist.get_world_size()
    return total


@functools.cache  # each makes process groups
def hybrid_mesh() -> DeviceMesh:
    shape = 2, dist.get_world_size() // 2
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))


def shard(model: nn.Sequential, how: str) -> nn.Module:
    kind, _, option = how.partition(":")
    if kind == "fsdp1":
        unit, _, original = option.partition(",")
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({{"block": Block, "inside": nn.Linear}[unit]}),
            use_orig_params=original == "original",
            device_id=torch.device("cpu"),
        )
    precision: dict[str, Any] = {}
    if option == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float64)
        precision["mp_policy"] = policy
    if option == "hybrid":
        precision["mesh"] = hybrid_mesh()
    if kind == "block":
        for block in model[1:]:
            fully_shard(block, reshard_after_forward=option != "keep", **precision)
    elif kind == "inside":
        for block in model[1:]:
            fully_shard(block.linear)
    return fully_shard(model, **precision)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """FSDP1's parameters, unsharded."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield
    else:
        yield


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    with whole(model):
        return {
            name.replace("_fsdp_wrapped_module.", ""): (
                p.full_tensor() if isinstance(p, DTensor) else p
            )
            .detach()
            .clone()
            for name, p in model.named_parameters()
        }


def train(rank: int, how: str, mode: str, ranks: str, after: bool) -> None:
    options = {"p": P, "schedule": "uniform", "mode": mode, "ranks": ranks}
    units_share = "inside" in how or (mode == "batch" and how != "root")
    shared = ranks == "shared" or (ranks == "auto" and units_share)
    model = build(how)
    if after:
        shard(model, how)
    options |= {"example_inputs": batch(0, 0), "draw": "independent"}  # as the reference draws
    sd.apply(model, seed=SEED if shared else None, **options)
    sharded = model if after else shard(model, how)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=LR)
    stream = torch.Generator().manual_seed(SEED)
    # The gradients are read off the step; bfloat16 has 8 bits, and five layers add up.
    tolerances = {"rtol": 1e-9, "atol": 1e-12}
    if how.endswith("bf16"):
        tolerances = {"rtol": 0.05, "atol": 0.02}
    draw = Draw(mode, stream)
    for step in range(STEPS):
        torch.manual_seed(100 * rank + step)
        optimizer.zero_grad()
        sharded(batch(rank, step)).square().mean().backward()
        state = stream.get_state() if shared else None
        for _ in range(4):
            draw.weights()
        compared = step % 6 == 0  # which takes longer than the step
        before = weights_of(sharded) if compared else {}
        optimizer.step()
        weights = weights_of(sharded) if compared else {}
        gradients = expected(mode, before, step, state) if compared else []
        for name, gradient in zip(before, gradients, strict=True):
            moved = (before[name] - weights[name]) / LR
            torch.testing.assert_close(moved, gradient, **tolerances)
    weights = weights_of(sharded)
    flat = torch.cat([w.flatten() for w in weights.values()])
    assert all(torch.equal(flat, other) for other in gathered(flat))
    dropped = torch.tensor([float(branch.dropped) for branch in sd.branches(model)])
    assert dropped.sum() > 0
    if mode != "subset":  # whose counts are fixed
        same = all(torch.equal(dropped, other) for other in gathered(dropped))
        assert same == shared
    evaluated = sharded.eval()(batch(0, 0))
    plain = build()
    plain.load_state_dict(weights)
    torch.testing.assert_close(evaluated, plain.eval()(batch(0, 0)), **tolerances)
    assert sd.branches(sd.remove(model)) == []
    torch.testing.assert_close(sharded.train()(batch(0, 0)), evaluated, rtol=1e-12, atol=1e-14)


def refuses(how: str, mode: str, ranks: str) -> bool:
    """Whether ranks could wait for each other: FSDP gathers something inside of a branch."""
    inside = "inside" in how
    return inside and (mode == "row" or ranks == "separate")


Case = tuple[str, str, str]  # how it is sharded, the mode, how decisions are shared


def train_all(rank: int, cases: list[Case]) -> None:
    for i, (how, mode, ranks) in enumerate(cases):
        after = i % 2 == 1 and not how.startswith("fsdp1")
        try:
            if refuses(how, mode, ranks):
                with pytest.raises(RuntimeError, match="waits for the other ranks"):
                    train(rank, how, mode, ranks, after)
            else:
                train(rank, how, mode, ranks, after)
        except BaseException as error:
            error.add_note(f"{how=}, {mode=}, {ranks=}, {after=}")
            raise


FSDP2 = ["block:reshard", "block:keep", "block:checkpoint", "block:bf16", "root", "inside"]
HYBRID = "block:hybrid"
FSDP1 = [f"fsdp1:{u},{o}" for u in ("block", "inside") for o in ("original", "flat")]


def cases(ways: list[str], ranks: list[str]) -> list[Case]:
    return list(itertools.product(ways, MODES, ranks))


def test_fully_shard_on_two_ranks() -> None:
    either = [(how, "batch", c) for how in ("block:reshard", "inside") for c in RANKS[1:]]
    launch(train_all, 2, [*cases(FSDP2, ["auto"]), *either, (HYBRID, "row", "auto")])


def drop_units(rank: int) -> None:
    """A unit of FSDP2 that is not called gathers nothing either."""
    for options in ({"ranks": "separate"}, {"mode": "row"}):
        model = shard(build(), "block:reshard")
        sd.apply(model, P, blocks="all", example_inputs=batch(0, 0), **options)
        with pytest.raises(RuntimeError, match=r"waits for the other ranks.*not the whole of it"):
            model(batch(rank, 0))
    model = shard(build(), "block:reshard")
    sd.apply(model, P, schedule="uniform", blocks="all", example_inputs=batch(0, 0))
    torch.manual_seed(rank)
    for step in range(STEPS):
        model(batch(rank, step)).square().mean().backward()
    dropped = torch.tensor([branch.dropped for branch in sd.branches(model)])
    assert dropped.any()
    assert all(torch.equal(dropped, other) for other in gathered(dropped))


def test_whole_blocks_that_are_units_are_dropped_on_all_ranks_or_on_none() -> None:
    launch(drop_units, 2)


def train_fsdp1(rank: int) -> None:
    for how in FSDP1:
        model = build()
        wrapped = shard(model, how)
        for module in (wrapped, model):
            with pytest.raises(ValueError, match="apply first and wrap then"):
                sd.apply(module, 0.2)
    train_all(rank, cases(FSDP1, ["auto"]))


def test_fsdp1_on_two_ranks() -> None:
    launch(train_fsdp1, 2)


@pytest.mark.zoo
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ways", [[*FSDP2, HYBRID], FSDP1], ids=["fully_shard", "fsdp1"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_way_to_shard(ranks: int, ways: list[str]) -> None:
    launch(train_all, ranks, cases(ways, RANKS), seconds=1100)


class Split(nn.Module):
    """A block that two ranks compute together."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def split_in_two(rank: int, after: bool, names: tuple[str, ...] | None) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*[Split() for _ in range(4)]).double()
    model, x = copy.deepcopy(plain), batch(0, 0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=names)

    def parallel() -> None:
        for block in model:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

    if after:
        parallel()
    sd.apply(model, P, schedule="uniform", example_inputs=x)
    if not after:
        parallel()
    torch.manual_seed(rank)  # by which they would decide apart
    for step in range(STEPS):
        x, before = batch(0, step), [b.dropped for b in sd.branches(model)]
        model.zero_grad()
        model(x).square().mean().backward()
        dropped = [b.dropped - old for b, old in zip(sd.branches(model), before, strict=True)]
        assert all(gathered(torch.tensor(dropped))[0].eq(torch.tensor(dropped)))
        y = x
        for block, absent in zip(plain, dropped, strict=True):
            y = y + (0 if absent else 1 / (1 - P)) * (block(y) - y)
        plain.zero_grad()
        y.square().mean().backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            got = ours.grad
            got = got.full_tensor() if isinstance(got, DTensor) else got
            want = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(torch.zeros_like(want) if got is None else got, want)


def split_all(rank: int) -> None:
    for after, names in ((False, ("tp",)), (True, ("tp",)), (False, None), (True, ("model",))):
        split_in_two(rank, after, names)


def test_tensor_parallel_blocks_are_dropped_on_all_ranks_or_on_none() -> None:
    launch(split_all, 2)


class Scaled(Block):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.linear(x)
        return x + torch.tanh(self.gamma * (h if scale is None else h * scale))


class Scaling(nn.ModuleList):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        for block in self:
            x = block(x, scale)
        return x


def meet_a_form_alone(rank: int) -> None:
    """The second rank calls the model in a form that was not seen, and the first one does not."""
    torch.manual_seed(0)
    plain = Scaling(Scaled() for _ in range(4)).double()
    scales = [torch.ones(1, dtype=torch.float64), None] if rank else [None]
    for seen in (True, False):
        model = sd.apply(copy.deepcopy(plain), P, schedule="uniform", example_inputs=batch(0, 0))
        if seen:
            for scale in (torch.ones(1, dtype=torch.float64), None):
                model(batch(0, 0), scale)
        for block in model:
            fully_shard(block)
        fully_shard(model)
        for step in range(STEPS):
            scale = scales[step % len(scales)]
            before = [b.dropped for b in sd.branches(model)]
            told = rank and not seen and step == 0
            model.zero_grad()
            with pytest.warns(match="FSDP shards it") if told else contextlib.nullcontext():
                model(batch(rank, step), scale).square().mean().backward()
            dropped = [b.dropped - n for b, n in zip(sd.branches(model), before, strict=True)]
            y = batch(rank, step)
            for block, absent in zip(plain, dropped, strict=True):
                weight = 1.0 if scale is not None and not seen else 1 / (1 - P)
                y = y + (0 if absent else weight) * (block(y, scale) - y)
            plain.zero_grad()
            y.square().mean().backward()
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                mean = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
                torch.testing.assert_close(ours.grad.full_tensor(), mean)
    model = sd.apply(copy.deepcopy(plain), P, example_inputs=batch(0, 0))
    for block in model:
        fully_shard(block.linear)
    fully_shard(model)
    with pytest.raises(RuntimeError, match="in a new form, and FSDP shards it"):
        model(batch(0, 0), torch.ones(1, dtype=torch.float64))


def test_a_rank_that_meets_a_new_form_alone_waits_for_nobody() -> None:
    launch(meet_a_form_alone, 2)

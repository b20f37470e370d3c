"""Branches that several ranks compute together: all of them drop it, or the same samples of it."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import stochastic_depth as sd
from ranks import gathered, launch

SEED, STEPS, P = 7, 6, 0.5


class Copied(torch.autograd.Function):
    """Hands on what all ranks have, and adds up their gradients, as Megatron does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Summed(torch.autograd.Function):
    """Adds up what the ranks have computed."""

    functional = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if Summed.functional:
            return functional.all_reduce(x, "sum", dist.group.WORLD)
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Linear(nn.Linear):
    """One that has its share of the weights: of what comes out, or of what goes in."""

    share = -1

    def forward(self, x: Tensor) -> Tensor:
        if self.share == 0:
            x = Copied.apply(x)
        x = super().forward(x)
        return Summed.apply(x) if self.share == 1 else x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up, self.down = Linear(4, 8, bias=False), Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def build(how: str) -> nn.Sequential:
    """The network, whole on each rank (``how`` is empty), or split between them."""
    torch.manual_seed(0)
    net = nn.Sequential(*[Block() for _ in range(4)]).double()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if how == "dtensor":
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
        for block in net:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    elif how:
        Summed.functional = how == "functional"
        for block in net:
            for share, linear in enumerate((block.up, block.down)):
                mine = linear.weight.detach().chunk(ranks, share)[rank].clone()
                linear.weight, linear.share = nn.Parameter(mine), share
    return net


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


def train(rank: int, how: str, seed: int | None, **options: Any) -> None:
    options |= {"p": P, "schedule": "uniform", "example_inputs": batch(0)}
    model = sd.apply(build(how), seed=seed, **options)
    twin = sd.apply(build(""), seed=seed, **options | {"ranks": "shared"})
    torch.manual_seed(rank)  # by which they would decide apart
    for step in range(STEPS):
        outs = []
        for net in (model, twin):
            net.zero_grad()
            outs.append(net(batch(step)))
            outs[-1].square().mean().backward()
        assert all(torch.equal(outs[0], other) for other in gathered(outs[0].detach()))
        if seed is not None:  # with the same decisions
            torch.testing.assert_close(*outs)
            for block, whole in zip(model, twin, strict=True):
                torch.testing.assert_close(block.norm.weight.grad, whole.norm.weight.grad)
    counts = [torch.tensor([b.dropped for b in sd.branches(net)]) for net in (model, twin)]
    assert counts[0].any()
    assert all(torch.equal(counts[0], other) for other in gathered(counts[0]))


def train_all(rank: int) -> None:
    for how in ("by hand", "functional", "dtensor"):
        try:
            train(rank, how, None)  # balanced, with a number of branches that is the same anyway
            if how == "functional":
                continue
            for mode in ("batch", "subset"):
                train(rank, how, SEED, mode=mode, draw="independent")
            for options in ({"mode": "row"}, {"ranks": "separate", "mode": "subset"}):
                model = sd.apply(build(how), P, example_inputs=batch(0), **options)
                with pytest.raises(RuntimeError, match="waits for the other ranks"):
                    model(batch(0))
            whole = sd.apply(build(how), P, blocks="all", example_inputs=batch(0))
            torch.manual_seed(rank)
            for step in range(STEPS):
                out = whole(batch(step)).detach()
                assert all(torch.equal(out, other) for other in gathered(out))
        except BaseException as error:
            error.add_note(how)
            raise


def test_ranks_that_compute_a_branch_together_decide_alike() -> None:
    launch(train_all, 2)


def compile_all(rank: int) -> None:
    # dynamo looks at .grad of what it is given, which warns for activations
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
    # as it makes an object of a custom Function that it traces, which is torch's own, too
    warnings.filterwarnings("ignore", ".* should not be instantiated", DeprecationWarning)
    model = sd.apply(build("dtensor"), P, example_inputs=batch(0))
    fast = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="ranks compute a branch together"):
        fast(batch(0))
    model = sd.apply(build("dtensor"), P, mode="subset", example_inputs=batch(0))
    model[0].compile(backend="eager")
    with pytest.raises(RuntimeError, match="ranks compute a branch together"):
        model(batch(0))
    model = sd.apply(build("dtensor"), P, schedule="uniform", example_inputs=batch(0))
    model[0].compile(backend="eager")
    torch.manual_seed(rank)
    for step in range(STEPS):
        out = model(batch(step)).detach()
        assert all(torch.equal(out, other) for other in gathered(out))


def test_a_graph_that_draws_for_itself_does_not_drop_what_ranks_compute_together() -> None:
    launch(compile_all, 2)

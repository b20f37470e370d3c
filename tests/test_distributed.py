"""DistributedDataParallel on two gloo processes: nothing hangs, nothing drifts."""

import datetime
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd

STEPS = 30
RANKS = 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.gamma * self.linear(x))


def build(mode: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), *[Block() for _ in range(4)]).double()
    return sd.apply(model, p=0.5, schedule="uniform", mode=mode)


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(3, 4, generator=generator, dtype=torch.float64)


def local_gradients(model: nn.Module, rank: int, step: int) -> list[Tensor]:
    """What one process computes alone from the coins of ``rank``; zeros where dropped."""
    model.zero_grad()
    torch.manual_seed(100 * rank + step)
    model(batch(rank, step)).square().mean().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def gathered(values: Tensor) -> list[Tensor]:
    everyone = [torch.empty_like(values) for _ in range(RANKS)]
    dist.all_gather(everyone, values)
    return everyone


def train(rank: int, mode: str, options: dict, same_coins: bool, accumulate: bool) -> None:
    model, alone = build(mode), build(mode)
    ddp = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        coins = 0 if same_coins else rank
        if accumulate:
            with ddp.no_sync():
                torch.manual_seed(100 * coins + step + STEPS)
                ddp(batch(rank, step + STEPS)).square().mean().backward()
        torch.manual_seed(100 * coins + step)
        ddp(batch(rank, step)).square().mean().backward()
        if not same_coins and not accumulate:
            alone.load_state_dict(model.state_dict())
            expected = [local_gradients(alone, r, step) for r in range(RANKS)]
            for p, *grads in zip(model.parameters(), *expected, strict=True):
                torch.testing.assert_close(p.grad, sum(grads) / RANKS, rtol=1e-12, atol=1e-14)
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert weights.isfinite().all()
    assert torch.equal(*gathered(weights))
    dropped = torch.tensor([float(branch.dropped) for branch in sd.branches(model)])
    assert dropped.sum() > 0
    if mode != "subset":  # whose counts are fixed
        assert torch.equal(*gathered(dropped)) == same_coins


def run_all(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    timeout = datetime.timedelta(seconds=60)  # the watchdog: a hang becomes an error
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timeout)
    for mode in ("batch", "row", "subset"):
        for options, same_coins, accumulate in (
            ({}, False, False),
            ({}, True, False),
            ({"static_graph": True}, False, False),
            ({"gradient_as_bucket_view": True}, False, False),
            ({}, False, True),
        ):
            try:
                train(rank, mode, options, same_coins, accumulate)
            except BaseException as error:
                error.add_note(f"{mode=}, {options=}, {same_coins=}, {accumulate=}")
                raise
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_ddp_without_find_unused_parameters():
    # All cases in one pair of processes: starting them takes longer than the steps.
    mp.spawn(run_all, (free_port(),), nprocs=RANKS)

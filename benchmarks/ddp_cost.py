"""What a step costs under DistributedDataParallel, on two processes of this machine.

    python -m benchmarks.ddp_cost
    python -m benchmarks.ddp_cost --rounds 60 --width 512

Sides, interleaved step by step in one run: plain DDP; DDP with ours at each rate; and, where a
layer is skipped by a Python ``if``, DDP with find_unused_parameters=True, which that needs. The
medians over the rounds with their quartiles, and the ratio to plain DDP in the same round.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd

from .harness import machine, turn

RATES = (0.0, 0.1, 0.5)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Skipping(nn.Module):
    """The layers of ``model``, each skipped by a Python ``if``."""

    def __init__(self, model: nn.Sequential, p: float) -> None:
        super().__init__()
        self.layers, self.p = model, p

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.rand(1).item() >= self.p:
                x = layer(x)
        return x


def build_sides(width: int, depth: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(*[Layer(width) for _ in range(depth)])
    sides: dict[str, nn.Module] = {"plain": DistributedDataParallel(copy.deepcopy(model))}
    for p in RATES:
        ours = sd.apply(copy.deepcopy(model), p=p, schedule="uniform")
        sides[f"ours, p={p}"] = DistributedDataParallel(ours)
    for p in RATES:
        skipping = Skipping(copy.deepcopy(model), p)
        sides[f"find_unused_parameters, p={p}"] = DistributedDataParallel(
            skipping, find_unused_parameters=True
        )
    return sides


def run(rank: int, ranks: int, store: str, *args: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    measure(rank, *args)
    dist.destroy_process_group()  # when DDP is freed: after it, gloo may wait for ever


def measure(rank: int, width: int, depth: int, rounds: int, same: bool) -> None:
    sides = build_sides(width, depth)
    x = torch.randn(256, width, requires_grad=True)  # for a step that drops all
    torch.manual_seed(0 if same else rank)
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(-3, rounds):
        for name in turn(names, i):
            model = sides[name]
            model.zero_grad(set_to_none=True)
            dist.barrier()
            start = time.perf_counter()
            model(x).square().mean().backward()
            dist.barrier()  # the step takes as long as the slowest rank
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    if rank == 0:
        report(times)


def report(times: dict[str, list[float]]) -> None:
    print("| side | ms, median (quartiles) | / plain, median (quartiles) |\n|---|---|---|")
    for name, taken in times.items():
        ratios = [t / plain for t, plain in zip(taken, times["plain"], strict=True)]
        print(f"| {name} | {quartiles([1e3 * t for t in taken], 1)} | {quartiles(ratios, 2)} |")


def quartiles(values: list[float], digits: int) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--same-coins", action="store_true", help="all ranks toss the same")
    args = parser.parse_args()
    print(machine(torch.device("cpu")))
    print(f"{args.ranks} gloo ranks, {args.depth} layers of width {args.width}, 256 rows each\n")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        given = (args.ranks, store, args.width, args.depth, args.rounds, args.same_coins)
        mp.spawn(run, given, nprocs=args.ranks)


if __name__ == "__main__":
    main()

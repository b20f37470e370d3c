"""What balanced decisions are worth: time a step on several ranks, and memory on one.

    python -m benchmarks.ranks
    python -m benchmarks.ranks --ranks 2 --compute --width 384     # the processor is the device
    python -m benchmarks.ranks --parts memory --steps 1000

Time: DistributedDataParallel on gloo processes of this machine, a stack of equal blocks, rates that
rise linearly. Sides, interleaved step by step in one run: the plain model; every rank draws for
itself (separate); all ranks draw the same (shared); equally many branches on all ranks, different
ones (balanced). A rank is taken to have a device of its own: a branch waits for some milliseconds
in its forward, twice as long in its backward, and leaves the processor to the others, since 8 ranks
that compute on 2 cores would wait for the cores and not for each other. ``--compute`` waits for
nothing and computes.

Memory: bytes that autograd saves in the forward, each storage once, parameters not counted; the
most of many steps of one process. And the largest batch of which that fits into what the plain
model saves, with the steps of another run that do not fit.
"""

import argparse
import copy
import json
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
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd
from stochastic_depth.drop.balance import slowest

from .harness import machine, turn

SIDES: dict[str, dict[str, str]] = {
    "separate": {"draw": "independent", "ranks": "separate"},
    "shared": {"draw": "independent", "ranks": "shared"},
    "balanced": {"draw": "balanced", "ranks": "separate"},
}
ON_ONE = {"independent": SIDES["separate"], "balanced": SIDES["balanced"]}
WARM_UP = 3


class Busy(nn.Linear):
    """A linear layer on a device that is busy for so long, twice as long in backward."""

    def __init__(self, width_in: int, width: int, seconds: float) -> None:
        super().__init__(width_in, width)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if self.seconds:
            time.sleep(self.seconds)
            if output.requires_grad:
                output.register_hook(self.wait_twice)
        return output

    def wait_twice(self, _: Tensor) -> None:
        time.sleep(2 * self.seconds)


class Layer(nn.Module):
    def __init__(self, width: int, seconds: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), Busy(4 * width, width, seconds)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def stack(args: argparse.Namespace, seconds: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Layer(args.width, seconds) for _ in range(args.depth)])


def build_sides(
    model: nn.Module, p: float, ways: dict[str, dict[str, str]]
) -> dict[str, nn.Module]:
    sides: dict[str, nn.Module] = {"plain": copy.deepcopy(model)}
    for name, way in ways.items():
        sides[name] = sd.apply(copy.deepcopy(model), p=p, mode="batch", **way)
    return sides


# Time


class Reducer:
    """Sums the gradients over the ranks, and notes when the last of this rank's were there."""

    def __init__(self) -> None:
        self.ready = 0.0

    def hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.ready = time.perf_counter()
        mean = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(mean, async_op=True).get_future().then(lambda done: done.value()[0])


def run(rank: int, ranks: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(Path(folder, "store")), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    taken, waited = measure(rank, args)
    gathered = [torch.empty_like(waited) for _ in range(ranks)]
    dist.all_gather(gathered, waited)
    if rank == 0:
        result = {"taken": taken.tolist(), "waited": torch.stack(gathered).mean(0).tolist()}
        Path(folder, "result").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()  # when DDP is freed: after it, gloo may wait for ever


def measure(rank: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Milliseconds of every step, and those that this rank waited for, a row for each side."""
    model = stack(args, 0.0 if args.compute else args.ms / 1e3)
    sides = {n: DistributedDataParallel(m) for n, m in build_sides(model, args.p, SIDES).items()}
    reducers = {name: Reducer() for name in sides}
    for name, side in sides.items():
        side.register_comm_hook(None, reducers[name].hook)
    names = list(sides)
    x = torch.randn(args.batch, args.width, requires_grad=True)  # for a step that drops all
    torch.manual_seed(rank + 1)
    taken, waited = torch.zeros(2, len(names), args.rounds)
    for i in range(-WARM_UP, args.rounds):
        for name in turn(names, i):
            sides[name].zero_grad(set_to_none=True)
            dist.barrier()
            start = time.perf_counter()
            sides[name](x).square().mean().backward()
            done = time.perf_counter()
            dist.barrier()  # the step takes as long as the slowest rank
            if i >= 0:
                side = names.index(name)
                taken[side, i] = 1e3 * (time.perf_counter() - start)
                waited[side, i] = 1e3 * (done - reducers[name].ready)
    return taken, waited


def time_tables(args: argparse.Namespace) -> list[str]:
    names = ["plain", *SIDES]
    rows: dict[str, dict[str, list[float]]] = {}
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run, (ranks, folder, args), nprocs=ranks)
            result: dict[str, Any] = json.loads(Path(folder, "result").read_text())
        taken, waited = result["taken"], result["waited"]
        means = [statistics.mean(times) for times in taken]
        for question, values in {
            "How long does a step take? Mean, ms.": means,
            "How long, as a ratio to the plain model?": [mean / means[0] for mean in means],
            "Which share of the branches' compute should the slowest rank execute, by the rates?": [
                1.0,
                *expected(args, ranks),
            ],
            "How much do steps differ? Standard deviation, ms.": [
                statistics.stdev(times) for times in taken
            ],
            "How long does a rank wait for the others, and for their gradients? Mean, ms.": [
                statistics.mean(times) for times in waited
            ],
        }.items():
            rows.setdefault(question, {})[f"{ranks} ranks"] = values
    return [table(question, names, cells) for question, cells in rows.items()]


def expected(args: argparse.Namespace, ranks: int) -> list[float]:
    rates = [args.p * level / args.depth for level in range(1, args.depth + 1)]
    costs = [1.0] * args.depth
    return [
        slowest(rates, costs, ranks, "independent"),
        slowest(rates, costs, ranks, "shared"),
        slowest(rates, costs, ranks, "balanced"),
    ]


# Memory


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps of a forward until its backward, beside the parameters."""
    sizes: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return saved.detach()

    with saved_tensors_hooks(pack, lambda saved: saved):
        output = model(x)  # keeps what is saved alive, so that no address comes twice
    del output
    return sum(sizes.values())


def most_saved(model: nn.Module, args: argparse.Namespace, batch: int) -> list[int]:
    x = torch.randn(batch, args.width, requires_grad=True)
    return [saved_bytes(model, x) for _ in range(args.steps)]


def memory_tables(args: argparse.Namespace) -> list[str]:
    sides = build_sides(stack(args), args.p, ON_ONE)
    torch.manual_seed(1)
    saved = {name: most_saved(side, args, args.batch) for name, side in sides.items()}
    budget = max(saved["plain"])
    fits = {name: int(args.batch * budget / max(values)) for name, values in saved.items()}
    again = {name: most_saved(side, args, fits[name]) for name, side in sides.items()}
    here = f"batch {args.batch}"
    columns = list(sides)
    return [
        table(
            f"How much is saved for backward, at the most of {args.steps} steps? Plain = 1.",
            columns,
            {here: [max(values) / budget for values in saved.values()]},
        ),
        table(
            "And in the mean?",
            columns,
            {here: [statistics.mean(values) / budget for values in saved.values()]},
        ),
        table(
            f"Which is the largest batch that fits into {budget / 2**20:.1f} MiB, what the plain "
            f"model saves at {here}, in all {args.steps} steps?",
            columns,
            {"batch": list(fits.values())},
        ),
        table(
            f"In how many of {args.steps} further steps does that batch not fit?",
            columns,
            {"steps": [sum(value > budget for value in values) for values in again.values()]},
        ),
    ]


def table(question: str, names: list[str], rows: dict[str, list[Any]]) -> str:
    lines = [question, "", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, values in rows.items():
        cells = [str(value) if isinstance(value, int) else f"{value:.2f}" for value in values]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["time", "memory"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--p", type=float, default=0.6, help="of the last block")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40, help="steps that are timed")
    parser.add_argument("--ms", type=float, default=8.0, help="that a branch's forward waits")
    parser.add_argument("--compute", action="store_true", help="wait for nothing")
    parser.add_argument("--steps", type=int, default=200, help="steps whose memory is measured")
    args = parser.parse_args()
    print(machine(torch.device("cpu")))
    how = "computing" if args.compute else f"{args.ms:g} ms each, waited for"
    print(f"{args.depth} blocks of width {args.width}, {how}; linear to p = {args.p:g}\n")
    if "time" in args.parts:
        print("\n".join(time_tables(args)))
    if "memory" in args.parts:
        print("\n".join(memory_tables(args)))


if __name__ == "__main__":
    main()

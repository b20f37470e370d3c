"""Measure several sides interleaved: round by round one training step of each."""

import itertools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import stochastic_depth as sd
from stochastic_depth.drop.force import forced
from stochastic_depth.install import by_block


@dataclass
class Side:
    """A model that is trained on one fixed batch.

    ``shares`` is what each branch's own time is of the plain step, by name; ``dtype`` is that of
    autocast.
    """

    model: nn.Module
    x: Tensor
    shares: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)

    def step(self) -> None:
        with self.autocast():
            output = self.model(self.x)
        loss = output.float().square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:  # not if all is dropped, of a model that is blocks alone
            loss.backward()
        self.optimizer.step()

    def autocast(self) -> torch.autocast:
        low = self.dtype is not torch.float32
        return torch.autocast(self.x.device.type, self.dtype if low else None, enabled=low)

    def counts(self) -> dict[str, tuple[int, int]]:
        """How many decisions each branch took so far, and how many of them dropped."""
        return {b.name: (b.decided, b.dropped) for b in sd.branches(self.model) if self.shares}

    def bound(self, before: dict[str, tuple[int, int]]) -> float:
        """What would be left of the plain step if what was dropped since ``before`` were free."""
        left = 1.0
        for name, (decided, dropped) in self.counts().items():
            decided, dropped = decided - before[name][0], dropped - before[name][1]
            left -= self.shares[name] * dropped / decided if decided else 0.0
        return left


def block_names(model: nn.Module) -> list[str]:
    """The blocks of an applied model, in the order of execution."""
    return list(by_block(sd.branches(model)))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def turn(names: list[str], i: int) -> list[str]:
    """The sides in the order of round ``i``: nobody is always first."""
    shift = i % len(names)
    return names[shift:] + names[:shift]


def interleave(
    sides: dict[str, Side], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds a step of every side in each round, after two rounds of warm-up, and the bounds.

    The bound of a step is for the branches that it dropped, so a comparison with it is free of
    the coins' chance.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    bounds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(-2, rounds):
        for name in turn(names, i):
            side = sides[name]
            before = side.counts()
            taken = seconds(side.step, side.x.device)
            if i >= 0:
                times[name].append(taken)
                bounds[name].append(side.bound(before))
    return times, bounds


def branch_shares(side: Side, repeats: int = 2) -> dict[str, float]:
    """What each branch adds to the time of a plain step, forward and backward, as a share of it.

    A step without any branch tells what they add together, and steps without one each tell how
    that is divided: summed up by themselves, many small differences are mostly noise.

    Args:
        side: an applied model, with every rate 0.
        repeats: how often a step without one is measured beside a plain one; the medians count.
    """
    branches = sd.branches(side.model)
    _share(side, branches, 2)  # warm-up
    together = _share(side, branches, 4 * repeats)
    shares = {branch.name: max(0.0, _share(side, [branch], repeats)) for branch in branches}
    side.optimizer.zero_grad()
    whole = sum(shares.values())
    return {name: together * share / whole for name, share in shares.items()} if whole else shares


def _share(side: Side, branches: list[sd.Branch], repeats: int) -> float:
    """What a step is shorter without these branches, as a share of a plain one."""
    found = []
    for _ in range(repeats):
        plain = seconds(side.step, side.x.device)
        with forced(dict.fromkeys(branches, (True, 1.0))):
            found.append(1.0 - seconds(side.step, side.x.device) / plain)
    return statistics.median(found)


def peak_mebibytes(side: Side, steps: int = 2) -> float:
    """The most memory that a training step holds beside model, optimizer and batch.

    Mean of some steps, since what is dropped is random.
    """
    return statistics.mean(_peak_mebibytes(side) for _ in range(steps))


def _peak_mebibytes(side: Side) -> float:
    if side.x.device.type == "cuda":
        side.optimizer.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    side.optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        side.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 2**20


def spread(values: list[float]) -> str:
    """Mean and standard error. The mean, since a random number of branches runs each round."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ±{error:.3f}"


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

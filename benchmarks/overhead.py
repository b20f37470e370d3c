"""What stochastic depth costs beside what it saves: microseconds a block, and seconds of apply.

    python -m benchmarks.overhead

A hundred small blocks in a row, where a call a block is felt; a training step without the
optimizer. Beside ours, the same model with an ``if`` written into its forward, which draws, skips
and weighs as ours does. The plain model is there twice, since two copies of one model differ by
chance too (in where their memory lies).
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import efficientnet_b7

import stochastic_depth as sd

from .harness import machine, seconds, turn

BLOCKS, MANY = 100, 1_000
ALMOST_NEVER = 1e-12  # drops: draws, and keeps


class Block(nn.Module):
    """A residual block that is as small as they get."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class ByHand(Block):
    """The same with stochastic depth written into its forward."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if torch.rand(()).item() < self.p:
            return x
        return x + self.linear(x) * (1.0 / (1.0 - self.p))


def stack(make: Callable[[], nn.Module], count: int = BLOCKS) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), *(make() for _ in range(count)))


def applied(p: float, x: Tensor) -> nn.Module:
    return sd.apply(stack(Block), p=p, schedule="uniform", example_inputs=x)


def step(model: nn.Module, x: Tensor) -> float:
    """Seconds of a forward and backward."""
    return timed(lambda: model(x).sum().backward())


def per_block(rounds: int) -> None:
    """Print microseconds a block of each side, over the plain model's and over the ``if``'s."""
    x = torch.randn(8, 16)
    sides = {
        "plain": stack(Block),
        "plain again": stack(Block),
        "p = 0": applied(0.0, x),
        "if, dropped": stack(lambda: ByHand(1.0)),
        "ours, dropped": applied(1.0, x),
        "if, kept": stack(lambda: ByHand(ALMOST_NEVER)),
        "ours, kept": applied(ALMOST_NEVER, x),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(-5, rounds):
        for name in turn(list(sides), i):
            took = step(sides[name].train(), x)
            if i >= 0:
                taken[name].append(1e6 * took / BLOCKS)
    print("\nMicroseconds a block of a forward and backward; medians over the rounds.\n")
    print("| | a block | over plain | over the `if` |\n|---|---|---|---|")
    for name, values in taken.items():
        cells = [f"{statistics.median(values):.1f}", over(values, taken["plain"]), ""]
        if name.startswith("ours"):
            cells[2] = over(values, taken[name.replace("ours", "if")])
        print(f"| {name} | " + " | ".join(cells) + " |")


def over(values: list[float], reference: list[float]) -> str:
    return f"{statistics.median(a - b for a, b in zip(values, reference, strict=True)):+.1f}"


def new_sizes(rounds: int) -> None:
    """Print milliseconds a block of the first step at a size, over the plain model's."""
    x = torch.randn(8, 16)
    plain = stack(Block).train()
    ours = applied(ALMOST_NEVER, x).train()
    step(ours, x)
    differences = []
    for i in range(rounds):
        x = torch.randn(9 + i, 16)  # a size that none of both has met
        first, second = (step(m, x) for m in ((ours, plain) if i % 2 else (plain, ours)))
        differences.append((first - second if i % 2 else second - first) / BLOCKS)
    print(f"\nA new size: {1e3 * statistics.median(differences):+.3f} ms a block over plain.")


def applying() -> None:
    """Print seconds of apply, and of the first steps after it."""
    x = torch.randn(8, 16)
    model = stack(Block, MANY).train()
    step(model, x)  # the libraries' own first times
    forward = timed(lambda: model(x))
    took = timed(lambda: sd.apply(model, p=0.2, example_inputs=x))
    steps = [step(model, x) for _ in range(6)]
    later = statistics.median(steps[1:])
    print(
        f"\n{MANY:,} blocks: a forward takes {forward:.2f} s, apply {took:.2f} s, the first step "
        f"{steps[0]:.2f} s, a later one {later:.2f} s."
    )
    images = torch.randn(2, 3, 64, 64)
    large = efficientnet_b7().eval()
    with torch.no_grad():
        large(images)
        forward = timed(lambda: large(images))
    took = timed(lambda: sd.apply(large, p=0.2, example_inputs=images))
    print(f"efficientnet_b7: a forward takes {forward:.2f} s, apply {took:.2f} s.")


def timed(run: Callable[[], object]) -> float:
    return seconds(run, torch.device("cpu"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    print(machine(torch.device("cpu")))
    per_block(rounds)
    new_sizes(rounds)
    applying()


if __name__ == "__main__":
    main()

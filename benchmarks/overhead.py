"""What an applied model costs at p = 0, where it must cost nothing.

    python -m benchmarks.overhead

ResNet-50 on two images of 32 px, the smallest steps it can do: what we add is a call a block, so
its share only falls with larger steps. The plain model is there twice, since two copies of one
model differ by chance too (in where their memory lies).
"""

import argparse
import copy
import statistics

import torch
from torchvision.models import resnet50

import stochastic_depth as sd

from .harness import Side, interleave, machine, spread


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    model = resnet50().to(device)
    x = torch.randn(2, 3, 32, 32, device=device)
    sides = {
        "plain": Side(model, x),
        "plain again": Side(copy.deepcopy(model), x),
        "p=0": Side(sd.apply(copy.deepcopy(model), p=0.0, example_inputs=x), x),
    }
    times, _ = interleave(sides, args.rounds)
    print(machine(device))
    print(f"plain: {statistics.median(times['plain']) * 1e3:.1f} ms a step")
    for name in ("plain again", "p=0"):
        ratios = [ours / plain for ours, plain in zip(times[name], times["plain"], strict=True)]
        print(f"{name} / plain: median {statistics.median(ratios):.4f}, mean {spread(ratios)}")


if __name__ == "__main__":
    main()

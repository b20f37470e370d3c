"""Time of a training step: plain, ours, torchvision's masks, and the bound.

    python -m benchmarks.step_time                          # the two models of the front page
    python -m benchmarks.step_time resnet18 vit-s --p 0.2   # others

All sides run interleaved in one process. Figures are ratios to the plain model of the same
round, mean and standard error over the rounds. The bound is what is left of the plain step when
each branch's own time (forward and backward) goes with its probability to drop.
"""

import argparse
import copy
import statistics

import torch

import stochastic_depth as sd

from .harness import Side, branch_seconds, interleave, machine, spread
from .models import SUBJECTS, build
from .peers import last_layers, mask_last_layers

SETTINGS = {"p=0": (0.0, "uniform"), "linear 0.5": (0.5, "linear"), "p=0.5": (0.5, "uniform")}


def measure(name: str, rounds: int, modes: list[str], device: torch.device) -> list[list[str]]:
    """One row a setting: the ratio of every side to the plain model."""
    plain, x = build(name, device)
    sides = {"plain": Side(plain, x)}
    bounds: dict[str, float] = {}
    probe = sd.apply(copy.deepcopy(plain).train(), p=1.0, schedule="uniform")
    branch_times = branch_seconds(probe, x)
    for setting, (p, schedule) in SETTINGS.items():
        for mode in modes:
            ours = sd.apply(copy.deepcopy(plain), p=p, schedule=schedule, mode=mode)
            sides[f"{setting}|ours {mode}"] = Side(ours, x)
        if p > 0:
            masked = mask_last_layers(copy.deepcopy(plain), last_layers(ours), modes[0])
            sides[f"{setting}|torchvision"] = Side(masked, x)
        bounds[setting] = sum(b.p * branch_times[b.name] for b in sd.branches(ours))
    times = interleave(sides, rounds)
    step = statistics.median(times["plain"])
    rows = []
    for setting in SETTINGS:
        cells = [name, f"{step * 1e3:.0f} ms", setting, f"{1 - bounds[setting] / step:.3f}"]
        for column in (*(f"ours {mode}" for mode in modes), "torchvision"):
            taken = times.get(f"{setting}|{column}")
            ratios = [a / b for a, b in zip(taken or [], times["plain"], strict=False)]
            cells.append(spread(ratios) if ratios else "")
        rows.append(cells)
    return rows


def main() -> None:
    """Measure the models named on the command line and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["resnet50", "resnet110-cifar"])
    parser.add_argument("--modes", nargs="+", default=["batch"], choices=["batch", "row"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu", type=torch.device)
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(SUBJECTS))
    if unknown:
        parser.error(f"unknown models {unknown}; there are {sorted(SUBJECTS)}")
    print(machine(args.device), flush=True)
    header = [
        "model",
        "plain",
        "setting",
        "bound",
        *(f"ours {m}" for m in args.modes),
        "torchvision",
    ]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|", flush=True)
    for name in args.models:
        for row in measure(name, args.rounds, args.modes, args.device):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Time of a forward before and after pruning.

    python -m benchmarks.depth                       # every model
    python -m benchmarks.depth llama --rounds 100

The whole model, the whole model again (what chance does), one with half of the blocks that can go
taken out, and one without every other branch run interleaved in one process, in evaluation. Ratios
are those to the whole model in the same round: median, and the middle half of the rounds. FLOPs
are counted.
"""

import argparse
import copy
import statistics

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd

from .harness import machine, seconds, turn
from .models import ON_CPU, SUBJECTS, build

HEADER = "| model | taken out | parameters, × | FLOPs, × | time, × | middle half |\n" + "|---" * 6


def pruned(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """The sides to measure."""
    table = sd.importance(model, [x], of="blocks")
    blocks = table.ranking[: max(1, len(table.ranking) // 2)]
    whole = sd.apply(copy.deepcopy(model), p=0.0, example_inputs=x)
    branches = [branch.name for branch in sd.branches(whole)][1::2]
    return {
        "": model,
        "nothing": copy.deepcopy(model),
        f"{len(blocks)} blocks": sd.prune(copy.deepcopy(model), remove=blocks, example_inputs=x),
        f"{len(branches)} of {2 * len(branches)} branches": sd.prune(
            copy.deepcopy(model), remove=branches, example_inputs=x
        ),
    }


def size(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Parameters, and FLOPs of a forward."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def measure(name: str, rounds: int, device: torch.device) -> str:
    """The rows of a model."""
    model, x = build(name, device)
    sides = pruned(model.eval(), x)
    sizes = {side: size(m, x) for side, m in sides.items()}
    times: dict[str, list[float]] = {side: [] for side in sides}
    names = list(sides)
    with torch.inference_mode():
        for i in range(-2, rounds):
            for side in turn(names, i):
                taken = seconds(lambda m=sides[side]: m(x), device)  # type: ignore[misc]
                if i >= 0:
                    times[side].append(taken)
    rows = []
    for side in names[1:]:
        ratios = [a / b for a, b in zip(times[side], times[""], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        parameters, flops = (a / b for a, b in zip(sizes[side], sizes[""], strict=True))
        rows.append(
            f"| {name} | {side} | {parameters:.2f} | {flops:.2f} | {middle:.2f} | "
            f"{low:.2f} to {high:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if unknown := sorted(set(args.models) - set(SUBJECTS)):
        parser.error(f"unknown models {unknown}; there are {sorted(SUBJECTS)}")
    device = torch.device(args.device)
    print(f"{machine(device)}\n\n{HEADER}|", flush=True)
    for name in args.models or ON_CPU:
        print(measure(name, args.rounds, device), flush=True)


if __name__ == "__main__":
    main()

"""What the slowest of many ranks executes, by how decisions are drawn: simulated.

    python -m benchmarks.balance

A data-parallel step takes as long as its slowest rank. Independent and shared draws are computed
from the rates, balanced ones simulated, over steps with u spread evenly over [0, 1). Then, for real
models, by what the branches are put into classes of equal cost: by their FLOPs, by their numbers of
parameters, which is what the library does, or not at all.
"""

import argparse
import time

import torch
import torchvision

import stochastic_depth as sd
from stochastic_depth.drop.balance import cost_classes, simulated, slowest

RANKS = (1, 2, 8, 64, 1024, 4096)
STEPS = 100
QUESTIONS = (
    "Which share of the branches' compute does the slowest rank execute? By the number of ranks.",
    "Which share of the branches does no rank train in a step? By the number of ranks.",
)
Cells = dict[str, tuple[float, float]]


def linear(p: float, depth: int) -> list[float]:
    return [p * level / depth for level in range(1, depth + 1)]


MODELS: dict[str, tuple[list[float], list[float]]] = {  # rates and costs
    "8 branches, linear .2": (linear(0.2, 8), [1.0] * 8),
    "24 branches, linear .5": (linear(0.5, 24), [1.0] * 24),
    "24 branches, uniform .3": ([0.3] * 24, [1.0] * 24),
    "96 branches, linear .5": (linear(0.5, 96), [1.0] * 96),
    "12 whole blocks, linear .6": (linear(0.6, 12), [1.0] * 12),
    "32 whole blocks, linear .6": (linear(0.6, 32), [1.0] * 32),
    "12 × attention and MLP (1 : 2), linear .5": (linear(0.5, 24), [1.0, 2.0] * 12),
    "24 branches of 24 costs (10 to 33), linear .5": (
        linear(0.5, 24),
        [10.0 + i for i in range(24)],
    ),
}


REAL = (
    "resnet50",
    "convnext_tiny",
    "efficientnet_b3",
    "mobilenet_v2",
    "regnet_y_8gf",
    "swin_t",
    "vit_b_16",
)


def real_models(ranks: int = 64) -> str:
    """What the slowest rank executes of the branches of torchvision's models, linear to .5."""
    lines = [
        f"Which share of the branches' FLOPs does the slowest of {ranks} ranks execute?",
        "",
        "| model | mean of a rank | independent | one class | by parameters | by FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    x = torch.zeros(2, 3, 224, 224)
    for name in REAL:
        model = sd.apply(torchvision.models.get_model(name), 0.5, example_inputs=x)
        rows = sd.summary(model, x).rows
        rates, flops = [row.p for row in rows], [row.flops or 0.0 for row in rows]
        one, parameters = [0] * len(rows), cost_classes([row.parameters for row in rows])
        shares = [slowest(rates, flops, 1), slowest(rates, flops, ranks)]
        for classes in (one, parameters, cost_classes(flops)):
            shares.append(slowest(rates, flops, ranks, "balanced", classes=classes))
        lines.append(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    return "\n".join(lines) + "\n"


def balanced(rates: list[float], costs: list[float], ranks: int, seed: int) -> tuple[float, float]:
    """Two shares of the branches: what the slowest rank executes, and what no rank trains."""
    weights = torch.tensor(costs, dtype=torch.float64) / sum(costs)
    generator = torch.Generator().manual_seed(seed)
    executed = untrained = 0.0
    for dropped in simulated(rates, cost_classes(costs), ranks, STEPS, generator):
        executed += 1.0 - (dropped.double() @ weights).min().item()
        untrained += dropped.all(0).double().mean().item()
    return executed / STEPS, untrained / STEPS


def missed(rates: list[float], ranks: int) -> float:
    """The share of branches that no rank trains, where each rank draws for itself."""
    return sum(p**ranks for p in rates) / len(rates)


def measure(rates: list[float], costs: list[float], ranks: int, seed: int) -> Cells:
    """By the way of drawing: what the slowest rank executes, and what no rank trains."""
    independent = slowest(rates, costs, ranks, "independent")
    shared = slowest(rates, costs, ranks, "shared")
    return {
        "independent": (independent, missed(rates, ranks)),
        "shared": (shared, missed(rates, 1)),
        "balanced": balanced(rates, costs, ranks, seed),
    }


def tables(seed: int) -> list[str]:
    head = ["", "| branches, rates | draws | " + " | ".join(f"{n:,}" for n in RANKS) + " |"]
    head.append("|---" * (len(RANKS) + 2) + "|")
    lines = [[question, *head] for question in QUESTIONS]
    for name, (rates, costs) in MODELS.items():
        measured = [measure(rates, costs, ranks, seed) for ranks in RANKS]
        for draw in measured[0]:
            for i, table in enumerate(lines):
                cells = [f"{by_draw[draw][i]:.3f}" for by_draw in measured]
                table.append(f"| {name} | {draw} | " + " | ".join(cells) + " |")
    return ["\n".join(table) + "\n" for table in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    print("\n".join(tables(args.seed)))
    print(real_models())
    print(f"{STEPS} balanced steps each, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

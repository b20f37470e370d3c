"""What stochastic depth costs where it should not be used.

python -m experiments.costs

Three cases: a pretrained network that is fine-tuned for a single epoch; eight branches at p = 0.5,
uniform, so that one step in 256 runs none of them; and a small network from scratch that does not
fit its training images even without.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.cli import fashion_mnist, models
from stochastic_depth.cli.seeds import derive

from .from_scratch import BATCH, batches, classify, error, resnet, tensors
from .harness import (
    Store,
    arguments,
    axes,
    change,
    device,
    draw_pairs,
    markdown,
    mean,
    ratio,
    train_by_turns,
    write_section,
)

WITHOUT, WITH = "without", "with"


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and stochastic depth that does not suit it."""

    name: str
    kind: str
    images: int
    epochs: int
    lr: float
    options: dict[str, Any]


class Coloured(nn.Module):
    """A network for coloured images of another size, on grey ones."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> Any:
        larger = nn.functional.interpolate(images, size=(48, 48), mode="bilinear")
        return self.network(larger.expand(-1, 3, -1, -1))


FACTOR = {"tiny": 0.03, "small": 1.0, "large": 10.0}  # of the images
CASES = (
    Case("too few epochs", "pretrained", 1_000, 1, 1e-3, {"p": 0.5}),
    Case("eight branches at p = 0.5", "resnet18", 500, 6, 1e-3, {"p": 0.5, "schedule": "uniform"}),
    Case("an underfitting model", "narrow", 4_000, 6, 3e-3, {"p": 0.5}),
)


def make(kind: str) -> nn.Module:
    """The model of a case."""
    if kind == "pretrained":
        return Coloured(models.load(models.EMBEDDED, classes=10).model)
    if kind == "resnet18":
        return Coloured(models.load("resnet18", weights="none", classes=10).model)
    return resnet(20, 4)


def run(case: Case, factor: float, seed: int) -> dict[str, Any]:
    """Both arms of a case, by turns."""
    count = int(case.images * factor)
    train, _, test, _ = fashion_mnist.load(count, min(2_000, 2 * count))
    images, labels = tensors(train)
    torch.manual_seed(derive("start", seed))
    plain = make(case.kind)
    arms = {WITHOUT: plain, WITH: copy.deepcopy(plain)}
    sd.apply(arms[WITH], example_inputs=images[:4], **case.options)
    for model in arms.values():
        model.to(device()).train()
    steps = case.epochs * (-(-len(images) // BATCH) - (len(images) % BATCH == 1))
    source = batches(images, labels, case.epochs, seed)
    seconds = train_by_turns(arms, source, classify, steps, case.lr, seed)
    return {
        arm: {
            "error": error(model, *tensors(test)),
            "training error": error(model, images, labels),
            "seconds": seconds[arm],
        }
        for arm, model in arms.items()
    }


def report(store: Store, factor: float, seeds: int) -> None:
    """Write the section."""
    figure, panels = axes(
        len(CASES),
        f"Fashion-MNIST, stochastic depth p = 0.5 where it does not suit, {seeds} seeds "
        "(joined by lines), mean (bar)",
    )
    rows = []
    for panel, case in zip(panels, CASES, strict=True):
        runs = [store.runs[f"{case.name}, seed {seed}"] for seed in range(seeds)]
        found = {
            arm: {key: [r[arm][key] for r in runs] for key in runs[0][arm]}
            for arm in (WITHOUT, WITH)
        }
        rows.append(
            [
                case.name,
                f"{int(case.images * factor):,} × {case.epochs}",
                ", ".join(f"{key} = {value}" for key, value in case.options.items()),
                mean(found[WITHOUT]["training error"], 1),
                mean(found[WITHOUT]["error"], 1),
                mean(found[WITH]["error"], 1),
                change(found[WITH]["error"], found[WITHOUT]["error"], 1),
                ratio(found[WITH]["seconds"], found[WITHOUT]["seconds"]),
            ]
        )
        draw_pairs(panel, {arm: found[arm]["error"] for arm in (WITHOUT, WITH)})
        panel.set_title(case.name, fontsize=10)
        panel.set_ylabel("test error, %")
    header = ["case", "images × epochs", "stochastic depth", "training error without, %"]
    header += ["test error without, %", "with, %", "change", "time per step, ×"]
    text = (
        "*too few epochs*: EfficientNet-Lite0 from ImageNet. *eight branches*: ResNet-18 from "
        "scratch. *an underfitting model*: a ResNet of 20 layers and width 4 from scratch. AdamW "
        f"with one cycle, {seeds} paired seeds, by turns; ± is half a 95 % interval. Nothing was "
        "tuned.\n\n"
    )
    write_section(store, "Where it should not be used", text + markdown(header, rows), figure)


def main() -> None:
    size, seeds = arguments(__doc__, seeds=3)
    store = Store("costs", size).load()
    for seed in range(seeds):
        for case in CASES:
            store.get(
                f"{case.name}, seed {seed}",
                lambda case=case, seed=seed: run(case, FACTOR[size], seed),
            )
    report(store, FACTOR[size], seeds)


if __name__ == "__main__":
    main()

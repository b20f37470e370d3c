"""A deep, narrow ResNet from scratch on few images: the paper's setting, small.

python -m experiments.from_scratch
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stochastic_depth as sd
from stochastic_depth.cli import fashion_mnist
from stochastic_depth.cli.seeds import derive

from .harness import (
    Store,
    arguments,
    axes,
    change,
    device,
    draw_curve,
    markdown,
    mean,
    ratio,
    train_by_turns,
    write_section,
)

BATCH = 64
WITHOUT = "without"
ARMS: dict[str, dict[str, Any]] = {
    WITHOUT: {},
    "batch": {"p": 0.5, "mode": "batch"},
    "row": {"p": 0.5, "mode": "row"},
}


@dataclass(frozen=True)
class Scale:
    depths: tuple[int, ...]  # 6n + 2, as in the paper
    width: int
    images: int
    tested: int
    epochs: int


SCALES = {
    "tiny": Scale((8, 14), 4, 64, 64, 1),
    "small": Scale((14, 32), 8, 1_000, 2_000, 20),
    "large": Scale((20, 56, 110), 16, 50_000, 10_000, 100),
}


class Block(nn.Module):
    """Two convolutions and the shortcut; where the size changes, it is a convolution too."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def resnet(depth: int, width: int) -> nn.Module:
    """The CIFAR ResNet of 6n + 2 layers, for grey images."""
    layers: list[nn.Module] = [
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    for stage in range(3):
        outputs = width * 2**stage
        for block in range((depth - 2) // 6):
            first = block == 0 and stage > 0
            inputs = outputs // 2 if first else outputs
            layers.append(Block(inputs, outputs, 2 if first else 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def tensors(images: Any) -> tuple[Tensor, Tensor]:
    """All images of a part, and their labels."""
    pixels = images.dataset.data[images.indices].float()[:, None] / 255
    return (pixels - 0.286) / 0.353, images.dataset.targets[images.indices]


def batches(images: Tensor, labels: Tensor, epochs: int, seed: int) -> Iterator[Any]:
    """Shifted and mirrored images, in an order of each epoch."""
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(derive("epoch", seed, epoch))
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            if len(chosen) < 2:
                continue
            right, down = torch.randint(-2, 3, (2,), generator=generator).tolist()
            batch = images[chosen].roll((down, right), (2, 3))
            if torch.rand((), generator=generator) < 0.5:
                batch = batch.flip(3)
            yield batch.to(device()), labels[chosen].to(device())


def run(scale: Scale, depth: int, seed: int) -> dict[str, Any]:
    """All arms of one depth and seed, by turns."""
    train, _, test, _ = fashion_mnist.load(scale.images, scale.tested)
    images, labels = tensors(train)
    torch.manual_seed(derive("start", seed))
    plain = resnet(depth, scale.width)
    models = {}
    for arm, options in ARMS.items():
        model = copy.deepcopy(plain)
        if options:
            sd.apply(model, example_inputs=images[:4], **options)
        models[arm] = model.to(device()).train()
    steps = scale.epochs * -(-len(images) // BATCH)
    steps -= scale.epochs * (len(images) % BATCH == 1)
    source = batches(images, labels, scale.epochs, seed)
    seconds = train_by_turns(models, source, classify, steps, 3e-3, seed)
    return {
        arm: {"error": error(model, *tensors(test)), "seconds": seconds[arm]}
        for arm, model in models.items()
    }


def classify(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss."""
    return cross_entropy(model(images), labels)


def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of wrong answers, in percent."""
    model.eval()
    with torch.inference_mode():
        found = torch.cat([model(part.to(device())).argmax(1).cpu() for part in images.split(256)])
    return 100 * (found != labels).float().mean().item()


def report(store: Store, scale: Scale, seeds: int) -> None:
    """Write the section."""
    figure, (errors, times) = axes(
        2,
        f"ResNets of width {scale.width} from scratch on {scale.images:,} images of Fashion-MNIST, "
        f"{scale.epochs} epochs, p = 0.5 linear, {seeds} seeds (thin), mean (thick)",
    )
    rows = []
    curves: dict[str, tuple[list[list[float]], list[list[float]]]] = {a: ([], []) for a in ARMS}
    for depth in scale.depths:
        runs = [store.runs[f"{depth} layers, seed {seed}"] for seed in range(seeds)]
        base = [found[WITHOUT] for found in runs]
        for arm in ARMS:
            wrong, took = ([found[arm][key] for found in runs] for key in ("error", "seconds"))
            curves[arm][0].append(wrong)
            curves[arm][1].append([1000 * seconds for seconds in took])
            row = [str(depth), arm, mean(wrong, 1)]
            row.append("" if arm == WITHOUT else change(wrong, [b["error"] for b in base], 1))
            row.append("" if arm == WITHOUT else ratio(took, [b["seconds"] for b in base]))
            rows.append(row)
    for place, (arm, (wrong, took)) in enumerate(curves.items()):
        for panel, values in ((errors, wrong), (times, took)):
            draw_curve(panel, scale.depths, values, place, arm)
            panel.set_xticks(scale.depths)
    errors.set(xlabel="layers", ylabel="test error, %")
    times.set(xlabel="layers", ylabel="time per step, ms", ylim=(0, None))
    errors.legend(frameon=False)
    header = ["layers", "", "test error, %", "change", "time per step, ×"]
    text = (
        f"CIFAR-style ResNets of width {scale.width}, {scale.images:,} training images, "
        f"{scale.epochs} epochs, AdamW at 3e-3 with one cycle; *batch* and *row* drop at p = 0.5, "
        f"linear over depth; {seeds} paired seeds, by turns, error after the last epoch on "
        f"{scale.tested:,} test images; ± is half a 95 % interval. Nothing was tuned.\n\n"
    )
    write_section(store, "From scratch, against depth", text + markdown(header, rows), figure)


def main() -> None:
    size, seeds = arguments(__doc__, seeds=3)
    scale, store = SCALES[size], Store("from_scratch", size).load()
    for seed in range(seeds):
        for depth in scale.depths:
            store.get(
                f"{depth} layers, seed {seed}",
                lambda depth=depth, seed=seed: run(scale, depth, seed),
            )
    report(store, scale, seeds)


if __name__ == "__main__":
    main()

"""Fine-tuning the embedded network with clean and with wrong labels: rates, schedules and modes.

python -m experiments.finetuning
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import Subset

import stochastic_depth as sd
from stochastic_depth.cli import fashion_mnist, models
from stochastic_depth.cli.batches import evaluation_batches, training_batches
from stochastic_depth.cli.data import with_wrong_labels
from stochastic_depth.cli.finetune import fit_and_test, quiet
from stochastic_depth.cli.seeds import derive
from stochastic_depth.cli.statistics import middle_mean
from stochastic_depth.cli.training import Turns, Variant, trainer

from .harness import (
    STYLES,
    Numbers,
    Store,
    arguments,
    axes,
    change,
    markdown,
    mean,
    ratio,
    write_section,
)

NOISE = (0.0, 0.2, 0.4)
WITHOUT = "without"
ARMS: dict[str, dict[str, Any]] = {
    WITHOUT: {},
    "p = 0.2, linear": {"p": 0.2, "schedule": "linear", "mode": "batch"},
    "p = 0.5, linear": {"p": 0.5, "schedule": "linear", "mode": "batch"},
    "p = 0.5, uniform": {"p": 0.5, "schedule": "uniform", "mode": "batch"},
    "p = 0.5, linear, row": {"p": 0.5, "schedule": "linear", "mode": "row"},
}
SCALES = {  # training images, epochs, test images, pixels
    "tiny": (64, 1, 64, 32),
    "small": (2_000, 8, 2_000, 32),  # as in the default of the command
    "large": (10_000, 30, 10_000, 64),
}
FIRST_SEED = 1_000  # on those below, validation images were looked at to choose the demo's settings


def run(size: str, noise: float, seed: int) -> dict[str, Numbers]:
    """All variants of one seed, by turns."""
    images, epochs, tested, pixels = SCALES[size]
    train, val, test, classes = fashion_mnist.load(images, tested)
    if size == "tiny":
        val = Subset(val, range(64))
    torch.manual_seed(derive("start", seed))
    network = models.load(models.EMBEDDED, classes=len(classes))
    example = torch.zeros(2, 3, pixels, pixels)
    variants = []
    for name, options in ARMS.items():
        model, flops = copy.deepcopy(network.model), []
        if options:
            sd.apply(model, example_inputs=example, **options)
            flops = [row.flops or 0.0 for row in sd.summary(model, example).rows]
        p = options.get("p", 0.0)
        variants.append(Variant(p, model, network.mean, network.std, flops, name=name))
    module = Turns(variants, len(classes), 1e-3, seed)
    noisy = with_wrong_labels(train, noise, len(classes), seed)
    batches = training_batches(noisy, pixels, 32, seed)
    with TemporaryDirectory() as folder, quiet():
        fitting = trainer(epochs, Path(folder), 1, "auto", None, len(batches))
        loaders = (evaluation_batches(part, pixels, 32) for part in (val, test))
        dropped, last, chosen = fit_and_test(fitting, module, batches, *loaders, None)
    found = {}
    for place, variant in enumerate(variants):
        saved = zip(dropped[0][place], variant.flops, strict=True)
        found[variant.name] = {
            "error_last": 100 * last[place]["error"],
            "error_chosen": 100 * chosen[place]["error"],
            "nll_last": last[place]["nll"],
            "calibration_last": 100 * last[place]["calibration_error"],
            "val_error_last": 100 * variant.history[-1]["val_error"],
            "val_error_chosen": 100 * variant.best["error"],
            "seconds": middle_mean(variant.seconds),
            "flops": 1.0 - sum(share * flops for share, flops in saved),
        }
    return found


def report(store: Store, seeds: int) -> None:
    """Write the section."""
    images, epochs, _, pixels = SCALES[store.size]
    figure, panels = axes(
        len(NOISE),
        f"EfficientNet-Lite0 on Fashion-MNIST, {images:,} training images, {epochs} epochs, "
        f"{seeds} paired seeds (dots), mean and its 95 % interval",
        sharex=True,
        sharey=True,
    )
    errors: list[list[str]] = []
    costs: list[list[str]] = []
    for panel, noise in zip(panels, NOISE, strict=True):
        runs = [store.runs[f"{noise:g} wrong, seed {seed}"] for seed in range(seeds)]
        columns = {
            arm: {key: [found[arm][key] for found in runs] for key in runs[0][arm]} for arm in ARMS
        }
        base = columns[WITHOUT]
        for place, (arm, found) in enumerate(columns.items()):
            plain = arm == WITHOUT
            what = [f"{100 * noise:g} %", arm]
            errors.append([*what, mean(found["error_last"], 1)])
            if plain:
                errors[-1] += ["", "", ""]
                continue
            errors[-1] += [
                change(found[key], base[key], 1)
                for key in ("error_last", "error_chosen", "val_error_last")
            ]
            costs.append(
                [
                    *what,
                    change(found["nll_last"], base["nll_last"], 2),
                    change(found["calibration_last"], base["calibration_last"], 1),
                    ratio(found["seconds"], base["seconds"]),
                    ratio(found["flops"], base["flops"]),
                ]
            )
            draw(panel, place, found["error_last"], base["error_last"])
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(1, len(ARMS)), list(ARMS)[1:])
        panel.set_ylim(len(ARMS) - 0.5, 0.5)
        panel.set_title(f"{100 * noise:g} % of the labels wrong", fontsize=10)
        panel.set_xlabel("change of the test error, points")
    of_errors = ["wrong labels", "variant", "test error, %", "change", "change, chosen epoch"]
    of_errors += ["change, validation images"]
    of_costs = ["wrong labels", "variant", "NLL, change", "calibration error, change"]
    of_costs += ["time per step, ×", "FLOPs, ×"]
    text = (
        f"{images:,} training images, {epochs} epochs, AdamW at 1e-3 with one cycle, batches of "
        f"32, images of {pixels} pixels, *batch* mode where it is not said, {seeds} paired seeds "
        f"({FIRST_SEED} and up), by turns; ± is half a 95 % interval of the mean difference. "
        "Errors, NLL and calibration error are those after the last epoch, on test images; *chosen "
        "epoch* is the one with the lowest validation error. Images, epochs and batches are those "
        "of the command's [default](finetune.md#what-the-default-shows), the seeds are others. "
        "Nothing was chosen on test images.\n\n"
        + markdown(of_errors, errors)
        + "\n\nThe same runs:\n\n"
        + markdown(of_costs, costs)
    )
    write_section(store, "Fine-tuning with wrong labels", text, figure)


def draw(panel: Any, place: int, values: list[float], base: list[float]) -> None:
    """The change of an arm and its interval."""
    from stochastic_depth.cli.statistics import half_width

    differences = [a - b for a, b in zip(values, base, strict=True)]
    colour, marker = STYLES[place % len(STYLES)]
    centre, half = sum(differences) / len(differences), half_width(differences) or 0.0
    panel.plot(differences, [place + 0.12] * len(differences), ".", color=colour, alpha=0.6)
    panel.errorbar(centre, place, xerr=half, color=colour, marker=marker, capsize=3, linewidth=2)


def main() -> None:
    size, seeds = arguments(__doc__, seeds=5)
    store = Store("finetuning", size).load()
    for seed in range(seeds):
        for noise in NOISE:
            key = f"{noise:g} wrong, seed {seed}"
            store.get(key, lambda noise=noise, seed=seed: run(size, noise, FIRST_SEED + seed))
    report(store, seeds)


if __name__ == "__main__":
    main()

"""The network, the data and the variants of a run, checked before the first long run."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import stochastic_depth as sd

from . import data, depth, models
from .batches import EpochOrder
from .curve import cost
from .errors import CommandError, first_line
from .seeds import derive
from .settings import Settings
from .training import EVALUATION_COST, Variant, now

TITLES = {
    models.EMBEDDED: "EfficientNet-Lite0",
    "fashion-mnist": "Fashion-MNIST",
}


class Task:
    """What a run works on."""

    step: float | None = None  # seconds of a step of the plain model, once that was tried

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.splits = data.load(settings.data, quick=settings.quick)
        self.source = self.network()
        self.image_size = settings.image_size or self.splits.image_size or self.source.image_size
        try_out(settings.model, self.source.model, self.image_size, len(self.splits.classes))
        self.try_smallest_batch()
        self.summaries: dict[float, sd.Summary] = {}
        for p in settings.p:
            model = copy.deepcopy(self.source.model)
            self.apply(model, p or 0.5)  # what is not dropped is described all the same
            self.summaries[p] = sd.summary(model, self.example())

    def network(self) -> models.Network:
        """The network as it is before fine-tuning."""
        return models.load(
            self.settings.model, weights=self.settings.weights, classes=len(self.splits.classes)
        )

    def example(self) -> torch.Tensor:
        """Images of the size in use."""
        return torch.zeros(2, 3, self.image_size, self.image_size)

    def apply(self, model: nn.Module, p: float) -> None:
        """Put stochastic depth into ``model``."""
        settings = self.settings
        depth.apply(
            settings.model,
            model,
            self.example(),
            p=p,
            schedule=settings.schedule,
            mode=settings.mode,
        )

    def variants(self, seed: int) -> list[Variant]:
        """The variants at the start of a seed: equal, but for the rates."""
        torch.manual_seed(derive("start", seed))  # what the head is drawn from
        network = self.network()
        variants = []
        for p in self.settings.p:
            model = copy.deepcopy(network.model)
            flops: list[float] = []
            if p:
                self.apply(model, p)
                flops = [row.flops or 0.0 for row in self.summaries[p].rows]
            variants.append(Variant(p, model, network.mean, network.std, flops))
        return variants

    def try_smallest_batch(self) -> None:
        """See that there are batches, and that the model can be trained on one or two images."""
        settings = self.settings
        smallest = min(self.batch_sizes(), default=0) // settings.devices
        if not smallest:
            count = len(self.splits.train)  # type: ignore[arg-type]
            raise CommandError(
                f"--devices {settings.devices}: more than there are training images ({count})"
            )
        try:
            with torch.random.fork_rng(), torch.no_grad():
                copy.deepcopy(self.source.model).train()(self.example()[:smallest])
        except (RuntimeError, ValueError) as error:
            raise CommandError(
                f"--batch-size {settings.batch_size}: {settings.model} cannot be trained on "
                f"{smallest} image{'s'[: smallest > 1]} of {self.image_size} pixels per device "
                f"({first_line(error)}); give a larger one"
            ) from error

    def batch_sizes(self) -> list[int]:
        """The batches of an epoch, of all devices together."""
        settings, count = self.settings, len(self.splits.train)  # type: ignore[arg-type]
        return EpochOrder(count, settings.batch_size, 0, settings.devices).sizes

    def steps(self) -> int:
        """How many batches an epoch has."""
        return len(self.batch_sizes())

    def cost(self) -> float:
        """What a seed costs, in training batches: the ticks of `training.Turns`."""
        val, test = (
            -(-len(images) // (4 * self.settings.batch_size))  # type: ignore[arg-type]
            for images in (self.splits.val, self.splits.test)
        )
        epochs = self.settings.epochs
        training = epochs * self.steps() + EVALUATION_COST * (epochs * val + 2 * test)
        depth = next(iter(self.summaries.values())).depth
        return training + cost(depth, val, test)

    def seconds(self) -> float:
        """How long a seed will take, from a few steps of one variant."""
        kept = [1.0 if not p else (s.compute_kept or 1.0) for p, s in self.summaries.items()]
        step = self.step or self.step_seconds()
        return step * sum(kept) * self.cost()

    def choose_threads(self) -> None:
        """Let torch have one thread where that is quicker, as it is for small images.

        The number is one of the settings, as it decides in which order torch adds up.
        """
        settings, most = self.settings, torch.get_num_threads()
        if settings.threads is None and most > 1 and settings.devices == 1:
            seconds = {}
            for threads in (most, 1):
                torch.set_num_threads(threads)
                seconds[threads] = self.step_seconds()
            best = min(seconds, key=lambda threads: seconds[threads])
            self.settings, self.step = replace(settings, threads=best), seconds[best]
        torch.set_num_threads(self.settings.threads or most)

    def step_seconds(self) -> float:
        """How long a step of the plain model takes."""
        settings = self.settings
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = self.source
        variant = Variant(0.0, copy.deepcopy(source.model), source.mean, source.std).to(device)
        size = min(settings.batch_size, len(self.splits.train))  # type: ignore[arg-type]
        shape = (max(2, size // settings.devices), 3, self.image_size, self.image_size)
        taken = []
        with torch.random.fork_rng():
            images = torch.randint(256, shape, dtype=torch.uint8, device=device)
            labels = torch.zeros(len(images), dtype=torch.long, device=device)
            for _ in range(5):
                started = now(device)
                loss = cross_entropy(variant(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                taken.append(now(device) - started)
        return 1.15 * min(taken[1:])  # with the optimizer and the loading of images

    def title(self) -> str:
        """Model and data in a few words."""
        model, data = (
            TITLES.get(name, Path(name).name if Path(name).is_absolute() else name)
            for name in (self.settings.model, self.settings.data)
        )
        return f"{model} on {data}"

    def describe(self) -> str:
        """The task in a few lines."""
        settings, splits = self.settings, self.splits
        train, val, test = (len(part) for part in (splits.train, splits.val, splits.test))  # type: ignore[arg-type]
        lines = [
            f"{self.title()}: {len(splits.classes)} classes; {train:,} training, {val:,} "
            f"validation and {test:,} test images of {self.image_size} pixels."
        ]
        if settings.label_noise:
            lines.append(
                f"Wrong labels: {data.wrong_labels(train, settings.label_noise):,} of the {train:,}"
                " training images get the label of another class; validation and test keep theirs."
            )
        for p, summary in self.summaries.items():
            if p:
                kept = summary.compute_kept
                lines.append(
                    f"Stochastic depth p = {p:g} ({settings.schedule}, {settings.mode} mode): on "
                    f"average {summary.expected_depth:.1f} of {summary.depth} residual branches "
                    "run in a training step"
                    + (f", {kept:.2f} of the FLOPs." if kept is not None else ".")
                )
        lines += listed("Images left out, as they cannot be read", splits.unreadable)
        lines += listed("Files ignored, as they are no images", splits.ignored)
        lines += [f"Warning: {text}." for text in splits.warnings]
        return "\n".join(lines)


def listed(title: str, names: Sequence[str], most: int = 10) -> list[str]:
    """The first of some names, a line each."""
    if not names:
        return []
    rest = [f"  and {len(names) - most} more, all in metrics.json"] if len(names) > most else []
    return [f"{title}: {len(names)}", *(f"  {name}" for name in names[:most]), *rest]


def try_out(name: str, model: nn.Module, image_size: int, classes: int | None = None) -> None:
    """See that the model takes such images before anything else is done with it."""
    images = torch.zeros(2, 3, image_size, image_size)
    try:
        with torch.no_grad():
            output: Any = model.eval()(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise CommandError(
            f"--image-size {image_size}: {name} takes no images of this size "
            f"({first_line(error)}); leave it out for the model's own"
        ) from error
    shape = tuple(getattr(output, "logits", output).shape)
    if classes is not None and shape != (2, classes):
        raise CommandError(
            f"--model {name}: must give one logit per class, shape {(2, classes)}, but gave {shape}"
        )

"""Images by class, split for training, validation and the final test."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from . import fashion_mnist
from .errors import CommandError
from .seeds import permutation

QUICK_IMAGES = 1_000
HELD_OUT = 0.15
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Splits:
    """What to train on, what to watch, what to report on, and the files that cannot be read."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    image_size: int | None = None
    skipped: tuple[str, ...] = ()


def load(name: str, *, quick: bool = False) -> Splits:
    """The data called ``name``: a built-in set or a folder; little of it if ``quick``."""
    if name == fashion_mnist.NAME:
        train, val, test, classes = fashion_mnist.load()
        splits = Splits(train, val, test, classes, fashion_mnist.IMAGE_SIZE)
    else:
        splits = load_folder(Path(name))
    if not quick:
        return splits
    train, val, test = (
        limit(images, QUICK_IMAGES) for images in (splits.train, splits.val, splits.test)
    )
    return replace(splits, train=train, val=val, test=test)


def limit(images: Dataset[Any], count: int) -> Dataset[Any]:
    """At most ``count`` of the images, the same ones every time."""
    return Subset(images, permutation(len(images), "limit")[:count])  # type: ignore[arg-type]


def load_folder(root: Path) -> Splits:
    """Images by class below ``root``, or below its train/, val/ and test/.

    What has no folder of its own is split off the training images, each class in proportion and
    the same way every time.
    """
    if not root.is_dir():
        raise CommandError(
            f"--data {root}: no such folder; give a folder with one folder of images for each "
            f"class, or '{fashion_mnist.NAME}'"
        )
    paths = {
        part: root / name
        for part, names in PARTS.items()
        for name in names
        if (root / name).is_dir()
    }
    if "train" not in paths:
        paths = {"train": root}
    images = {part: image_folder(path) for part, path in paths.items()}
    classes = images["train"].classes
    for part, found in images.items():
        if found.classes != classes:
            differing = sorted(set(classes) ^ set(found.classes))
            raise CommandError(
                f"--data {root}: {paths[part].name}/ and train/ must have the same classes, "
                f"but only one of them has {differing[:5]}"
            )
    if len(classes) < 2:
        raise CommandError(f"--data {root}: needs two classes or more, found only {classes}")
    skipped = [problem for found in images.values() for problem in drop_unreadable(found)]

    chosen = {part: list(range(len(found))) for part, found in images.items()}
    for part in ("val", "test"):
        if part not in images:
            images[part] = images["train"]
            chosen["train"], chosen[part] = hold_out(chosen["train"], images["train"].targets)
    for part, indices in chosen.items():
        if not indices:
            raise CommandError(f"--data {root}: has too few images to leave some for '{part}'")
    train, val, test = (Subset(images[part], chosen[part]) for part in PARTS)
    return Splits(train, val, test, tuple(classes), skipped=tuple(skipped))


def image_folder(path: Path) -> Any:
    """torchvision's `ImageFolder` over ``path``."""
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(path))
    except FileNotFoundError as error:  # no class, or a class without images
        raise CommandError(f"--data {path}: {str(error).splitlines()[0]}") from error


def drop_unreadable(images: Any) -> list[str]:
    """Take the files that cannot be decoded out of an `ImageFolder`, and name them.

    Every file is decoded once, before training, so that the batches don't depend on when a bad
    file is met.
    """
    from rich.progress import track

    paths = [path for path, _ in images.samples]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = list(
            track(pool.map(problem, paths), "Reading images", len(paths), transient=True)
        )
    if all(problems):
        raise CommandError(
            f"--data {images.root}: none of its {len(paths)} images can be read, "
            f"such as {problems[0]}"
        )
    images.samples = [
        sample for sample, bad in zip(images.samples, problems, strict=True) if not bad
    ]
    images.targets = [label for _, label in images.samples]
    return [bad for bad in problems if bad]


def problem(path: str) -> str | None:
    """What is wrong with an image file, if anything."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # decoders raise what they like on broken files
        return f"{path} ({str(error) or type(error).__name__})"
    return None


def hold_out(indices: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split off a part of each class: at least one image of a class that has two or more."""
    by_class: dict[int, list[int]] = {}
    for index in indices:
        by_class.setdefault(labels[index], []).append(index)
    kept, held = [], []
    for label, members in sorted(by_class.items()):
        count = max(1, round(HELD_OUT * len(members))) if len(members) > 1 else 0
        order = [members[position] for position in permutation(len(members), "hold out", label)]
        held += order[:count]
        kept += order[count:]
    return sorted(kept), sorted(held)

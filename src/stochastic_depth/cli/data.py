"""Images by class, split for training, validation and the final test."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from . import fashion_mnist
from .errors import CommandError
from .seeds import derive, permutation

QUICK_IMAGES = 500
HELD_OUT = 0.15
FEW = 5
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Splits:
    """What to train on, what to choose on, what to report on, and what was left out or is scarce.

    ``unreadable`` are image files that cannot be decoded, ``ignored`` those of other types,
    ``warnings`` sentences about classes that are too small.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    image_size: int | None = None
    unreadable: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Relabelled(Dataset[Any]):
    """Images with other labels."""

    def __init__(self, images: Dataset[Any], labels: Sequence[int]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index][0], self.labels[index]


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


def with_wrong_labels(images: Any, share: float, classes: int, seed: int) -> Dataset[Any]:
    """The same images, ``share`` of them with the label of another class drawn at random."""
    count = wrong_labels(len(images), share)
    if not count:
        return images  # type: ignore[no-any-return]
    labels = labels_of(images)
    generator = torch.Generator().manual_seed(derive("wrong label", seed))
    shifts = torch.randint(1, classes, (count,), generator=generator).tolist()
    chosen = permutation(len(labels), "wrong labels", seed)[:count]
    for index, shift in zip(chosen, shifts, strict=True):
        labels[index] = (labels[index] + shift) % classes
    return Relabelled(images, labels)


def wrong_labels(images: int, share: float) -> int:
    """How many of the images get a wrong label."""
    return round(share * images)


def labels_of(images: Any) -> list[int]:
    """The labels, where they are at hand without decoding an image."""
    if isinstance(images, Subset):
        labels = labels_of(images.dataset)
        return [labels[index] for index in images.indices]
    return [int(label) for label in images.targets]


def load_folder(root: Path) -> Splits:
    """Images by class below ``root``, or below its train/, val/ and test/.

    What has no folder of its own is split off the training images, each class in proportion and
    the same way every time.
    """
    if not root.is_dir():
        raise CommandError(
            f"--data {root}: {'is a file' if root.exists() else 'no such folder'}; give a folder "
            f"with one folder of images for each class, or '{fashion_mnist.NAME}'"
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
            differing = ", ".join(sorted(set(classes) ^ set(found.classes))[:5])
            raise CommandError(
                f"--data {root}: {paths[part].name}/ and train/ must have the same classes, "
                f"but only one of them has {differing}"
            )
    if len(classes) < 2:
        raise CommandError(f"--data {root}: needs two classes or more, found only {classes[0]}")
    unreadable = [problem for found in images.values() for problem in drop_unreadable(found)]
    ignored = [name for found in images.values() for name in found.ignored]

    chosen = {part: list(range(len(found))) for part, found in images.items()}
    for part in ("val", "test"):
        if part not in images:
            images[part] = images["train"]
            chosen["train"], chosen[part] = hold_out(chosen["train"], images["train"].targets)
    for part, indices in chosen.items():
        if not indices:
            raise CommandError(f"--data {root}: has too few images to leave some for '{part}'")
    train, val, test = (Subset(images[part], chosen[part]) for part in PARTS)
    return Splits(
        train,
        val,
        test,
        tuple(classes),
        unreadable=tuple(unreadable),
        ignored=tuple(ignored),
        warnings=tuple(scarce(train, val, test, classes)),
    )


def scarce(train: Any, val: Any, test: Any, classes: Sequence[str]) -> list[str]:
    """A sentence for each class that is too small to learn or to judge."""
    counts = [Counter(labels_of(images)) for images in (train, val, test)]
    warnings = []
    for label, name in enumerate(classes):
        training, validation, testing = (count[label] for count in counts)
        if training < FEW or not validation or not testing:
            warnings.append(
                f"class '{name}' is small: {training} training, {validation} validation and "
                f"{testing} test images"
            )
    return warnings


def image_folder(path: Path) -> Any:
    """torchvision's `ImageFolder` over ``path``, without hidden folders and files."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    class Visible(ImageFolder):  # type: ignore[misc]
        """It keeps the names of the files that are no images in ``ignored``."""

        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            names = sorted(
                entry.name
                for entry in os.scandir(directory)
                if entry.is_dir() and not entry.name.startswith((".", "__"))
            )
            if not names:
                raise CommandError(
                    f"--data {directory}: has no folders; put the images of each class into a "
                    "folder that has the class's name"
                )
            return names, {name: label for label, name in enumerate(names)}

    def is_image(name: str) -> bool:
        if Path(name).name.startswith("."):
            return False
        if name.lower().endswith(IMG_EXTENSIONS):
            return True
        ignored.append(name)
        return False

    ignored: list[str] = []
    try:
        images = Visible(str(path), is_valid_file=is_image, allow_empty=True)
    except OSError as error:
        raise CommandError(f"--data {path}: cannot be read ({error.strerror})") from error
    counts: Counter[int] = Counter(images.targets)
    if empty := [name for name, label in images.class_to_idx.items() if not counts[label]]:
        raise CommandError(
            f"--data {path}: no images in {', '.join(empty[:5])}; images are files that end with "
            + ", ".join(IMG_EXTENSIONS)
        )
    images.ignored = ignored
    return images


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


def problem(path: str | Path) -> str | None:
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

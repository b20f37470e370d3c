"""Fashion-MNIST, from Debian's package where there is one."""

import gzip
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from .errors import CommandError
from .seeds import permutation

NAME = "fashion-mnist"
PACKAGE = "dataset-fashion-mnist"
FILES = Path("usr/share/datasets/fashion-mnist")
IMAGE_SIZE = 32
TRAINING_IMAGES = 2_000
VALIDATION_IMAGES = 500
TEST_IMAGES = 2_000


def load(
    training: int | None = None, testing: int | None = None
) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any], tuple[str, ...]]:
    """Some training images, others to choose on, some test images, and the class names."""
    from torchvision.datasets import FashionMNIST

    root = cache_folder()
    prepare(root / "FashionMNIST" / "raw")
    try:
        full, test = (FashionMNIST(str(root), part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise CommandError(
            f"--data {NAME}: cannot be fetched ({error}); install Debian's package "
            f"{PACKAGE}, or give a folder of images"
        ) from error
    order = permutation(len(full), NAME)
    validation = len(full) - VALIDATION_IMAGES  # from the end: the same ones for every number
    train = Subset(full, order[: min(training or TRAINING_IMAGES, validation)])
    val = Subset(full, order[validation:])
    some = permutation(len(test), NAME, "test")[: testing or TEST_IMAGES]
    return train, val, Subset(test, some), tuple(full.classes)


def cache_folder() -> Path:
    """Where downloads are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stochastic-depth"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def prepare(raw: Path) -> None:
    """Put Debian's copy of the files, if there is one to be had, where torchvision looks."""
    if raw.is_dir():
        return
    print(f"Fetching Fashion-MNIST (53 MB) into {cache_folder()} ...", flush=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        packed = debian_package(PACKAGE, FILES, Path(scratch))
        if packed is None:
            return
        unpacked = Path(scratch, "raw")
        unpacked.mkdir()
        for path in packed.glob("*.gz"):
            with gzip.open(path) as source, (unpacked / path.stem).open("wb") as target:
                shutil.copyfileobj(source, target)
        raw.parent.mkdir(exist_ok=True)
        unpacked.rename(raw)  # all of it or nothing


def debian_package(name: str, folder: Path, scratch: Path) -> Path | None:
    """A folder of a Debian package, installed or fetched without root; None elsewhere."""
    if (installed := Path("/") / folder).is_dir():
        return installed
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return None
    lists = scratch / "lists"
    private = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={scratch}"]
    attempts = (  # with the machine's package lists, or where they are missing with fresh ones
        [["apt-get", "download", name]],
        [
            ["apt-get", *private, "update"],
            ["apt-get", *private, "download", name],
        ],
    )
    (lists / "partial").mkdir(parents=True)
    for commands in attempts:
        if all(
            subprocess.run(command, cwd=scratch, capture_output=True, check=False).returncode == 0
            for command in commands
        ):
            (package,) = scratch.glob("*.deb")
            subprocess.run(["dpkg", "-x", package, scratch], check=True)
            return scratch / folder
    return None

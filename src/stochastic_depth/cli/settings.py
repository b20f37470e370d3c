"""What decides the outcome of a run, and the folder that keeps it."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from . import fashion_mnist, models
from .errors import CommandError
from .files import write_json
from .loggers import check_logger

FOLDER = "STOCHASTIC_DEPTH_FOLDER"
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Settings:
    """All that decides the outcome; kept beside the results, so that a run can be resumed.

    Paths are absolute, so that it can be resumed from anywhere.
    """

    model: str
    weights: str
    data: str
    p: tuple[float, ...]
    epochs: int
    seeds: int
    image_size: int | None = None
    label_noise: float = 0.0
    schedule: str = "linear"
    mode: str = "batch"
    batch_size: int = 32
    lr: float = 1e-3
    quick: bool = False
    devices: int = 1
    strategy: str = "auto"
    logger: str | None = None
    threads: int | None = None  # of torch, where they were chosen by trying

    @classmethod
    def from_options(cls, **given: Any) -> "Settings":
        """Fill in the defaults that depend on what else is given."""
        quick = given.get("quick", False)
        if not given.keys() & {"model", "data"}:  # chosen on validation images: docs/finetune.md
            epochs, seeds = (6, 1) if quick else (8, 3)
            demo = {"p": (0.0, 0.5), "label_noise": 0.4, "epochs": epochs, "seeds": seeds}
            given = demo | given
        given.setdefault("p", (0.2,))
        given.setdefault("epochs", 3 if quick else 8)
        given.setdefault("seeds", 3 if len(given["p"]) > 1 and not quick else 1)
        given["model"] = absolute(given.get("model", models.EMBEDDED), (models.EMBEDDED,))
        given["weights"] = absolute(given.get("weights", "pretrained"), models.WEIGHTS)
        given["data"] = absolute(given.get("data", fashion_mnist.NAME), (fashion_mnist.NAME,))
        return cls(**{**given, "p": tuple(sorted(given["p"]))})

    def check(self) -> None:
        """Refuse what cannot be, before anything is loaded."""
        if self.batch_size % self.devices:
            raise CommandError(
                f"--batch-size {self.batch_size}: is shared by all devices, so it must be a "
                f"multiple of --devices {self.devices}"
            )
        if self.data != fashion_mnist.NAME and not Path(self.data).is_dir():
            reason = "is a file" if Path(self.data).exists() else "no such folder"
            raise CommandError(
                f"--data {self.data}: {reason}; give a folder with one folder of images for each "
                f"class, or '{fashion_mnist.NAME}'"
            )
        models.check_paths(self.model, self.weights)
        check_logger(self.logger)


def absolute(name: str, words: Iterable[str]) -> str:
    """A path that holds everywhere, where ``name`` is one rather than a word or a model's name."""
    path = Path(name).expanduser()
    if name in words or not (path.exists() or models.is_path(name)):
        return name
    return str(path.resolve())


def is_first_process() -> bool:
    """Whether this is not one of the processes that Lightning or torchrun started beside it."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def new_folder() -> Path:
    """A folder named after the time: the first process's time, which the others inherit."""
    if not is_first_process() and FOLDER not in os.environ:
        raise CommandError("--out: is needed where torchrun starts the processes")
    name = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return Path(os.environ.setdefault(FOLDER, str(Path("runs", name))))


def check_folder(folder: Path) -> None:
    """See that a run can be written to ``folder``, without making it yet."""
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--out {folder}: is a file; name a folder")
    if (folder / SETTINGS).exists():
        raise CommandError(
            f"--out {folder}: holds a run already; continue it with --resume, or name another "
            "folder"
        )
    check_place(folder, folder)


def check_place(out: Path, folder: Path) -> None:
    """See that ``out`` can be written to ``folder``, which may have to be made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise CommandError(f"--out {out}: {nearest} is a file, so no folder can be made in it")
    try:
        with TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise CommandError(
            f"--out {out}: nothing can be written to {nearest} ({error.strerror})"
        ) from error


def create_folder(folder: Path, settings: Settings) -> None:
    """A new folder for the results, the settings in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, asdict(settings))
    except OSError as error:
        raise CommandError(f"--out {folder}: cannot be written to ({error.strerror})") from error


def read_settings(folder: Path) -> Settings:
    """The settings that a run left in its folder."""
    path = folder / SETTINGS
    if not path.is_file():
        reason = f"has no {SETTINGS}" if folder.is_dir() else "no such folder"
        raise CommandError(f"--resume {folder}: {reason}; give the folder of a run of finetune")
    try:
        found = json.loads(path.read_text())
        return Settings(**{**found, "p": tuple(found["p"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        known = ", ".join(field.name for field in fields(Settings))
        raise CommandError(
            f"--resume {folder}: its {SETTINGS} cannot be read ({error}); it must be a JSON "
            f"object with {known}"
        ) from error

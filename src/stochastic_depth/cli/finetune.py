"""The main job: fine-tune with stochastic depth, and side by side without."""

import json
import logging
import os
import statistics
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import stochastic_depth as sd

from . import data, fashion_mnist, models
from .batches import evaluation_batches, training_batches
from .errors import CommandError, first_line
from .report import WITH, WITHOUT, Result, write_json, write_report
from .seeds import derive
from .training import Classifier, Recorder, trainer


@dataclass(frozen=True)
class Settings:
    """All that decides the outcome; kept beside the results, so that a run can go on."""

    model: str = models.EMBEDDED
    weights: str = "pretrained"
    data: str = fashion_mnist.NAME
    image_size: int | None = None
    p: float = 0.2
    schedule: str = "linear"
    mode: str = "batch"
    epochs: int = 4
    batch_size: int = 32
    lr: float = 1e-3
    compare: bool = True
    seeds: int = 3
    quick: bool = False
    devices: int = 1
    strategy: str = "auto"

    @classmethod
    def from_options(cls, **given: Any) -> "Settings":
        """Fill in the defaults that depend on what else is given."""
        quick = given.get("quick", False)
        compare = given.setdefault("compare", not given.keys() & {"model", "data"})
        given.setdefault("seeds", 3 if compare and not quick else 1)
        given.setdefault("epochs", 2 if quick else 4)
        return cls(**given)


def finetune(*, out: Path | None = None, resume: Path | None = None, **given: Any) -> None:
    """Run, or go on with, every arm of every seed, and leave all that came out in a folder."""
    if resume is None:
        settings = Settings.from_options(**given)
        folder = out or new_folder()
    else:
        if options := given.keys() | ({"out"} if out else set()):
            named = ", ".join(f"--{option.replace('_', '-')}" for option in sorted(options))
            raise CommandError(f"--resume {resume}: goes on with its own settings; drop {named}")
        settings, folder = read_settings(resume), resume
    if settings.batch_size % settings.devices:
        raise CommandError(
            f"--batch-size {settings.batch_size}: is shared by all devices, so it must be a "
            f"multiple of --devices {settings.devices}"
        )
    first = is_first_process()
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not first)
    with quiet():
        task = Task(settings)
        if resume is None and first:
            create_folder(folder, settings)
        console.print(task.describe())
        console.print(
            f"Results in {folder}; if interrupted, go on with: "
            f"stochastic-depth finetune --resume {folder}\n",
        )
        results = []
        for seed in range(settings.seeds):
            for arm in arms(settings.compare, seed):
                result = task.run(seed, arm, folder / f"seed{seed}-{arm}")
                console.print(result.line())
                results.append(result)
    if first:
        write_report(results, asdict(settings), list(task.splits.skipped), folder, console)


def is_first_process() -> bool:
    """Whether this is not one of the processes that Lightning or torchrun started beside it."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def new_folder() -> Path:
    """A folder named after the time: the first process's time, which the others inherit."""
    if not is_first_process() and FOLDER not in os.environ:
        raise CommandError("--out: is needed where torchrun starts the processes")
    name = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return Path(os.environ.setdefault(FOLDER, str(Path("runs", name))))


FOLDER = "STOCHASTIC_DEPTH_FOLDER"


def arms(compare: bool, seed: int) -> tuple[str, ...]:
    """The arms in the order to run them: who goes first alternates, as machines warm and cool."""
    if not compare:
        return (WITH,)
    return (WITHOUT, WITH) if seed % 2 == 0 else (WITH, WITHOUT)


class Task:
    """The network and the data, checked before the first long run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.splits = data.load(settings.data, quick=settings.quick)
        network = self.network()
        self.image_size = settings.image_size or self.splits.image_size or network.image_size
        try_out(settings.model, network.model, self.image_size, len(self.splits.classes))
        self.apply(network.model)
        self.summary = sd.summary(network.model, self.example())

    def network(self) -> models.Network:
        """The network as it is before fine-tuning."""
        return models.load(
            self.settings.model, weights=self.settings.weights, classes=len(self.splits.classes)
        )

    def example(self) -> torch.Tensor:
        """Images of the size in use."""
        return torch.zeros(2, 3, self.image_size, self.image_size)

    def apply(self, model: nn.Module) -> list[sd.Branch]:
        """Put stochastic depth into ``model``."""
        settings = self.settings
        try:
            sd.apply(
                model,
                settings.p,
                schedule=settings.schedule,
                mode=settings.mode,
                example_inputs=self.example(),
            )
        except ValueError as error:
            raise CommandError(str(error)) from error
        return sd.branches(model)

    def describe(self) -> str:
        """The task in a few lines."""
        settings, summary, skipped = self.settings, self.summary, self.splits.skipped
        counts = ", ".join(f"{len(getattr(self.splits, part)):,} {part}" for part in data.PARTS)
        text = (
            f"{settings.model} on {settings.data}: {len(self.splits.classes)} classes, {counts} "
            f"images of {self.image_size} px\n"
            f"p = {settings.p}, {settings.schedule}, {settings.mode} mode: expected depth "
            f"{summary.expected_depth:.2f} of {summary.depth} branches"
        )
        if skipped:
            text += f"\nLeft out, as they cannot be read: {len(skipped)} images\n  "
            text += "\n  ".join(skipped)
        return text

    def run(self, seed: int, arm: str, folder: Path) -> Result:
        """Train and test one arm, or read what it gave if that was done before."""
        done = folder / "result.json"
        if done.is_file():
            return Result(**json.loads(done.read_text()))
        settings = self.settings
        torch.manual_seed(derive("start", seed))  # both arms draw the same head
        network = self.network()
        branches = self.apply(network.model) if arm == WITH else []
        classifier = Classifier(network, settings.lr, seed)
        recorder = Recorder(branches, self.summary.depth)
        fitting = trainer(settings.epochs, recorder, folder, settings.devices, settings.strategy)
        fitting.fit(
            classifier,
            training_batches(
                self.splits.train, self.image_size, settings.batch_size, seed, settings.devices
            ),
            evaluation_batches(self.splits.val, self.image_size, settings.batch_size),
            ckpt_path=last_checkpoint(folder),
        )
        (test,) = fitting.test(
            classifier,
            evaluation_batches(self.splits.test, self.image_size, settings.batch_size),
            verbose=False,
        )
        if is_first_process():
            torch.save(classifier.model.state_dict(), folder / "model.pt")
        result = Result(
            seed=seed,
            arm=arm,
            test_error=test["test_error"],
            test_loss=test["test_loss"],
            step_seconds=statistics.median(recorder.step_seconds),
            expected_depth=self.summary.depth - sum(branch.p for branch in branches),
            realised_depth=statistics.fmean(row["realised_depth"] for row in recorder.history),
            history=recorder.history,
        )
        if is_first_process():
            write_json(done, asdict(result))
        return result


def try_out(name: str, model: nn.Module, image_size: int, classes: int) -> None:
    """See that the model takes such images before anything else is done with it."""
    images = torch.zeros(2, 3, image_size, image_size)
    try:
        with torch.no_grad():
            output = model.eval()(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise CommandError(
            f"--image-size {image_size}: {name} takes no images of this size "
            f"({first_line(error)}); leave it out for the model's own"
        ) from error
    shape = tuple(getattr(output, "logits", output).shape)
    if shape != (2, classes):
        raise CommandError(
            f"--model {name}: must give one logit a class, shape {(2, classes)}, but gave {shape}"
        )


def create_folder(folder: Path, settings: Settings) -> None:
    """A new folder for the results, the settings in it."""
    if (folder / "settings.json").exists():
        raise CommandError(
            f"--out {folder}: holds a run already; go on with it by --resume, or name another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", asdict(settings))


def read_settings(folder: Path) -> Settings:
    """The settings that a run left in its folder."""
    path = folder / "settings.json"
    try:
        return Settings(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(
            f"--resume {folder}: needs the folder of a run, with a readable settings.json ({error})"
        ) from error


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; None is the start."""
    for path in sorted(folder.glob("epoch=*.ckpt"), reverse=True):
        if is_whole(path):
            return path
        print(
            f"stochastic-depth finetune: the checkpoint {path} is cut short or corrupted; going on "
            "from the one before it, or where there is none from the start of that seed",
            file=sys.stderr,
        )
        path.rename(path.with_suffix(".damaged"))  # or the next of this epoch had another name
    return None


def is_whole(path: Path) -> bool:
    """Whether every part of a file that torch.save wrote has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notes on its own affairs and on choices made here on purpose to itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
        warnings.filterwarnings("ignore", "The .*dataloader.* does not have many workers")
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        yield

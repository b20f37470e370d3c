"""The main job: fine-tune at one or more rates of stochastic depth, by turns, and compare."""

import json
import logging
import shutil
import statistics
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning import Trainer
from rich.console import Console

from stochastic_depth_command import command_line

from . import saving
from .batches import evaluation_batches, training_batches
from .curve import Watched, curve, rank
from .data import with_wrong_labels
from .errors import CommandError, Interrupted, first_line
from .files import write_json
from .loggers import close_logger, make_logger
from .names import described
from .progress import Overall
from .report import write_report
from .results import Result
from .settings import (
    Settings,
    check_folder,
    create_folder,
    is_first_process,
    new_folder,
    read_settings,
)
from .statistics import middle_mean
from .task import Task
from .training import Turns, Variant, of_all_processes, trainer


def finetune(*, out: Path | None = None, resume: Path | None = None, **given: Any) -> None:
    """Run, or continue, every rate of every seed, and leave all that came out in a folder."""
    first = is_first_process()
    if resume is None:
        settings, folder = Settings.from_options(**given), out or new_folder()
        if first:
            check_folder(folder)
    else:
        if options := given.keys() | ({"out"} if out else set()):
            named = ", ".join(f"--{option.replace('_', '-')}" for option in sorted(options))
            raise CommandError(f"--resume {resume}: keeps its own settings; leave out {named}")
        settings, folder = read_settings(resume), resume
    settings.check()
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not first)
    with quiet():
        console.print("Loading the model and the data ...")
        task = Task(settings)
        task.choose_threads()
        if resume is None and first:
            create_folder(folder, task.settings)
        try:
            run(task, folder, console)
        except KeyboardInterrupt:
            again = command_line("finetune", "--resume", folder.resolve())
            raise Interrupted(f"continue with: {again}") from None


def run(task: Task, folder: Path, console: Console) -> None:
    """Train what is not trained yet, and report on everything."""
    settings = task.settings
    done = {seed: read_results(folder, seed) for seed in range(settings.seeds)}
    left = [seed for seed, results in done.items() if results is None]
    console.print(task.describe())
    console.print(plan(task, folder, left))
    with Overall(console, task, left) as overall:
        for seed in left:
            done[seed] = train(task, seed, folder, overall)
            for result in done[seed] or ():
                overall.say(result.line(settings.seeds))
    if is_first_process():
        results = [result for results in done.values() for result in results or ()]
        write_report(results, task, folder, console)
        console.print(
            f"\n{folder}/ holds metrics.json, curves.png, and for each of the "
            f"{len(results)} runs model.pt and model.json.\n"
            f"To use one: {command_line('predict', folder)} IMAGE...\n"
            f"To make it less deep: {command_line('prune', folder)} --keep BRANCHES --out FILE"
        )


def plan(task: Task, folder: Path, left: list[int]) -> str:
    """What is going to happen, how long it takes, and where it goes."""
    settings = task.settings
    seeds, rates = settings.seeds, settings.p
    kinds = " and ".join(described(p) for p in rates)
    text = f"Plan: {seeds * len(rates)} run{'s'[: seeds * len(rates) > 1]}: "
    text += f"{seeds} seed{'s'[: seeds > 1]}, {'each ' if seeds > 1 else ''}{kinds}"
    text += ", trained by turns" if len(rates) > 1 else ""
    text += (
        f"; {settings.epochs} epoch{'s'[: settings.epochs > 1]} of {task.steps()} steps, at most "
        f"{settings.batch_size} images each"
    )
    if len(left) < seeds:
        text += f"; {seeds - len(left)} of the {seeds} seeds are done"
    if left:
        text += f"; about {duration(len(left) * task.seconds())} on this machine"
    return (
        f"{text}.\nFiles go to {folder.resolve()}; if interrupted, continue with: "
        f"{command_line('finetune', '--resume', folder.resolve())}\n"
    )


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def read_results(folder: Path, seed: int) -> list[Result] | None:
    """What a seed gave, if that was done before."""
    path = folder / f"seed{seed}.json"
    if not path.is_file():
        return None
    try:
        return [Result(**result) for result in json.loads(path.read_text())["results"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CommandError(
            f"--resume {folder}: its {path.name} cannot be read ({first_line(error)}); delete that "
            "file to train this seed again"
        ) from error


def train(task: Task, seed: int, folder: Path, overall: Overall) -> list[Result]:
    """Train and test the variants of one seed."""
    settings, splits, size = task.settings, task.splits, task.image_size
    variants = task.variants(seed)
    checkpoints = folder / f"seed{seed}-checkpoints"
    module = Turns(variants, len(splits.classes), settings.lr, seed, overall.tick)
    overall.begin(seed, variants)
    batches = task.steps()
    logger = make_logger(settings.logger, folder, seed)
    fitting = trainer(
        settings.epochs, checkpoints, settings.devices, settings.strategy, logger, batches
    )
    noisy = with_wrong_labels(splits.train, settings.label_noise, len(splits.classes), seed)
    val, test = (
        evaluation_batches(images, size, settings.batch_size)
        for images in (splits.val, splits.test)
    )
    training = training_batches(noisy, size, settings.batch_size, seed, settings.devices)
    dropped, last, chosen = fit_and_test(
        fitting, module, training, val, test, last_checkpoint(checkpoints)
    )
    close_logger(settings.logger, logger)
    results = [
        result(task, seed, p, variant, [process[place] for process in dropped])
        for place, (p, variant) in enumerate(zip(settings.p, variants, strict=True))
    ]
    results = [
        replace(found, last=scores, chosen=best)
        for found, scores, best in zip(results, last, chosen, strict=True)
    ]
    device = fitting.strategy.root_device
    seen, unseen = (
        Watched(images, device, lambda cost: overall.tick(cost / len(variants)))
        for images in (val, test)
    )
    results = [
        shallower(task, found, variant.to(device).eval(), seen, unseen)
        for found, variant in zip(results, variants, strict=True)
    ]
    if is_first_process():
        for found, variant in zip(results, variants, strict=True):
            save(task, found, variant, folder / f"seed{seed}-{variant.name}")
        write_json(folder / f"seed{seed}.json", {"results": [asdict(r) for r in results]})
        shutil.rmtree(checkpoints, ignore_errors=True)
    return results


def fit_and_test(
    fitting: Trainer, module: Turns, training: Any, val: Any, test: Any, checkpoint: Path | None
) -> tuple[list[list[list[float]]], list[dict[str, float]], list[dict[str, float]]]:
    """Train the variants and test each twice: after the last epoch, and after its best one.

    Returns:
        For each process and variant, the share of decisions in which each branch was dropped;
        the scores of each variant after the last epoch, and those after its best one.
    """
    with interruptible(fitting):
        fitting.fit(module, training, val, ckpt_path=checkpoint)
        dropped = of_all_processes([variant.dropped() for variant in module.variants])
        fitting.test(module, test, verbose=False)
        last = module.tested
        for variant in module.variants:
            variant.model.load_state_dict(variant.best["state"])
        fitting.test(module, test, verbose=False)
    return dropped, last, module.tested


def result(task: Task, seed: int, p: float, variant: Variant, dropped: list[list[float]]) -> Result:
    """What was measured in training; ``dropped`` are the shares of each process."""
    summary = task.summaries[p]
    shares = [statistics.fmean(branch) for branch in zip(*dropped, strict=True)]
    saved = sum(share * flops for share, flops in zip(shares, variant.flops, strict=True))
    return Result(
        seed=seed,
        p=p,
        last={},
        chosen={},
        chosen_epoch=variant.best["epoch"],
        step_seconds=middle_mean(variant.seconds),
        flops=1.0 - saved,
        expected_flops=summary.compute_kept if p else 1.0,
        expected_depth=summary.expected_depth if p else summary.depth,
        realised_depth=summary.depth - sum(shares),
        history=variant.history,
    )


def shallower(task: Task, found: Result, variant: Variant, val: Watched, test: Watched) -> Result:
    """The same with what the model, which is that of the chosen epoch, gives with less depth."""
    depth = task.summaries[found.p].depth
    ranking, unranked = rank(variant, val)
    points = curve(variant, ranking, depth, test, task.example())
    whole = {"branches": depth, "error": found.chosen["error"]}
    return replace(found, ranking=ranking, unranked=unranked, curve=[whole, *points])


def save(task: Task, found: Result, variant: Variant, folder: Path) -> None:
    """Leave the model of the chosen epoch, which it has now."""
    about = {
        "p": found.p,
        "schedule": task.settings.schedule,
        "mode": task.settings.mode,
        "seed": found.seed,
        "epoch": found.chosen_epoch,
        "validation_error": variant.best["error"],
        "test_error": found.chosen["error"],
        "ranking": found.ranking,
        "curve": found.curve,
    }
    saving.save(folder, task, variant.best["state"], about)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; None is the start."""
    for path in sorted(folder.glob("epoch=*.ckpt"), reverse=True):
        if is_whole(path):
            return path
        print(
            f"stochastic-depth finetune: the checkpoint {path} is cut short or corrupted; "
            "continuing from the one before it, or where there is none from the start of that seed",
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
def interruptible(fitting: Trainer) -> Iterator[None]:
    """Let Ctrl-C be what it is, instead of the exit that Lightning makes of it."""
    try:
        yield
    except SystemExit:
        if fitting.interrupted:
            raise KeyboardInterrupt from None
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notes on its own affairs and on choices made here on purpose to itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
        warnings.filterwarnings("ignore", "The .*dataloader.* does not have many workers")
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", "The number of training batches .* is smaller than")
        yield

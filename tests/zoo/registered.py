"""Every architecture that timm has registered, looked at without its weights.

The models are built on the meta device, where detection works and nothing is computed, so also the
largest are seen. What is expected is counted: DropPath modules that a training step runs, or the
classes in ``timm_models.BLOCKS``. Values cannot be verified there.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby

import torch
from torch import nn

import stochastic_depth as sd

from .measure import Row, drops_that_run, modules_that_run, reasons, timed
from .timm_models import BLOCKS
from .timm_models import MODELS as BY_FILE


def timm_registered_zoo(only: str | None, verified: bool = False) -> Iterator[Row]:
    """All of them, or those of one architecture file."""
    import timm

    files = {name: _file_of(name) for name in timm.list_models()}
    names = sorted((n for n in files if only in (None, files[n])), key=lambda n: (files[n], n))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_look_at, [files[n] for n in names], names)


def by_file(rows: list[Row]) -> list[Row]:
    """One row for each architecture file: sums, and the models that are not whole."""
    lines = []
    for file, group in groupby(rows, lambda row: row.family):
        of_file = list(group)
        others = [row for row in of_file if row.verdict != "whole"]
        lines.append(
            Row(
                file,
                f"{len(of_file)} architectures",
                sum(row.found for row in of_file),
                ", ".join(dict.fromkeys(row.expected.partition(" ")[2] for row in of_file)),
                f"{len(of_file) - len(others)} whole",
                "; ".join(f"{row.model} {row.verdict}: {row.note}" for row in others),
                None,
                tuple(_total(row.seconds[k] for row in of_file) for k in range(4)),
            )
        )
    return lines


def _total(seconds: Iterable[float | None]) -> float | None:
    """The sum of those that were measured, if any was."""
    measured = [s for s in seconds if s is not None]
    return sum(measured) if measured else None


def _file_of(name: str) -> str:
    import timm

    return str(timm.models.model_entrypoint(name).__module__).rpartition(".")[2]


def _look_at(file: str, name: str) -> Row:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        return _look_on(torch.device("meta"), file, name)
    except Exception:  # of any kind: the model needs values
        try:
            return _look_on(torch.device("cpu"), file, name)
        except Exception as error:
            return Row(file, name, 0, "", "wrong", f"{type(error).__name__} {error}"[:100])


def _look_on(device: torch.device, file: str, name: str) -> Row:
    with device:
        model, build = timed(lambda: _build(name))
        inputs = torch.randn(2, *model.default_cfg["input_size"])
        drops = drops_that_run(model, inputs)
        blocks = modules_that_run(model, inputs, BLOCKS.get(file, ()))
        found: list[sd.Branch] = []

        def apply() -> None:
            try:
                found.extend(sd.branches(sd.apply(model, 0.2, example_inputs=inputs)))
            except ValueError as error:
                if "no residual branch" not in str(error):
                    raise

        _, spent = timed(apply)
        missing = drops - {drop for branch in found for drop in branch.existing}
        by_hand = BY_FILE[file][1] if file in BY_FILE else None
        note = ""
        if file in BLOCKS:
            told, whole = f"{len(blocks)} blocks", len(found) >= len(blocks)
        elif by_hand == 0:
            told, whole = "0 none", not found
        elif by_hand is None and drops:
            told, whole = f"{len(drops)} DropPath", not missing
        else:
            told, whole, note = "", False, f"{len(found)} found"
        if told and not whole:
            note = f"{len(found)} of {told}, {reasons(sd.remove(model), inputs)}"
    verdict = "whole" if whole else "partial" if told else "uncounted"
    return Row(file, name, len(found), told, verdict, note, None, (build, None, spent, None))


def _build(name: str) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, drop_path_rate=0.1)
    except TypeError:
        return timm.create_model(name)

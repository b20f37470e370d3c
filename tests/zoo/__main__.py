"""Measure how much of each model zoo is found and verified, and write docs/coverage.md.

``python -m tests.zoo`` does all zoos, ``python -m tests.zoo timm`` one.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.cli.torchvision_ops import ensure_torchvision
from stochastic_depth.surgery import detect

from . import transformers_models
from .timm_models import MODELS as TIMM

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
HEAD = """# What is found in which model

Written by `python -m tests.zoo`. *Whole*: every residual branch that is expected is found, and
`sd.verify` passes. *Partial*: some are not found; `sd.apply` refuses them, and `sd.summary` says
why. *Wrong*: something fails `sd.verify`. Expected numbers come from the model's own DropPath
modules (those that a training step runs), from the layer count of its configuration, or were
counted by hand. Times are for `sd.apply`, on one busy CPU core.
"""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    family: str
    model: str
    found: int
    expected: str
    verdict: str
    note: str
    seconds: float

    def __str__(self) -> str:
        note = self.note.replace("|", "/").replace("\n", " ")
        return (
            f"| {self.family} | {self.model} | {self.found} | {self.expected} | {self.verdict} | "
            f"{note} | {self.seconds:.1f} |"
        )


def measure(
    family: str, name: str, model: nn.Module, inputs: Any, expected: int | None, source: str
) -> Row:
    """Apply to ``model``, verify it, and compare what was found with what was expected."""
    drops = _drops_that_run(model, inputs)
    start = time.perf_counter()
    try:
        sd.apply(model, example_inputs=inputs)
    except ValueError as error:
        seconds = time.perf_counter() - start
        verdict = "whole" if expected == 0 else "none"
        note = "" if expected == 0 else _reasons(model, inputs) or str(error)[:80]
        return Row(family, name, 0, f"{expected} ({source})", verdict, note, seconds)
    seconds = time.perf_counter() - start
    found = sd.branches(model)
    taken = {drop for branch in found for drop in branch.existing}
    result = sd.verify(model, inputs)
    failed = "; ".join(f"{c.name}: {c.failure}" for c in result.checks if c.failure)
    missing = sorted(drops - taken)
    if drops:
        told = f"{len(drops)} DropPath"
        whole = not missing
    else:
        told = "not counted" if expected is None else f"{expected} ({source})"
        whole = expected is None or len(found) >= expected
    verdict = "wrong" if failed else "whole" if whole else "partial"
    note = failed or (
        "" if whole else f"{', '.join(missing[:2])} {_reasons(sd.remove(model), inputs)}"
    )
    return Row(family, name, len(found), told, verdict, note, seconds)


def _drops_that_run(model: nn.Module, inputs: Any) -> set[str]:
    ran: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("DropPath", "StochasticDepth"))
    ]
    model.train()
    _batch_norm_aside(model)
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for handle in handles:
        handle.remove()
    return ran


def _batch_norm_aside(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _reasons(model: nn.Module, inputs: Any) -> str:
    reasons = dict.fromkeys(r.reason for r in detect(model, inputs).refused)
    return "; ".join(list(reasons)[:2])


def torchvision_zoo() -> Iterator[Row]:
    """Every classification model of torchvision."""
    from torchvision import models

    for name in models.list_models(module=models):
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, **extra)
        if sum(p.numel() for p in model.parameters()) > 100e6:
            continue
        size = 299 if "inception" in name else 224 if "vit" in name or "maxvit" in name else 64
        none = name.startswith(
            ("alexnet", "densenet", "googlenet", "inception", "shufflenet", "squeezenet", "vgg")
        )
        inputs = torch.randn(2, 3, size, size)
        expected = 0 if none else None
        yield measure(name.split("_")[0], name, model, inputs, expected, "by hand")


def timm_zoo() -> Iterator[Row]:
    """One model of each of timm's architecture files."""
    import timm

    for family, (name, expected) in TIMM.items():
        try:
            model = timm.create_model(name, drop_path_rate=0.1)
        except TypeError:
            model = timm.create_model(name)
        size = model.default_cfg["input_size"]
        for inputs in (torch.randn(2, 3, 64, 64), torch.randn(2, *size)):
            try:
                row = measure(family, name, model, inputs, expected, "by hand")
            except Exception as error:  # of any kind: the model does not take this size
                row = Row(family, name, 0, "", "none", str(error)[:100], 0.0)
                continue
            break
        yield row


def transformers_zoo() -> Iterator[Row]:
    """Tiny random models of transformers families."""
    import transformers

    transformers.logging.set_verbosity_error()
    for family in transformers_models.FAMILIES:
        model, inputs = transformers_models.build(family)
        try:
            row = measure(family.name, family.model, model, inputs, family.branches, family.reason)
        except Exception as error:  # of any kind: it belongs into the table
            row = Row(family.name, family.model, 0, "", "none", str(error)[:100], 0.0)
        yield row


ZOOS: dict[str, Callable[[], Iterator[Row]]] = {
    "torchvision": torchvision_zoo,
    "timm": timm_zoo,
    "transformers": transformers_zoo,
}


def write(name: str, rows: list[Row]) -> None:
    """Put the table of a zoo in its section of the page."""
    text = PAGE.read_text() if PAGE.exists() else HEAD
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    counts = ", ".join(
        f"{sum(row.verdict == verdict for row in rows)} {verdict}"
        for verdict in ("whole", "partial", "none", "wrong")
    )
    lines = [
        "",
        f"{len(rows)} models: {counts}.",
        "",
        "| family | model | found | expected | verdict | note | s |",
        "|---|---|---|---|---|---|---|",
        *map(str, rows),
    ]
    sections[name] = "\n".join(lines) + "\n"
    PAGE.write_text(HEAD + "".join(f"\n## {n}\n{sections[n]}" for n in ZOOS if n in sections))


def main() -> None:
    """Measure the zoos that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoos", nargs="*", choices=[*ZOOS, []], help="all, if none is given")
    torch.set_num_threads(1)
    ensure_torchvision()
    warnings.simplefilter("ignore")
    for name in parser.parse_args().zoos or ZOOS:
        rows = []
        for row in ZOOS[name]():
            print(row, flush=True)
            rows.append(row)
        write(name, rows)


if __name__ == "__main__":
    main()

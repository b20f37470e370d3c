"""Measure how much of each model zoo is found and verified, and write docs/coverage.md.

``python -m tests.zoo`` does all zoos but ``third-party``, ``python -m tests.zoo timm`` one, and
with ``--only swin`` one family, which is printed and not written. ``--without-verify`` leaves
``sd.verify`` out, which takes by far the most time; the rows say so.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from benchmarks.harness import machine

import stochastic_depth as sd
from stochastic_depth.cli.torchvision_ops import ensure_torchvision
from stochastic_depth.find.state import copied
from stochastic_depth.options import call_of

from . import transformers_models
from .measure import COLUMNS, Row, measure, reasons, timed
from .page import write_section
from .registered import by_file, timm_registered_zoo
from .timm_models import MODELS as TIMM

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
VERDICTS = ("whole", "partial", "none", "uncounted", "wrong")
LARGEST = "aimv2_3b_patch14_224"
HEAD = """# What is found in which model

Written by `python -m tests.zoo`. *Whole*: every residual branch that is expected is found, and
`sd.verify` passes, with one decision for each sample. *Partial*: some are not found. *None*:
nothing is found, and `sd.apply` says so. *Wrong*: something fails `sd.verify`, or raises an error
that is none of ours. Rows that are *not verified* were only tried by `sd.apply` itself, which runs
the model with all branches dropped, with all of them counted twice, and with some samples selected,
and refuses what fails. *Samples*: in how many of the branches samples can be selected; in the
others all are computed and the dropped ones masked.

Expected numbers come from the model's own DropPath modules (those that a training step runs), from
the layer count of its configuration, or are kept by hand, with the reason. More may be found than
that. Positional convolutions, `x + dwconv(x)` in CoaT, DaViT or Twins, are refused with this as the
reason, and sums of two streams, as of TNT's pixels and patches, are no shortcuts. For packages of
third parties they come from `tests/zoo/oracle.py`, which sees the sums of one run by itself; more
than that is wrong. What cannot be dropped is taken off, where `sd.apply` gives the reason named.

Seconds are processor time on the machine that is named, on one core: of building the model, of one
forward of the examples without gradients, and of `sd.apply` with examples, without samples
(`mode="batch"`) and with (`mode="row"`). Models are built with random weights; those of
transformers are small.
"""
REGISTERED = """All architectures that timm knows, a row for each of its files. They are built
without values (on the meta device), so nothing can be tried or verified there. *Uncounted*:
branches are found, but neither DropPath modules nor classes of blocks say how many there should be.
"""


def torchvision_zoo(only: str | None, verified: bool = True) -> Iterator[Row]:
    """Every classification model of torchvision."""
    from tests.models import WITHOUT_BRANCHES
    from tests.test_torchvision import expected_branches
    from torchvision import models

    for name in models.list_models(module=models):
        if only not in (None, name.split("_")[0]):
            continue
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        built = timed(lambda: models.get_model(name, **extra))  # noqa: B023
        if sum(p.numel() for p in built[0].parameters()) > 100e6:
            continue
        size = 299 if "inception" in name else 224 if "vit" in name or "maxvit" in name else 64
        none = name in WITHOUT_BRANCHES
        inputs = torch.randn(2, 3, size, size)
        expected = 0 if none else len(expected_branches(built[0]))
        source = "concatenation or a plain stack" if none else "by the source of its blocks"
        yield measure(name.split("_")[0], name, built, inputs, expected, source, verified)


def timm_zoo(only: str | None, verified: bool = True) -> Iterator[Row]:
    """One model of each of timm's architecture files."""
    import timm

    for family, (name, expected, *reason) in TIMM.items():
        if only not in (None, family):
            continue
        try:
            built = timed(lambda: timm.create_model(name, drop_path_rate=0.1))  # noqa: B023
        except TypeError:
            built = timed(lambda: timm.create_model(name))  # noqa: B023
        size = built[0].default_cfg["input_size"]
        for inputs in (torch.randn(2, 3, 64, 64), torch.randn(2, *size)):
            try:
                row = measure(family, name, built, inputs, expected, *reason or [""], verified)
            except Exception as error:  # of any kind: the model does not take this size
                row = Row(family, name, 0, "", "none", str(error)[:100], None, (built[1],))
                continue
            break
        yield row


def transformers_zoo(only: str | None, verified: bool = True) -> Iterator[Row]:
    """Tiny random models of transformers families."""
    import transformers

    transformers.logging.set_verbosity_error()
    for family in transformers_models.FAMILIES:
        if only not in (None, family.name):
            continue
        (model, inputs), seconds = timed(lambda: transformers_models.build(family))  # noqa: B023
        built = model, seconds
        try:
            row = measure(
                family.name, family.model, built, inputs, family.branches, family.reason, verified
            )
        except Exception as error:  # of any kind: it belongs into the table
            row = Row(
                family.name, family.model, 0, "", "wrong", str(error)[:100], None, (built[1],)
            )
        yield row


def largest_zoo(only: str | None, verified: bool = False) -> Iterator[Row]:
    """The time that detection takes on the largest model of timm that fits: 2.7 billion weights."""
    import timm

    model, build = timed(lambda: timm.create_model(LARGEST))
    _, spent = timed(lambda: sd.apply(model, 0.2))
    found, blocks = len(sd.branches(model)), 2 * len(model.blocks)
    verdict = "whole" if found == blocks else "partial"
    told, seconds = f"{blocks} (blocks of 2)", (build, None, spent, None)
    yield Row("vision_transformer", LARGEST, found, told, verdict, "not verified", None, seconds)


def third_party_zoo(only: str | None, verified: bool = True) -> Iterator[Row]:
    """Models of packages that nothing here was written for; ``make third-party`` installs them."""
    from .oracle import residual_sums
    from .third_party_models import MODELS

    for model in MODELS:
        if only not in (None, model.package):
            continue
        torch.manual_seed(0)
        built = timed(model.build)
        inputs = model.inputs()
        refused, why = model.refused
        if model.counted is None:
            expected = residual_sums(built[0], *copied(call_of(inputs))) - refused
            source = "by data flow" + (f", less {refused}: {why}" if refused else "")
        else:
            expected, source = model.counted
        try:
            row = measure(model.package, model.name, built, inputs, expected, source, verified)
        except Exception as error:  # of any kind: it belongs into the table
            note = f"{type(error).__name__}: {error}"[:100]
            row = Row(model.package, model.name, 0, source, "wrong", note, None, (built[1],))
        if row.verdict == "whole" and row.found > expected:
            row = replace(row, verdict="wrong", note="more than that")
        if row.verdict == "whole" and refused:
            plain = sd.remove(built[0]) if sd.is_applied(built[0]) else built[0]
            if why not in reasons(plain, inputs, most=99):
                row = replace(row, verdict="partial", note="the reason is not given")
        yield row


def _where(zoo: str) -> str:
    if zoo == "third-party":
        return f"Packages as `make third-party` installs them, on {machine(torch.device('cpu'))}."
    package = "timm" if zoo in ("timm-registered", "largest") else zoo
    return f"{package} {version(package)} on {machine(torch.device('cpu'))}."


ZOOS: dict[str, Callable[..., Iterator[Row]]] = {
    "torchvision": torchvision_zoo,
    "timm": timm_zoo,
    "timm-registered": timm_registered_zoo,
    "transformers": transformers_zoo,
    "largest": largest_zoo,
    "third-party": third_party_zoo,
}
ELSEWHERE = {"third-party"}  # not among all, as its packages have an environment of their own


def write(name: str, rows: list[Row]) -> None:
    """Put the table of a zoo in its section of the page."""
    counts = ", ".join(
        f"{sum(row.verdict == verdict for row in rows)} {verdict}" for verdict in VERDICTS
    )
    known = [row.samples for row in rows if row.samples is not None]
    selected = f", samples selected in {sum(known)}" if known else ""
    table = by_file(rows) if name == "timm-registered" else rows
    lines = [
        "",
        f"{len(rows)} models: {counts}; {sum(row.found for row in rows)} branches{selected}. "
        f"{_where(name)}",
        *(["", REGISTERED.rstrip()] if name == "timm-registered" else []),
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *map(str, table),
    ]
    write_section(PAGE, HEAD, ZOOS, name, lines)


def main() -> None:
    """Measure the zoos that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoos", nargs="*", choices=[*ZOOS, []], help="all, if none is given")
    parser.add_argument("--only", metavar="FAMILY", help="print this family, and write nothing")
    parser.add_argument(
        "--without-verify", dest="verified", action="store_false", help="leave sd.verify out"
    )
    args = parser.parse_args()
    sys.path.insert(0, str(PAGE.parents[1] / "tests"))  # where test modules find each other
    torch.set_num_threads(1)
    ensure_torchvision()
    warnings.simplefilter("ignore")
    for name in args.zoos or [zoo for zoo in ZOOS if zoo not in ELSEWHERE]:
        rows = []
        for row in ZOOS[name](args.only, args.verified):
            print(row, flush=True)
            rows.append(row)
        if args.only is None:
            write(name, rows)


if __name__ == "__main__":
    main()

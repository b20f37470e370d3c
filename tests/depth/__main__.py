"""Take depth out of each model of the zoos, and write docs/depth_coverage.md.

``python -m tests.depth`` does all zoos, ``python -m tests.depth timm`` one, and with
``--only swin`` one family, which is printed and not written.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stochastic_depth.cli.torchvision_ops import ensure_torchvision

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "depth_coverage.md"
LARGE = 400e6
HEAD = """# From which models depth can be taken out

Written by `python -m tests.depth`. From each model every second block is taken out (of those that
can go: not the ones that change the shape), and one branch of a block that stays. *Same*: the
pruned model gives what the model that skips the same gives, to the bit; parameters and FLOPs are
down by what `sd.summary` says; its state_dict loads into another model that is pruned by the record
alone. *Refused*: nothing could go, with the reason, and the model was as before. *Wrong*: anything
else. A note says what else was tried and could not go.

*Taken out* is blocks + branches. Time is the CPU time of a forward on two small images or texts,
the median of five interleaved rounds. Models have random weights; those of transformers are small.
"""

Case = tuple[str, str, Callable[[], nn.Module], list[Any]]


def seeded(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Another model each time, with the same weights."""
    torch.manual_seed(0)
    return build(*args, **kwargs)


def torchvision_cases() -> Iterator[Case]:
    """Every classification model of torchvision with residual branches."""
    from torchvision import models

    from models import WITHOUT_BRANCHES

    for name in models.list_models(module=models):
        if name in WITHOUT_BRANCHES:
            continue
        if models.get_model_weights(name).DEFAULT.meta["num_params"] > LARGE:
            continue
        size = 224 if name.startswith(("vit", "maxvit")) else 64
        build = partial(seeded, models.get_model, name)
        yield name.split("_")[0], name, build, [torch.randn(2, 3, size, size)]


def timm_cases() -> Iterator[Case]:
    """One model of each of timm's architecture files that has residual branches."""
    import timm

    from zoo.timm_models import MODELS

    for family, (name, expected, *_) in MODELS.items():
        if expected != 0:
            size = timm.get_pretrained_cfg(name).input_size
            sizes = [torch.randn(2, 3, 64, 64), torch.randn(2, *size)]
            yield family, name, partial(seeded, timm.create_model, name), sizes


def transformers_cases() -> Iterator[Case]:
    """Tiny random models of transformers families."""
    from zoo.transformers_models import FAMILIES, build

    for family in FAMILIES:
        if family.branches:
            inputs = build(family)[1]
            yield family.name, family.model, partial(first_of, build, family), [inputs]


def first_of(build: Callable[[Any], Any], family: Any) -> nn.Module:
    """The model alone."""
    model: nn.Module = build(family)[0]
    return model


ZOOS: dict[str, Callable[[], Iterator[Case]]] = {
    "torchvision": torchvision_cases,
    "timm": timm_cases,
    "transformers": transformers_cases,
}


def look(case: Case) -> Any:
    """The row of a case, with the first inputs that its model takes."""
    from .measure import Row, measure

    family, name, build, several = case
    for inputs in several:
        try:
            with torch.no_grad():
                model = build().eval()
                model(**inputs) if isinstance(inputs, dict) else model(inputs)
        except Exception:  # of any kind: it takes another size
            continue
        try:
            return measure(family, name, build, inputs)
        except Exception as error:  # of any kind: it belongs into the table
            problem = f"{type(error).__name__}: {error}".split("\n")[0][:160]
            return Row(family, name, "", 0, "", 1.0, 1.0, 1.0, "wrong", problem)
    return Row(family, name, "", 0, "", 1.0, 1.0, 1.0, "wrong", "cannot be run")


def write(zoo: str, rows: list[Any]) -> None:
    """Put the table of a zoo in its section of the page."""
    from benchmarks.harness import machine

    from zoo.page import write_section

    from .measure import HEADER

    verdicts = [row.verdict for row in rows]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("same", "refused", "wrong"))
    where = f"{zoo} {version(zoo)} on {machine(torch.device('cpu'))}"
    lines = ["", f"{len(rows)} models: {counts}. {where}.", "", HEADER, *map(str, rows)]
    write_section(PAGE, HEAD, ZOOS, zoo, lines)


def main() -> None:
    """Measure the zoos that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoos", nargs="*", choices=[*ZOOS, []], help="all, if none is given")
    parser.add_argument("--only", metavar="FAMILY", help="print this family, and write nothing")
    args = parser.parse_args()
    for zoo in args.zoos or ZOOS:
        rows = []
        for case in ZOOS[zoo]():
            if args.only in (None, case[0]):
                rows.append(look(case))
                print(rows[-1], flush=True)
                if args.only is None:
                    write(zoo, rows)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))  # where test modules find each other
    torch.set_num_threads(1)
    ensure_torchvision()
    warnings.simplefilter("ignore")
    main()

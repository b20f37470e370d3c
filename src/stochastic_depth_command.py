"""The `stochastic-depth` command: arguments in, exit code out.

It is a module beside the package, since importing the package imports torch: `--help`, `--version`
and a mistyped option answer at once, and what torch's threads do is settled before it starts them.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEMO = (
    "With no arguments: EfficientNet-Lite0 from ImageNet on 2,000 photos of Fashion-MNIST with "
    "40 % of their labels wrong, without stochastic depth and with p = 0.5, three seeds each."
)
MODEL_HELP = (
    "an image classifier: a name of torchvision, timm or the Hugging Face hub ('resnet50', "
    "'timm/resnet50', 'microsoft/resnet-50'), or a folder saved by save_pretrained"
)
RUN_HELP = (
    "a folder of finetune (its model with the lowest validation error is used), or the folder of "
    "one of its models"
)
SCHEDULES = ("linear", "linear-timm", "linear-efficientnet", "uniform", "alternating")
MODES = ("batch", "row", "subset")
LOGGERS = ("csv", "tensorboard", "wandb")
MISSING = "pip install 'stochastic-depth[cli]' installs everything that the command needs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    It is 0, or 2 for input the user can put right, or 130 after Ctrl-C.
    """
    given = vars(parser().parse_args(argv))
    command = given.pop("command")
    # Threads that wait by spinning keep the cores from those that have work to do.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from stochastic_depth.cli import commands
        from stochastic_depth.cli.errors import CommandError, Interrupted
    except KeyboardInterrupt:
        return say(command, "interrupted", 130)
    except ModuleNotFoundError as error:
        return say(command, f"the package {error.name!r} is missing; {MISSING}", 2)
    try:
        commands.run(command, given)
    except CommandError as error:
        return say(command, str(error), 2)
    except Interrupted as stop:
        return say(command, f"interrupted; {stop}", 130)
    except KeyboardInterrupt:
        return say(command, "interrupted before anything was written", 130)
    except ModuleNotFoundError as error:
        return say(command, f"the package {error.name!r} is missing; {MISSING}", 2)
    return 0


def say(command: str, message: str, code: int) -> int:
    """One line on the error stream, and the exit code."""
    print(f"stochastic-depth {command}: {message}", file=sys.stderr)
    return code


def program() -> str:
    """How a shell calls this program again: its name, or its path where it is not on PATH."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py":
        return "python -m stochastic_depth"
    if path.stem != "stochastic-depth" or shutil.which("stochastic-depth"):
        return "stochastic-depth"
    return shlex.quote(str(path))


def command_line(*words: object) -> str:
    """What to type into a shell for this program with these arguments."""
    return f"{program()} {shlex.join(map(str, words))}"


def parser() -> argparse.ArgumentParser:
    """The parser; an option that is not given is absent from what it returns."""
    root = argparse.ArgumentParser(
        prog="stochastic-depth", description="Stochastic depth for any PyTorch model."
    )
    root.add_argument(
        "--version",
        action=Version,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the version and exit",
    )
    commands = root.add_subparsers(dest="command", required=True)
    add_finetune(commands)
    add_predict(commands)
    add_prune(commands)
    add_inspect(commands)
    return root


class Version(argparse.Action):
    """Look the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        from importlib.metadata import version

        print(f"stochastic-depth {version('stochastic-depth')}")
        parser.exit()


def add_finetune(commands: Any) -> None:
    """The options of `finetune`."""
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune an image classifier at one or more rates of stochastic depth",
        description="Fine-tune a pretrained image classifier at one or more rates of stochastic "
        f"depth, by turns, and compare. {DEMO}",
        argument_default=argparse.SUPPRESS,
    )
    task = finetune.add_argument_group("task")
    task.add_argument("--model", help=f"{MODEL_HELP} (default: efficientnet-lite0, built in)")
    task.add_argument(
        "--weights",
        help="'pretrained' (default), 'none' for random ones, or a file with a state_dict",
    )
    task.add_argument(
        "--data",
        help="a folder with one folder of images for each class, or such folders in train/, "
        "val/ and test/; or 'fashion-mnist' (default)",
    )
    task.add_argument(
        "--image-size", type=positive, metavar="PIXELS", help="default: the model's or data's own"
    )
    task.add_argument(
        "--label-noise",
        type=share,
        metavar="SHARE",
        help="give this share of the training images the label of another class, the same for "
        "all rates; validation and test labels stay (default: 0; 0.4 on the built-in data)",
    )
    add_depth_options(finetune)
    finetune.add_argument_group("rates").add_argument(
        "--p",
        type=rates,
        metavar="P[,P...]",
        help="probability to drop a branch; several, such as 0,0.2,0.5, are trained by turns and "
        "compared, 0 being without stochastic depth (default: 0.2; 0,0.5 on the built-in data)",
    )
    training = finetune.add_argument_group("training")
    training.add_argument("--epochs", type=positive, help="default: 8; fewer with --quick")
    training.add_argument(
        "--batch-size", type=positive, help="of all devices together (default: 32)"
    )
    training.add_argument(
        "--lr", type=above_zero, help="peak learning rate of AdamW (default: 0.001)"
    )
    training.add_argument(
        "--seeds",
        type=positive,
        help="how many (default: 3 for several rates, otherwise 1)",
    )
    training.add_argument(
        "--quick",
        action="store_true",
        help="a first look: one seed, few epochs, at most 500 images of each split",
    )
    training.add_argument(
        "--devices", type=positive, help="how many GPUs, or processes on the CPU (default: 1)"
    )
    training.add_argument(
        "--strategy",
        choices=("auto", "ddp"),
        help="Lightning's, for several devices (default: auto, which is ddp for them)",
    )
    output = finetune.add_argument_group("output")
    output.add_argument("--out", type=Path, help="folder to create (default: runs/<date and time>)")
    output.add_argument(
        "--logger", choices=LOGGERS, help="also log each epoch with this logger of Lightning"
    )
    output.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue the interrupted run in this folder, with its own settings",
    )


def add_predict(commands: Any) -> None:
    """The arguments of `predict`."""
    predict = commands.add_parser(
        "predict",
        help="classify images with a fine-tuned model",
        description="Classify images with a model that finetune left: the most likely classes of "
        "each image.",
        argument_default=argparse.SUPPRESS,
    )
    predict.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help=f"{RUN_HELP}, or a file of prune",
    )
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")


def add_prune(commands: Any) -> None:
    """The arguments of `prune`."""
    prune = commands.add_parser(
        "prune",
        help="take the least important branches out of a fine-tuned model for good",
        description="Take branches out of a model that finetune left, in the order in which it "
        "ranked them on validation images, and write what is left to a file.",
        argument_default=argparse.SUPPRESS,
    )
    prune.add_argument("run", type=Path, metavar="RUN", help=RUN_HELP)
    prune.add_argument(
        "--keep", type=positive, required=True, metavar="K", help="how many branches stay"
    )
    prune.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the file to write, such as less.pt"
    )


def add_inspect(commands: Any) -> None:
    """The options of `inspect`."""
    inspect = commands.add_parser(
        "inspect",
        help="list a model's residual branches and what dropping them saves",
        description="Apply stochastic depth to a model with random weights and print what was "
        "found, what was skipped and why, and what is saved. Downloads no weights.",
        argument_default=argparse.SUPPRESS,
    )
    inspect.add_argument("model", help=MODEL_HELP)
    inspect.add_argument(
        "--image-size", type=positive, metavar="PIXELS", help="default: the model's own"
    )
    inspect.add_argument(
        "--p", type=probability, help="probability to drop a branch (default: 0.2)"
    )
    inspect.add_argument(
        "--png", type=Path, metavar="FILE", help="also draw the branches into this file"
    )
    add_depth_options(inspect)


def add_depth_options(command: argparse.ArgumentParser) -> None:
    """The options that both commands hand on to `stochastic_depth.apply`."""
    depth = command.add_argument_group("stochastic depth")
    depth.add_argument(
        "--schedule", choices=SCHEDULES, help="p over depth (default: linear, the paper's)"
    )
    depth.add_argument(
        "--mode",
        choices=MODES,
        help="what is dropped together: the whole batch (default), each sample (row) on its own "
        "as in timm and torchvision, or a fixed number of samples (subset)",
    )


def number(
    text: str, kind: Callable[[str], float], fits: Callable[[float], bool], what: str
) -> Any:
    """A number for argparse, or what it should have been."""
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not fits(value):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    found: int = number(text, int, lambda value: value >= 1, "a whole number of at least 1")
    return found


def above_zero(text: str) -> float:
    """A number above 0."""
    what = "a number above 0"
    found: float = number(text, float, lambda value: 0 < value < float("inf"), what)
    return found


def probability(text: str) -> float:
    """A number from 0 to 1."""
    found: float = number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
    return found


def share(text: str) -> float:
    """A number from 0 to below 1."""
    what = "a number from 0 to below 1"
    found: float = number(text, float, lambda value: 0 <= value < 1, what)
    return found


def rates(text: str) -> tuple[float, ...]:
    """Different probabilities, with commas between them."""
    found = tuple(probability(part) for part in text.split(","))
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"must be different numbers, got {text!r}")
    return found

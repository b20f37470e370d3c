"""Arguments in, exit code out; what is slow to import is imported by the command that needs it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import CommandError
from .torchvision_ops import ensure_torchvision

MODEL_HELP = (
    "a name of torchvision, timm or the Hugging Face hub ('resnet50', 'timm/resnet50', "
    "'microsoft/resnet-50'), or a folder saved by save_pretrained"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 for input the user can put right."""
    given = vars(parser().parse_args(argv))
    command = given.pop("command")
    try:
        ensure_torchvision()  # Lightning and timm import torchvision too
        if command == "inspect":
            from .inspect import inspect

            inspect(**given)
        else:
            from .finetune import finetune

            finetune(**given)
    except CommandError as error:
        print(f"stochastic-depth {command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"stochastic-depth {command}: the package {error.name!r} is missing; "
            "pip install 'stochastic-depth[cli]' brings all that the command needs",
            file=sys.stderr,
        )
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser; an option that is not given is absent from what it returns."""
    root = argparse.ArgumentParser(
        prog="stochastic-depth", description="Stochastic depth for any PyTorch model."
    )
    commands = root.add_subparsers(dest="command", required=True)

    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a pretrained network with stochastic depth",
        description="Fine-tune a pretrained network with stochastic depth and, to compare, "
        "without. With no arguments: EfficientNet-Lite0 from ImageNet on Fashion-MNIST, with "
        "and without, three seeds each.",
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
    task.add_argument("--image-size", type=positive, help="pixels (default: the model's or data's)")
    add_depth_options(finetune)
    training = finetune.add_argument_group("training")
    training.add_argument("--epochs", type=positive, help="default: 4")
    training.add_argument(
        "--batch-size", type=positive, help="of all devices together (default: 32)"
    )
    training.add_argument("--lr", type=float, help="peak learning rate of AdamW (default: 0.001)")
    training.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="also train without stochastic depth, on the same batches from the same start "
        "(default where neither --model nor --data is given)",
    )
    training.add_argument(
        "--seeds", type=positive, help="how many (default: 3 if comparing, otherwise 1)"
    )
    training.add_argument(
        "--quick",
        action="store_true",
        help="a first look: one seed, two epochs, at most 1,000 images of each split",
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
    output.add_argument("--resume", type=Path, help="go on with the interrupted run in this folder")

    inspect = commands.add_parser(
        "inspect",
        help="list a model's residual branches and what dropping them saves",
        description="Apply stochastic depth to a model with random weights and print what was "
        "found, what was refused, and what is saved. Downloads no weights.",
        argument_default=argparse.SUPPRESS,
    )
    inspect.add_argument("model", help=MODEL_HELP)
    inspect.add_argument("--image-size", type=positive, help="pixels (default: the model's own)")
    add_depth_options(inspect)
    return root


def add_depth_options(command: argparse.ArgumentParser) -> None:
    """The options that both commands hand on to `stochastic_depth.apply`, which checks them."""
    depth = command.add_argument_group("stochastic depth")
    depth.add_argument("--p", type=float, help="probability to drop a branch (default: 0.2)")
    depth.add_argument("--schedule", help="p over depth (default: linear, the paper's)")
    depth.add_argument("--mode", help="'batch' (default), 'row' or 'subset': what a coin drops")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return value

"""From the command's name to what it does; each imports what is slow to import."""

from typing import Any

from .torchvision_ops import ensure_torchvision


def run(command: str, given: dict[str, Any]) -> None:
    """Run a command with the options that were given."""
    ensure_torchvision()  # Lightning and timm import torchvision too
    if command == "inspect":
        from .inspect import inspect

        inspect(**given)
    elif command == "predict":
        from .predict import predict

        predict(**given)
    elif command == "prune":
        from .prune import prune

        prune(**given)
    else:
        from .finetune import finetune

        finetune(**given)

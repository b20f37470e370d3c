"""The command line: `stochastic-depth finetune` and `stochastic-depth inspect`."""

from .main import main

__all__ = ["main"]

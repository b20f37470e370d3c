"""What the `stochastic-depth` command does; its arguments are in `stochastic_depth_command`."""

from stochastic_depth_command import main

__all__ = ["main"]

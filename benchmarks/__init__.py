"""Time and memory of training steps, each module a command."""

from stochastic_depth.cli.torchvision_ops import ensure_torchvision

ensure_torchvision()  # before anything here imports torchvision, or timm, which does

"""Set-up that comes before a test's first import of torchvision or of a hub's client."""

import gc
import os
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for a network; offline it fails at once

import torch

from stochastic_depth.cli.torchvision_ops import ensure_torchvision

if find_spec("torchvision"):  # the core tests need torch alone
    ensure_torchvision()
torch.set_num_threads(1)  # small tensors gain nothing from more, and lose much on a busy machine


def pytest_collection_finish() -> None:
    """Take what is there by now out of garbage collection, which would go through all of it."""
    gc.collect()
    gc.freeze()

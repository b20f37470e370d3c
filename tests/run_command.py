"""The command line as a script, which Lightning can start again for its other processes.

With STOP_AT_EPOCH it ends there, as if the power had gone off.
"""

import os
import sys

from stochastic_depth.cli.torchvision_ops import ensure_torchvision

ensure_torchvision()  # before Lightning imports torchvision
from stochastic_depth.cli import main, training  # noqa: E402


def stop(self):
    if self.current_epoch == int(os.environ["STOP_AT_EPOCH"]):
        self.trainer.strategy.barrier()
        os._exit(7)


if __name__ == "__main__":
    if "STOP_AT_EPOCH" in os.environ:
        training.Turns.on_train_epoch_start = stop
    sys.exit(main())

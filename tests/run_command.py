"""The command line as a script, which Lightning can start again for its other processes.

With STOP_AT_EPOCH it ends there, as if the power had gone off.
"""

import os
import sys

from stochastic_depth.cli.torchvision_ops import ensure_torchvision

ensure_torchvision()  # before Lightning imports torchvision
from stochastic_depth.cli import main, training  # noqa: E402

original = training.Recorder.on_train_epoch_start


def stop(self, trainer, module):
    original(self, trainer, module)
    if trainer.current_epoch == int(os.environ["STOP_AT_EPOCH"]):
        trainer.strategy.barrier()
        os._exit(7)


if __name__ == "__main__":
    if "STOP_AT_EPOCH" in os.environ:
        training.Recorder.on_train_epoch_start = stop
    sys.exit(main())

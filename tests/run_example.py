"""Run a script as `python SCRIPT` does, where torchvision's operators may not fit torch.

It ends as the children of multiprocessing do, without the interpreter's own end: a thread of gloo
that still frees the tensors of its last collective asks for the lock of an interpreter that is
gone, and aborts the process (seen in one of 80 runs of fsdp2.py on a loaded machine).
"""

import os
import runpy
import sys
from pathlib import Path

from stochastic_depth.cli.torchvision_ops import ensure_torchvision

if __name__ == "__main__":
    ensure_torchvision()  # Lightning imports torchvision
    script = sys.argv.pop(1)
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

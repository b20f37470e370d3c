"""Run a script as `python SCRIPT` does, where torchvision's operators may not fit torch."""

import runpy
import sys
from pathlib import Path

from stochastic_depth.cli.torchvision_ops import ensure_torchvision

if __name__ == "__main__":
    ensure_torchvision()  # Lightning imports torchvision
    script = sys.argv.pop(1)
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")

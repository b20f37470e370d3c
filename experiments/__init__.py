"""What stochastic depth is good for, measured: each module is a command that writes its section of
docs/evidence.md. They can be interrupted: what was run is kept, and is not run again.
"""

from stochastic_depth.cli.torchvision_ops import ensure_torchvision

ensure_torchvision()  # transformers imports torchvision too

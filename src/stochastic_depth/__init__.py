"""Stochastic depth for any PyTorch model: ``sd.apply(model, p=0.2)``."""

from ._torch import start_no_graph as _start_no_graph
from .applied import branches, is_applied
from .apply import apply, remove
from .branch import Branch, DroppedGrad, Mode, Scale
from .check.summary import Summary, summary
from .check.verification import Verification
from .check.verify import verify
from .depth import Importance, Pruned, importance, prune, pruned, sampling, shallow, skip
from .drop.draws import Draw, Ranks
from .drop.layer import StochasticDepth
from .drop.residual import residual
from .rates import RateSchedule
from .state import load_state_dict, state_dict

__version__ = "0.2.0"

__all__ = [
    "Branch",
    "Draw",
    "DroppedGrad",
    "Importance",
    "Mode",
    "Pruned",
    "Ranks",
    "RateSchedule",
    "Scale",
    "StochasticDepth",
    "Summary",
    "Verification",
    "__version__",
    "apply",
    "branches",
    "importance",
    "is_applied",
    "load_state_dict",
    "prune",
    "pruned",
    "remove",
    "residual",
    "sampling",
    "shallow",
    "skip",
    "state_dict",
    "summary",
    "verify",
]

_start_no_graph(__name__)

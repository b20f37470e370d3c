"""Stochastic depth for any PyTorch model: ``sd.apply(model, p=0.2)``."""

from .detect.handlers import register_handler
from .functional import residual
from .layer import StochasticDepth
from .rate_schedule import RateSchedule
from .report import Summary, summary
from .resume import random_state, set_random_state
from .surgery import Branch, apply, branches, remove
from .verify import Verification, verify

__all__ = [
    "Branch",
    "RateSchedule",
    "StochasticDepth",
    "Summary",
    "Verification",
    "apply",
    "branches",
    "random_state",
    "register_handler",
    "remove",
    "residual",
    "set_random_state",
    "summary",
    "verify",
]

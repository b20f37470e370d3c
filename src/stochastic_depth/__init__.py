"""Stochastic depth for any PyTorch model: ``sd.apply(model, p=0.2)``."""

from .detect.handlers import register_handler
from .functional import residual
from .layer import StochasticDepth
from .rate_schedule import RateSchedule
from .report import Summary, summary
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
    "register_handler",
    "remove",
    "residual",
    "summary",
    "verify",
]

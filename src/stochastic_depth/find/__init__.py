"""Finding: one real run of a model is watched, and its residual branches are read off it."""

from typing import Any

from torch import nn

from .batch import Samples, first_samples
from .blocks import WHOLE, find_blocks
from .costs import flop_shares
from .drops import find_drops, rate_of, settle_drops
from .form import form_of
from .inputs import guess_inputs
from .meet import record_examples
from .nesting import find_regions
from .plan import Findings
from .plans import plan
from .samples import place_samples
from .spot import spot
from .weighed import run_weighed

__all__ = [
    "WHOLE",
    "Samples",
    "find",
    "find_blocks",
    "first_samples",
    "flop_shares",
    "form_of",
    "guess_inputs",
    "rate_of",
    "run_weighed",
    "spot",
]


def find(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    samples: Samples | None,
) -> Findings:
    """What one real run of ``model`` says about its residual branches.

    Args:
        model: the model.
        args: what it is called with.
        kwargs: the same.
        samples: what is known of where ``args`` and ``kwargs`` have the samples of the batch, to
            find out where all values have them; None is not to.

    Raises:
        ValueError: the model fails on these arguments.
    """
    flow = record_examples(model, args, kwargs)
    flow.result = None
    drops = find_drops(model, args, kwargs, flow.constants)
    planned = plan(model, flow, *find_regions(flow, drops.modules))
    findings = planned.findings
    for branch, found in planned.regions.items():
        findings.merges[branch] = tuple(merge for region in found for merge in region.merges)
        findings.nodes[branch] = frozenset().union(*(region.nodes for region in found))
    findings.constants, findings.writes = flow.constants, flow.writes
    settle_drops(model, findings, drops, flow)
    if samples is not None:
        place_samples(model, args, kwargs, flow, planned, samples)
    return findings

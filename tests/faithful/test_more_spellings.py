"""Kinds of forwards that were met in packages: found, dropped, and nothing else changed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from find import small
from stochastic_depth.find import find

KINDS: dict[str, Callable[[], nn.Module]] = {
    "asks isinstance": small.Asking,
    "an object that nobody needs": small.Explained,
    "lerp": small.Lerp,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_they_are_dropped_and_verify(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(KINDS[kind](), KINDS[kind]()), torch.randn(4, small.WIDTH)
    sd.apply(model, 0.5, mode=mode, example_inputs=x)
    assert len(sd.branches(model)) == (4 if kind.startswith("an object") else 2)
    assert all(branch.place is not None for branch in sd.branches(model)) == (mode != "batch")
    assert sd.verify(model, x).passed, sd.verify(model, x)


def test_what_an_object_holds_may_be_needed() -> None:
    found = find(small.Explained(used=True), (torch.randn(3, small.WIDTH),), {}, samples=None)
    assert found.branches == []
    assert "used" in found.refused[0].reason


class Noise(nn.Module):
    """Draws numbers in evaluation, too, in its branch (a sampler of tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.f = small.linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.f(x + torch.rand(small.WIDTH))


def test_verify_knows_that_a_dropped_branch_draws_no_numbers() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Noise(), Noise()), torch.randn(4, small.WIDTH)
    sd.apply(model, 0.5, example_inputs=x)
    assert len(sd.branches(model)) == 2
    assert sd.verify(model, x).passed, sd.verify(model, x)

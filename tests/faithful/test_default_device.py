"""``torch.set_default_device`` is for the user's tensors: ours are where the model's are."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

from .twins import data, net


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), Images(), Images(), nn.Flatten(), nn.Linear(144, 2))


def tokens() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(9, 8), layer, nn.Linear(8, 9))


IMAGES, TOKENS = data(4, 3, 8, 8), torch.arange(20).reshape(4, 5) % 9


def session(elsewhere: bool, given: bool, options: dict[str, Any]) -> list[Any]:
    """What a user gets to see where new tensors are on the CPU, or elsewhere."""
    seen: list[Any] = []
    for make, x in ((convolutions, IMAGES), (tokens, TOKENS)):
        model = net(make)
        with torch.device("meta") if elsewhere else nullcontext():
            sd.apply(model, 0.5, example_inputs=x if given else None, **options)
            torch.manual_seed(0)
            for _ in range(4):
                model(x).square().sum().backward()
            sd.load_state_dict(model, sd.state_dict(model))
            seen += [str(sd.summary(model, x)), str(sd.verify(model, x))]
            with sd.skip(model, sd.branches(model)[:1]):
                seen.append(model(x).detach())
        seen += [p.grad for p in model.parameters()]
    return seen


@pytest.mark.parametrize("given", [True, False], ids=["examples", "made up"])
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "batch"},
        {"mode": "batch", "seed": 0},
        {"mode": "batch", "draw": "balanced"},
        {"mode": "row"},
        {"mode": "row", "seed": 0},
        {"mode": "subset"},
        {"mode": "batch", "blocks": "all"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:stochastic depth:UserWarning")
def test_a_default_device_elsewhere_changes_nothing(options: dict[str, Any], given: bool) -> None:
    usual, elsewhere = (session(where, given, options) for where in (False, True))
    assert not any("FAILED" in text for text in usual if isinstance(text, str))
    for ours, theirs in zip(elsewhere, usual, strict=True):
        if isinstance(theirs, str) or theirs is None:
            assert ours == theirs
        else:
            assert torch.equal(ours, theirs)

"""The zoos once more, their sums counted by data flow."""

import pytest
import torch

from models import WITHOUT_BRANCHES
from stochastic_depth.options import call_of
from test_torchvision import expected_branches

from .oracle import residual_sums
from .transformers_models import FAMILIES, build

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]

_POSITIONS = "the positions of tokens are computed of the tokens, so their sum counts"
_CONVOLUTION = "a positional convolution counts, which is refused by design"
_BARE = "branches without parameters do not count"
_STEPS = "sums within the steps of a recurrence count"
OTHERWISE = {  # what data flow says of a family of transformers, and why
    **dict.fromkeys(
        [
            *("camembert", "data2vec_text", "layoutlm", "roberta"),
            *("roberta_prelayernorm", "xlm_roberta"),
        ],
        (7, _POSITIONS),
    ),
    **dict.fromkeys(
        ["data2vec_audio", "hubert", "sew", "unispeech", "wav2vec2", "wavlm"], (7, _CONVOLUTION)
    ),
    "fnet": (3, _BARE),
    "mra": (6, "its attention adds two resolutions"),
    "cohere": (3, "attention and MLP are added to each other first"),
    "rwkv": (48, _STEPS),
    "xlstm": (66, _STEPS),
    "pegasus_x": (21, "global tokens have sums of their own"),
    "timesformer": (6, "attention over time and over space counts as one"),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_transformers(family) -> None:
    model, inputs = build(family)
    expected, _ = OTHERWISE.get(family.name, (family.branches, ""))
    assert residual_sums(model, *call_of(inputs)) == expected


def _torchvision() -> list[str]:
    from torchvision import models

    few = [n for n in models.list_models(module=models) if not n.startswith(("google", "incep"))]
    sizes = {n: models.get_model_weights(n).DEFAULT.meta["num_params"] for n in few}
    return [n for n in few if sizes[n] < 100e6]


@pytest.mark.parametrize("name", _torchvision())
def test_torchvision(name: str) -> None:
    from torchvision import models

    model = models.get_model(name).eval()
    size = 224 if "vit" in name else 64
    expected = 0 if name in WITHOUT_BRANCHES else len(expected_branches(model))
    assert residual_sums(model, (torch.randn(2, 3, size, size),), {}) == expected

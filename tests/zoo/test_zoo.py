"""A sample of the transformers zoo in every run; all zoos with ``pytest -m zoo``."""

import warnings

import pytest

from .__main__ import ELSEWHERE, ZOOS
from .measure import Row, measure
from .transformers_models import FAMILIES, build

SAMPLE = {
    "bert",
    "gpt2",
    "llama",
    "t5",
    "whisper",
    "wav2vec2",
    "swin",
    "gptj",
    "bloom",
    "squeezebert",
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in SAMPLE], ids=lambda f: f.name)
def test_a_sample_is_whole(family) -> None:
    model, inputs = build(family)
    row = measure(family.name, family.model, (model, 0.0), inputs, family.branches, family.reason)
    assert (row.verdict, row.found) == ("whole", family.branches), row.note


@pytest.mark.zoo
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("zoo", [zoo for zoo in ZOOS if zoo not in ELSEWHERE])
def test_nothing_is_wrong_in_a_whole_zoo(zoo: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows: list[Row] = list(ZOOS[zoo](None))
    assert [str(row) for row in rows if row.verdict == "wrong"] == []

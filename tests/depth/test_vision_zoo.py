"""torchvision's and timm's models prune as they skip: a block in the middle, and a branch."""

import copy

import pytest
import timm
import torch
import torchvision

import stochastic_depth as sd
from stochastic_depth.depth.looks import look_at
from stochastic_depth.find import guess_inputs
from zoo.timm_models import MODELS

from .measure import awake
from .small import run, skips_as_it_prunes

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

TORCHVISION = [
    "convnext_tiny", "efficientnet_b0", "efficientnet_v2_s", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_large", "regnet_x_400mf", "regnet_y_400mf", "resnet34",
    "resnet50", "resnext50_32x4d", "swin_t", "swin_v2_t", "vit_b_16",
]  # fmt: skip
# These cannot lose a single branch whose modules or values others use, and say so.
WITH_BRANCHES = {file: entry[0] for file, entry in MODELS.items() if entry[1] != 0}


def check(model):
    (inputs,), _ = guess_inputs(model)
    look = look_at(model, inputs)
    homes = [name for name in look.wholes if name in look.blocks]
    done = 0
    for names in (homes, [b.name for b in look.found.branches]):
        if len(look.found.branches) > 1 and names:
            done += can_go(model, names[len(names) // 2], inputs)
    return done


def can_go(model, name, inputs):
    """Whether it goes; where it cannot, the model has to be as it was."""
    before = run(model, inputs)
    try:
        skips_as_it_prunes(model, name, inputs)
    except (RuntimeError, ValueError) as error:
        print(name, error)
        changed = copy.deepcopy(model)
        with pytest.raises(type(error)):
            sd.prune(changed, remove=name, example_inputs=inputs)
        for a, b in zip(run(changed, inputs), before, strict=True):
            assert torch.equal(a, b)
        return False
    return True


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    torch.manual_seed(0)
    assert check(awake(getattr(torchvision.models, name)().eval())) == 2


@pytest.mark.parametrize("file", WITH_BRANCHES)
def test_timm(file):
    torch.manual_seed(0)
    assert check(awake(timm.create_model(WITH_BRANCHES[file]).eval())) > 0

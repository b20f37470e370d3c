"""What is given by name, or by its Branch, is what goes."""

import pytest
import torch
from torch import nn

import stochastic_depth as sd

from .small import Block, net, x_for_net
from .test_skip import without


def test_names_may_come_from_a_generator():
    names = (f"blocks.{i}" for i in (1, 3))
    assert len(sd.prune(net(), remove=names, example_inputs=x_for_net()).blocks) == 3


@pytest.mark.parametrize("act", [sd.prune, sd.shallow])
def test_a_branch_that_is_given_is_the_one_that_goes(act):
    torch.manual_seed(0)
    inner, x = nn.Sequential(Block(8), Block(8), Block(8)), torch.randn(2, 8)
    model = nn.Sequential(Block(8), inner).eval()
    sd.apply(inner, p=0.5, example_inputs=x)
    branch = sd.branches(model)[0]
    del model[1][2]
    with sd.skip(model, branch):
        skipped = model(x)
    pruned = act(model, remove=branch, example_inputs=x)
    assert branch.name == "0:attn"
    assert sd.pruned(pruned).removed == ("1.0:attn",)
    assert torch.equal(pruned(x), skipped)
    with pytest.raises(ValueError, match="not applied to this model"):
        sd.prune(net(), remove=branch, example_inputs=x_for_net())


@pytest.mark.parametrize("options", [{"remove": "0"}, {"keep": 1}])
def test_a_model_of_stochastic_depth_layers_is_told_what_to_do(options):
    model = nn.Sequential(*[sd.StochasticDepth(nn.Linear(8, 8), 0.5) for _ in range(2)])
    with pytest.raises(
        ValueError, match=r"StochasticDepth layers \(0, 1\).* take it out of its list"
    ):
        sd.prune(model, example_inputs=torch.randn(2, 8), **options)


def test_a_name_is_the_one_in_the_model_that_is_given():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = net(), net()
            self.between = nn.Linear(3, 4)

        def forward(self, x):
            return self.second(self.between(self.first(x)))

    model, x = Two().eval(), x_for_net()
    for part in (model.first, model.second):
        sd.apply(part, p=0.5, example_inputs=x)
    with sd.skip(model, "second.blocks.1:mlp"), torch.no_grad():
        skipped = model(x)
    branch = next(b for b in sd.branches(model.second) if b.name == "blocks.1:mlp")
    with sd.skip(model, branch), torch.no_grad():
        assert torch.equal(model(x), skipped)
    with (
        pytest.raises(ValueError, match="is no branch or block"),
        sd.skip(model, "blocks.1:mlp", x),
    ):
        pass


def test_a_branch_is_known_after_its_block_has_moved():
    model = sd.apply(net(), p=0.5, example_inputs=x_for_net()).eval()
    branch = next(b for b in sd.branches(model) if b.name == "blocks.4:mlp")
    del model.blocks[0]
    for what in (branch, "blocks.3:mlp", [branch, "blocks.3:mlp"]):
        with sd.skip(model, what):
            assert torch.equal(model(x_for_net()), without(model, {(3, "mlp")}))


def test_what_is_skipped_in_a_part_may_be_skipped_in_the_whole():
    model = nn.Sequential(nn.Linear(4, 4), net()).eval()
    x = x_for_net()
    with sd.skip(model[1], "blocks.1:mlp", x):
        one = model(x)
        with sd.skip(model, ["1.blocks.1:mlp", "1.blocks.1:attn"], x):
            both = model(x)
        assert torch.equal(model(x), one)
    with sd.skip(model, "1.blocks.1", x):
        assert torch.equal(model(x), both)

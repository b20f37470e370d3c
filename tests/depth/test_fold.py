"""What ``scale="eval"`` counts less in evaluation becomes a part of the weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stochastic_depth as sd

from .small import Block, Dropping, net, x_for_net


class Plain(nn.Module):
    def __init__(self, width: int, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), *layers)

    def forward(self, x):
        return x + self.body(x)


class Parallel(Block):
    def forward(self, x):
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x)).relu()


class Optional(Block):
    def forward(self, x, more=None):
        x = x + self.attn(self.norm1(x))
        return x if more is None else x + self.mlp(x + more)


class Stack(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind(8) for _ in range(3))

    def forward(self, x, *others):
        for block in self.blocks:
            x = block(x, *others)
        return x


def applied(model, x, **options):
    options = {"p": 0.6, "schedule": "uniform", "scale": "eval", "example_inputs": x, **options}
    return sd.apply(model, **options).eval()


def prunes_as_it_skips(model, what, x):
    inputs = x if isinstance(x, tuple) else (x,)
    with sd.skip(model, what, x):
        skipped = model(*inputs)
    torch.testing.assert_close(sd.prune(model, remove=what, example_inputs=x)(*inputs), skipped)


@pytest.mark.parametrize("shared", [False, True])
def test_scale_eval_is_folded_into_the_weights(shared):
    x = x_for_net()
    model = sd.apply(net(), p=0.6, scale="eval", example_inputs=x).eval()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    with sd.skip(model, "blocks.1", x):
        skipped = model(x)
    pruned = (sd.shallow if shared else sd.prune)(model, remove="blocks.1", example_inputs=x)
    torch.testing.assert_close(pruned(x), skipped)
    assert (pruned is model) is not shared
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, weights.get(n, p))]
    assert bool(changed) is not shared


@pytest.mark.parametrize("kind", [Plain, Parallel])
def test_the_weight_of_a_whole_block_is_folded_into_its_branches(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(*[kind(8) for _ in range(3)]), torch.randn(4, 8)
    prunes_as_it_skips(applied(model, x, blocks="all"), "1", x)


def test_a_weight_is_folded_where_the_model_has_drop_modules_of_its_own():
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Dropping() for _ in range(3)]), torch.randn(4, 8)
    prunes_as_it_skips(applied(model, x), "1:one", x)


def test_a_branch_goes_and_the_rest_of_its_block_has_the_weight():
    x = torch.randn(4, 8)
    model = Stack(Parallel).eval()
    first, second, third = model.blocks
    h = first(x)
    want = third(h + 0.4 * second.mlp(second.norm2(h)).relu())
    applied(second, h, blocks=[""])
    torch.testing.assert_close(sd.prune(model, remove="blocks.1:attn", example_inputs=x)(x), want)


def test_a_block_whose_branches_build_on_each_other_is_not_folded_as_a_whole():
    model = applied(net(), x_for_net(), blocks="all")
    before = model(x_for_net())
    with pytest.raises(ValueError, match=r"blocks\.0:\(block\) 0\.4 times in evaluation"):
        sd.prune(model, remove="blocks.1", example_inputs=x_for_net())
    assert torch.equal(model(x_for_net()), before)


def test_the_weights_of_a_part_are_folded_where_the_part_is():
    x = x_for_net()
    model = nn.Sequential(nn.Linear(4, 4), applied(net(), x), nn.Linear(3, 3)).eval()
    prunes_as_it_skips(model, "1.blocks.1", x)


def test_a_weight_that_the_inputs_do_not_reach_is_an_error():
    x, more = torch.randn(4, 8), torch.randn(4, 8)
    model = applied(Stack(Optional), (x, more))
    before = model(x, more)
    for inputs in (x, None):
        with pytest.raises(ValueError, match=r"blocks\.0:mlp 0\.4 times .* give example_inputs"):
            sd.prune(model, remove="blocks.1", example_inputs=inputs)
    assert torch.equal(model(x, more), before)
    prunes_as_it_skips(model, "blocks.1", (x, more))


def test_what_does_not_reach_a_block_that_goes_is_no_matter():
    x, more = torch.randn(4, 8), torch.randn(4, 8)
    model = applied(Stack(Optional), (x, more))
    for branch in sd.branches(model):
        branch.p = 0.6 if branch.name == "blocks.1:mlp" else 0.0
    sd.prune(model, remove="blocks.1", example_inputs=x)
    assert len(model.blocks) == 2


@pytest.mark.parametrize("bound", [nn.ReLU6(), nn.Hardtanh(-3, 3), nn.Tanh(), nn.GELU()])
def test_what_is_linear_for_small_values_only_is_not_folded(bound):
    model, x = nn.Sequential(*[Plain(8, bound) for _ in range(3)]), torch.randn(4, 8) / 100
    with pytest.raises(ValueError, match="no weights that this could become a part of"):
        sd.prune(applied(model, x), remove="2", example_inputs=x)


def test_a_last_layer_of_zeros_is_the_one_that_is_multiplied():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(8, 8), nn.Linear(8, 8)
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    model, x = nn.Sequential(*[Plain(8) for _ in range(3)]), torch.randn(4, 8)
    for block in model:
        block.body = Body()
    weights = copy.deepcopy(model.state_dict())
    sd.prune(applied(model, x), remove="2", example_inputs=x)
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())


def test_a_view_shares_all_but_what_the_weights_become_a_part_of():
    x = x_for_net()
    model = applied(net(), x)
    view = sd.shallow(model, keep=range(2), example_inputs=x)
    whole = dict(model.named_parameters())
    own = {n.partition(".")[2][2:] for n, p in view.named_parameters() if p is not whole[n]}
    assert own == {"gamma", "mlp.weight", "mlp.bias"}
    F.mse_loss(view(x), torch.zeros(6, 3)).backward()
    assert model.stem.weight.grad is not None
    assert model.blocks[0].gamma.grad is None


@pytest.mark.parametrize("head_is_zero", [False, True])
def test_scale_eval_is_not_folded_into_what_it_is_no_factor_of(head_is_zero):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(8, 8)

        def forward(self, x):
            return x + torch.tanh(self.body(x))

    model, x = nn.Sequential(Odd(), Odd(), nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    if head_is_zero:
        nn.init.zeros_(model[2].weight)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    sd.apply(model, p=0.5, scale="eval", example_inputs=x)
    with pytest.raises(ValueError, match="no weights that this could become a part of"):
        sd.prune(model, remove="0", example_inputs=x)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())

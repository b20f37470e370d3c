"""Stochastic depth that a model brings along: taken over, or reported."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import stochastic_depth as sd

KEPT = 1e-30  # a rate at which nothing is ever dropped, but everything runs as if it could be


class DropPath(nn.Module):
    """As every code base writes it; here one that shows when it runs."""

    def __init__(self, drop_prob: float = 0.5) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x * 100 if self.training else x


class Mlp(nn.Module):
    def __init__(self, drop: float = 0.5) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x))


class Inside(nn.Module):
    """The drop module is out of sight, in a child of the branch."""

    def __init__(self, drop: float = 0.5) -> None:
        super().__init__()
        self.mlp = Mlp(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Elsewhere(nn.Module):
    """A drop module on what is no residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear = DropPath(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        return x + self.linear(x)


def test_a_drop_module_inside_of_a_branch_is_taken_over_and_comes_back():
    torch.manual_seed(0)
    model, x = nn.Sequential(Inside(), Inside()), torch.randn(3, 4)
    plain = copy.deepcopy(model).eval()
    sd.apply(model, KEPT, example_inputs=x)
    assert sd.branches(model)[0].existing == ("0.mlp.drop",)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), plain(x))
    assert sd.verify(model, x).passed
    sd.remove(model)
    assert "forward" not in vars(model[0].mlp.drop)
    torch.testing.assert_close(model[0](x), x + 100 * model[0].mlp.linear(x))


def test_what_masks_something_else_is_reported():
    with pytest.warns(UserWarning, match="0.drop: it is not on a branch that was found"):
        model = sd.apply(nn.Sequential(Elsewhere()), 0.5, example_inputs=torch.randn(3, 4))
    assert ("0.drop", "it is not on a branch that was found, and goes on dropping") in sd.summary(
        model
    ).refused


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_layerdrop_is_reported(rate):
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        layerdrop=rate,
        num_conv_pos_embedding_groups=4,
        num_conv_pos_embeddings=16,
    )
    model = transformers.Wav2Vec2Model(config)
    told = pytest.warns(UserWarning, match="encoder: it tosses a coin")
    with told if rate else nullcontext():
        sd.apply(model, 0.2, example_inputs=torch.randn(2, 4000))
    told = [
        name for name, reason in sd.summary(model).refused if "tosses a coin of its own" in reason
    ]
    assert told == (["encoder"] if rate else [])


def test_p_model_keeps_the_rates_of_the_model():
    model = nn.Sequential(Inside(0.1), Inside(0.0), Inside(0.3))
    sd.apply(model, "model", example_inputs=torch.randn(3, 4))
    assert [branch.p for branch in sd.branches(model)] == [0.1, 0.0, 0.3]
    vit = timm.create_model("test_vit", drop_path_rate=0.2)
    rates = [block.drop_path1.drop_prob for block in vit.blocks[1:]]
    sd.apply(vit, "model", example_inputs=torch.randn(2, 3, 160, 160))
    assert [branch.p for branch in sd.branches(vit)][2::2] == rates


def test_p_model_needs_rates_and_takes_no_schedule():
    with pytest.raises(ValueError, match="has none in its residual branches"):
        sd.apply(timm.create_model("test_vit"), "model", example_inputs=torch.randn(2, 3, 160, 160))
    with pytest.raises(ValueError, match="drop schedule='uniform'"):
        sd.apply(nn.Sequential(Inside()), "model", schedule="uniform")


class Named(Inside):
    """Calls its drop module with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path = DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(x=self.mlp.linear(x))


def test_a_drop_module_may_be_called_with_a_keyword() -> None:
    x, model = torch.randn(3, 4), Named()
    sd.apply(model, "model", example_inputs=x)
    (branch,) = sd.branches(model)
    assert branch.p == 0.5
    outputs = [model(x) for _ in range(20)]
    expected = x + 2 * model.mlp.linear(x)
    assert all(torch.equal(y, x) or torch.allclose(y, expected) for y in outputs)
    assert 0 < branch.dropped < 20


class Nameless(DropPath):
    """A drop module whose rate has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.share = self.__dict__.pop("drop_prob")

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1) >= self.share) if self.training else x


def test_p_model_says_which_rate_it_cannot_read() -> None:
    model = nn.Sequential(Inside(0.3), Inside(0.3))
    model[1].mlp.drop = Nameless()
    with pytest.raises(ValueError, match=r"cannot read the rate of 1\.mlp\.drop, a Nameless"):
        sd.apply(model, "model", example_inputs=torch.randn(3, 4))


def test_a_drop_module_inside_of_a_whole_block_is_taken_over_and_comes_back() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Inside(0.1), Inside(0.3)), torch.randn(3, 4)
    plain = copy.deepcopy(model).eval()
    sd.apply(model, "model", blocks="all", example_inputs=x)
    assert [branch.p for branch in sd.branches(model)] == [0.1, 0.3]
    sd.apply(model, KEPT, blocks="all", example_inputs=x)
    with sd.skip(model, "0", x):
        pass
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), plain(x))
    assert sd.verify(model, x).passed
    sd.remove(model)
    torch.testing.assert_close(model[0](x), x + 100 * model[0].mlp.linear(x))


class ByItself(nn.Module):
    """A block whose forward drops samples without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return x + (h * (torch.rand(len(x), 1) >= 0.5) if self.training else h)


def test_what_whole_blocks_do_not_replace_is_reported() -> None:
    model, x = nn.Sequential(Inside(), Inside(), ByItself()), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="stochastic depth of its own") as told:
        sd.apply(model, 0.5, blocks=["1", "2"], example_inputs=x)
    (message,) = [str(w.message) for w in told]
    assert "0.mlp.drop: it is not on a branch that was found" in message
    assert "2: it drops by itself, in ByItself.forward (line" in message
    assert "1.mlp.drop" not in message

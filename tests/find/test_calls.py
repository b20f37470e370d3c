"""Finding where it depends on how a block is called: sizes, children, further outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.find import find
from stochastic_depth.find.plan import Findings
from stochastic_depth.options import call_of

D = 8


def names(model: nn.Module, example_inputs: Any = None) -> list[str]:
    return [branch.name for branch in look(model, example_inputs).branches]


def reasons(model: nn.Module, example_inputs: Any = None) -> str:
    return "\n".join(refused.reason for refused in look(model, example_inputs).refused)


def look(model: nn.Module, example_inputs: Any) -> Findings:
    example = torch.randn(2, D) if example_inputs is None else example_inputs
    return find(model, *call_of(example), samples=None)


def applied(model: nn.Module, p: float, **options: Any) -> Any:
    """``sd.apply`` with an example."""
    return sd.apply(
        model, p, **{"schedule": "uniform", "example_inputs": torch.randn(2, D), **options}
    )


def check_kept(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """In training, with every branch kept, the applied model is the plain one."""
    model.train()
    plain = model(*args, **kwargs)
    applied(model, p=1e-12, scale="none", example_inputs=(args or kwargs))
    torch.testing.assert_close(model(*args, **kwargs), plain, rtol=0, atol=0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.fc = nn.Linear(D, D)


class AsksForSizes(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if x.shape[1] > 4:
            h = h * 2
        if h.dtype == torch.float64:
            h = h * 3
        return x + self.fc(h)


def test_a_branch_behind_a_decision_on_sizes() -> None:
    assert names(AsksForSizes(), torch.zeros(2, 3, D)) == [":fc"]


@pytest.mark.parametrize("kind", ["size", "dtype"])
def test_a_decision_is_taken_anew_where_the_form_of_the_values_changes(kind: str) -> None:
    block = AsksForSizes()
    x = torch.randn(2, 3, D)
    other = torch.randn(2, 6, D) if kind == "size" else x.double()
    applied(block, p=1e-12, scale="none", example_inputs=x)
    block(x)
    if kind == "dtype":
        block.double()
    expected = AsksForSizes.forward(block, other)
    assert torch.equal(block(other), expected)


class Loops(Block):
    def forward(self, x: Tensor) -> Tensor:
        *batch, d = x.shape
        h = self.fc(x).view(*batch, d)
        for i in range(len(batch)):
            h = h + i
        for part in h.chunk(2, dim=-1):
            h = h + part.sum(-1, keepdim=True)
        return x + h


def test_loops_over_shapes_and_tuples() -> None:
    assert names(Loops(), torch.zeros(2, 3, D)) == [":fc"]
    check_kept(Loops(), torch.randn(2, 3, D))


class AsksForData(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x) if x.sum() > 0 else x


def test_a_decision_on_data_is_taken_anew_in_every_call() -> None:
    x = torch.ones(2, 3, D)
    model = applied(AsksForData(), 1.0, example_inputs=x)
    ran: list[int] = []
    model.fc.register_forward_hook(lambda *_: ran.append(1))
    assert torch.equal(model(x), x)
    with pytest.warns(UserWarning, match="fc was not called in a call of its block"):
        assert torch.equal(model(-x), -x)
    assert ran == []


class AddsWhatItIsHanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, hidden: Tensor, given: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + given)


class HandsDown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.output = nn.Linear(D, D), AddsWhatItIsHanded()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.gelu(self.up(x)), x)


def test_a_sum_in_a_child_that_is_handed_the_shortcut() -> None:
    model = HandsDown()
    assert names(model) == [":up"]
    check_kept(model, torch.randn(2, D))
    applied(model, p=1.0)
    x = torch.randn(2, D)
    assert torch.equal(model(x), model.output.norm(x))


def test_hooks_on_such_a_child_fire_also_where_the_branch_is_dropped() -> None:
    model = HandsDown()
    seen: list[int] = []
    model.output.register_forward_hook(lambda *_: seen.append(1))
    applied(model, 1.0)
    model.output.register_forward_hook(lambda *_: seen.append(2))
    seen.clear()
    model(torch.randn(2, D))
    assert seen == [1, 2]


class Weighs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)
        self.returns_weights = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.fc(x), x if self.returns_weights else None


class ReturnsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Weighs()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y, weights = self.attention(x)
        return x + y, weights


def test_a_further_output_that_is_none_does_not_keep_a_branch() -> None:
    model = ReturnsWeights()
    x = torch.randn(2, D)
    assert names(model) == names(model, x) == [":attention"]
    check_kept(model, x)
    y, weights = applied(model, p=1.0)(x)
    assert torch.equal(y, x)
    assert weights is None


def test_a_module_that_also_returns_what_is_used_is_looked_into() -> None:
    model, x = ReturnsWeights(), torch.randn(2, D)
    model.attention.returns_weights = True
    assert [branch.modules for branch in look(model, x).branches] == [("attention.fc",)]
    y, weights = applied(model, 1.0)(x)
    assert torch.equal(y, x)
    assert torch.equal(weights, x)


class ReturnsAttentionWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.attention(x, x, x)
        return x + out, weights


def test_attention_weights_that_are_asked_for_keep_the_branch() -> None:
    x = torch.randn(2, 3, D)
    assert names(ReturnsAttentionWeights(), x) == []
    with pytest.raises(ValueError, match="attention also returns something else that is used"):
        applied(ReturnsAttentionWeights(), 1.0, example_inputs=x)


def test_a_further_output_that_appears_later_is_an_error_where_the_branch_is_dropped() -> None:
    model, x = applied(ReturnsWeights(), 1e-12, scale="none"), torch.randn(2, D)
    model.attention.returns_weights = True
    y, weights = model(x)
    assert torch.equal(y, x + model.attention.fc(x))
    assert torch.equal(weights, x)


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.types, self.norm = nn.Embedding(9, D), nn.Embedding(9, D), nn.LayerNorm(D)
        self.proj = nn.Linear(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.words(ids) + self.proj(self.types(ids)))


class OnlyDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(x)


@pytest.mark.parametrize(
    ("make", "example"), [(Embeds, torch.tensor([[1, 2]])), (OnlyDropout, torch.randn(2, D))]
)
def test_sums_that_are_no_residual_branches(make: Callable[[], nn.Module], example: Tensor) -> None:
    assert names(make(), example) == []


class Attribute(Block):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x) * self.scale


def test_an_attribute_that_changes_between_calls_counts() -> None:
    block = applied(Attribute(), p=1e-12, scale="none")
    x = torch.randn(2, D)
    block(x)
    block.scale = 2.0
    assert torch.equal(block(x), x + block.fc(x) * 2.0)


class SetsABuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(3, D))

    def forward(self, x: Tensor) -> Tensor:
        self.table = self.table.to(x.dtype)
        return x + self.fc(x)


def test_a_forward_that_sets_its_buffers_leaves_those_of_before_after_a_look() -> None:
    block = SetsABuffer()
    table = block.table
    assert names(block) == [":fc"]
    assert block.table is table


class MayGetABias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Weighs()

    def forward(self, x: Tensor) -> Tensor:
        y, bias = self.attention(x)
        return x + (y if bias is None else y + bias)


def test_a_none_that_a_module_returns_is_none() -> None:
    check_kept(MayGetABias(), torch.randn(2, D))
    model, x = MayGetABias(), torch.randn(2, D)
    model.attention.returns_weights = True
    check_kept(model, x)


class Output(dict[str, Tensor]):
    pass


class ReturnsItsOwnDict(Block):
    def forward(self, x: Tensor) -> Output:
        return Output(y=x + self.fc(x))


def test_an_output_of_a_type_of_one_s_own() -> None:
    x = torch.randn(2, D)
    model = applied(ReturnsItsOwnDict(), 1.0)
    output = model(x)
    assert type(output) is Output
    assert torch.equal(output["y"], x)


class MasksScores(Block):
    """Scores and a mask that is made from the same input: no shortcut, by its shape."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(x)
        mask = (x[..., :1] * mask).transpose(1, 2)
        return (self.fc(h) @ h.transpose(1, 2) + mask).softmax(-1) @ h


def test_a_mask_is_no_shortcut() -> None:
    assert names(MasksScores(), (torch.zeros(2, 3, D), torch.zeros(2, 3, 1))) == []


class Cache:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        if cache is not None:
            cache.seen.append(x)
        return self.fc(x)


class PassesACache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Remembers()

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return x + self.attention(x, cache)


def test_a_cache_in_use_keeps_the_branch() -> None:
    model, x, cache = applied(PassesACache(), 1.0), torch.randn(2, D), Cache()
    assert torch.equal(model(x), x)
    with pytest.warns(UserWarning, match="not dropped .*use_cache=False"):
        model(x, cache)
    assert len(cache.seen) == 1
    assert "use_cache=False" in reasons(model, (x, cache))

"""Detection where it depends on how a block is called: sizes, children, further outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.surgery import detect

D = 8


def names(model: nn.Module, example_inputs: Any = None) -> list[str]:
    return [f"{f.block}:{f.label}" for f in detect(model, example_inputs).branches]


def reasons(model: nn.Module, example_inputs: Any = None) -> str:
    return "\n".join(r.reason for r in detect(model, example_inputs).refused)


def check_kept(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """In training, with every branch kept, the applied model is the plain one."""
    model.train()
    plain = model(*args, **kwargs)
    sd.apply(model, p=1e-12, schedule="uniform", scale="none", example_inputs=(args or kwargs))
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


def test_a_decision_on_sizes_needs_an_example() -> None:
    assert "example inputs may tell" in reasons(AsksForSizes())
    assert names(AsksForSizes(), torch.zeros(2, 3, D)) == [":fc"]


@pytest.mark.parametrize("kind", ["size", "dtype"])
def test_a_decision_is_taken_anew_where_the_form_of_the_values_changes(kind: str) -> None:
    block = AsksForSizes()
    x = torch.randn(2, 3, D)
    other = torch.randn(2, 6, D) if kind == "size" else x.double()
    sd.apply(block, p=1e-12, schedule="uniform", scale="none", example_inputs=x)
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


def test_a_decision_on_data_is_refused() -> None:
    assert names(AsksForData(), torch.zeros(2, 3, D)) == []
    assert "depends on a value" in reasons(AsksForData(), torch.zeros(2, 3, D))


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
    sd.apply(model, p=1.0, schedule="uniform")
    x = torch.randn(2, D)
    assert torch.equal(model(x), model.output.norm(x))


def test_hooks_on_such_a_child_would_not_fire() -> None:
    model = HandsDown()
    model.output.register_forward_hook(lambda *_: None)
    assert names(model) == []
    assert "hooks on 'output' would not run" in reasons(model)


def test_hooks_added_later_fire_and_the_branch_is_kept() -> None:
    model = sd.apply(HandsDown(), p=1.0, schedule="uniform")
    model(torch.randn(2, D))
    seen: list[int] = []
    model.output.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hooks on 'output' would not run"):
        model(torch.randn(2, D))
    assert seen == [1]


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
    y, weights = sd.apply(model, p=1.0, schedule="uniform")(x)
    assert torch.equal(y, x)
    assert weights is None


def test_a_further_output_that_is_used_keeps_the_branch_and_says_so() -> None:
    model = sd.apply(ReturnsWeights(), p=1.0, schedule="uniform")
    model.attention.returns_weights = True
    x = torch.randn(2, D)
    with pytest.warns(UserWarning, match=r"never drops \['attention'\]: it also returns"):
        y, weights = model(x)
    assert torch.equal(y, x + model.attention.fc(x))
    assert weights is x
    assert "it also returns something else that is used" in reasons(model, x)


class ReturnsAttentionWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.attention(x, x, x)
        return x + out, weights


def test_attention_weights_that_are_asked_for_keep_the_branch() -> None:
    model, x = ReturnsAttentionWeights(), torch.randn(2, 3, D)
    assert names(model, x) == []
    sd.apply(model, p=1.0, schedule="uniform")
    with pytest.warns(UserWarning, match=r"never drops \['attention'\]: it also returns"):
        assert model(x)[1] is not None


def test_a_further_output_that_appears_later_is_an_error() -> None:
    model = sd.apply(ReturnsWeights(), p=1e-12, schedule="uniform")
    model(torch.randn(2, D))
    model.attention.returns_weights = True
    with pytest.raises(RuntimeError, match=r"Call stochastic_depth.apply again"):
        model(torch.randn(2, D))


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


@pytest.mark.parametrize("make", [Embeds, OnlyDropout])
def test_sums_that_are_no_residual_branches(make: Callable[[], nn.Module]) -> None:
    assert names(make()) == []


class Attribute(Block):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x) * self.scale


def test_an_attribute_that_changes_between_calls_counts() -> None:
    block = sd.apply(Attribute(), p=1e-12, schedule="uniform", scale="none")
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


def test_a_forward_that_sets_its_buffers_is_refused_and_they_stay() -> None:
    block = SetsABuffer()
    assert names(block) == []
    assert "changes its attribute 'table'" in reasons(block)
    assert isinstance(block.table, Tensor)


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


def test_an_output_of_a_type_that_a_trace_cannot_make_is_refused() -> None:
    assert names(ReturnsItsOwnDict()) == []
    assert "it makes a Output" in reasons(ReturnsItsOwnDict())


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
    model, x, cache = (
        sd.apply(PassesACache(), p=1.0, schedule="uniform"),
        torch.randn(2, D),
        Cache(),
    )
    assert torch.equal(model(x), x)
    with pytest.warns(UserWarning, match=r"never drops .* given a Cache.*use_cache=False"):
        model(x, cache)
    assert len(cache.seen) == 1
    assert "given a Cache" in reasons(model, (x, cache))


def test_a_handler_says_what_stands_in_for_a_further_output() -> None:
    class Attention(Weighs):
        pass

    model, x = ReturnsWeights(), torch.randn(2, D)
    model.attention = Attention()
    model.attention.returns_weights = True
    assert names(model, x) == []
    sd.register_handler(Attention, lambda module, given: {1: given["x"]})
    assert names(model, x) == [":attention"]
    sd.apply(model, p=1.0, schedule="uniform")
    assert [y is x for y in model(x)] == [False, True]
    assert torch.equal(model(x)[0], x)
    sd.branches(model)[0].p = 1e-12
    assert torch.equal(model(x)[0], x + model.attention.fc(x))


def test_bad_handlers() -> None:
    with pytest.raises(TypeError, match="kind must be a module type or its qualified name"):
        sd.register_handler(3, lambda module, given: {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="handler must be a function"):
        sd.register_handler(Weighs, {})  # type: ignore[arg-type]

"""Blocks dropped as a whole: LayerDrop, and blocks without a residual sum."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd


class Cache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Layer(nn.Module):
    """A decoder layer in the way of transformers: keywords, a mask, a cache, a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, hidden: Tensor, mask: Tensor | None = None, cache: Cache | None = None):
        mixed = torch.tanh(self.first(hidden))
        if mask is not None:
            mixed = mixed * mask
        if cache is not None:
            cache.keys.append(mixed)
        hidden = hidden + mixed
        return hidden + self.gain * self.second(hidden), cache, None


class Decoder(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x: Tensor, **more: object) -> Tensor:
        states = [x]
        for layer in self.layers:
            x, cache, weights = layer(hidden=x, **more)
            assert weights is None
            assert cache is more.get("cache")
            states.append(x.detach())
        self.states = states
        return x


class Asking(nn.Module):
    """What it does depends on its data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise ValueError("not finite")
        return self.linear(x)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rows_run(model: nn.Module) -> list[int]:
    """Filled with the rows that every layer's first linear computes."""
    counts: list[int] = []
    for layer in model.layers:
        layer.first.register_forward_hook(lambda _, args, __: counts.append(len(args[0])))
    return counts


def expected(plain: Decoder, x: Tensor, weights: list[Tensor], **more: object) -> Tensor:
    """All computed; ``weights`` are those of each layer's change, by row."""
    for layer, weight in zip(plain.layers, weights, strict=True):
        x = x + weight.view(-1, 1) * (layer(x, **more)[0] - x)
    return x


def weights(model: Decoder, weight: float) -> list[Tensor]:
    """By row, ``weight`` where a layer counted in the last call of the model, and 0 elsewhere."""
    steps = zip(model.states, model.states[1:], strict=False)
    return [torch.where((after != x).any(-1), weight, 0.0).double() for x, after in steps]


def applied(model: nn.Module, p: float, **options: object) -> nn.Module:
    """``sd.apply`` with an example in the model's dtype."""
    x = torch.randn(4, 4, dtype=next(model.parameters()).dtype)
    return sd.apply(model, p, **{"schedule": "uniform", "example_inputs": x, **options})


@pytest.mark.parametrize(("scale", "weight"), [("train", 2.0), ("none", 1.0)])
@pytest.mark.parametrize("mode", ["batch", "row"])
def test_output_and_gradients_are_those_of_masked_layers(mode, scale, weight):
    plain = Decoder().double()
    model = applied(copy.deepcopy(plain), 0.5, mode=mode, scale=scale, blocks=Layer)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(8):
        loss = model(x).square().sum()
        losses = [loss, expected(plain, x, weights(model, weight)).square().sum()]
        torch.testing.assert_close(*losses)
        leaves = [[x, *m.parameters()] for m in (model, plain)]
        ours, theirs = (
            torch.autograd.grad(loss, wrt, allow_unused=True, materialize_grads=True)
            for loss, wrt in zip(losses, leaves, strict=True)
        )
        torch.testing.assert_close(ours, theirs)
    decided = sum(branch.decided for branch in sd.branches(model))
    assert decided == 3 * 8 * (5 if mode == "row" else 1)
    assert 0 < sum(branch.dropped for branch in sd.branches(model)) < decided


def test_only_kept_rows_run():
    model = applied(Decoder(), 0.5, mode="subset", blocks=Layer)
    model(torch.randn(6, 4))
    counts = rows_run(model)
    model(torch.randn(6, 4))
    assert counts == [3, 3, 3]


def test_p_1_runs_nothing_from_the_first_call_and_p_0_is_the_plain_model():
    plain = Decoder()
    x = torch.randn(2, 4)
    model = applied(copy.deepcopy(plain), 1.0, blocks="layers.*")
    calls: list[int] = []
    for layer in model.layers:
        layer.first.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model(x), x)
    assert calls == []
    assert torch.equal(applied(model, 0.0, blocks="layers.*")(x), plain(x))


def test_evaluation_is_the_plain_model_and_the_paper_s_scaling_weighs_the_change():
    plain = Decoder().double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    model = applied(copy.deepcopy(plain), 0.5, blocks=Layer)
    assert torch.equal(model(x), plain(x))
    applied(model, 0.25, scale="eval", blocks=Layer).eval()
    by_row = [torch.full((3,), 0.75, dtype=torch.float64)] * 3
    torch.testing.assert_close(model(x), expected(plain, x, by_row))


@pytest.mark.parametrize("rows", [5, 1])
def test_a_mask_that_the_examples_do_not_have_is_told_when_it_comes(rows):
    plain = Decoder().double()
    model = applied(copy.deepcopy(plain), 0.5, mode="subset", blocks=Layer)
    x, mask = torch.randn(6, 4).double(), torch.randn(6 if rows > 1 else 1, 4).double()
    model(x, mask=mask)  # watched
    counts = rows_run(model)
    out = model(x, mask=mask)
    torch.testing.assert_close(out, expected(plain, x, weights(model, 2.0), mask=mask))
    assert counts == [3, 3, 3]


def test_where_a_cache_is_written_no_layer_is_dropped_and_a_warning_says_so():
    model, cache, x = applied(Decoder(), 0.5, blocks=Layer), Cache(), torch.randn(2, 4)
    with pytest.warns(UserWarning, match=r"layers\.\d.*is not dropped .* use_cache=False") as told:
        model(x, cache=cache)
    assert len(told) == 3
    for _ in range(9):
        model(x, cache=cache)
    assert len(cache.keys) == 30


def test_a_block_without_a_residual_sum_is_dropped():
    model = nn.Sequential(Asking(), Asking())
    with pytest.raises(ValueError, match="blocks="):
        applied(model, 0.5)
    applied(model, 1.0, blocks=Asking)
    x = torch.randn(2, 4)
    assert torch.equal(model(x), x)
    assert sd.verify(model, x).passed


class Bad(nn.Module):
    def __init__(self, result) -> None:
        super().__init__()
        self.linear, self.result = nn.Linear(4, 3), result

    def forward(self, x: Tensor):
        return self.result(self, x)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (lambda self, x: self.linear(x), "wrap it in StochasticDepth with a projection"),
        (lambda self, x: (x + 1, self.linear(x)), "besides its output it returns a tensor"),
        (lambda self, x: (x + 1, len(x)), "besides its output it returns a value"),
        (lambda self, x: "nothing", "it returns no tensor"),
        (lambda self, x: x.argsort(), "it returns no floating-point tensor"),
    ],
)
def test_what_cannot_be_dropped_is_reported_and_runs(result, reason):
    bad, x = Bad(result), torch.randn(2, 4)
    plain = bad(x)
    with pytest.raises(ValueError, match=rf"none of the blocks of blocks=.*\n.*{reason}"):
        applied(nn.Sequential(bad), 1.0, blocks=Bad)
    model = applied(nn.Sequential(Asking(), bad), 1.0, blocks=[Asking, Bad])
    ((name, why),) = sd.summary(model).refused
    assert name == "1:(block)"
    assert reason in why
    assert str(model(x)) == str(plain)


class Twice(nn.Module):
    """Calls a block twice, and reads what else it returns of one call."""

    def __init__(self, read: int) -> None:
        super().__init__()
        self.block = Bad(lambda block, x: (x + 1, block.linear(x)))
        self.other, self.read = Asking(), read

    def forward(self, x: Tensor) -> Tensor:
        x, first = self.block(x)
        x, second = self.block(x)
        return self.other(x), (first, second)[self.read]


class Collecting(Decoder):
    """Collects what its layers return, in the way of transformers."""

    def forward(self, x: Tensor, collect: bool = False) -> Tensor | tuple[Tensor, ...]:
        states: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda layer, args, out: states.append(out[0]))
            for layer in self.layers
            if collect
        ]
        out = super().forward(x)
        for hook in hooks:
            hook.remove()
        return (out, *states) if collect else out


class Counting(Decoder):
    """Fails where a layer has not run."""

    def forward(self, x: Tensor) -> Tensor:
        ran: list[nn.Module] = []
        hooks = [
            m.first.register_forward_hook(lambda m, args, out: ran.append(m)) for m in self.layers
        ]
        out = super().forward(x)
        for hook in hooks:
            hook.remove()
        return out + len(ran[len(self.layers) - 1].weight)


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (Collecting, {"collect": True}, "returns 3 tensors and not 4: hooks collect"),
        (Counting, {}, "the model fails where it is left out: IndexError"),
    ],
)
def test_blocks_that_the_model_needs_are_refused(kind, options, reason, mode):
    model, batch = kind(), {"x": torch.randn(3, 4), **options}
    with pytest.raises(ValueError, match=rf"(?s)none of the blocks .*layers.2.*{reason}"):
        sd.apply(model, 0.5, blocks=Layer, mode=mode, example_inputs=batch)


def test_hooks_that_come_later_and_miss_what_is_dropped_are_told_once():
    model, x = Collecting(), torch.randn(3, 4)
    sd.apply(model, 1.0, blocks=Layer, schedule="uniform", example_inputs=x)
    with pytest.warns(UserWarning, match="Layer has forward hooks, which do not run where it is"):
        assert len(model(x, collect=True)) == 1
    model(x, collect=True)


@pytest.mark.parametrize("read", [0, 1])
def test_a_block_is_dropped_in_all_calls_of_a_form_or_in_none(read):
    model, x = Twice(read), torch.randn(2, 4)
    sd.apply(model, 1.0, blocks=["block", "other"], example_inputs=x)
    assert [branch.name for branch in sd.branches(model)] == ["other:(block)"]
    ((name, reason),) = sd.summary(model).refused
    assert name == "block:(block)"
    assert "besides its output it returns a tensor that is used" in reason
    model(x)


def test_state_is_kept_and_remove_undoes():
    plain = Decoder()
    model = applied(copy.deepcopy(plain), 0.5, blocks=lambda name, m: isinstance(m, Layer))
    x = torch.randn(2, 4)
    model(x)
    assert list(model.state_dict()) == list(plain.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(3)
        ours = model(x)
        torch.manual_seed(3)
        assert torch.equal(twin(x), ours)
    sd.remove(model)
    assert torch.equal(model(x), plain(x))
    assert vars(model.layers[0]).keys() == vars(plain.layers[0]).keys()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_replays(reentrant):
    model = applied(Decoder(), 0.5, mode="row", blocks=Layer)
    x = torch.randn(4, 4, requires_grad=True)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        run(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["batch", "subset"])
def test_compiles_into_one_graph(mode):
    torch._dynamo.reset()
    model = applied(Decoder(), 0.5, mode=mode, blocks=Layer)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 4)
    results = {round(fast(x).sum().item(), 4) for _ in range(20)}
    assert len(results) > 2


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"blocks='blocks\.\*' matches no module of Decoder"):
        applied(Decoder(), 0.5, blocks="blocks.*")
    with pytest.raises(TypeError, match="blocks must be 'all', globs"):
        applied(Decoder(), 0.5, blocks=3)
    with pytest.raises(ValueError, match="include and exclude are for branches"):
        applied(Decoder(), 0.5, blocks=Layer, exclude="layers.0")


def test_summary_lists_blocks_and_not_what_is_in_them():
    text = str(sd.summary(applied(Decoder(), 0.5, blocks=Layer), torch.randn(2, 4)))
    assert "layers.2:(block)" in text
    assert "not dropped" not in text
    assert "expected depth  1.50 of 3" in text


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class TwoParts(nn.Module):
    """A post-norm layer of which one part is a block of its own, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = Part(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.linear(x)


class OneSum(nn.Module):
    """A stack under a shortcut of the whole, as in super-resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(TwoParts(), Part())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def test_all_blocks_are_the_outermost_ones_but_no_stack_of_them():
    model = sd.apply(OneSum(), 1.0, schedule="uniform", blocks="all")
    assert [b.name for b in sd.branches(model)] == ["body.0:(block)", "body.1:(block)"]
    x = torch.randn(2, 4)
    assert torch.equal(model(x), x + x)


class Shifted(nn.Module):
    """Adds a number to what its inner module makes of the input."""

    def __init__(self, number: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.number, self.inner = nn.Parameter(torch.tensor(number)), inner
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return (x if self.inner is None else self.inner(x)) + self.number


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_a_block_inside_of_another_is_given_samples_of_those_that_are_kept(mode: str) -> None:
    model = nn.Sequential(Shifted(1.0, Shifted(10.0)))
    sd.apply(
        model, 0.5, schedule="uniform", scale="none", mode=mode, seed=0,
        blocks=["0", "0.inner"], example_inputs=torch.randn(6, 3),
    )  # fmt: skip
    assert [branch.place for branch in sd.branches(model)] == [(0, 1), (0, 1)]
    seen = set()
    for _ in range(30):
        model[0].sizes, model[0].inner.sizes = [], []
        out = model(torch.zeros(6, 3))[:, 0].tolist()
        seen |= set(out)
        assert sum(model[0].sizes) == sum(value >= 1.0 for value in out)
        assert sum(model[0].inner.sizes) == out.count(11.0)
    assert seen == {0.0, 1.0, 11.0}

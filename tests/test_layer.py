"""StochasticDepth, the wrapper: the module's output moved away from its shortcut."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.drop import force

MODES = ["batch", "row", "subset"]
ROW_MODES = ["row", "subset"]
SCALES = ["train", "eval", "none"]


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2))


def image(rows: int = 6, **options: Any) -> Tensor:
    return torch.randn(rows, 3, 5, 5, generator=torch.Generator().manual_seed(1), **options)


def numbered(rows: int, width: int = 2) -> Tensor:
    return torch.arange(float(rows))[:, None].expand(rows, width).clone()


class Recorder(nn.Module):
    """A module that notes its arguments and returns what ``inner`` does."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.inner(*args, **kwargs)


def until(call: Callable[[], Any], wanted: Callable[[], bool]) -> Any:
    """What comes out of the first call after which ``wanted``."""
    for _ in range(1000):
        out = call()
        if wanted():
            return out
    raise AssertionError("never")


def plus_one(x: Tensor) -> Tensor:
    return x + 1


# --- what runs


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", MODES)
def test_at_p_1_no_module_inside_runs(mode: str, scale: str) -> None:
    layer, x = sd.StochasticDepth(block(), 1.0, mode=mode, scale=scale), image()
    ran: list[nn.Module] = []
    for module in layer.module.modules():
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
    statistics = {name: b.clone() for name, b in layer.named_buffers()}
    x.requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert ran == []
    assert torch.equal(out, x)
    assert torch.equal(x.grad, torch.ones_like(x))
    assert [p.grad for p in layer.parameters()] == [None] * 4
    assert len(statistics) == 3
    for name, b in layer.named_buffers():
        assert torch.equal(b, statistics[name])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", MODES)
def test_at_p_0_everything_is_bit_identical_to_the_module(mode: str, scale: str) -> None:
    plain = block()
    layer = sd.StochasticDepth(copy.deepcopy(plain), 0.0, mode=mode, scale=scale)
    results = []
    for module in (layer, plain):
        torch.manual_seed(2)
        x = image().requires_grad_()
        out = module(x)
        out.square().sum().backward()
        results.append((out, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scale", ["train", "none"])
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_composer_evaluation_changes_at_once(mode: str, p: float, scale: str) -> None:
    layer, x = sd.StochasticDepth(block(), p, mode=mode, scale=scale).eval(), image()
    before = torch.get_rng_state()
    assert torch.equal(layer(x), layer.module(x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", SCALES)
def test_what_runs_the_plain_model_runs_the_plain_module(scale: str, training: bool) -> None:
    module, x = nn.Linear(3, 3), torch.randn(4, 3)
    layer = sd.StochasticDepth(module, 0.7, scale=scale).train(training)
    with force.plain():
        assert torch.equal(layer(x), module(x))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_evaluation_in_scale_eval_is_between_shortcut_and_module(p: float) -> None:
    layer = sd.StochasticDepth(block(), p, scale="eval").double().eval()
    x = image(dtype=torch.float64)
    expected = x + (1 - p) * (layer.module(x) - x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", ROW_MODES)
def test_the_module_sees_exactly_the_kept_rows(mode: str) -> None:
    torch.manual_seed(0)
    module, x = Recorder(plus_one), numbered(9)
    layer = sd.StochasticDepth(module, 0.5, mode=mode, scale="none")
    sizes = set()
    for _ in range(50):
        module.calls.clear()
        out = layer(x)
        kept = [int(row) for args, _ in module.calls for row in args[0][:, 0]]
        expected = x.clone()
        expected[kept] += 1
        assert torch.equal(out, expected)
        assert len(set(kept)) == len(kept)
        sizes.add(len(kept))
    assert sizes == {4} if mode == "subset" else len(sizes) > 3


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", ["batch", "row"])
def test_torchtune_does_not_rescale_around_the_shortcut(mode: str, scale: str) -> None:
    torch.manual_seed(0)
    layer = sd.StochasticDepth(block()[:1].double(), 0.25, mode=mode, scale=scale)
    x = image(dtype=torch.float64)
    weight = 1 / 0.75 if scale == "train" else 1.0
    whole = x + weight * (layer.module(x) - x)
    rows = []
    for _ in range(10):
        for out, dropped, kept in zip(layer(x), x, whole, strict=True):
            is_dropped = torch.equal(out, dropped)
            torch.testing.assert_close(out, dropped if is_dropped else kept, rtol=0, atol=1e-13)
            rows.append(is_dropped)
    assert 0 < sum(rows) < len(rows)


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_gradients_are_those_of_a_masked_module(mode: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    layer = sd.StochasticDepth(module, 0.4, mode=mode)
    x = torch.randn(8, 3, dtype=torch.float64)

    def results(net: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = net(leaf)
        wanted = (leaf, *module.parameters())
        return [out, *torch.autograd.grad(out.square().sum(), wanted, materialize_grads=True)]

    counts = set()
    for _ in range(10):
        ours = results(layer)
        mask = (ours[0] != x).any(1, keepdim=True).double()
        theirs = results(lambda x, mask=mask: x + mask / 0.6 * (module(x) - x))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        counts.add(int(mask.sum()))
    assert counts == {0, 8} if mode == "batch" else len(counts) > 2


def test_a_lone_row_takes_one_along_through_batch_norm() -> None:
    torch.manual_seed(0)
    module = Recorder(nn.BatchNorm1d(2))
    sd.StochasticDepth(module, 0.75, mode="subset")(torch.randn(4, 2))
    assert [len(args[0]) for args, _ in module.calls] == [2]


# --- the rate


def test_timm_a_rate_of_0_cannot_be_raised_later() -> None:
    layer, x = sd.StochasticDepth(Recorder(plus_one), 0.0), torch.zeros(1)
    assert layer(x) == 1
    layer.p = 1.0
    assert layer(x) == 0
    layer.p = 0.0
    assert layer(x) == 1


def test_torchlayers_scales_in_training_although_nothing_is_dropped() -> None:
    layer = sd.StochasticDepth(Recorder(plus_one), 0.0)
    assert layer(torch.ones(1)) == 2.0
    assert layer.eval()(torch.ones(1)) == 2.0


def test_training_and_evaluation_may_alternate() -> None:
    layer, x = sd.StochasticDepth(Recorder(plus_one), 1.0), torch.zeros(1)
    assert [layer.train(mode)(x).item() for mode in (True, False, True, False)] == [0, 1, 0, 1]


def test_repr_tells_how_it_drops() -> None:
    text = repr(sd.StochasticDepth(nn.Linear(2, 2), 0.25, mode="row", scale="none"))
    assert text.startswith("StochasticDepth(\n  p=0.25, mode='row', scale='none'\n")


# --- what goes in and comes out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [1.0, 0.4, 1e-30])
def test_tuples_pass_through_and_each_tensor_is_a_stream(mode: str, p: float) -> None:
    torch.manual_seed(0)
    module = Recorder(lambda xs: (xs[0] + 1, xs[1] * 2))
    layer = sd.StochasticDepth(module, p, mode=mode, scale="none")
    x, y = numbered(6), torch.arange(6.0) + 1
    for _ in range(10):
        module.calls.clear()
        out = layer((x, y))
        assert type(out) is tuple
        kept = [int(row) for args, _ in module.calls for row in args[0][0][:, 0]]
        expected = x.clone(), y.clone()
        expected[0][kept] += 1
        expected[1][kept] *= 2
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1], expected[1])


@pytest.mark.parametrize("mode", MODES)
def test_dicts_and_what_is_no_tensor_pass_through(mode: str) -> None:
    torch.manual_seed(0)
    module = Recorder(lambda d: {**d, "x": d["x"] + 1, "id": d["id"]})
    layer = sd.StochasticDepth(module, 0.5, mode=mode)
    value = {"x": torch.zeros(4, 2), "id": torch.arange(4), "name": "a", "none": None}
    for _ in range(10):
        out = layer(value)
        assert set(out["x"].flatten().tolist()) <= {0.0, 2.0}
        assert torch.equal(out["id"], value["id"])
        assert (out["name"], out["none"]) == ("a", None)
    assert module.calls


@pytest.mark.parametrize("mode", MODES)
def test_further_arguments_go_to_the_module_as_they_are(mode: str) -> None:
    torch.manual_seed(0)
    module = Recorder(lambda x, factor, *, shift, flag: x * factor + shift)
    layer = sd.StochasticDepth(module, 0.5, mode=mode, scale="none")
    shift = torch.ones(2)
    out = until(lambda: layer(numbered(6), 3, shift=shift, flag="yes"), lambda: bool(module.calls))
    ((_, factor), kwargs) = module.calls[0]
    assert factor == 3
    assert kwargs == {"shift": shift, "flag": "yes"}
    kept = module.calls[0][0][0][:, 0].long()
    assert torch.equal(out[kept], numbered(6)[kept] * 3 + 1)


@pytest.mark.parametrize("mode", ROW_MODES)
def test_torchtune_masks_with_batch_rows_crash(mode: str) -> None:
    torch.manual_seed(0)
    module = Recorder(lambda x, mask: x + mask)
    layer = sd.StochasticDepth(module, 0.5, mode=mode, scale="none")
    mask = numbered(6) + 1
    module.calls.clear()
    with pytest.warns(UserWarning, match="computing all samples and masking the dropped ones"):
        outs = [layer(torch.zeros(6, 2), mask=mask) for _ in range(10)]
    assert module.calls
    assert {len(args[0]) for args, _ in module.calls} == {6}  # on all rows
    counts = set()
    for out in outs:
        kept = (out != 0).all(1)
        assert torch.equal(out[kept], mask[kept])
        assert (out[~kept] == 0).all()
        counts.add(int(kept.sum()))
    assert counts == {3} if mode == "subset" else len(counts) > 2


@pytest.mark.parametrize("mode", ROW_MODES)
def test_masks_in_the_input_have_their_rows_selected_without_a_warning(mode: str) -> None:
    torch.manual_seed(0)
    module = Recorder(lambda xs: (xs[0] + xs[1], xs[1]))
    layer = sd.StochasticDepth(module, 0.5, mode=mode, scale="none")
    x, mask = torch.zeros(6, 2), numbered(6) + 1
    out, _ = until(lambda: layer((x, mask)), lambda: bool(module.calls))
    kept = (module.calls[0][0][0][1][:, 0] - 1).long()
    assert 0 < len(kept) < 6
    expected = torch.zeros(6, 2)
    expected[kept] = mask[kept]
    assert torch.equal(out, expected)


def test_batch_mode_does_not_warn_of_masks() -> None:
    torch.manual_seed(0)
    layer = sd.StochasticDepth(Recorder(torch.add), 0.5)
    for _ in range(5):
        assert layer(torch.zeros(4), torch.ones(4)).unique().item() in (0.0, 2.0)


# --- what the caller has stays the caller's


@pytest.mark.parametrize("p", [1.0, 0.5, 1e-30])
@pytest.mark.parametrize("mode", MODES)
def test_what_follows_in_place_does_not_reach_the_input(mode: str, p: float) -> None:
    torch.manual_seed(0)
    layer = sd.StochasticDepth(nn.Linear(3, 3), p, mode=mode)
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    before = x.clone()
    for _ in range(10):
        layer(x).relu_()
    assert torch.equal(x, before)
    pair = sd.StochasticDepth(Recorder(lambda xs: (xs[0].sin(), xs[1].cos())), p, mode=mode)
    for out in pair((x, y)):
        assert out.untyped_storage().data_ptr() not in (
            x.untyped_storage().data_ptr(),
            y.untyped_storage().data_ptr(),
        )


@pytest.mark.parametrize("projection", [None, nn.Identity(), torch.Tensor.detach])
@pytest.mark.parametrize("mode", MODES)
def test_a_module_that_would_be_inf_is_not_nan_where_dropped(mode: str, projection: Any) -> None:
    torch.manual_seed(0)
    layer = sd.StochasticDepth(Recorder(torch.reciprocal), 0.5, projection, mode=mode)
    outcomes = set()
    for _ in range(30):
        x = torch.tensor([[0.0], [1.0], [2.0]], requires_grad=True)
        out = layer(x)
        outcomes.add(bool(out[0].isfinite()))
        assert out[1:].isfinite().all()
        assert bool(out[0].isfinite()) is (out[0] == 0).item()
    assert outcomes == {True, False}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_module_at_p_1_is_left_out_in_evaluation_by_the_scale_of_the_paper(
    mode: str, training: bool
) -> None:
    x = torch.tensor([[0.0], [1.0]])
    layer = sd.StochasticDepth(Recorder(torch.reciprocal), 1.0, mode=mode, scale="eval")
    assert torch.equal(layer.train(training)(x), x)
    assert layer.module.calls == []


@pytest.mark.parametrize("mode", MODES)
def test_complex_numbers_are_weighed(mode: str) -> None:
    torch.manual_seed(0)
    layer = sd.StochasticDepth(Recorder(lambda x: 3 * x), 0.5, mode=mode)
    x = torch.tensor([1 + 2j, 3 - 1j])[:, None]
    outputs = torch.cat([layer(x) / x for _ in range(20)])
    assert sorted(set(outputs.flatten().real.tolist())) == [1, 5]  # x, and x + 2 (3x - x)


@pytest.mark.parametrize("mode", MODES)
def test_torchtune_autocast_to_bf16_crashes(mode: str) -> None:
    torch.manual_seed(0)
    layer = sd.StochasticDepth(nn.Linear(4, 4), 0.5, mode=mode)
    for _ in range(10):
        x = torch.randn(6, 4, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.float32
        out.sum().backward()
        assert x.grad.isfinite().all()
    assert layer.module.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_the_output_has_the_dtype_of_the_module(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = sd.StochasticDepth(nn.Linear(4, 4, dtype=dtype), 0.5, mode=mode)
    for _ in range(5):
        assert layer(torch.ones(6, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("mode", ROW_MODES)
def test_a_module_of_higher_precision_than_its_input_raises_the_outputs(mode: str) -> None:
    torch.manual_seed(0)
    module = Recorder(lambda x: x.float() + 1)
    layer = sd.StochasticDepth(module, 0.5, mode=mode, scale="none")
    x = torch.zeros(6, 1, dtype=torch.bfloat16)
    out = until(lambda: layer(x), lambda: sum(len(args[0]) for args, _ in module.calls[-1:]) == 3)
    assert out.dtype == torch.float32
    assert sorted(out.flatten().tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_replays_the_coins(mode: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(sd.StochasticDepth(nn.Linear(4, 4, dtype=torch.float64), 0.5, mode=mode) for _ in "abc")
    )
    start = torch.randn(6, 4, dtype=torch.float64)
    gradients = []
    for seed in range(8):
        for run in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
            net.zero_grad()
            torch.manual_seed(seed)
            x = start.clone().requires_grad_()
            out = run(x)
            torch.rand(5)
            out.square().sum().backward()
            gradients.append([x.grad, *(p.grad for p in net.parameters())])
    for plain, replayed in zip(gradients[::2], gradients[1::2], strict=True):
        for ours, theirs in zip(replayed, plain, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)


# --- saving and copying


def test_torchtune_reloading_its_own_state_dict_fails() -> None:
    layer = sd.StochasticDepth(block(), 0.5)
    state = layer.state_dict()
    assert list(state) == [f"module.{key}" for key in block().state_dict()]
    assert layer.load_state_dict(state).missing_keys == []


def through_torch(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "trip", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_torch]
)
@pytest.mark.parametrize("mode", MODES)
def test_composer_cannot_be_pickled(mode: str, trip: Callable[[nn.Module], nn.Module]) -> None:
    layer = sd.StochasticDepth(block(), 0.3, mode=mode, scale="none")
    twin, x = trip(layer), image()
    assert (twin.p, twin.mode, twin.scale) == (0.3, mode, "none")
    outputs = []
    for module in (layer, twin):
        torch.manual_seed(5)
        outputs.append(torch.stack([module(x) for _ in range(5)]))
    assert torch.equal(*outputs)
    twin.p = 1.0
    nn.init.zeros_(twin.module[0].weight)
    assert layer.p == 0.3
    assert layer.module[0].weight.any()

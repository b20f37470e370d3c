"""The residual sum with a droppable branch: what runs, on which rows, and what comes out."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reference
import stochastic_depth as sd

MODES = ["batch", "row", "subset"]
ROW_MODES = ["row", "subset"]
SCALES = ["train", "eval", "none"]


class Recorder(nn.Module):
    """A branch that notes the tensors it is called with."""

    def __init__(self, inner: Callable[..., Tensor] = torch.neg) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[Tensor] = []

    def forward(self, *inputs: Tensor) -> Tensor:
        self.seen.append(inputs[0].detach().clone())
        return self.inner(*inputs)

    def rows(self) -> list[int]:
        """The numbers, in column 0, of the rows of the only call."""
        (x,) = self.seen
        return x[:, 0].int().tolist()


def numbered(rows: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch whose rows hold their number, from 0."""
    return torch.arange(rows).view(-1, *[1] * len(shape)).expand(rows, *shape).to(dtype).clone()


def coins(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def partly(call: Callable[[], Tensor], branch: Recorder, rows: int) -> Tensor:
    """What comes out of the first call that keeps some of ``rows`` rows but not all."""
    for _ in range(1000):
        branch.seen.clear()
        out = call()
        if 0 < sum(map(len, branch.seen)) < rows:
            return out
    raise AssertionError("never kept some of the rows but not all")


def conv_block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2))


def image(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 5, 5, generator=coins(1))


# --- what runs


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", MODES)
def test_at_p_1_nothing_of_the_branch_runs(mode: str, scale: str) -> None:
    block, x = conv_block(), image().requires_grad_()
    ran: list[nn.Module] = []
    for module in block.modules():
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
    statistics = {name: b.clone() for name, b in block.named_buffers()}
    out = sd.residual(x, block, p=1.0, mode=mode, scale=scale)
    out.square().sum().backward()
    assert ran == []
    assert torch.equal(out, x)
    assert torch.equal(x.grad, 2 * x.detach())
    assert [p.grad for p in block.parameters()] == [None] * 4
    assert len(statistics) == 3
    for name, b in block.named_buffers():
        assert torch.equal(b, statistics[name])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", MODES)
def test_at_p_0_everything_is_bit_identical_to_the_plain_sum(mode: str, scale: str) -> None:
    block = conv_block()
    plain = copy.deepcopy(block)
    results = []
    for run in (
        lambda x: sd.residual(x, block, p=0.0, mode=mode, scale=scale),
        lambda x: x + plain(x),
    ):
        torch.manual_seed(2)  # for the dropout
        x = image().requires_grad_()
        out = run(x)
        out.square().sum().backward()
        results.append((out, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for ours, theirs in zip(block.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(block.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_without_a_choice_no_coin_is_tossed(mode: str, p: float) -> None:
    before = torch.get_rng_state()
    private = coins()
    sd.residual(numbered(4, 2), torch.neg, p=p, mode=mode)
    sd.residual(numbered(4, 2), torch.neg, p=p, mode=mode, generator=private)
    sd.residual(numbered(4, 2), torch.neg, p=0.5, mode=mode, training=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(private.get_state(), coins().get_state())


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", ["train", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_evaluation_is_the_plain_sum(mode: str, scale: str, p: float) -> None:
    block, x = conv_block().eval(), image()
    out = sd.residual(x, block, p=p, training=False, mode=mode, scale=scale)
    assert torch.equal(out, x + block(x))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_evaluation_in_scale_eval_weighs_the_branch_by_its_survival(mode: str, p: float) -> None:
    block, x = conv_block().double().eval(), image().double()
    out = sd.residual(x, block, p=p, training=False, mode=mode, scale="eval")
    torch.testing.assert_close(out, x + (1 - p) * block(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", ROW_MODES)
def test_the_branch_sees_exactly_the_kept_rows(mode: str) -> None:
    torch.manual_seed(0)
    x, branch = numbered(9, 2), Recorder(lambda rows: rows + 1)
    sizes = set()
    for _ in range(50):
        branch.seen.clear()
        out = sd.residual(x, branch, p=0.5, mode=mode, scale="none")
        changed = (out != x).all(1)
        kept = branch.rows() if branch.seen else []
        assert sorted(kept) == changed.nonzero().squeeze(1).tolist()
        assert torch.equal(out[changed], (2 * x + 1)[changed])
        assert torch.equal(out[~changed], x[~changed])
        sizes.add(len(kept))
    assert sizes == {4} if mode == "subset" else len(sizes) > 3


def test_the_branch_is_not_called_where_no_row_is_kept() -> None:
    torch.manual_seed(0)
    x, branch = numbered(2, 2), Recorder()
    for _ in range(40):
        sd.residual(x, branch, p=0.5, mode="row")
    assert 0 < len(branch.seen) < 40
    assert {len(rows) for rows in branch.seen} == {1, 2}


@pytest.mark.parametrize("mode", ROW_MODES)
@pytest.mark.parametrize("batch_dim", [0, 1, 2])
def test_rows_may_be_in_any_dimension(mode: str, batch_dim: int) -> None:
    torch.manual_seed(0)
    x = numbered(6, 2, 3).movedim(0, batch_dim)
    branch = Recorder(torch.ones_like)

    def call() -> Tensor:
        return sd.residual(x, branch, p=0.5, mode=mode, scale="none", batch_dim=batch_dim)

    out = partly(call, branch, 6).movedim(batch_dim, 0)
    (seen,) = branch.seen
    seen = seen.movedim(batch_dim, 0)
    assert seen.shape[1:] == (2, 3)
    kept = seen[:, 0, 0].long()
    expected = numbered(6, 2, 3)
    expected[kept] += 1
    assert torch.equal(out, expected)


@pytest.mark.parametrize("mode", ROW_MODES)
def test_the_rows_of_every_input_are_selected(mode: str) -> None:
    torch.manual_seed(0)
    x, y, shortcut = numbered(8, 1), numbered(8, 1, 3) * 10, torch.zeros(8, 1)

    def both(x: Tensor, y: Tensor) -> Tensor:
        assert torch.equal(y, x[:, :, None].expand(-1, 1, 3) * 10)
        return x + 1

    branch = Recorder(both)
    out = partly(
        lambda: sd.residual(shortcut, branch, x, y, p=0.5, mode=mode, scale="none"), branch, 8
    )
    kept = branch.rows()
    assert sorted(out.squeeze(1).nonzero().squeeze(1).tolist()) == sorted(kept)
    assert torch.equal(out[kept], x[kept] + 1)


def test_in_batch_mode_inputs_need_no_rows() -> None:
    scalar = torch.tensor(2.0)
    out = sd.residual(torch.ones(3), torch.mul, torch.ones(3), scalar, p=0.0)
    assert torch.equal(out, torch.full((3,), 3.0))
    assert sd.residual(scalar, torch.neg, p=0.0) == 0
    assert sd.residual(torch.empty(0, 3), torch.neg, p=0.5).shape == (0, 3)


# --- the weight of what is kept


@pytest.mark.parametrize("scale", SCALES)
def test_a_kept_call_weighs_what_the_scaling_says(scale: str) -> None:
    x, p = image().double(), 0.2
    expected = x + x.sin() * (1 / (1 - p) if scale == "train" else 1.0)
    torch.manual_seed(0)
    outputs = [sd.residual(x, torch.sin, p=p, scale=scale) for _ in range(40)]
    dropped = [torch.equal(out, x) for out in outputs]
    assert 0 < sum(dropped) < 40
    for out in (out for out, drop in zip(outputs, dropped, strict=True) if not drop):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", MODES)
@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    rows=st.integers(2, 6),
    others=st.lists(st.integers(1, 3), max_size=3),
    data=st.data(),
    p=st.sampled_from([0.2, 0.4, 0.7]),
    seed=st.integers(0, 1000),
)
def test_output_and_gradients_are_those_of_a_masked_sum(
    mode: str, scale: str, rows: int, others: list[int], data: st.DataObject, p: float, seed: int
) -> None:
    dim = data.draw(st.integers(0, len(others)))
    shape = [*others[:dim], rows, *others[dim:]]
    x = torch.randn(shape, generator=coins(seed), dtype=torch.float64)
    number = torch.arange(rows).view([-1 if d == dim else 1 for d in range(len(shape))])
    number = number.expand(shape).to(x)
    kept: set[int] = set()

    def results(net: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = x.clone().requires_grad_(), torch.tensor(0.7, dtype=x.dtype, requires_grad=True)
        out = net(*leaves)
        loss = (out * out.detach().cos()).sum()
        return [out, *torch.autograd.grad(loss, leaves, materialize_grads=True)]

    def ours(x: Tensor, w: Tensor) -> Tensor:
        def branch(x: Tensor, number: Tensor) -> Tensor:
            kept.update(number.flatten().int().tolist())
            return (w * x).sin()

        options = {"mode": mode, "scale": scale, "batch_dim": dim, "generator": coins(seed)}
        return sd.residual(x, branch, x, number, p=p, **options)

    def masked(x: Tensor, w: Tensor) -> Tensor:
        mask = tuple(row in kept for row in range(rows))
        weight = reference.training_weight(rows, p, mode, scale)
        return reference.masked(x, (w * x).sin(), mask, weight, dim)

    torch.testing.assert_close(results(ours), results(masked), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_branch_and_shortcut_may_differ_in_layout(mode: str) -> None:
    x = torch.randn(4, 3, 2, 5, generator=coins(3), dtype=torch.float64)
    layouts = torch.channels_last, torch.contiguous_format
    for shortcut_layout, branch_layout in (layouts, layouts[::-1]):
        s = x.to(memory_format=shortcut_layout)
        branch = Recorder(lambda v, f=branch_layout: v.sin().to(memory_format=f))
        torch.manual_seed(0)
        while not branch.seen:
            out = sd.residual(s, branch, p=0.5, mode=mode)
        kept = (out != x).flatten(1).any(1)
        assert torch.equal(out[~kept], x[~kept])
        torch.testing.assert_close(out[kept], (x + 2 * x.sin())[kept], rtol=0, atol=1e-14)


def test_deepspeed_scales_by_a_rate_that_changed_after_the_coin() -> None:
    class Changing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            layer.p = 0.9
            return x + 1

    layer = sd.StochasticDepth(Changing(), 0.5)
    torch.manual_seed(0)
    while layer.p == 0.5:
        out = layer(torch.zeros(1))
    assert out == 2.0


def test_deepspeed_the_last_layer_divides_by_zero() -> None:
    out = sd.residual(torch.ones(2), lambda x: x / 0, p=1.0)
    assert torch.equal(out, torch.ones(2))


# --- BatchNorm


def test_a_lone_row_takes_one_along_through_batch_norm_and_leaves_it_out() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2, affine=False)
    branch, x = Recorder(norm), torch.arange(8.0).view(4, 2)
    out = partly(
        lambda: sd.residual(x, branch, p=0.75, mode="subset", scale="none"), branch, rows=4
    )
    (kept,) = (out != x).any(1).nonzero()
    (seen,) = branch.seen
    fresh = nn.BatchNorm1d(2, affine=False)(seen)
    assert len(seen) == 2
    assert torch.equal(seen[:1], x[kept])
    assert torch.equal(out[kept], x[kept] + fresh[:1])
    assert not torch.equal(seen[0], seen[1])


def test_a_lone_row_goes_alone_where_statistics_are_frozen() -> None:
    torch.manual_seed(0)
    branch = Recorder(nn.BatchNorm1d(2).eval())
    sd.residual(torch.randn(4, 2), branch, p=0.75, mode="subset")
    assert [len(x) for x in branch.seen] == [1]


def test_two_kept_rows_alone_make_the_statistics() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2, momentum=1.0)
    branch, x = Recorder(norm), torch.randn(4, 2)
    sd.residual(x, branch, p=0.5, mode="subset")
    (seen,) = branch.seen
    assert len(seen) == 2
    torch.testing.assert_close(norm.running_mean, seen.mean(0))


# --- what the caller has stays the caller's


def relu_in_place(x: Tensor) -> Tensor:
    return x.relu_()


@pytest.mark.parametrize("p", [1.0, 0.5, 1e-30, 0.0])
@pytest.mark.parametrize("mode", MODES)
def test_what_follows_in_place_does_not_reach_the_callers_tensor(mode: str, p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    before, version = x.clone(), x._version
    for _ in range(10):
        out = sd.residual(x, torch.sin, p=p, mode=mode)
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        relu_in_place(out)
    assert torch.equal(x, before)
    assert x._version == version


@pytest.mark.parametrize("p", [1.0, 0.5, 1e-30])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_through_what_follows_in_place_are_right(mode: str, p: float) -> None:
    def gradient(relu: Callable[[Tensor], Tensor]) -> Tensor:
        x = torch.randn(6, 3, generator=coins(1)).requires_grad_()
        h = x.sigmoid() - 0.5  # its gradient needs its own output
        relu(sd.residual(h, torch.sin, p=p, mode=mode, generator=coins(2))).sum().backward()
        return x.grad

    assert torch.equal(gradient(relu_in_place), gradient(torch.relu))


def test_stochdepth_multiplies_in_place() -> None:
    output = torch.full((3,), 2.0)
    torch.manual_seed(0)
    for mode in MODES:
        for _ in range(5):
            sd.residual(torch.ones(3), lambda x: output[: len(x)], p=0.4, mode=mode)
    assert torch.equal(output, torch.full((3,), 2.0))


@pytest.mark.parametrize("training", [True, False])
def test_at_p_1_the_scale_of_the_paper_calls_nothing_in_evaluation(training: bool) -> None:
    x = torch.tensor([[0.0], [1.0]])
    out = sd.residual(x, torch.reciprocal, p=1.0, scale="eval", training=training)
    assert torch.equal(out, x)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_nemo_a_dropped_call_that_would_be_inf_is_nan(bad: float) -> None:
    x = torch.ones(2, requires_grad=True)
    out = sd.residual(x, lambda x: x * bad, p=1.0)
    out.sum().backward()
    assert torch.equal(out, torch.ones(2))
    assert torch.equal(x.grad, torch.ones(2))


@pytest.mark.parametrize("mode", ROW_MODES)
def test_torchvision_inf_in_a_dropped_row_is_nan(mode: str) -> None:
    torch.manual_seed(0)
    outcomes = set()
    for _ in range(50):
        x = torch.tensor([[0.0], [1.0], [2.0], [3.0]], requires_grad=True)
        out = sd.residual(x, torch.reciprocal, p=0.5, mode=mode)  # inf in row 0
        out.sum().backward()
        kept = not out[0].isfinite()
        assert bool(x.grad[0].isfinite()) is not kept
        assert out[1:].isfinite().all()
        assert x.grad[1:].isfinite().all()
        outcomes.add(kept)
    assert outcomes == {True, False}


# --- dtypes


@pytest.mark.parametrize("p", [1.0, 0.5, 1e-30])
@pytest.mark.parametrize("mode", MODES)
def test_autocast_to_bf16_trains(mode: str, p: float) -> None:
    torch.manual_seed(0)
    block, x = nn.Linear(4, 4), torch.randn(6, 4, requires_grad=True)
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            out = sd.residual(x, block, p=p, mode=mode)
        assert out.dtype == torch.float32
        out.sum().backward()
    assert x.grad.isfinite().all()
    assert (block.weight.grad is None) is (p == 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1.0, 0.5, 1e-30])
@pytest.mark.parametrize("mode", MODES)
def test_the_sum_has_the_dtype_of_its_parts(mode: str, p: float, dtype: torch.dtype) -> None:
    out = sd.residual(torch.ones(6, 3, dtype=dtype), torch.ones_like, p=p, mode=mode)
    assert out.dtype == dtype
    assert set(out.flatten().tolist()) <= {1.0, 2.0, 3.0}


# --- where the coins come from


@pytest.mark.parametrize("mode", MODES)
def test_a_private_generator_repeats_itself_and_leaves_the_default_one_alone(mode: str) -> None:
    before = torch.get_rng_state()
    x = torch.ones(32, 1)

    def draw(seed: int) -> Tensor:
        source = coins(seed)
        once = sd.residual(x, torch.ones_like, p=0.5, mode=mode, generator=source)
        return sd.residual(once, torch.ones_like, p=0.5, mode=mode, generator=source)

    assert torch.equal(draw(3), draw(3))
    assert len({tuple(draw(seed).flatten().tolist()) for seed in range(20)}) > 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", MODES)
def test_the_default_generator_repeats_itself(mode: str) -> None:
    x = torch.ones(32, 1)

    def draw(seed: int) -> list[float]:
        torch.manual_seed(seed)
        out = [sd.residual(x, torch.ones_like, p=0.5, mode=mode) for _ in range(8)]
        return torch.cat(out).flatten().tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def net(x: Tensor, blocks: nn.ModuleList, mode: str, source: torch.Generator | None) -> Tensor:
    for block in blocks:
        x = sd.residual(x, block, p=0.5, mode=mode, generator=source).tanh()
    return x


@pytest.fixture
def blocks() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))


def trained(
    blocks: nn.ModuleList, run: Callable[[Tensor], Tensor], seed: int
) -> Iterator[Tensor | None]:
    blocks.zero_grad()
    x = torch.randn(6, 4, generator=coins(1), dtype=torch.float64).requires_grad_()
    torch.manual_seed(seed)
    out = run(x)
    torch.rand(5)  # the random state moves on between forward and backward
    out.square().sum().backward()
    yield out.detach()
    yield x.grad
    for p in blocks.parameters():
        yield p.grad if p.grad is None else p.grad.clone()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_torchtune_checkpointing_replays_other_coins(
    blocks: nn.ModuleList, mode: str, reentrant: bool
) -> None:
    for seed in range(10):
        plain = list(trained(blocks, lambda x: net(x, blocks, mode, None), seed))
        replayed = list(
            trained(
                blocks,
                lambda x: checkpoint(net, x, blocks, mode, None, use_reentrant=reentrant),
                seed,
            )
        )
        assert len(plain) == 8
        for ours, theirs in zip(replayed, plain, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)


# --- more than one process


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wav2vec2_a_dropped_layer_keeps_its_output_in_a_process_group() -> None:
    block, x = nn.Linear(3, 3), torch.randn(4, 3)
    branch = Recorder(block)
    out = sd.residual(x, branch, p=1.0)
    assert branch.seen == []
    assert torch.equal(out, x)


@pytest.mark.usefixtures("process_group")
def test_in_a_process_group_a_dropped_branch_reports_zero_gradients() -> None:
    block, x = nn.Linear(3, 3), torch.randn(4, 3, requires_grad=True)
    block.bias.requires_grad_(False)
    out = sd.residual(x, block, p=1.0)
    relu_in_place(out).sum().backward()
    assert torch.equal(x.grad, (x > 0).to(x))
    assert torch.equal(block.weight.grad, torch.zeros(3, 3))
    assert block.bias.grad is None


@pytest.mark.usefixtures("process_group")
def test_in_a_process_group_no_stream_of_a_dropped_module_is_the_callers_tensor() -> None:
    layer = sd.StochasticDepth(nn.Linear(3, 3), 1.0)
    pair = torch.ones(2, 3), torch.ones(2, 3)
    for out in layer(pair):
        out.zero_()
    assert torch.equal(torch.cat(pair), torch.ones(4, 3))


@pytest.mark.parametrize("mode", MODES)
def test_in_inference_mode_it_is_the_plain_sum(mode: str) -> None:
    f = nn.Linear(4, 4)
    with torch.inference_mode():
        x = torch.randn(3, 4)
        assert torch.equal(sd.residual(x, f, p=0.5, training=False, mode=mode), x + f(x))


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_a_branch_that_overwrites_its_shortcut_is_an_error_or_works_on_a_copy(mode: str) -> None:
    branch = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    x = torch.full((8, 4), -1.0)
    if mode == "batch":
        with pytest.raises(RuntimeError, match="overwrites its shortcut in place"):
            sd.residual(x.clone(), branch, p=1e-9)
    else:  # the branch gets rows of its own
        torch.manual_seed(0)
        sd.residual(x, branch, p=0.5, mode=mode)
        assert torch.equal(x, torch.full((8, 4), -1.0))


def test_a_wrapped_module_that_overwrites_its_input_is_an_error() -> None:
    block = sd.StochasticDepth(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), p=1e-9)
    with pytest.raises(RuntimeError, match="overwrites its shortcut in place"):
        block(torch.randn(8, 4))


class Summing(nn.Module):
    """Has a branch of residual()'s, on its input or on the value of another branch."""

    def __init__(self, within: bool = False, **options: str) -> None:
        super().__init__()
        self.fc, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)
        self.within, self.options = within, options

    def forward(self, x: Tensor) -> Tensor:
        start = self.fc(x) if self.within else x
        out = sd.residual(start, self.mlp, p=0.5, training=self.training, **self.options)
        return x + out if self.within else out + self.fc(out)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", MODES)
def test_residual_alone_drops_its_branch(mode: str, scale: str) -> None:
    model, x = nn.Sequential(Summing(mode=mode, scale=scale)), torch.randn(4, 4)
    told = (("0:mlp", "residual() drops it by itself, at the p that it is given there"),)
    found = sd.summary(model, x)
    assert (found.unused, found.refused) == (("0:fc",), told)
    sd.apply(model, p=0.5, example_inputs=x)
    assert [branch.name for branch in sd.branches(model)] == ["0:fc"]
    assert sd.summary(model).refused == sd.summary(model, x).refused == told
    assert sd.verify(model, x).passed
    with pytest.raises(ValueError, match=r"'0:mlp' cannot be left out: residual\(\) drops it"):
        sd.prune(model, remove="0:mlp", example_inputs=x)


@pytest.mark.parametrize("mode", MODES)
def test_a_branch_around_residual_is_refused_with_a_reason(mode: str) -> None:
    model = Summing(within=True, mode=mode)
    with pytest.raises(ValueError, match=r"branch :fc goes on into residual\(\): call that in a"):
        sd.apply(model, p=0.5, mode=mode, example_inputs=torch.randn(4, 4))

"""Defects of other implementations, each shown not to be ours; named after who has it.

Only what concerns a whole model or its training; those of the layer are tested beside it.
"""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth as TorchvisionDepth

import stochastic_depth as sd
from models import Block, build, images, small, small_batch


def applied(model: nn.Module, p: float = 0.2, **options: Any) -> Any:
    """``sd.apply`` with a batch for a SmallResNet as the example."""
    x = small_batch(dtype=next(model.parameters()).dtype)
    return sd.apply(model, p, **{"example_inputs": x, **options})


def drops(model: nn.Module, calls: int = 12) -> list[int]:
    counts = []
    for _ in range(calls):
        before = sum(branch.dropped for branch in sd.branches(model))
        model(small_batch())
        counts.append(sum(branch.dropped for branch in sd.branches(model)) - before)
    return counts


# --- Composer


def test_composer_changes_the_output_of_a_pretrained_network_in_evaluation() -> None:
    model = build("resnet50").eval()
    with torch.no_grad():
        before = model(images("resnet50"))
        after = applied(model, p=0.5)(images("resnet50"))
    assert torch.equal(after, before)


def test_composer_cannot_pickle_a_whole_model() -> None:
    model = sd.apply(build("resnet18"), example_inputs=images("resnet18"), p=0.5)
    twin = pickle.loads(pickle.dumps(model)).eval()
    with torch.no_grad():
        assert torch.equal(twin(images("resnet18")), model.eval()(images("resnet18")))
    assert [b.p for b in sd.branches(twin)] == [b.p for b in sd.branches(model)]


def test_composer_s_copies_call_the_forward_of_the_original() -> None:
    model = applied(small(), p=1e-30)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    for forward in (twin.train(), twin.eval()):
        assert torch.isfinite(forward(small_batch())).all()


def test_composer_s_data_parallel_replicas_call_the_forward_of_the_original() -> None:
    block = sd.apply(Linear(), 1e-30, example_inputs=torch.ones(2, 1))
    # What torch.nn.parallel.replicate does, without its GPUs.
    replica = block._replicate_for_data_parallel()
    replica._modules = {"f": nn.Linear(1, 1)}
    x = torch.randn(4, 1)
    for training in (True, False):
        assert torch.equal(replica.train(training)(x), x + replica.f(x))


def test_composer_knows_one_kind_of_block_only() -> None:
    for name, count in (("resnet18", 8), ("resnet50", 16), ("vit_b_32", 24)):
        assert len(sd.branches(sd.apply(build(name), p=0.2, example_inputs=images(name)))) == count


# --- torchtune


def test_torchtune_cannot_reload_its_own_state_dict() -> None:
    model = applied(small(), p=0.5)
    result = model.load_state_dict(model.state_dict())
    assert result.missing_keys == result.unexpected_keys == []
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    small().load_state_dict(torch.load(io.BytesIO(file.getvalue())))


def test_torchtune_does_not_heed_manual_seed() -> None:
    model = applied(small(), p=0.5, schedule="uniform")
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(drops(model))
    assert seen[0] == seen[1] != seen[2]


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.reentrant = Block(4, 4, norm=False), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_torchtune_s_gradients_are_silently_wrong_under_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(8, 4, 8, 8, requires_grad=True)
    model = Recomputed(reentrant)
    gradients = []
    for run in (model, model.block):
        sd.apply(model, 0.5, mode="row", seed=0, example_inputs=x.detach())
        model.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        gradients.append([t.grad for t in (x, *model.parameters())])
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


class Masked(nn.Module):
    """A branch with a further argument that has the batch's rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]


def test_torchtune_crashes_where_a_mask_has_the_rows_of_the_batch() -> None:
    model, x = Masked(), torch.randn(16, 3, 8)
    mask = torch.rand(16, 3) < 0.3
    mask[:, 0] = False
    whole = model(x, mask)
    sd.apply(model, 0.5, mode="row", scale="none", seed=0, example_inputs=(x, mask))
    out = model(x, mask)
    dropped = (out == x).flatten(1).all(1)
    assert 0 < int(dropped.sum()) == sd.branches(model)[0].dropped < 16
    torch.testing.assert_close(out[~dropped], whole[~dropped])


# --- rates


@pytest.mark.parametrize("p", [1.0, 1])
@pytest.mark.parametrize("mode", ["batch", "row"])
def test_huggingface_and_mmcv_give_nan_at_p_1(mode: str, p: float) -> None:
    model = applied(small(), p=p, schedule="uniform", mode=mode)
    out = model(small_batch())
    out.sum().backward()
    assert torch.isfinite(out).all()
    gradients = [q.grad for q in model.parameters() if q.grad is not None]
    assert len(gradients) == 6  # stem, projection and head, each a weight and a bias
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_huggingface_never_drops_in_bfloat16_at_small_rates_and_doubles_rows(mode: str) -> None:
    rows = 1 if mode == "batch" else 4096
    model = sd.apply(
        nn.Sequential(Linear()).to(torch.bfloat16),
        0.001,
        schedule="uniform",
        mode=mode,
        seed=0,
        example_inputs=torch.randn(2, 1, dtype=torch.bfloat16),
    )
    x = torch.ones(rows, 1, dtype=torch.bfloat16)
    out = torch.cat([model(x) for _ in range(20000 // rows + 1)])
    # The branch adds 1: a dropped row stays 1, a kept one is 2 (1/0.999 is 1 in bfloat16).
    assert set(out.flatten().tolist()) == {1.0, 2.0}
    # 20,000 rows at 0.001: 20 expected; outside of 3..50 once in 10,000 seeds, and this is one.
    assert 3 <= int((out == 1).sum()) <= 50


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.f.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@pytest.mark.parametrize("p", [-0.1, -1e-9, 1.0000001])
def test_timm_accepts_a_negative_rate(p: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        applied(small(), p=p)


def test_timm_turns_blocks_of_rate_0_into_identities_that_stay() -> None:
    model = applied(small(), p=0.5, schedule="linear-timm")
    first = sd.branches(model)[0]
    assert first.p == 0.0
    first.p = 1.0
    model(small_batch())
    assert (first.decided, first.dropped) == (1, 1)


def test_torchvision_s_efficientnet_never_reaches_the_rate_it_is_given() -> None:
    model = sd.apply(build("efficientnet_b0"), example_inputs=images("efficientnet_b0"), p=0.2)
    assert sd.branches(model)[-1].p == 0.2


@pytest.mark.parametrize("name", ["swin_t", "maxvit_t", "resnet18"])
def test_torchvision_takes_no_rate_for_some_models(name: str) -> None:
    with pytest.raises(TypeError):
        torchvision.models.get_model(name, stochastic_depth_prob=0.5, sd_prob=0.5)
    rates = [
        branch.p
        for branch in sd.branches(sd.apply(build(name), example_inputs=images(name), p=0.5))
    ]
    assert rates[-1] == 0.5
    assert rates == sorted(rates)


# --- silent no-ops


@pytest.mark.parametrize("name", ["densenet121", "googlenet", "squeezenet1_0", "vgg11"])
def test_timm_and_huggingface_accept_a_rate_and_do_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="no residual branch found"):
        sd.apply(build(name), example_inputs=images(name), p=0.3)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(), nn.Identity()])
def test_stochdepth_returns_an_empty_tuple_where_it_finds_nothing(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no residual branch found"):
        sd.apply(model, 0.3, example_inputs=torch.randn(2, 2))


def test_a_pattern_that_matches_nothing_is_silent_in_torchao() -> None:
    with pytest.raises(ValueError, match=r"matches no branch; there are blocks\.0:conv1"):
        applied(small(), include="encoder.*")


# --- stochdepth


@pytest.mark.parametrize("schedule", ["linear", "linear-timm", "linear-efficientnet", "uniform"])
def test_stochdepth_divides_by_zero_where_there_is_one_block(schedule: str) -> None:
    (branch,) = sd.branches(
        sd.apply(Block(4, 4), 0.5, schedule=schedule, example_inputs=torch.randn(2, 4, 8, 8))
    )
    assert branch.p == (0.0 if schedule == "linear-efficientnet" else 0.5)


class Subclass(Block):
    pass


def test_stochdepth_does_not_know_subclasses() -> None:
    assert (
        len(sd.branches(sd.apply(Subclass(4, 4), 0.5, example_inputs=torch.randn(2, 4, 8, 8)))) == 1
    )


def test_stochdepth_stacks_when_applied_twice() -> None:
    once, twice = applied(small(), p=0.5), applied(applied(small(), p=0.5), p=0.5)
    torch.manual_seed(0)
    expected = [once(small_batch()) for _ in range(5)]
    torch.manual_seed(0)
    assert torch.equal(torch.stack([twice(small_batch()) for _ in range(5)]), torch.stack(expected))
    sd.remove(twice)
    assert not any("forward" in module.__dict__ for module in twice.modules())


# --- stacking on what is there already


def test_a_model_with_stochastic_depth_of_its_own_gets_it_doubled_elsewhere() -> None:
    model = build("efficientnet_b0", stochastic_depth_prob=1.0)
    applied(model, p=0.0, schedule="uniform")
    calls: list[object] = []
    for module in model.modules():
        if isinstance(module, TorchvisionDepth):
            module.register_forward_hook(lambda *_: calls.append(1))
    plain = build("efficientnet_b0", stochastic_depth_prob=0.0)
    outputs = []
    for m in (model, plain):
        torch.manual_seed(0)
        outputs.append(m.train()(images("efficientnet_b0")))
    assert torch.equal(*outputs)
    assert calls == []
    sd.remove(model)
    own = [m.p for m in model.modules() if isinstance(m, TorchvisionDepth)]
    assert own[0] == 0.0
    assert own[-1] == pytest.approx(15 / 16)


# --- what is dropped is not computed


class Exploding(nn.Module):
    """A branch that gives inf or nan."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * float("inf")


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_nemo_and_torchvision_turn_an_infinite_dropped_branch_into_nan(mode: str) -> None:
    model = sd.apply(Exploding(), 0.5, mode=mode, seed=0, example_inputs=torch.ones(2, 4))
    (branch,) = sd.branches(model)
    x = torch.randn(16, 4, requires_grad=True)
    clean = 0
    for _ in range(8):
        before = branch.dropped
        out = model(x)
        rows = (out == x).all(1)
        assert int(rows.sum()) == (branch.dropped - before) * (16 if mode == "batch" else 1)
        clean += int(rows.sum())
        (gradient,) = torch.autograd.grad(out[rows].sum(), x)
        assert torch.equal(gradient[rows], torch.ones_like(x)[rows])
    assert 0 < clean < 8 * 16


def test_deepspeed_scales_by_a_rate_changed_since_the_coin() -> None:
    model = sd.apply(
        nn.Sequential(Linear()), 0.5, example_inputs=torch.ones(2, 1), schedule="uniform", seed=0
    )
    branch = sd.branches(model)[0]
    model[0].f.register_forward_hook(lambda *_: setattr(branch, "p", 0.9))  # after its coin
    while branch.decided == branch.dropped:
        out = model(torch.ones(1, 1))
    assert out == 1 + 1 / (1 - 0.5)


def test_s3prl_returns_fewer_hidden_states_when_layers_are_dropped() -> None:
    model = applied(small(), p=1.0, schedule="uniform")
    states: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: states.append(out))
    model(small_batch())
    assert len(states) == 4


def test_torchvision_and_composer_compute_what_they_drop() -> None:
    model = sd.apply(
        build("convnext_tiny"), example_inputs=images("convnext_tiny"), p=1.0, schedule="uniform"
    )
    calls: list[str] = []
    for name, module in model.named_modules():
        if ".block." in name:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.train()(images("convnext_tiny"))
    assert calls == []


def test_tensorflow_s_momentum_keeps_moving_what_was_dropped() -> None:
    model = applied(small(), p=0.0, schedule="uniform")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    weight = model.blocks[0].conv1.weight
    for p in (0.0, 1.0):
        sd.branches(model)[0].p = p
        before = weight.detach().clone()
        optimizer.zero_grad()
        model(small_batch()).sum().backward()
        optimizer.step()
        assert torch.equal(weight, before) == (p == 1.0)


def test_dinov2_drops_the_wrong_share_of_small_batches() -> None:
    model = sd.apply(
        nn.Sequential(Linear()),
        0.1,
        example_inputs=torch.ones(2, 1),
        schedule="uniform",
        mode="row",
        seed=0,
    )
    for batch in (1, 4):
        branch = sd.branches(model)[0]
        start = branch.dropped
        for _ in range(4000 // batch):
            model(torch.ones(batch, 1))
        # 400 expected of 4,000, standard deviation 19: five of them either way.
        assert abs(branch.dropped - start - 400) < 95


def test_importing_and_applying_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sd.apply(build("resnet18"), example_inputs=images("resnet18"), p=0.5, mode="row")
        model.train()(images("resnet18", 4))

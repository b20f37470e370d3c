"""What else wraps, copies or rewrites modules: each works in either order, or says why not."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import stochastic_depth as sd
from models import small, small_batch


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.linear(self.norm(x))


def plain(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *[Block() for _ in range(4)]).to(dtype)


def half(model: nn.Module, **options) -> nn.Module:
    """Every branch dropped in half of the calls, kept ones as they are."""
    options.setdefault("p", 0.5)
    options.setdefault("example_inputs", x())
    return sd.apply(model, schedule="uniform", scale="none", **options)


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=dtype)


def check_drops(model: nn.Module, reference: nn.Module, dtype=torch.float32) -> None:
    """Training outputs are those of ``reference`` without the blocks that were dropped.

    ``reference`` computes the same function with its blocks 1 to 4 whole; each of the 16
    subsets of branches gives another output.
    """
    model.train(), reference.train()
    branches = sd.branches(model)
    assert len(branches) == 4
    seen = set()
    with torch.no_grad():
        for seed in range(12):
            before = [branch.dropped for branch in branches]
            torch.manual_seed(seed)
            output = model(x(dtype))
            dropped = [b.dropped - n for b, n in zip(branches, before, strict=True)]
            expected = reference[0](x(dtype))
            for block, drop in zip(list(reference)[1:], dropped, strict=True):
                expected = expected if drop else block(expected)
            torch.testing.assert_close(output, expected)
            seen.add(tuple(dropped))
    assert len(seen) > 3


# Automatic mixed precision


@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_bfloat16_autocast_changes_kept_branches_only(mode):
    model, reference = half(plain(), mode=mode), plain()
    for seed in range(8):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.train()(x())
            expected = reference[0](x())
            outcomes = [expected]
            for block in list(reference)[1:]:  # each row has taken one of these ways
                outcomes = [o for way in outcomes for o in (way, block(way))]
        assert output.dtype == expected.dtype or output.dtype == torch.float32
        distance = torch.stack([(output.float() - o.float()).abs().amax(1) for o in outcomes])
        # A kept branch's rounding to bfloat16, 8 bits, of values below 4; another way is far off.
        assert distance.amin(0).max() <= 4 * 2.0**-8
        output.float().sum().backward()
    for p in model.parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_float16_with_a_scaler_skips_overflows_and_takes_branches_without_gradient(mode):
    model = half(plain(), mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    without_gradient = 0
    for step in range(12):
        torch.manual_seed(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model.train()(x()).float().square().mean()
        overflow = step == 5
        scaler.scale(loss * (torch.inf if overflow else 1.0)).backward()
        without_gradient += sum(p.grad is None for p in model.parameters())
        before, scale = [p.clone() for p in model.parameters()], scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        after = list(model.parameters())
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert all(same) if overflow else not all(same)
        assert scaler.get_scale() == (scale / 2 if overflow else scale)
        assert all(p.isfinite().all() for p in after)
    if mode != "row":  # in which all rows may be dropped, but need not
        assert (without_gradient > 0) == (mode == "batch")


# Copies


def test_an_average_of_the_weights_is_whole_in_evaluation_and_collects_statistics():
    model = half(small(), mode="batch", example_inputs=small_batch())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(4):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model.train()(small_batch()).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        for name, p in model.named_parameters():
            expected[name] = p.detach().clone() if seed == 0 else expected[name].lerp(p, 0.5)
    reference = small()
    reference.load_state_dict(
        {**model.state_dict(), **{n: expected[n] for n, _ in model.named_parameters()}}
    )
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, expected[name])
    with torch.no_grad():
        # Statistics are collected in training mode: of all branches, so with their rates at 0.
        for branch in sd.branches(average):
            branch.p = 0.0
        batches = [small_batch(seed=seed) for seed in range(3)]
        update_bn(batches, average)
        update_bn(batches, reference)
        average.eval(), reference.eval()
        torch.testing.assert_close(average(small_batch()), reference(small_batch()))
    before = [branch.dropped for branch in sd.branches(model)]
    average.train()(small_batch())
    assert [branch.dropped for branch in sd.branches(model)] == before  # the copy has its own


# torch.nn.utils


def weight_norm(model: nn.Sequential) -> nn.Sequential:
    for block in list(model)[1:]:
        parametrizations.weight_norm(block.linear)
    return model


def orthogonal(model: nn.Sequential) -> nn.Sequential:
    for block in list(model)[1:]:
        parametrizations.orthogonal(block.linear)
    return model


class Positive(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.exp()


def of_the_block(model: nn.Sequential) -> nn.Sequential:
    """A parametrized block: of another class, which is made for it alone."""
    for block in list(model)[1:]:
        nn.utils.parametrize.register_parametrization(block, "gamma", Positive())
    return model


def pruned(model: nn.Sequential) -> nn.Sequential:
    for block in list(model)[1:]:
        prune.l1_unstructured(block.linear, "weight", amount=0.5)
        prune.l1_unstructured(block, "gamma", amount=0.5)
    return model


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", [weight_norm, orthogonal, of_the_block, pruned])
def test_rewritten_parameters(change, order):
    reference = change(plain(torch.float64))
    if order == "before":
        model = change(half(plain(torch.float64), example_inputs=x(torch.float64)))
    else:
        model = half(change(plain(torch.float64)), example_inputs=x(torch.float64))
    model.load_state_dict(reference.state_dict())
    check_drops(model, reference, torch.float64)
    for p in model.parameters():
        p.grad = None
    for seed in range(8):
        torch.manual_seed(seed)
        model(x(torch.float64)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    sd.remove(model)
    with torch.no_grad():
        assert torch.equal(model(x(torch.float64)), reference(x(torch.float64)))


@pytest.mark.parametrize("order", ["before", "after"])
def test_spectral_norm(order):
    """Its power iteration goes on with each call in training: only where the branch is kept."""

    def change(model: nn.Sequential) -> nn.Sequential:
        for block in list(model)[1:]:
            parametrizations.spectral_norm(block.linear)
        return model

    torch.manual_seed(0)
    model = change(half(plain())) if order == "before" else half(change(plain()))
    model.train()
    vectors = [b.linear.parametrizations.weight[0]._u for b in list(model)[1:]]
    for seed in range(6):
        torch.manual_seed(seed)
        before = [u.clone() for u in vectors]
        counts = [branch.dropped for branch in sd.branches(model)]
        model(x())
        dropped = [b.dropped - n for b, n in zip(sd.branches(model), counts, strict=True)]
        stood = [torch.equal(u, old) for u, old in zip(vectors, before, strict=True)]
        assert stood == [bool(d) for d in dropped]


# accelerate's hooks replace the forward of instances


def hooked(model: nn.Module) -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    for module in model.modules():
        add_hook_to_module(module, Count())
    return model


def offloaded(model: nn.Module) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(model, torch.device("cpu"))


def dispatched(model: nn.Module) -> nn.Module:
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", [hooked, offloaded, dispatched])
def test_hooks_of_accelerate(change, order):
    from accelerate.hooks import remove_hook_from_module

    reference = plain()
    model = change(half(plain())) if order == "before" else half(change(plain()))
    check_drops(model, reference)
    remove_hook_from_module(model, recurse=True)
    check_drops(model, reference)  # the hooks are gone, stochastic depth is not
    for branch in sd.branches(sd.apply(model, p=0.0, example_inputs=x())):
        assert branch.p == 0.0
    sd.remove(model)
    assert sd.branches(model) == []
    with torch.no_grad():
        assert torch.equal(model.train()(x()), reference(x()))


def test_removing_under_a_hook_of_accelerate():
    model = hooked(half(plain()))
    sd.remove(model)
    assert sd.branches(model) == []
    with torch.no_grad():
        assert torch.equal(model.train()(x()), plain()(x()))
    check_drops(half(model), plain())


# PEFT and transformers


def language_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3,
        n_embd=16,
        n_head=2,
        vocab_size=32,
        n_positions=16,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_inside_branches(order):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = language_model()
    if order == "before":
        model = get_peft_model(half(model, p=0.3, example_inputs=tokens()), config)
    else:
        model = half(get_peft_model(model, config), p=0.3, example_inputs=tokens())
    branches = sd.branches(model)
    assert len(branches) == 6  # attention and MLP of three layers
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 12
    model.train()
    for seed in range(12):
        for p in trained.values():
            p.grad = None
        before = [branch.dropped for branch in branches]
        torch.manual_seed(seed)
        model(**tokens()).loss.backward()
        for branch, count in zip(branches, before, strict=True):
            adapters = [
                p for name, p in trained.items() if any(f"{m}." in name for m in branch.modules)
            ]
            assert adapters
            assert all((p.grad is None) == (branch.dropped > count) for p in adapters)
        with torch.no_grad():
            for p in trained.values():
                p.add_(0.1)
    assert all(branch.dropped > 0 for branch in branches)
    with torch.no_grad():
        output = model.eval()(**tokens()).logits
        merged = model.merge_and_unload()
        assert len(sd.branches(merged)) == 6
        torch.testing.assert_close(merged.eval()(**tokens()).logits, output)
        assert not torch.equal(merged.train()(**tokens()).logits, output)
    plain = sd.remove(merged)
    torch.testing.assert_close(plain.train()(**tokens()).logits, output)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_activation_checkpointing_of_transformers(mode, use_reentrant):
    gradients, counts = [], []
    for checkpointing in (False, True):
        model = half(language_model(), mode=mode, example_inputs=tokens()).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        model(**tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        counts.append([(b.decided, b.dropped) for b in sd.branches(model)])
    assert counts[0] == counts[1]
    assert sum(dropped for _, dropped in counts[0]) > 0
    for ours, theirs in zip(*gradients, strict=True):
        if ours is None or theirs is None:
            assert ours is None
            assert theirs is None
        else:
            torch.testing.assert_close(ours, theirs)

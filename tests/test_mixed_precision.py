"""In mixed precision weights move as the plain model's do, and ranks stay equal."""

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from stochastic_depth.cli.torchvision_ops import ensure_torchvision

ensure_torchvision()  # the processes of other ranks have no conftest

import pytest  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torchvision.models.convnext import CNBlockConfig  # noqa: E402
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel  # noqa: E402

import stochastic_depth as sd  # noqa: E402
from ranks import gathered, launch  # noqa: E402

KEPT = 1e-30  # drops never, while everything that could drop is in place
STEPS, BATCH = 4, 4
Batch = dict[str, Tensor]


class Images(nn.Module):
    """Takes its images by name, as the text models take their tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class Hidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).last_hidden_state


def convnext() -> nn.Module:
    """Its layer scale keeps the sums in float32, whatever autocast makes of the branches."""
    stages = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)]
    return Images(torchvision.models.ConvNeXt(stages, layer_scale=1.0, num_classes=5))


def vit() -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 2, "num_heads": 2}
    return Images(torchvision.models.VisionTransformer(**sizes, hidden_dim=8, mlp_dim=16))


def timm_vit() -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    return Images(timm.models.VisionTransformer(**sizes, num_classes=5))


SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
}


def bert() -> nn.Module:
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Hidden(BertModel(BertConfig(**SIZES, **none), add_pooling_layer=False))


def llama() -> nn.Module:
    return Hidden(LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Embedding(32, 8), nn.Linear(8, 1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.encoder(self.first(tokens)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (convnext, vit, timm_vit, bert, llama, Encoder)
}
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda weights: torch.optim.SGD(weights, 0.05, momentum=0.9),
    "AdamW": lambda weights: torch.optim.AdamW(weights, 0.01),
}


def batch(name: str, step: int, rank: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(100 * rank + step)
    if name in ("bert", "llama", "Encoder"):
        return {"tokens": torch.randint(0, 32, (BATCH, 6), generator=generator)}
    size = 32 if name == "convnext" else 8
    return {"images": torch.randn(BATCH, 3, size, size, generator=generator)}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    with torch.no_grad():
        for p in model.parameters():  # nothing is 0, so that every branch matters
            p.add_(0.05 * torch.randn_like(p))
    return model


def apply(model: nn.Module, name: str, given: bool, p: float = KEPT, **options: Any) -> nn.Module:
    example = batch(name, 99) if given else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that something has to be seen first
        return sd.apply(model, p, schedule="uniform", example_inputs=example, **options)


def train(
    model: nn.Module, name: str, optimizer: str, dtype: torch.dtype, rank: int = 0
) -> list[Tensor]:
    """A few steps; returns the losses."""
    stepper = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype is torch.float16)
    losses = []
    for step in range(STEPS):
        with torch.autocast("cpu", dtype):
            output = model(**batch(name, step, rank))
            loss = (output.float().mean(-1) - 1).square().mean()
        assert type(loss) is Tensor
        stepper.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(stepper)
        scaler.update()
        losses.append(loss.detach())
    for state in stepper.state.values():
        assert {type(x) for x in state.values() if x is not None} == {Tensor}
    return losses


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_moved_alike(ours: nn.Module, plain: nn.Module, start: nn.Module) -> None:
    mine, theirs = weights(ours) - weights(start), weights(plain) - weights(start)
    assert theirs.isfinite().all()
    assert theirs.norm() > 0.01
    # The sums are rounded alike; what is allowed is a hundredth of the way.
    assert (mine - theirs).norm() < 0.01 * theirs.norm()


# Convolutions in float16 take seconds on a CPU.
CASES = [
    (name, dtype)
    for name in MODELS
    for dtype in (torch.bfloat16, torch.float16)
    if name != "convnext" or dtype is torch.bfloat16
]


@pytest.mark.parametrize(("mode", "given"), [("batch", False), ("batch", True), ("row", True)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_weights_move_as_the_plain_models(
    name: str, optimizer: str, dtype: torch.dtype, mode: str, given: bool
) -> None:
    start = build(name)
    plain, ours = copy.deepcopy(start), copy.deepcopy(start)
    expected = train(plain, name, optimizer, dtype)
    apply(ours, name, given, mode=mode, seed=0)
    losses = train(ours, name, optimizer, dtype)
    assert sd.branches(ours)
    torch.testing.assert_close(losses, expected, rtol=0.01, atol=0.001)
    assert_moved_alike(ours, plain, start)


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_move_and_stay_finite_where_branches_drop(name: str, mode: str) -> None:
    start = build(name)
    ours = apply(copy.deepcopy(start), name, True, p=0.5, mode=mode, seed=0)
    train(ours, name, "SGD", torch.bfloat16)
    moved = weights(ours) - weights(start)
    assert moved.isfinite().all()
    assert moved.norm() > 0.01
    assert sum(branch.dropped for branch in sd.branches(ours)) > 0


class Normed(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.first = nn.Linear(4, 4), nn.LayerNorm(4), first

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x)) if self.first else self.norm(self.linear(x))
        return y if self.is_whole else x + y


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("blocks", [None, "all", "(whole)"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("scale", ["train", "none"])
def test_the_dtype_of_an_output_does_not_depend_on_the_decision(
    scale: str, first: bool, blocks: str | None, mode: str
) -> None:
    Normed.is_whole = blocks == "(whole)"
    model, x = nn.Sequential(nn.Linear(4, 4), Normed(first)), torch.randn(6, 4)
    ours = copy.deepcopy(model)
    blocks = Normed if blocks == "(whole)" else blocks
    sd.apply(ours, 0.5, mode=mode, scale=scale, blocks=blocks, seed=0, example_inputs=x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x).dtype
        seen = {ours(x).dtype for _ in range(12)}
    assert seen == {expected}
    assert {ours(x).dtype for _ in range(12)} == {torch.float32}
    assert ours.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


class Asks(nn.Module):
    """Its forward asks what dtype a value of the branch has, and its shortcut is of that dtype."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.first, self.second, self.inside = nn.Linear(4, 4), nn.Linear(4, 4), inside
        self.asked: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.inside else contextlib.nullcontext():
            hidden = self.first(x)
            out = self.second(hidden.tanh())
        if not torch.compiler.is_compiling():
            self.asked += [hidden.dtype, out.dtype]
        return x.to(out.dtype) + out


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_dtype_that_a_forward_asks_for_does_not_depend_on_the_decision(
    inside: bool, around: bool, given: bool, mode: str
) -> None:
    plain, x = Asks(inside), torch.randn(6, 4)
    model = copy.deepcopy(plain)
    sd.apply(model, 0.5, mode=mode, seed=0, **({"example_inputs": x} if given else {}))
    for enabled in (around, not around, around):  # each also where the other one came first
        plain.asked.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected = plain(x).dtype
            model(x)
            for p in (0.0, 0.5, 1.0):
                sd.branches(model)[0].p = p
                model.asked.clear()
                assert {model(x).dtype for _ in range(6)} == {expected}
                assert set(model.asked) == set(plain.asked)


@pytest.mark.parametrize("given", [False, True])
def test_a_compiled_block_keeps_the_dtype_that_its_forward_asks_for(given: bool) -> None:
    plain, x = Asks(False), torch.randn(6, 4)
    model = nn.Sequential(copy.deepcopy(plain))
    sd.apply(model, 0.5, mode="batch", seed=0, **({"example_inputs": x} if given else {}))
    model[0].compile(backend="aot_eager")
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert {model(x).dtype for _ in range(12)} == {plain(x).dtype}
    assert 0 < sd.branches(model)[0].dropped < 36


def on_each_rank(rank: int) -> None:
    warnings.simplefilter("ignore")
    for name, optimizer in itertools.product(MODELS, OPTIMIZERS):
        start = build(name)
        plain = DistributedDataParallel(copy.deepcopy(start))
        train(plain, name, optimizer, torch.bfloat16, rank)
        cases = [(KEPT, False, "batch"), (0.5, True, "batch"), (KEPT, True, "row")]
        for p, given, mode in cases[: 3 if optimizer == "SGD" else 2]:
            try:
                ours = apply(copy.deepcopy(start), name, given, p=p, mode=mode)
                torch.manual_seed(rank)
                train(DistributedDataParallel(ours), name, optimizer, torch.bfloat16, rank)
                if p == KEPT:
                    assert_moved_alike(ours, plain.module, start)
                everyone = gathered(weights(ours))
                assert everyone[0].isfinite().all()
                assert torch.equal(*everyone)
                assert not torch.equal(weights(ours), weights(start))
                assert p == KEPT or sum(b.dropped for b in sd.branches(ours)) > 0
            except BaseException as error:
                error.add_note(f"{name=}, {optimizer=}, {p=}, {given=}, {mode=}")
                raise


def test_two_ranks_stay_equal_and_move_as_plain_ones() -> None:
    launch(on_each_rank, 2)


class OfHalf(nn.Module):
    """The shortcut that it scales has a lower precision than the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.f(x.float()), x, alpha=0.3)


@pytest.mark.parametrize("p", [KEPT, 1 - 1e-15])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_shortcut_is_scaled_in_the_precision_of_the_sum(p: float, dtype: torch.dtype) -> None:
    model, x = OfHalf(), torch.randn(5, 8).to(dtype)
    expected = model(x) if p == KEPT else 0.3 * x.float()
    sd.apply(model, p, scale="none", schedule="uniform", example_inputs=x)
    torch.testing.assert_close(model(x), expected)


def into_branch(x: Tensor, y: Tensor) -> Tensor:
    y += x
    return y


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "into the branch": into_branch,
    "into the branch by a method": lambda x, y: y.add_(x),
    "into the shortcut": lambda x, y: x.clone().add_(y),
    "of a stack": lambda x, y: torch.stack([x, y]).sum(0),
    "the mean of a stack": lambda x, y: torch.stack([y, x], 1).mean(1),
}


class Summing(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.f, self.way = nn.Linear(4, 4), way

    def forward(self, x: Tensor) -> Tensor:
        return SUMS[self.way](x, self.f(x.to(self.f.weight.dtype)))


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("way", SUMS)
@pytest.mark.parametrize("autocast", [True, False])
def test_a_sum_has_the_dtype_of_the_plain_one(autocast: bool, way: str, mode: str) -> None:
    plain, x = Summing(way), torch.randn(6, 4)
    if not autocast:
        plain, x = plain.double(), x.bfloat16()
    ours = sd.apply(copy.deepcopy(plain), 0.5, mode=mode, seed=0, example_inputs=x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        seen = {ours(x).dtype for _ in range(12)}
        assert seen == {plain(x).dtype}

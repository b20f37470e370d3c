"""Two optimizer steps of known models against the plain model with masks, in float64.

The reference is the model without the library: a hook on the last layer of each residual branch,
named here by hand, multiplies what that returns. It is given only which rows were kept, in the
order in which the model runs; the weights are its own. So branches that are missed, found twice
or taken for another one show as another number of decisions or as other gradients.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

import reference
import stochastic_depth as sd
from stochastic_depth.drop import merging
from stochastic_depth.drop.draws import Draws
from zoo.transformers_models import FAMILIES, build

ROWS, STEPS = 4, 2


@dataclass(frozen=True)
class Subject:
    make: Callable[[], tuple[nn.Module, Any]]  # the model and its inputs
    ends: str  # the full names of the modules that end a residual branch
    depth: int


def image(name: str, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (
        models.get_model(name, num_classes=5, **options),
        pixels(),
    )


def pixels() -> Tensor:
    return torch.randn(ROWS, 3, 32, 32, dtype=torch.float64)


def small_vit() -> tuple[nn.Module, Any]:
    vit = models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5)
    nn.init.normal_(vit.heads[0].weight)  # zero in the beginning, which would stop all gradients
    return vit, pixels()


def small_swin() -> tuple[nn.Module, Any]:
    options = {"stochastic_depth_prob": 0.0, "num_classes": 5}
    return models.SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], **options), pixels()


def small_convnext() -> tuple[nn.Module, Any]:
    settings = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]
    # The scale of 1e-6 that training begins with would hide what a branch does.
    return models.ConvNeXt(settings, layer_scale=0.5, num_classes=5), pixels()


def text(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    """A tiny model of a transformers family, without random effects of its own."""

    def make() -> tuple[nn.Module, Any]:
        (family,) = (f for f in FAMILIES if f.name == name)
        defaults = vars(getattr(transformers, family.config)())
        drops = {k: 0.0 for k, v in defaults.items() if "drop" in k and isinstance(v, float)}
        quiet = replace(family, overrides={**family.overrides, **drops})
        model, inputs = build(quiet)
        return model, {k: widen(v) for k, v in inputs.items()}

    return make


def widen(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = torch.cat([value, value.flip(-1)])
    return value.double() if value.is_floating_point() else value


SUBJECTS = {
    "resnet18": Subject(image("resnet18"), r"layer\d\.\d\.bn2", 8),
    "convnext": Subject(small_convnext, r"features\.\d\.\d\.stochastic_depth", 4),
    "swin": Subject(small_swin, r"features\.\d\.\d\.stochastic_depth", 8),
    "efficientnet": Subject(
        image("efficientnet_b0", stochastic_depth_prob=0.0, dropout=0.0),
        r"features\.\d\.\d\.stochastic_depth",
        9,
    ),
    "vit": Subject(small_vit, r"encoder\.layers\.encoder_layer_\d\.(dropout|mlp)", 6),
    "bert": Subject(text("bert"), r"encoder\.layer\.\d\.(attention\.)?output\.dropout", 6),
    "gpt2": Subject(text("gpt2"), r"transformer\.h\.\d\.(attn\.resid_dropout|mlp)", 6),
    "llama": Subject(text("llama"), r"model\.layers\.\d\.(self_attn\.o_proj|mlp)", 6),
    "t5": Subject(text("t5"), r"(en|de)coder\.block\.\d\.layer\.\d\.dropout", 15),
    "wav2vec2": Subject(text("wav2vec2"), r"encoder\.layers\.\d\.(dropout|feed_forward)", 6),
    "whisper": Subject(
        text("whisper"), r"(en|de)coder\.layers\.\d\.((self|encoder)_attn\.out_proj|fc2)", 15
    ),
}

Decision = tuple[int, float, reference.Kept]


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    """Of every decision: the branch's place in the order of execution, its rate, the kept rows."""
    seen: list[Decision] = []
    decide, choose = Draws.decide, merging.choose_samples

    def record_calls(self: Draws, branches: Any, block: nn.Module) -> Any:
        decisions = decide(self, branches, block)
        for branch, dropped in zip(branches, decisions, strict=True):
            if branch.mode == "batch":
                seen.append((branch.order, branch.p, (not dropped,) * ROWS))
        return decisions

    def record_samples(branch: sd.Branch, *args: Any) -> Any:
        kept, weight = choose(branch, *args)
        seen.append((branch.order, branch.p, tuple(row in kept.tolist() for row in range(ROWS))))
        return kept, weight

    monkeypatch.setattr(Draws, "decide", record_calls)
    monkeypatch.setattr(merging, "choose_samples", record_samples)
    return seen


def mask_branches(model: nn.Module, ends: str, mode: str, decisions: Iterator[Decision]) -> None:
    def mask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        _, p, kept = next(decisions)
        weight = reference.training_weight(ROWS, p, mode, "train")
        return reference.masked(torch.zeros_like(output), output, kept, weight)

    for name, module in model.named_modules():
        if re.fullmatch(ends, name):
            module.register_forward_hook(mask)


def prepare(model: nn.Module) -> torch.optim.Optimizer:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # a batch of kept rows has other statistics than one of all rows
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-2)


def step(model: nn.Module, inputs: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The gradients of a step."""
    optimizer.zero_grad()
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    output = output if isinstance(output, Tensor) else output[0]
    weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=torch.float64).sin()
    (output * weights.view_as(output)).sum().backward()
    optimizer.step()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_two_steps_are_those_of_the_model_with_masks(
    name: str, mode: str, decisions: list[Decision]
) -> None:
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    model, inputs = subject.make()
    model.double()
    plain = copy.deepcopy(model)
    sd.apply(model, p=0.6, mode=mode, example_inputs=inputs, seed=0, dropped_grad="zero")
    decisions.clear()  # those of apply's own trial
    taken = prepare(model)
    gradients = [step(model, inputs, taken) for _ in range(STEPS)]

    assert len(decisions) == STEPS * subject.depth
    decided = {k for *_, kept in decisions for k in ([any(kept)] if mode == "batch" else kept)}
    assert len(decided) == 2  # with this seed some are dropped and some are kept
    # A block decides when it is called, and what it calls decides after it.
    steps = [decisions[i : i + subject.depth] for i in range(0, len(decisions), subject.depth)]
    replayed = iter([decision for each in steps for decision in sorted(each)])
    mask_branches(plain, subject.ends, mode, replayed)
    expected = prepare(plain)
    for got in gradients:
        wanted = step(plain, inputs, expected)
        assert got.keys() == wanted.keys()
        for key, gradient in wanted.items():
            # Another number of rows is summed in another order; gradients that cancel to zero
            # are known to the rounding of what they are a sum of.
            atol = 1e-11 * max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(got[key], gradient, rtol=1e-9, atol=atol, msg=key)
    assert next(replayed, None) is None  # the masks stand where the decisions were taken
    for (key, got), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12, msg=key)

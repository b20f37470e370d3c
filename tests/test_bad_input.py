"""Bad arguments: each an error that says what was given, what is allowed, and what to do."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from models import contents
from stochastic_depth.rates import depth_rates

OUTSIDE = [-0.1, 1.1, float("nan"), float("inf"), -float("inf"), torch.tensor(1.5), 2]
NO_NUMBER = ["0.5", b"0.5", True, False, 0.5j, [0.5], (), {}, object, torch.ones(2)]
UNKNOWN = ["", "Batch", "rows", "sample", None, 1, ["batch"]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def model() -> nn.Sequential:
    return nn.Sequential(Block(), nn.ReLU(), Block())


def by_function(**options: Any) -> Any:
    return sd.residual(torch.ones(2, 4), torch.neg, **{"p": 0.5, **options})


def by_layer(**options: Any) -> Any:
    return sd.StochasticDepth(nn.Linear(4, 4), **{"p": 0.5, **options})


def by_apply(**options: Any) -> Any:
    return sd.apply(model(), **{"p": 0.5, "example_inputs": torch.ones(2, 4), **options})


FORMS = [by_function, by_layer, by_apply]
Form = Callable[..., Any]


# --- p, mode and scale, wherever they are given


@pytest.mark.parametrize("p", OUTSIDE, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_p_outside_0_to_1(form: Form, p: Any) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[0, 1\], got {re.escape(repr(p))}"):
        form(p=p)


@pytest.mark.parametrize("p", NO_NUMBER, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_p_that_is_no_number(form: Form, p: Any) -> None:
    with pytest.raises(TypeError, match=r"p must be a number in \[0, 1\], got "):
        form(p=p)


@pytest.mark.parametrize("form", [by_function, by_layer])
def test_p_that_is_none(form: Form) -> None:
    with pytest.raises(TypeError, match=r"p must be a number in \[0, 1\], got None"):
        form(p=None)


@pytest.mark.parametrize("p", [0, 1, 0.5, torch.tensor(0.5), torch.tensor([0.25])], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_any_real_number_will_do(form: Form, p: Any) -> None:
    form(p=p)


@pytest.mark.parametrize("mode", UNKNOWN, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_unknown_mode(form: Form, mode: Any) -> None:
    text = f"mode must be one of ('batch', 'row', 'subset'), got {mode!r}"
    with pytest.raises(ValueError, match=re.escape(text)):
        form(mode=mode)


@pytest.mark.parametrize("scale", UNKNOWN, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_unknown_scale(form: Form, scale: Any) -> None:
    text = f"scale must be one of ('train', 'eval', 'none'), got {scale!r}"
    with pytest.raises(ValueError, match=re.escape(text)):
        form(scale=scale)


# --- the function


@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize(
    ("shape", "batch_dim"),
    [((), 0), ((4, 4), 2), ((4, 4), -1)],
)
def test_a_shortcut_without_samples(shape: tuple[int, ...], batch_dim: int, mode: str) -> None:
    text = rf"samples in dimension {batch_dim} .* got a shortcut of shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=rf"{text}; use mode='batch'"):
        sd.residual(torch.ones(shape), torch.neg, p=0.5, mode=mode, batch_dim=batch_dim)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize("other", [torch.ones(3), torch.tensor(1.0)], ids=["short", "scalar"])
def test_an_input_with_another_number_of_samples(other: Tensor, mode: str, p: float) -> None:
    x = torch.ones(2, 3)
    text = r"inputs\[1\] has shape .* needs 2 samples in dimension 0 as in the shortcut; let the"
    with pytest.raises(ValueError, match=text):
        sd.residual(x, torch.add, x, other, p=p, mode=mode)


@pytest.mark.parametrize("p", [0.0, 1e-30])
@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 3)])
def test_an_output_that_would_broaden_the_shortcut(shape: tuple[int, ...], p: float) -> None:
    shown = re.escape(str(shape))
    text = rf"of residual\(\) has shape {shown} and the shortcut \(1, 3\).*project the shortcut"
    with pytest.raises(ValueError, match=text):
        sd.residual(torch.ones(1, 3), lambda x: x.new_ones(shape), p=p)


def test_a_branch_that_fails_is_not_hidden() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        sd.residual(torch.ones(2), broken, p=0.0)


# --- the layer


@pytest.mark.parametrize("module", [None, "relu", torch.sin, nn.ReLU])
def test_a_module_that_is_none(module: Any) -> None:
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got "):
        sd.StochasticDepth(module, 0.5)


@pytest.mark.parametrize("projection", ["", "Tied", "newest"])
def test_an_unknown_recipe(projection: str) -> None:
    text = "projection must be one of ('tied', 'copy', 'new'), a module or None, got "
    with pytest.raises(ValueError, match=re.escape(text + repr(projection))):
        sd.StochasticDepth(nn.Linear(2, 2), 0.5, projection=projection)


@pytest.mark.parametrize("projection", [1, 0.5, torch.ones(2), ["new"]], ids=str)
def test_a_projection_of_another_type(projection: Any) -> None:
    text = rf"projection must be a module, .* got {type(projection).__name__}"
    with pytest.raises(TypeError, match=text):
        sd.StochasticDepth(nn.Linear(2, 2), 0.5, projection=projection)


@pytest.mark.parametrize("p", [-0.5, 1.5, float("nan")])
def test_a_bad_rate_for_a_layer_leaves_the_old_one(p: float) -> None:
    layer = sd.StochasticDepth(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        layer.p = p
    assert layer.p == 0.5


def test_a_layer_needs_its_input() -> None:
    with pytest.raises(TypeError, match="needs its input as the first positional argument"):
        sd.StochasticDepth(nn.Linear(2, 2), 0.5)(input=torch.ones(2, 2))


@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize(
    "x",
    [
        torch.tensor(1.0),
        (),
        (torch.ones(2, 2), torch.ones(3, 2)),
        (torch.ones(2, 2), torch.tensor(1.0)),
        "text",
    ],
    ids=["0-d", "no tensor", "different numbers", "with a 0-d tensor", "text"],
)
def test_a_layer_needs_samples_to_choose_from(x: Any, mode: str) -> None:
    layer = sd.StochasticDepth(nn.Identity(), 0.5, mode=mode)
    with pytest.raises(ValueError, match=r"the same number of them .*use mode='batch'"):
        layer(x)


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(0, 2)], ids=["0-d", "empty"])
@pytest.mark.parametrize("p", [1.0, 1e-30])
def test_batch_mode_takes_what_has_no_samples(x: Tensor, p: float) -> None:
    assert torch.equal(sd.StochasticDepth(nn.Identity(), p)(x), x)
    assert torch.equal(sd.residual(x, torch.zeros_like, p=p), x)


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_an_empty_batch_is_one_of_no_samples(mode: str) -> None:
    x = torch.ones(0, 2)
    assert torch.equal(sd.residual(x, torch.neg, p=0.5, mode=mode), x)
    assert torch.equal(sd.StochasticDepth(nn.Identity(), 0.5, mode=mode)(x), x)


# --- schedules


@pytest.mark.parametrize("schedule", ["", "Linear", "cosine", "linear_timm"])
def test_unknown_schedule(schedule: str) -> None:
    text = r"must be one of \('linear', .*\), a function \(l, L\) -> p or a list of 3"
    with pytest.raises(ValueError, match=rf"{text} rates, got {schedule!r}"):
        depth_rates(schedule, 0.5, 3)


@pytest.mark.parametrize("schedule", [None, 0.5, {0.5}, {0: 0.5}])
def test_a_schedule_of_another_type(schedule: Any) -> None:
    text = rf"must be a name, a function .* or a list of rates, got {type(schedule).__name__}"
    with pytest.raises(TypeError, match=text):
        depth_rates(schedule, None, 1)


@pytest.mark.parametrize("rates", [[], [0.1], [0.1] * 3])
def test_a_list_of_the_wrong_length(rates: list[float]) -> None:
    with pytest.raises(
        ValueError, match=rf"schedule has {len(rates)} rates, but there are 2 block"
    ):
        depth_rates(rates, None, 2)


def test_a_bad_rate_in_a_list_is_named() -> None:
    with pytest.raises(ValueError, match=r"schedule\[1\] is the probability .* got 1.5"):
        depth_rates([0.5, 1.5], None, 2)
    with pytest.raises(TypeError, match=r"schedule\[0\] must be a number in \[0, 1\], got None"):
        depth_rates([None, 0.5], None, 2)


@pytest.mark.parametrize("rate", [1.5, -0.5, float("nan")])
def test_a_bad_rate_of_a_function_is_named(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"schedule\(2, 3\) is the probability .* got {rate}"):
        depth_rates(lambda level, _: rate if level == 2 else 0.1, None, 3)


@pytest.mark.parametrize("schedule", [[0.1, 0.2], lambda level, depth: 0.1], ids=["list", "func"])
def test_hugging_face_accepts_a_rate_that_does_nothing(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"p=0.5 and a schedule that sets the rates itself"):
        depth_rates(schedule, 0.5, 2)


# --- apply, which leaves the model as it was: the cases that test_apply.py has not


def failing(branch: sd.Branch) -> bool:
    raise KeyError("mine")


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"p": 2.0}, ValueError, r"must be in \[0, 1\], got 2.0"),
    ({"p": None, "schedule": [0.1]}, ValueError, "schedule has 1 rates, but there are 2 blocks"),
    ({"dropped_grad": None}, ValueError, "dropped_grad must be one of"),
    ({"dropped_grad": "zeros"}, ValueError, "dropped_grad must be one of"),
    ({"include": failing}, KeyError, "mine"),
    ({"exclude": [None]}, TypeError, "exclude must be globs .* got None"),
    ({"include": []}, ValueError, r"include=\[\]: nothing is included"),
    ({"blocks": ()}, ValueError, r"blocks=\(\): nothing is included"),
    ({"seed": 1 << 64}, ValueError, "seed must be one that torch takes, of 64 bits, got 1844674"),
    ({"example_inputs": 3}, ValueError, "example_inputs must be what the model is called with"),
]


@pytest.mark.parametrize("applied", [False, True], ids=["plain", "applied"])
@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_a_failed_apply_leaves_the_model_as_it_was(
    options: dict[str, Any], error: type[Exception], text: str, applied: bool
) -> None:
    net = model()
    net[1].eval()
    if applied:
        sd.apply(net, 0.4, mode="row", example_inputs=torch.ones(2, 4))
    before, rates = contents(net), [branch.p for branch in sd.branches(net)]
    random = torch.get_rng_state()
    with pytest.raises(error, match=text):
        sd.apply(net, **{"p": 0.5, "example_inputs": torch.ones(2, 4), **options})
    assert contents(net) == before
    assert [branch.p for branch in sd.branches(net)] == rates == ([0.2, 0.4] if applied else [])
    assert [m.training for m in net] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("p", [-0.5, 1.5, float("nan")])
def test_a_bad_rate_for_a_branch_leaves_the_old_one(p: float) -> None:
    branch = sd.branches(sd.apply(model(), 0.4, example_inputs=torch.ones(2, 4)))[1]
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        branch.p = p
    assert branch.p == 0.4


@pytest.mark.parametrize("name", ["mode", "scale", "dropped_grad"])
def test_what_is_set_of_a_branch_has_to_be_one_of_the_choices(name: str) -> None:
    branch = sd.branches(sd.apply(model(), 0.4, example_inputs=torch.ones(2, 4)))[1]
    before = getattr(branch, name)
    with pytest.raises(ValueError, match=f"{name} must be one of .*{before}.* got 'rwo'"):
        setattr(branch, name, "rwo")
    assert getattr(branch, name) == before


def test_samples_that_nobody_has_looked_for_cannot_be_chosen() -> None:
    branch = sd.branches(sd.apply(model(), 0.4, example_inputs=torch.ones(2, 4)))[1]
    with pytest.raises(ValueError, match=r"has not looked for those of .*: apply with mode='row'"):
        branch.mode = "row"
    assert branch.mode == "batch"
    branch = sd.branches(sd.apply(model(), 0.4, mode="row", example_inputs=torch.ones(2, 4)))[1]
    for mode in ("batch", "subset"):
        branch.mode = mode

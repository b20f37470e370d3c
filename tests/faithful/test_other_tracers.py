"""Scripting, tracing, export and compiling find the plain model, or are told what to do."""

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import stochastic_depth as sd

from .twins import MODES, assert_equal_outcomes, assert_weighed, data, net, outcome, twins

# Dynamo's, of inputs that are no leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.norm(x)).relu()


def model_of(count: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), *[Block() for _ in range(count)])


KINDS = [{}, {"mode": "row"}, {"blocks": Block}]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("stepped", [False, True])
def test_an_applied_model_can_be_scripted_and_traced_in_evaluation(
    options: dict[str, Any], stepped: bool
) -> None:
    ours, plain = twins(net(model_of), data(), p=0.5, **options)
    if stepped:
        outcome(ours, data())
    ours.eval()
    plain.eval()
    for script in (torch.jit.script(ours), torch.jit.trace(ours, data())):
        torch.testing.assert_close(script(data(3, 4)), plain(data(3, 4)))
    ours.train()
    before = [branch.decided for branch in sd.branches(ours)]
    outcome(ours, data())
    assert [branch.decided for branch in sd.branches(ours)] != before


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_scripted_or_traced_and_would_not_do_the_same_is_told() -> None:
    ours, _ = twins(net(model_of), data(), p=0.5)
    with pytest.warns(UserWarning, match="neither drops branches nor weighs them"):
        torch.jit.script(ours.train())
    with pytest.warns(UserWarning, match="for ever"):
        torch.jit.trace(ours, data(), check_trace=False)
    weighed, _ = twins(net(model_of), data(), p=0.5, scale="eval")
    with pytest.warns(UserWarning, match="neither drops branches nor weighs them"):
        torch.jit.script(weighed.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.testing.assert_close(torch.jit.trace(weighed, data())(data()), weighed(data()))
        torch.jit.script(sd.remove(weighed).train())


@pytest.mark.parametrize("options", KINDS)
def test_fx_finds_the_plain_graph_in_evaluation(options: dict[str, Any]) -> None:
    ours, plain = twins(net(model_of), data(), p=0.5, **options)
    ours.eval()
    plain.eval()
    graphs = [torch.fx.symbolic_trace(m) for m in (ours, plain)]
    assert graphs[0].code == graphs[1].code
    torch.testing.assert_close(graphs[0](data()), plain(data()))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", KINDS)
def test_torch_export_finds_the_plain_graph_in_evaluation(
    options: dict[str, Any], strict: bool
) -> None:
    ours, plain = twins(net(model_of), data(), p=0.5, **options)
    exported = [torch.export.export(m.eval(), (data(),), strict=strict) for m in (ours, plain)]
    torch.testing.assert_close(exported[0].module()(data()), plain(data()))
    targets = [[str(n.target) for n in e.graph.nodes if n.op == "call_function"] for e in exported]
    assert targets[0] == targets[1]


def test_export_in_training_drops_or_says_that_it_is_stochastic_depth() -> None:
    ours, plain = twins(net(model_of), data(), p=0.5)
    torch.export.export(plain, (data(),))  # the plain model can be
    try:
        exported = torch.export.export(ours, (data(),)).module()
    except Exception as error:
        assert "stochastic depth" in str(error)  # noqa: PT017
    else:
        assert len({exported(data()).sum().item() for _ in range(20)}) > 1


def test_tracing_in_training_drops_or_says_that_apply_comes_after() -> None:
    model = torchvision.models.resnet18(num_classes=2)
    example = torch.randn(2, 3, 32, 32)
    sd.apply(model, 0.5, schedule="uniform", example_inputs=example)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            extracted = create_feature_extractor(model, {"layer4": "f"}).train()
        except Exception as error:
            assert "stochastic depth" in str(error)  # noqa: PT017
            return
        with torch.no_grad():
            results = {round(extracted(example)["f"].sum().item(), 3) for _ in range(6)}
    told = [str(w.message) for w in said if "trace" in str(w.message)]
    assert len(results) > 1 or any("apply" in text for text in told)


def test_apply_comes_after_extraction() -> None:
    extracted = create_feature_extractor(torchvision.models.resnet18(), {"layer4": "f"}).train()
    example = torch.randn(2, 3, 32, 32)
    sd.apply(extracted, 0.5, schedule="uniform", example_inputs=example)
    assert len(sd.branches(extracted)) == 8
    with torch.no_grad():
        assert len({round(extracted(example)["f"].sum().item(), 3) for _ in range(6)}) > 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", ["apply", "compile"])
def test_blocks_may_be_compiled_one_by_one(first: str, mode: str) -> None:
    torch._dynamo.reset()
    ours, plain = net(model_of, 3), net(model_of, 3)
    if first == "apply":
        sd.apply(ours, 0.5, mode=mode, seed=0, example_inputs=data())
    for block in list(ours)[1:]:
        block.compile(backend="aot_eager")
    if first == "compile":
        sd.apply(ours, 0.5, mode=mode, seed=0, example_inputs=data())
    assert len({branch.p for branch in sd.branches(ours)}) == 3  # rates that grow with depth
    for branch in sd.branches(ours):
        branch.p = 0.0
    torch.testing.assert_close(ours(data()), plain(data()))
    for branch in sd.branches(ours):
        branch.p = 1.0
    torch.testing.assert_close(ours(data()), plain[0](data()))
    assert outcome(ours, data())["gradient of 1.f.weight"].eq(0).all()


def test_a_compiled_block_is_weighed_and_dropped() -> None:
    torch._dynamo.reset()
    ours, plain = twins(net(Block), data(), p=0.5)
    ours.compile(backend="aot_eager")
    assert_weighed(ours, plain, data())


def test_the_signature_of_a_forward_is_its_own() -> None:
    class Signed(Block):
        def forward(self, x: Tensor, *, scale: float = 1.0, **rest: Any) -> Tensor:
            """Its own words."""
            return super().forward(x) * scale

    for options in ({}, {"mode": "row"}, {"blocks": Signed}):
        model = net(Signed)
        plain = copy.deepcopy(model)
        sd.apply(model, 0.5, example_inputs=data(), **options)
        assert inspect.signature(model.forward) == inspect.signature(plain.forward)
        assert model.forward.__doc__ == "Its own words."
        assert inspect.getsource(model.forward) == inspect.getsource(plain.forward)


def features(model: nn.Module) -> nn.Module:
    return create_feature_extractor(model, {"2": "out"}).train()


@pytest.mark.parametrize("mode", MODES)
def test_a_feature_extractor_trains_again_after_an_evaluation(mode: str) -> None:
    ours, plain = twins(features(net(model_of)), data(), mode=mode)
    for _ in range(3):
        for model in (ours, plain):
            model.train()
        assert_equal_outcomes(outcome(ours, data()), outcome(plain, data()))
        for model in (ours, plain):
            model.eval()
        torch.testing.assert_close(ours(data()), plain(data()))


def test_a_deep_copy_of_a_graph_module_drops_like_it() -> None:
    ours = sd.apply(features(net(model_of)), 1.0, schedule="uniform", example_inputs=data())
    twin = copy.deepcopy(ours)
    assert [b.name for b in sd.branches(twin)] == [b.name for b in sd.branches(ours)]
    assert not set(sd.branches(twin)) & set(sd.branches(ours))
    torch.testing.assert_close(twin(data())["out"], twin.get_submodule("0")(data()))
    assert not sd.is_applied(sd.remove(twin))
    assert sd.is_applied(ours)

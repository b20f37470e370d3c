"""apply() on every torchvision classification model."""

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.maxvit import MBConv as MaxVitMBConv
from torchvision.ops import StochasticDepth as TorchvisionDepth

import stochastic_depth as sd
from models import ALL, WITH_BRANCHES, WITHOUT_BRANCHES, build, calibrate, contents, images

# A rate at which no branch is ever dropped, but everything runs as if it could be.
KEPT = 1e-30

# From the papers' tables: ResNet 2 or 3 convolutions a block, (layers - 2) / 2 or / 3 blocks;
# two branches (attention, MLP) in each of a transformer's layers; ConvNeXt's 3-3-9-3 and so on.
PUBLISHED = {
    "resnet18": (18 - 2) // 2,
    "resnet34": (34 - 2) // 2,
    "resnet50": (50 - 2) // 3,
    "resnet101": (101 - 2) // 3,
    "resnet152": (152 - 2) // 3,
    "resnext50_32x4d": (50 - 2) // 3,
    "resnext101_32x8d": (101 - 2) // 3,
    "resnext101_64x4d": (101 - 2) // 3,
    "wide_resnet50_2": (50 - 2) // 3,
    "wide_resnet101_2": (101 - 2) // 3,
    "vit_b_16": 2 * 12,
    "vit_b_32": 2 * 12,
    "vit_l_16": 2 * 24,
    "vit_l_32": 2 * 24,
    "vit_h_14": 2 * 32,
    "swin_t": 2 * (2 + 2 + 6 + 2),
    "swin_s": 2 * (2 + 2 + 18 + 2),
    "swin_b": 2 * (2 + 2 + 18 + 2),
    "swin_v2_t": 2 * (2 + 2 + 6 + 2),
    "swin_v2_s": 2 * (2 + 2 + 18 + 2),
    "swin_v2_b": 2 * (2 + 2 + 18 + 2),
    "convnext_tiny": 3 + 3 + 9 + 3,
    "convnext_small": 3 + 3 + 27 + 3,
    "convnext_base": 3 + 3 + 27 + 3,
    "convnext_large": 3 + 3 + 27 + 3,
    "mobilenet_v2": 1 + 2 + 3 + 2 + 2,  # n - 1 of a stage's n blocks keep the shape
    "mnasnet1_0": 2 + 2 + 2 + 1 + 3,
    "efficientnet_b0": 1 + 1 + 2 + 2 + 3,
    "maxvit_t": (2 + 2 + 5 + 2) * (1 + 2 + 2),  # MBConv, block attention, grid attention
}


def expected_branches(model: nn.Module) -> list[tuple[str, str, set[str]]]:
    """What the source of torchvision's blocks says: (block, kind of shortcut, children in it)."""
    expected = []
    for name, block in model.named_modules():
        kind, branches = "identity", []
        match type(block).__name__:
            case "BasicBlock":
                branches = [{"conv1", "bn1", "conv2", "bn2"}]
                kind = "identity" if block.downsample is None else "projection"
            case "Bottleneck":
                branches = [{"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}]
                kind = "identity" if block.downsample is None else "projection"
            case "ResBottleneckBlock":
                branches = [{"f"}]
                kind = "identity" if block.proj is None else "projection"
            case "MBConv" if isinstance(block, MaxVitMBConv):
                branches = [{"layers"}]
                kind = "identity" if isinstance(block.proj, nn.Identity) else "projection"
            case "MBConv" | "FusedMBConv" if block.use_res_connect:
                branches = [{"block"}]
            case "InvertedResidual" if hasattr(block, "use_res_connect"):  # not ShuffleNet's
                children = {"conv"} if hasattr(block, "conv") else {"block"}
                branches = [children] if block.use_res_connect else []
            case "_InvertedResidual" if block.apply_residual:
                branches = [{"layers"}]
            case "CNBlock":
                branches = [{"block"}]
            case "SwinTransformerBlock" | "SwinTransformerBlockV2":
                branches = [{"norm1", "attn"}, {"norm2", "mlp"}]
            case "EncoderBlock":
                branches = [{"ln_1", "self_attention"}, {"ln_2", "mlp"}]
            case "PartitionAttentionLayer":
                branches = [{"attn_layer"}, {"mlp_layer"}]
        expected += [(name, kind, children) for children in branches]
    return expected


def found_branches(model: nn.Module) -> list[tuple[str, str, set[str]]]:
    found = []
    for branch in sd.branches(model):
        block, _ = branch.name.split(":")
        paths = [m.removeprefix(f"{block}.") for m in branch.modules]
        weighty = [m for m in paths if any(True for _ in _module(model, block, m).parameters())]
        found.append((block, branch.kind, {m.split(".")[0] for m in weighty}))
    return found


def _module(model: nn.Module, block: str, path: str) -> nn.Module:
    return model.get_submodule(f"{block}.{path}")


def existing(model: nn.Module) -> list[TorchvisionDepth]:
    return [m for m in model.modules() if isinstance(m, TorchvisionDepth)]


def set_existing(model: nn.Module, p: float) -> None:
    for module in existing(model):
        module.p = p


def set_rates(model: nn.Module, p: float) -> None:
    branches = sd.branches(model)
    assert branches
    for branch in branches:
        branch.p = p


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def training_output(model: nn.Module, x: Tensor) -> Tensor:
    """The output in training; running statistics and the random state stay as they were."""
    before = running_statistics(model)
    # With gradients enabled, without which decisions of a generator of their own are recorded for
    # checkpointing, which takes numbers from the default generator, and thereby from dropout.
    model.train().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(x)
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    model.requires_grad_()
    return output


def evaluation_output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def called(model: nn.Module, x: Tensor) -> set[str]:
    """The modules with parameters of their own that are called in a training forward."""
    names: set[str] = set()
    handles = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            hook = module.register_forward_pre_hook(lambda *_, name=name: names.add(name))
            handles.append(hook)
    training_output(model, x)
    for handle in handles:
        handle.remove()
    return names


def inside(model: nn.Module) -> set[str]:
    """The modules with parameters of their own inside branches."""
    paths = tuple(m for branch in sd.branches(model) for m in branch.modules)
    return {
        name
        for name, module in model.named_modules()
        if any(name == path or name.startswith(f"{path}.") for path in paths)
        and next(module.parameters(recurse=False), None) is not None
    }


@dataclass
class Case:
    """A model to which stochastic depth was applied, and how it was before."""

    name: str
    model: nn.Module
    x: Tensor
    evaluation: Tensor
    training: Tensor
    called: set[str]
    contents: list[tuple[Any, ...]]
    state: list[tuple[str, int]]


def state(model: nn.Module) -> list[tuple[str, int]]:
    return [(key, value.data_ptr()) for key, value in model.state_dict().items()]


def apply_kept(model: nn.Module, x: Tensor) -> None:
    # Decisions from a generator of their own leave dropout the random numbers it has without us.
    sd.apply(model, KEPT, schedule="uniform", scale="none", seed=0, example_inputs=x)


# One of each class of blocks, and of each way to build a block; their siblings are more of the
# same, and longer.
QUICK = {
    "convnext_tiny",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "mnasnet0_5",
    "mnasnet1_0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "swin_t",
    "swin_v2_t",
    "vit_b_32",
    # Without branches.
    "alexnet",
    "densenet121",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "vgg11_bn",
}


def quick_first(names: list[str]) -> list[Any]:
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.zoo) for n in names]


@pytest.fixture(scope="module", params=quick_first(WITH_BRANCHES))
def case(request: pytest.FixtureRequest) -> Case:
    model, x = build(request.param), images(request.param)
    set_existing(model, 0.0)
    calibrate(model, x)
    case = Case(
        name=request.param,
        model=model,
        x=x,
        training=training_output(model, x),
        called=called(model, x),
        evaluation=evaluation_output(model, x),
        contents=contents(model),
        state=state(model),
    )
    apply_kept(model, x)
    return case


def test_torchvision_has_the_80_models_that_the_tables_here_cover() -> None:
    assert len(ALL) == 80
    assert len(WITHOUT_BRANCHES) == 21
    assert set(WITHOUT_BRANCHES) <= set(ALL)


def test_every_residual_branch_is_found(case: Case) -> None:
    expected = expected_branches(case.model)
    assert expected
    assert found_branches(case.model) == expected
    assert len(expected) == PUBLISHED.get(case.name, len(expected))


def test_evaluation_is_bit_identical(case: Case) -> None:
    assert case.evaluation.std() > 0
    set_rates(case.model, 0.5)
    assert torch.equal(evaluation_output(case.model, case.x), case.evaluation)


def test_training_with_every_branch_kept_is_bit_identical(case: Case) -> None:
    set_rates(case.model, KEPT)
    assert torch.equal(training_output(case.model, case.x), case.training)
    assert [branch.dropped for branch in sd.branches(case.model)] == [0] * len(
        sd.branches(case.model)
    )


def test_training_at_p_0_is_bit_identical_whatever_the_models_own_rates(case: Case) -> None:
    set_existing(case.model, 0.7)
    set_rates(case.model, 0.0)
    output = training_output(case.model, case.x)
    set_existing(case.model, 0.0)
    assert torch.equal(output, case.training)


def test_at_p_1_exactly_what_is_outside_of_branches_runs(case: Case) -> None:
    set_rates(case.model, 1.0)
    within = inside(case.model)
    # Not all of them are called: attention reads the weights of its linear layers itself.
    assert within & case.called
    assert called(case.model, case.x) == case.called - within


def test_parameters_and_their_names_stay(case: Case) -> None:
    assert state(case.model) == case.state
    # What a block and the modules that it calls get, and the dicts that stand in for theirs.
    ours = {
        "_call_impl", "_replicate_for_data_parallel", "__getstate__", "compile",
        "__prepare_scriptable__",
    }  # fmt: skip
    other = {"_modules", "_parameters"}
    before, now = (
        [
            item
            for item in items
            if item[1] not in {*ours, "training"} and not (len(item) == 3 and item[1] in other)
        ]
        for items in (case.contents, contents(case.model))
    )
    assert now == before


def light_copy(model: nn.Module) -> nn.Module:
    """A deepcopy whose parameters take no memory."""
    memo = {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()}
    memo |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def described(model: nn.Module) -> list[tuple[Any, ...]]:
    return [(b.name, b.kind, b.p, b.mode, b.scale, b.modules) for b in sd.branches(model)]


def test_a_copy_that_is_pickled_has_the_same_branches_and_is_independent(case: Case) -> None:
    set_rates(case.model, 0.25)
    twin = light_copy(case.model)
    assert described(twin) == described(case.model)
    twin = pickle.loads(pickle.dumps(twin))
    assert described(twin) == described(case.model)

    set_rates(twin, 1.0)
    assert {branch.p for branch in sd.branches(case.model)} == {0.25}
    decided = [branch.decided for branch in sd.branches(case.model)]
    assert called(twin, case.x.to("meta")) == case.called - inside(twin)
    assert [branch.decided for branch in sd.branches(case.model)] == decided

    sd.remove(twin)
    assert called(twin, case.x.to("meta")) == case.called
    assert described(case.model)


def test_applying_twice_is_applying_once(case: Case) -> None:
    names = [branch.name for branch in sd.branches(case.model)]
    sd.apply(case.model, 0.5, schedule="uniform", example_inputs=case.x)
    assert [(b.name, b.p) for b in sd.branches(case.model)] == [(name, 0.5) for name in names]
    assert torch.equal(evaluation_output(case.model, case.x), case.evaluation)


def test_remove_restores_the_model_exactly(case: Case) -> None:  # the last one on a model
    training = {name: m.training for name, m in case.model.named_modules()}
    assert sd.remove(case.model) is case.model
    for name, module in case.model.named_modules():
        assert module.training == training[name]
    case.model.eval()  # as it was when its contents were noted
    assert contents(case.model) == case.contents
    assert sd.branches(case.model) == []
    assert torch.equal(training_output(case.model, case.x), case.training)


@pytest.mark.parametrize("name", quick_first(WITHOUT_BRANCHES))
def test_a_model_without_residual_branches_is_an_error(name: str) -> None:
    model = build(name)
    before = contents(model)
    with pytest.raises(ValueError, match=f"no residual branch found in {type(model).__name__}"):
        sd.apply(model, 0.2, example_inputs=images(name))
    assert contents(model) == before


SEVERAL = [
    "resnet18",
    "efficientnet_b0",
    "convnext_tiny",
    "swin_t",
    "vit_b_32",
    "mobilenet_v2",
    "regnet_y_400mf",
]


def step(model: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model.train()(x)
        output.square().mean().backward()
    return output.detach()


@pytest.mark.parametrize("p", [0.0, KEPT])
@pytest.mark.parametrize("name", SEVERAL)
def test_gradients_and_statistics_with_every_branch_kept_are_bit_identical(
    name: str, p: float
) -> None:
    plain, x = build(name), images(name)
    set_existing(plain, 0.0)
    model = copy.deepcopy(plain)
    sd.apply(model, p, schedule="uniform", scale="none", seed=0, example_inputs=x)
    assert torch.equal(step(model, x), step(plain, x))
    gradients = {key: q.grad for key, q in plain.named_parameters()}
    for key, q in model.named_parameters():
        assert torch.equal(q.grad, gradients[key]), key
    statistics = running_statistics(plain)
    for key, b in model.named_buffers():
        assert torch.equal(b, statistics[key]), key


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("name", SEVERAL)
def test_at_p_1_no_parameter_of_a_branch_gets_a_gradient(name: str, mode: str) -> None:
    model, x = build(name), images(name)
    sd.apply(model, 1.0, schedule="uniform", mode=mode, example_inputs=x)
    statistics = running_statistics(model)
    step(model, x)
    within = inside(model)
    owners = {key: key.rpartition(".")[0] for key, _ in model.named_parameters()}
    without = {owners[key] for key, q in model.named_parameters() if q.grad is None}
    scales = {owner for key, owner in owners.items() if key.endswith(".layer_scale")}
    # self_attention's out_proj is not called but read by its parent, itself inside.
    assert without - scales == {o for o in owners.values() if _in(o, within)}
    for key, b in model.named_buffers():
        if _in(key.rpartition(".")[0], within):
            assert torch.equal(b, statistics[key]), key


def _in(name: str, within: set[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in within)


@pytest.mark.parametrize("name", SEVERAL)
def test_in_row_mode_a_branch_is_called_with_exactly_the_kept_rows(name: str) -> None:
    model, x = build(name), images(name, 4)
    sd.apply(model, 0.5, schedule="uniform", mode="row", seed=0, example_inputs=x)
    rows: dict[str, int] = {branch.name: 0 for branch in sd.branches(model)}
    for branch in sd.branches(model):
        first = model.get_submodule(branch.modules[0])

        def count(_: nn.Module, args: tuple[Tensor, ...], name: str = branch.name) -> None:
            rows[name] += len(args[0])

        first.register_forward_pre_hook(count)
    training_output(model, x)
    branches = sd.branches(model)
    assert [branch.decided for branch in branches] == [4] * len(branches)
    assert sum(branch.dropped for branch in branches) not in (0, 4 * len(branches))
    for branch in branches:
        kept = branch.decided - branch.dropped
        layers = [layer for path in branch.modules for layer in model.get_submodule(path).modules()]
        if kept == 1 and any(isinstance(layer, nn.BatchNorm2d) for layer in layers):
            kept = 2  # one row has no variance: another one comes along, and is left out again
        assert rows[branch.name] == kept, branch.name

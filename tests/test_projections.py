"""What stands in for a dropped module that changes the shape of its input."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import stochastic_depth as sd

CHANNELS = {"layer1": 64, "layer2": 64, "layer3": 128, "layer4": 256}  # that go in
RECIPES = ["module", "tied", "copy", "new"]


def by_hand(name: str) -> nn.Module:
    """The projection that a user gives."""
    inputs, stride = CHANNELS[name], 1 if name == "layer1" else 2
    return nn.Conv2d(inputs, 64 if name == "layer1" else 2 * inputs, 1, stride)


@functools.cache
def plain_resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5)


def wrapped_resnet(recipe: str, p: float = 0.5, mode: str = "batch") -> nn.Module:
    model = copy.deepcopy(plain_resnet())
    torch.manual_seed(1)
    for name in CHANNELS:
        projection = by_hand(name) if recipe == "module" else recipe
        setattr(model, name, sd.StochasticDepth(getattr(model, name), p, projection, mode=mode))
    return model


def wrappers(model: nn.Module) -> dict[str, sd.StochasticDepth]:
    return {name: getattr(model, name) for name in CHANNELS}


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def last_logits(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(images())


# --- resnet18, as in the well-known answer


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_of_a_wrapped_resnet_is_the_plain_one(recipe: str) -> None:
    model = wrapped_resnet(recipe).eval()
    with torch.no_grad():
        assert torch.equal(model(images()), copy.deepcopy(plain_resnet()).eval()(images()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_dropped_layers_of_a_resnet_are_their_projections(recipe: str) -> None:
    model = wrapped_resnet(recipe, p=1.0)
    ran: list[str] = []
    for name, module in model.named_modules():
        if ".module." in name and not name.endswith(".conv1"):  # conv1 may be the projection
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    x = model.maxpool(model.relu(model.bn1(model.conv1(images()))))
    for wrapper in wrappers(model).values():
        expected = wrapper.projection(x)
        assert torch.equal(wrapper(x), expected)
        x = expected
    assert ran == []
    assert x.shape == (4, 512, 1, 1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_of_a_dropped_resnet_go_to_the_projections(recipe: str) -> None:
    model = wrapped_resnet(recipe, p=1.0)
    model(images()).sum().backward()
    for wrapper in wrappers(model).values():
        projection = {id(p) for p in wrapper.projection.parameters()}
        assert projection
        got = {id(p) for p in wrapper.parameters() if p.grad is not None}
        assert got == projection


@pytest.mark.parametrize(
    ("recipe", "mode"),
    [*((recipe, "batch") for recipe in RECIPES), ("tied", "row"), ("new", "subset")],
)
def test_a_wrapped_resnet_trains(recipe: str, mode: str) -> None:
    model, x = wrapped_resnet(recipe, p=0.3, mode=mode), images()
    # Far below what would train well: projections are not normalised, and few steps diverge.
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []
    assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_wrapped_resnet_is_saved_and_loaded(recipe: str) -> None:
    model, other = wrapped_resnet(recipe), wrapped_resnet(recipe)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    assert not torch.equal(last_logits(other, 0), last_logits(model, 0))
    other.load_state_dict(model.state_dict())
    for seed in range(3):  # dropped and kept layers
        assert torch.equal(last_logits(other, seed), last_logits(model, seed))


@pytest.mark.parametrize("trip", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_wrapped_resnet_is_copied(recipe: str, trip: Callable[[nn.Module], nn.Module]) -> None:
    model = wrapped_resnet(recipe)
    twin = trip(model)
    assert [name for name, _ in twin.named_parameters()] == [
        name for name, _ in model.named_parameters()
    ]  # what is tied stays tied
    assert torch.equal(last_logits(twin, 1), last_logits(model, 1))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert model.layer2.projection.weight.any()


def test_tied_projections_are_the_first_convolutions_themselves() -> None:
    model = wrapped_resnet("tied")
    for wrapper in wrappers(model).values():
        assert wrapper.projection is wrapper.module[0].conv1
    plain = list(plain_resnet().parameters())
    assert [p.shape for p in model.parameters()] == [p.shape for p in plain]


def test_copied_projections_start_as_the_first_convolutions_and_are_independent() -> None:
    for wrapper in wrappers(wrapped_resnet("copy")).values():
        conv = wrapper.module[0].conv1
        assert repr(wrapper.projection) == repr(conv)
        assert torch.equal(wrapper.projection.weight, conv.weight)
        assert wrapper.projection.weight.data_ptr() != conv.weight.data_ptr()


def test_new_projections_are_pointwise_convolutions_with_the_stride_of_the_layer() -> None:
    expected = {
        "layer1": (64, 64, (1, 1), (1, 1)),
        "layer2": (64, 128, (1, 1), (2, 2)),
        "layer3": (128, 256, (1, 1), (2, 2)),
        "layer4": (256, 512, (1, 1), (2, 2)),
    }
    for name, wrapper in wrappers(wrapped_resnet("new")).items():
        conv = wrapper.projection
        assert type(conv) is nn.Conv2d
        found = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
        assert found == expected[name]


# --- other kinds of layers


class HeadFirst(nn.Module):
    """Registers its layers in another order than it runs them: the input shape is no guess."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.conv(x))))


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 6), (2, 3)),
    "linear on tokens": (lambda: nn.Linear(3, 6), (2, 5, 3)),
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6)), (2, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3, 2, 1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, 2, 1), (2, 3, 9, 8)),
    "conv2d, two strides": (lambda: nn.Conv2d(3, 6, 3, (2, 3), 1), (2, 3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 6, 3, (1, 2, 2), 1), (2, 3, 4, 7, 7)),
    "conv2d without batch": (lambda: nn.Conv2d(3, 6, 3, 2, 1), (3, 8, 8)),
    "at the first batch": (HeadFirst, (2, 3, 8, 8)),
}


@pytest.mark.parametrize("recipe", ["tied", "copy", "new"])
@pytest.mark.parametrize("kind", KINDS)
def test_recipes_project_to_the_shape_of_the_output(kind: str, recipe: str) -> None:
    make, shape = KINDS[kind]
    module, x = make(), torch.randn(shape)
    wanted = module(x).shape
    for p in (1.0, 1e-30):
        layer = sd.StochasticDepth(module, p, recipe)
        assert layer(x).shape == wanted
    wrapped = [m for m in module.modules() if type(m) is type(layer.projection)]
    assert (layer.projection in wrapped) is (recipe == "tied")
    assert layer.eval()(x).shape == wanted


@pytest.mark.parametrize("recipe", ["tied", "copy", "new"])
def test_the_first_batch_builds_what_cannot_be_guessed(recipe: str) -> None:
    layer = sd.StochasticDepth(HeadFirst(), 1.0, recipe)
    x = torch.randn(2, 3, 8, 8)
    assert layer.projection is None
    assert torch.equal(layer.eval()(x), layer.module(x))  # evaluation needs no projection
    layer.train()
    out = layer(x)
    built = layer.projection
    assert torch.equal(out, built(x))
    layer(x)
    assert layer.projection is built
    assert isinstance(built, nn.Conv2d)


@pytest.mark.parametrize("module", [KINDS["conv2d"][0], HeadFirst])
@pytest.mark.parametrize("recipe", ["tied", "copy"])
def test_looking_at_the_shapes_changes_nothing(
    module: Callable[[], nn.Module], recipe: str
) -> None:
    block = nn.Sequential(module(), nn.BatchNorm2d(6), nn.Dropout(0.5))
    state = copy.deepcopy(block.state_dict())
    random = torch.get_rng_state()
    layer = sd.StochasticDepth(block, 1.0, recipe)
    layer(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random)
    assert len(state) > 5
    for name, value in block.state_dict().items():
        assert torch.equal(value, state[name]), name
        assert value.device.type == "cpu"
    hooked = [m for m in block.modules() if m._forward_hooks]
    assert hooked == []


class Counted(nn.Module):
    """Has a layer twice and one that drops, counts its calls, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(6, 6)
        self.layers = nn.Sequential(layer, sd.StochasticDepth(nn.Linear(6, 6), 0.5), layer)
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x)
        out: Tensor = self.layers(x)
        return out


@pytest.mark.parametrize("recipe", [None, "new"])
def test_looking_at_the_shapes_leaves_a_layer_that_is_there_twice(recipe: Any) -> None:
    module, x = Counted(), torch.randn(4, 6)
    before, random = module.eval()(x), torch.get_rng_state()
    layer = sd.StochasticDepth(module.train(), 0.5, recipe)
    assert recipe or torch.equal(torch.get_rng_state(), random)
    assert torch.equal(layer.eval()(x), before)
    assert len(module.calls) == 2
    assert [branch.decided for branch in sd.branches(layer)] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_new_projection_has_the_dtype_of_the_module(dtype: torch.dtype) -> None:
    layer = sd.StochasticDepth(nn.Conv2d(3, 6, 3, 2, 1, dtype=dtype), 1.0, "new")
    assert layer(torch.ones(2, 3, 8, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_rows_of_the_projection_are_replaced_by_those_of_the_module(mode: str) -> None:
    torch.manual_seed(0)
    module, projection = nn.Linear(3, 6).double(), nn.Linear(3, 6).double()
    layer = sd.StochasticDepth(module, 0.5, projection, mode=mode, scale="none")
    x = torch.randn(8, 3, dtype=torch.float64)
    counts = set()
    for _ in range(20):
        out = layer(x)
        kept = ((out - module(x)).abs() < 1e-12).all(1)
        assert torch.equal(out[~kept], projection(x)[~kept])
        counts.add(int(kept.sum()))
    assert counts == {4} if mode == "subset" else len(counts) > 2


def test_a_function_may_be_the_projection() -> None:
    layer = sd.StochasticDepth(nn.Linear(4, 2), 1.0, lambda x: x[:, :2])
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), x[:, :2])
    assert list(layer.state_dict()) == ["module.weight", "module.bias"]


def test_tuples_may_be_projected_by_a_function() -> None:
    class Pair(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0] * pair[1]

    layer = sd.StochasticDepth(Pair(), 1.0, lambda pair: pair[0])
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(layer((x, y)), x)
    layer.p = 1e-30
    assert torch.equal(layer((x, y)), x * y)


# --- what does not fit


def test_a_missing_projection_is_told_when_the_layer_is_built() -> None:
    text = r"maps an input of shape \(2, 3\) to \(2, 5\).*give projection='new', 'copy' or 'tied'"
    with pytest.raises(ValueError, match=text):
        sd.StochasticDepth(nn.Linear(3, 5), 0.5)


class Unguessable(nn.Module):
    """Its first layer does not say what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.layer = nn.Linear(7, 7), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_a_missing_projection_names_the_shapes_and_the_remedy(mode: str) -> None:
    layer = sd.StochasticDepth(Unguessable(), 1e-30, mode=mode)
    text = (
        r"returned a tensor of shape \(2, 5\) but its shortcut is a tensor of shape \(2, 3\).*"
        r"give projection='new', 'copy' or 'tied'"
    )
    with pytest.raises(ValueError, match=text):
        layer(torch.ones(2, 3))


def test_a_wrong_projection_names_the_shapes() -> None:
    layer = sd.StochasticDepth(nn.Linear(3, 5), 1e-30, nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"\(2, 5\) but its shortcut .* \(2, 4\)"):
        layer(torch.ones(2, 3))


def test_another_structure_needs_a_projection() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    layer = sd.StochasticDepth(Split(), 1e-30)
    text = r"returned a tuple of 2 but its shortcut is a tensor of shape \(2, 3\).*structure"
    with pytest.raises(ValueError, match=text):
        layer(torch.ones(2, 3))


def build(module: nn.Module, recipe: str, *batch: Any) -> None:
    """Build the projection, at once or at the first batch."""
    layer = sd.StochasticDepth(module, 1.0, recipe)
    layer(*batch)


@pytest.mark.parametrize("recipe", ["tied", "copy"])
def test_no_layer_inside_maps_the_shapes(recipe: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    text = (
        rf"projection='{recipe}': no linear or .* maps \(2, 3\) to \(2, 5\); use projection='new'"
    )
    with pytest.raises(ValueError, match=text):
        build(module, recipe)


def test_no_stride_maps_the_shapes() -> None:
    text = (
        r"projection='new': no Conv2d with strides maps .* to \(2, 5, 62, 62\); give a projection"
    )
    with pytest.raises(ValueError, match=text):
        build(nn.Conv2d(3, 5, 3), "new")


@pytest.mark.parametrize(
    "module", [nn.ConvTranspose2d(3, 5, 2, 2), nn.AvgPool2d(2)], ids=lambda m: type(m).__name__
)
def test_there_is_no_kind_to_make_a_new_layer_of(module: nn.Module) -> None:
    text = rf"projection='new': {type(module).__name__} runs no linear or convolution layer"
    with pytest.raises(ValueError, match=text):
        build(module, "new", torch.ones(2, 3, 8, 8))


@pytest.mark.parametrize("recipe", ["tied", "copy", "new"])
def test_a_recipe_needs_a_tensor(recipe: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, named: dict[str, Tensor]) -> Tensor:
            return self.layer(named["x"])

    with pytest.raises(TypeError, match=f"'{recipe}' needs a tensor as input, got a dict of 1"):
        build(Named(), recipe, {"x": torch.ones(2, 3)})


def test_a_dry_run_that_fails_is_told() -> None:
    class OnTheHost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * float(x.sum())

    text = r"projection='new' needs .* dry run on an input of shape \(2, 3\) failed \(.*give a proj"
    with pytest.raises(ValueError, match=text):
        build(OnTheHost(), "new", torch.ones(2, 3))

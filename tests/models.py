"""Models for the tests: torchvision's, built fast, and a small residual network by hand."""

from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn

# torchvision's classification models without a residual sum: plain stacks and concatenations.
WITHOUT_BRANCHES = [
    "alexnet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]
ALL = torchvision.models.list_models(module=torchvision.models)
WITH_BRANCHES = [name for name in ALL if name not in WITHOUT_BRANCHES]

# The smallest square images that a model takes, where 32 pixels are not enough (or too many).
_SIZES = {"alexnet": 64, "inception_v3": 75, "maxvit_t": 224, "vit_h_14": 28}


def image_size(name: str) -> int:
    return _SIZES.get(name, 32)


def images(name: str, batch: int = 2) -> Tensor:
    size = image_size(name)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def build(name: str, **options: object) -> nn.Module:
    """A torchvision model with random weights: small, all different from 0, the same each time.

    torchvision's own initialisation takes seconds for many models, so it is left out; it would
    also hide branches (ConvNeXt's layer scale starts at 1e-6) and make all biases 0.
    """
    if name == "maxvit_t":
        options["input_size"] = (224, 224)
    elif name.startswith("vit"):
        options["image_size"] = image_size(name)
    elif name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    functions = [f for f in dir(nn.init) if f.endswith("_") and not f.startswith("_")]
    with mock.patch.multiple(nn.init, **dict.fromkeys(functions, _leave)):
        model: nn.Module = torchvision.models.get_model(name, **options)
    return fill(model)


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor) -> None:
    """Give BatchNorm the statistics of ``x``, so that its signal survives evaluation."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=0.1)  # two pixels that are alike would blow up all others


def _leave(tensor: Tensor, *_: object, **__: object) -> Tensor:
    return tensor


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Give every parameter and running statistic a small random value."""
    noise = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        for start in range(0, len(flat), len(noise)):
            chunk = flat[start : start + len(noise)]
            chunk.copy_(noise[: len(chunk)])
        if parameter.dim() > 1:
            parameter.mul_((3 * parameter.shape[0] / parameter.numel()) ** 0.5)
        else:
            parameter.mul_(0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.add_(1.0)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(noise[: module.num_features] * 0.1)
            module.running_var.copy_(noise[: module.num_features] * 0.5 + 1.0)
    return model


class Block(nn.Module):
    """A basic block as in ResNet, with an in-place ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)
        self.norm1 = nn.BatchNorm2d(outputs) if norm else nn.GroupNorm(2, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=not norm)
        self.norm2 = nn.BatchNorm2d(outputs) if norm else nn.GroupNorm(2, outputs)
        self.project = None
        if stride != 1 or inputs != outputs:
            self.project = nn.Conv2d(inputs, outputs, 1, stride)

    def branch(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(out))

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.project is None else self.project(x)

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += self.shortcut(x)
        return self.relu(out)


class SmallResNet(nn.Module):
    """Four blocks, the third with a projection."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.blocks = nn.Sequential(
            Block(4, 4, norm=norm),
            Block(4, 4, norm=norm),
            Block(4, 8, 2, norm=norm),
            Block(8, 8, norm=norm),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


# Named after their largest layer.
SMALL_BRANCHES = ["blocks.0:conv1", "blocks.1:conv1", "blocks.2:conv2", "blocks.3:conv1"]


def small(norm: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> SmallResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallResNet(norm).to(dtype)


def small_batch(rows: int = 6, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 8, 8, dtype=dtype, generator=generator)


def contents(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything there is in the modules of ``model``, by identity, in order.

    The dicts of children and parameters go by type and contents: others may share the old ones.
    """
    items: list[tuple[Any, ...]] = []
    for name, module in model.named_modules():
        items.append((name, type(module), id(module)))
        for key, value in module.__dict__.items():
            known = type(value) if key in ("_modules", "_parameters") else id(value)
            items.append((name, key, known))
            if isinstance(value, dict):
                items += [(name, key, inner, id(v)) for inner, v in value.items()]
    return items

"""The models that are measured, each with the shape of its batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stochastic_depth.cli.torchvision_ops import ensure_torchvision

ensure_torchvision()

import timm  # noqa: E402
import torchvision  # noqa: E402


class CifarBlock(nn.Module):
    """The basic block of the CIFAR ResNets: option A shortcuts, without parameters."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.pad = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.pad:
            x = nn.functional.avg_pool2d(x, self.stride)
            x = nn.functional.pad(x, (0, 0, 0, 0, 0, self.pad))
        return torch.relu(x + out)


def cifar_resnet(depth: int) -> nn.Sequential:
    """ResNet for 32 px images, 6n+2 layers in three stages (He et al. 2015, section 4.2)."""
    blocks: list[nn.Module] = []
    width_in = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range((depth - 2) // 6):
            blocks.append(CifarBlock(width_in, width, stride if i == 0 else 1))
            width_in = width
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(stem, *blocks, head)


@dataclass(frozen=True)
class Subject:
    """A model to measure, and its batch on a CPU."""

    build: Callable[[], nn.Module]
    batch: tuple[int, ...]
    channels_last: bool = False


SUBJECTS = {
    "resnet50": Subject(torchvision.models.resnet50, (32, 3, 96, 96)),
    "resnet110-cifar": Subject(lambda: cifar_resnet(110), (128, 3, 32, 32)),
    "resnet18": Subject(torchvision.models.resnet18, (32, 3, 96, 96)),
    "resnet18-channels-last": Subject(torchvision.models.resnet18, (32, 3, 96, 96), True),
    "resnet50-channels-last": Subject(torchvision.models.resnet50, (32, 3, 96, 96), True),
    "vit-s": Subject(
        lambda: timm.create_model("vit_small_patch16_224", img_size=160), (16, 3, 160, 160)
    ),
    "convnext-atto": Subject(lambda: timm.create_model("convnext_atto"), (32, 3, 128, 128)),
}


def build(name: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A subject's model and a random batch, from a fixed seed."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    layout = torch.channels_last if subject.channels_last else torch.contiguous_format
    model = subject.build().to(device, memory_format=layout)
    return model, torch.randn(subject.batch, device=device).contiguous(memory_format=layout)

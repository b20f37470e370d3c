"""The models that are measured, each with the shape of its batch."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torchvision
from torch import Tensor, nn


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


class TokenBlock(nn.Module):
    """A pre-norm transformer block: attention, then a feed-forward network."""

    def residual_branches(self) -> list[Callable[[Tensor], Tensor]]:
        """The two branches, for the peers that rewrite a block."""
        return [
            lambda x: self.ls1(self.attn(self.norm1(x))),
            lambda x: self.ls2(self.mlp(self.norm2(x))),
        ]


class VitBlock(TokenBlock, timm.models.vision_transformer.Block):
    """timm's block."""


class SwiGlu(nn.Module):
    """The feed-forward network of Llama."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class CausalAttention(nn.Module):
    """Multi-head self-attention on what came before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class LlamaBlock(TokenBlock):
    """A block in the shape of Llama's, without rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attn, self.mlp = CausalAttention(width, heads), SwiGlu(width, width * 8 // 3)
        self.ls1 = self.ls2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def llama(depth: int, width: int, heads: int) -> nn.Sequential:
    """The blocks of a Llama, without embeddings and head."""
    return nn.Sequential(*[LlamaBlock(width, heads) for _ in range(depth)])


def vit(name: str, size: int) -> nn.Module:
    """A ViT of timm."""
    return timm.create_model(name, img_size=size, block_fn=VitBlock)


@dataclass(frozen=True)
class Subject:
    """A model to measure, its batch on a CPU, and the larger one on a GPU."""

    build: Callable[[], nn.Module]
    batch: tuple[int, ...]
    channels_last: bool = False
    gpu_batch: tuple[int, ...] | None = None


SUBJECTS = {
    "resnet50": Subject(torchvision.models.resnet50, (32, 3, 96, 96), gpu_batch=(256, 3, 224, 224)),
    "resnet110-cifar": Subject(lambda: cifar_resnet(110), (64, 3, 32, 32)),
    "resnet18": Subject(torchvision.models.resnet18, (32, 3, 96, 96)),
    "resnet18-channels-last": Subject(torchvision.models.resnet18, (32, 3, 96, 96), True),
    "resnet50-channels-last": Subject(
        torchvision.models.resnet50, (32, 3, 96, 96), True, (256, 3, 224, 224)
    ),
    "vit-s": Subject(lambda: vit("vit_small_patch16_224", 160), (8, 3, 160, 160)),
    "convnext-atto": Subject(lambda: timm.create_model("convnext_atto"), (32, 3, 128, 128)),
    "llama": Subject(lambda: llama(12, 384, 6), (8, 128, 384)),
    "vit-b": Subject(
        lambda: vit("vit_base_patch16_224", 224), (8, 3, 224, 224), gpu_batch=(256, 3, 224, 224)
    ),
    "vit-l": Subject(
        lambda: vit("vit_large_patch16_224", 224), (4, 3, 224, 224), gpu_batch=(128, 3, 224, 224)
    ),
}
ON_CPU = [name for name in SUBJECTS if name not in ("vit-b", "vit-l")]
ON_GPU = ["resnet50", "resnet50-channels-last", "vit-b", "vit-l"]


def build(name: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A subject's model and a random batch, from a fixed seed."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    layout = torch.channels_last if subject.channels_last else torch.preserve_format
    model = subject.build().to(device, memory_format=layout)
    batch = subject.batch
    if device.type == "cuda" and subject.gpu_batch is not None:
        batch = subject.gpu_batch
    return model, torch.randn(batch, device=device).clone(memory_format=layout)

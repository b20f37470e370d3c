"""What the examples train: a small residual network on made-up images, which it can learn."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import stochastic_depth as sd

CLASSES, WIDTH = 4, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.norm(x)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(*[Block() for _ in range(6)])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def images(count: int = 256) -> TensorDataset:
    """Noise with one of four colour casts: images (N, 3, 8, 8) and labels (N)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    casts = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    noise = torch.randn(count, 3, 8, 8, generator=generator)
    return TensorDataset(noise + casts[labels][:, :, None, None], labels)


def report(rank: int, loss: Tensor, weights: Tensor, model: nn.Module) -> None:
    """Print what a rank ends with; the weights' sum of squares is the same on all of them."""
    dropped = sum(branch.dropped for branch in sd.branches(model))
    decided = sum(branch.decided for branch in sd.branches(model))
    print(
        f"rank {rank}: loss {loss.item():.3f}, weights {weights.detach().double().norm():.12f}, "
        f"dropped {dropped} of {decided}",
        flush=True,
    )

"""How sure is a model? Several passes with stochastic depth on, as Monte-Carlo predictions.

    python examples/uncertainty.py

Needs torchmetrics. Trains a small network on points in two dimensions, and compares its plain
predictions with the mean of passes in which branches drop: negative log-likelihood, calibration
error, and how much the passes differ where there were data, and where there were none.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stochastic_depth as sd


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three overlapping clouds, some of whose labels are wrong."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=source)
    centres = torch.tensor([[0.0, 1.5], [-1.3, -0.75], [1.3, -0.75]])
    x = centres[labels] + torch.randn(n, 2, generator=source)
    noise = torch.randint(3, (n,), generator=source)
    return x, torch.where(torch.rand(n, generator=source) < 0.1, noise, labels)


def main(steps: int = 400, passes: int = 32) -> dict[str, float]:
    from torchmetrics.functional.classification import multiclass_calibration_error

    torch.manual_seed(0)
    x, y = points(256, seed=1)
    model = nn.Sequential(nn.Linear(2, 64), *[Block(64) for _ in range(8)], nn.Linear(64, 3))
    sd.apply(model, p=0.5, mode="row", example_inputs=x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    model.eval()
    x, y = points(2000, seed=2)
    far = x + 12.0
    result: dict[str, float] = {}
    with torch.no_grad():
        plain = model(x).softmax(-1)
        with sd.sampling(model):
            sampled = torch.stack([model(x).softmax(-1) for _ in range(passes)])
            sampled_far = torch.stack([model(far).softmax(-1) for _ in range(passes)])
    for name, p in (("plain", plain), ("mean of passes", sampled.mean(0))):
        result[f"{name}: nll"] = float(F.nll_loss(p.clamp_min(1e-9).log(), y))
        result[f"{name}: calibration error"] = float(
            multiclass_calibration_error(p, y, num_classes=3, n_bins=15)
        )
    result["spread, where there were data"] = float(sampled.std(0).mean())
    result["spread, far from them"] = float(sampled_far.std(0).mean())
    return result


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:36} {value:.3f}")

"""Small models with blocks of their own, and what tests ask of them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.find.state import in_mode


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), nn.Linear(width, width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x)).relu()


class Net(nn.Module):
    def __init__(self, depth: int = 5, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob, self.calls = drop_prob, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1)) >= self.drop_prob
        return x * keep / (1 - self.drop_prob)


class Dropping(nn.Module):
    """With stochastic depth of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.drop1, self.drop2 = DropPath(0.5), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop1(self.one(x).relu())
        return x + self.drop2(self.two(x).relu())


def net(depth: int = 5, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(depth).eval()


def x_for_net(rows: int = 6) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def state_of(model: nn.Module) -> list[Any]:
    """All that a failed change must leave alone."""
    return [
        (name, type(m), {k: v for k, v in vars(m).items() if k[0] != "_" or k == "_modules"})
        for name, m in model.named_modules()
    ]


def keys_of(model: nn.Module) -> list[set[str]]:
    return [set(vars(m)) for m in model.modules()]


def leaves(out: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    torch.manual_seed(0)  # of a forward that draws numbers, as ViLT's does
    with in_mode(model, False), torch.no_grad():
        return leaves(model(*args, **kwargs))


def skips_as_it_prunes(model: nn.Module, what: Any, inputs: Any) -> nn.Module:
    """Prune a copy, and compare with skipping, bit for bit."""
    whole = run(model, inputs)
    with sd.skip(model, what, inputs):
        skipped = run(model, inputs)
    pruned = sd.prune(copy.deepcopy(model), remove=what, example_inputs=inputs)
    got = run(pruned, inputs)
    assert len(got) == len(skipped) > 0
    for a, b in zip(got, skipped, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert any(not torch.equal(a, b) for a, b in zip(whole, skipped, strict=True))
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    return pruned

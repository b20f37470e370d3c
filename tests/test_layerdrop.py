"""What skipping by Python's control flow does on several ranks, and ours does not."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd
from ranks import gathered, launch

STEPS, LAYERS = 30, 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Encoder(nn.Module):
    """Layers with transformers' layerdrop: a decision before each, and a Python ``if``."""

    def __init__(self, layerdrop: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 8)
        self.layers, self.layerdrop = nn.ModuleList(Layer() for _ in range(LAYERS)), layerdrop

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            skip = self.training and torch.rand([]) < self.layerdrop
            if not skip:
                x = layer(x)
        return x


def train(rank: int, engine: str, ours: str | None) -> None:
    model = Encoder(0.0 if ours else 0.5)
    options = {"p": 0.5, "schedule": "uniform", "scale": "none", "example_inputs": torch.ones(4, 8)}
    if ours == "branches":
        sd.apply(model, **options)
    elif ours == "layers":
        sd.apply(model, blocks=Layer, **options)
    if engine == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        for layer in model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    torch.manual_seed(rank)  # other decisions on every rank
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        wrapped(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    weights = [p.full_tensor() if engine == "fsdp" else p for p in model.parameters()]
    flat = torch.cat([w.detach().flatten() for w in weights])
    assert all(torch.equal(flat, other) for other in gathered(flat))
    assert sum(branch.dropped for branch in sd.branches(model)) > 0


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=pytest.mark.zoo)])
def test_layerdrop_fails_or_hangs_where_ranks_skip_different_layers(engine: str) -> None:
    # FSDP's ranks wait for each other until the process group gives up.
    message = {
        "ddp": "Expected to have finished reduction in the prior iteration",
        "fsdp": r"[Tt]imed out|Connection (closed|reset) by peer|mismatch|gloo",
    }[engine]
    with pytest.raises(ProcessRaisedException, match=message):
        launch(train, 2, engine, None, timeout=5)


def train_ours(rank: int) -> None:
    for engine in ("ddp", "fsdp"):
        for ours in ("branches", "layers"):
            train(rank, engine, ours)


def test_ours_trains_where_layerdrop_does_not() -> None:
    launch(train_ours, 2)

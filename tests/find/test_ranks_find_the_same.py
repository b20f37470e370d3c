"""What is found does not depend on when a collective ends: ranks that differ wait for ever."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import stochastic_depth as sd
from stochastic_depth.find.ranks import held
from stochastic_depth.find.record import Recorder


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Queue:
    """Holds tensors as a collective's thread does: from C++."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []

    def hold(self, t: Tensor) -> None:
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            self.waiting.append((torch.ones((), requires_grad=True) * t).grad_fn)


class Talking(nn.Module):
    """Its output is the sum over the ranks, and the queue is not done with it yet."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self.linear, self.hold = nn.Linear(4, 4), queue.hold

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.hold(y)
        return y * 2


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.gamma = nn.LayerNorm(4), inner, nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.inner(self.norm(x))


def test_a_tensor_that_a_queue_still_has_is_no_output() -> None:
    net = nn.Sequential(*[Block(Talking(Queue())) for _ in range(2)])
    sd.apply(net, 0.5, example_inputs=torch.randn(3, 4))
    assert [b.modules for b in sd.branches(net)] == [(f"{i}.norm", f"{i}.inner") for i in range(2)]


def test_held_tells_what_python_holds() -> None:
    queue = Queue()
    mine, both, theirs = torch.randn(3), torch.randn(3), torch.randn(3)
    queue.hold(both)
    queue.hold(theirs)
    kept = {"in": [mine, both]}
    assert list(map(id, held([mine, both, theirs]))) == list(map(id, kept["in"]))


def test_what_fsdp_moves_between_ranks_is_not_part_of_the_model() -> None:
    net = nn.Sequential(*[Block(nn.Linear(4, 4)) for _ in range(2)])
    for block in net:
        fully_shard(block.inner)
    fully_shard(net)
    x = torch.randn(3, 4)
    with torch.no_grad(), Recorder(net, []) as recorder:
        recorder.inputs((x,), {})
        number = recorder.enter(net, (x,), {})
        result = net(x)
        recorder.leave(number, result)
    flow = recorder.finish(result)
    names = [node.op for node in flow.nodes]
    assert not any("gather" in name or "split_with_sizes" in name for name in names)
    assert "opaque" not in names

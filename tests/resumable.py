"""A training run that may be killed at any time: what test_state.py starts and kills.

    python resumable.py FOLDER STEPS MODE [RANK RANKS STORE]

It prints a line a step, and leaves its weights in final.rankR.pt. Each rank writes a checkpoint of
its own after every step and keeps the latest three.
"""

import datetime
import hashlib
import io
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd

KEPT = 3


def write(path: Path, content: Any) -> None:
    """Write a file that is there as a whole or not at all, its checksum first."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(hashlib.blake2b(data).digest() + data)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def read(path: Path) -> Any:
    """What :func:`write` wrote; None, and a warning with the name, where the file is damaged."""
    content = path.read_bytes()
    if hashlib.blake2b(content[64:]).digest() != content[:64]:
        warnings.warn(f"{path} is cut short or corrupted; the one before is used", stacklevel=1)
        return None
    return torch.load(io.BytesIO(content[64:]), weights_only=True)


def checkpoints(folder: Path, rank: int) -> dict[int, Path]:
    """The checkpoints of a rank by their steps, the oldest first."""
    found = folder.glob(f"step*.rank{rank}.pt")
    return dict(sorted((int(re.search(r"step(\d+)", p.name)[1]), p) for p in found))


def latest(folder: Path, rank: int) -> tuple[int, Any]:
    """The newest step of which every rank has a whole checkpoint, and this rank's."""
    whole = {step: state for step, p in checkpoints(folder, rank).items() if (state := read(p))}
    steps = set(whole)
    if dist.is_initialized():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, steps)
        steps = set.intersection(*everyone)
    step = max(steps, default=0)
    return step, whole.get(step)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(x)))


def main(folder: Path, steps: int, mode: str, rank: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(8, 8), *[Block() for _ in range(3)])
    # Separate decisions from torch's generator, or shared ones from one of the model's own.
    ranks = "shared" if mode == "batch" else "separate"
    model = sd.apply(net, p=0.5, mode=mode, ranks=ranks, example_inputs=torch.zeros(2, 8))
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start, state = latest(folder, rank)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sd.load_state_dict(model, state["random"])
    for step in range(start, steps):
        x = torch.randn(4, 8)
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
        print(step + 1, flush=True)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": sd.state_dict(model),
        }
        write(folder / f"step{step + 1}.rank{rank}.pt", state)
        for old in list(checkpoints(folder, rank).values())[:-KEPT]:
            old.unlink()
    counts = [(b.decided, b.dropped) for b in sd.branches(model)]
    assert sum(dropped for _, dropped in counts) > 0
    write(folder / f"final.rank{rank}.pt", [model.state_dict(), counts, torch.rand(4)])


if __name__ == "__main__":
    place, count, how, *group = sys.argv[1:]
    if group:
        store = dist.FileStore(group[2], int(group[1]))
        timeout = datetime.timedelta(seconds=30)
        dist.init_process_group(
            "gloo", store=store, rank=int(group[0]), world_size=int(group[1]), timeout=timeout
        )
    main(Path(place), int(count), how, int(group[0]) if group else 0)
    if group:
        dist.destroy_process_group()

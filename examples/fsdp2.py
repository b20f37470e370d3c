"""Stochastic depth under FSDP2 (`fully_shard`), each block sharded by itself.

    torchrun --nproc-per-node 2 examples/fsdp2.py

A block that a rank drops must not leave the others waiting for its share of the parameters: the
block's own forward, and with it the gathering, runs on all ranks, whatever is dropped.
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

import stochastic_depth as sd
from task import Network, images, report

EPOCHS = 3


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    train(rank, device)
    dist.destroy_process_group()


def train(rank: int, device: torch.device) -> None:
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))

    torch.manual_seed(0)
    model = sd.apply(Network(), p=0.3, mode="row", example_inputs=torch.zeros(2, 3, 8, 8)).to(
        device
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = images()
    sampler = DistributedSampler(data)
    batches = DataLoader(data, batch_size=16, sampler=sampler)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, labels in batches:
            optimizer.zero_grad()
            loss = cross_entropy(model(x.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()

    weights = torch.cat([p.full_tensor().flatten() for p in model.parameters()])
    report(rank, loss, weights, model)


if __name__ == "__main__":
    main()

"""Stochastic depth under DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/ddp.py

On CPUs with gloo, on GPUs with nccl: the script is the same.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
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
    # Behind a function's end: where DDP is freed after the group, gloo may wait for ever.
    dist.destroy_process_group()


def train(rank: int, device: torch.device) -> None:
    torch.manual_seed(0)
    model = sd.apply(Network(), p=0.3, example_inputs=torch.zeros(2, 3, 8, 8)).to(device)
    ddp = DistributedDataParallel(model)  # find_unused_parameters is not needed
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    data = images()
    sampler = DistributedSampler(data)
    batches = DataLoader(data, batch_size=16, sampler=sampler)
    rates = sd.RateSchedule(model, "linear", steps=len(batches))  # a warm-up of one epoch

    # Each rank drops other branches, and all equally many, so that none waits for another.
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, labels in batches:
            optimizer.zero_grad()
            loss = cross_entropy(ddp(x.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            rates.step()

    report(rank, loss, nn.utils.parameters_to_vector(model.parameters()), model)


if __name__ == "__main__":
    main()

"""Stochastic depth under Accelerate: nothing but sd.apply before prepare.

accelerate launch --num_processes 2 examples/on_accelerate.py    # --cpu without GPUs
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import stochastic_depth as sd
from task import Network, images, report


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = sd.apply(Network(), p=0.3, example_inputs=torch.zeros(2, 3, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = DataLoader(images(), batch_size=16, shuffle=True)
    rates = sd.RateSchedule(model, "linear", steps=8)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    accelerator.register_for_checkpointing(rates)  # save_state and load_state take it along

    for _ in range(6):
        for x, labels in batches:
            with accelerator.accumulate(prepared):
                loss = cross_entropy(prepared(x), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                rates.step()

    weights = nn.utils.parameters_to_vector(model.parameters())
    report(accelerator.process_index, loss, weights, model)
    # Freed after the process group, DDP on CPUs may wait for ever, whatever the model is.
    prepared, optimizer, batches = accelerator.free_memory(prepared, optimizer, batches)
    accelerator.end_training()


if __name__ == "__main__":
    main()

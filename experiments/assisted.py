"""A shallower view of a language model as its own assistant: tokens, acceptance and speed.

python -m experiments.assisted

A small Llama learns Python's documentation, without and with stochastic depth, and continues
held-out texts greedily, by itself and with views of it as ``assistant_model``. Views share the
parameters of their model. The tokens must be the same; how many drafts are accepted, and the time,
are measured.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import stochastic_depth as sd

from .harness import Store, arguments, device, markdown, train_by_turns
from .language import Scale, load, make

P = 0.5
DRAFTS = 4  # tokens that an assistant drafts at once
SCALES = {  # layers, width, steps, sequences in a batch, tokens, held-out sequences
    "tiny": Scale(4, 32, 4, 4, 32, 4, files=8),
    "small": Scale(8, 96, 400, 16, 96, 24),
    "large": Scale(24, 512, 10_000, 64, 512, 64),
}


def train(scale: Scale, seed: int, train: Any) -> dict[str, nn.Module]:
    """The model without and with stochastic depth, trained by turns on the same sequences."""
    torch.manual_seed(seed)
    dense = make(scale, 1.0).to(device())
    dropping = make(scale, 1.0).to(device())
    dropping.load_state_dict(dense.state_dict())
    example = {"input_ids": train.pieces[:2].to(device())}
    sd.apply(
        dropping,
        P,
        blocks=LlamaDecoderLayer,
        schedule="linear-timm",
        mode="row",
        example_inputs=example,
        seed=seed,
    )
    source = torch.Generator().manual_seed(seed)
    loader = DataLoader(train, scale.batch, shuffle=True, drop_last=True, generator=source)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    batches = ((batch["input_ids"].to(device()), torch.empty(0)) for batch in endless)

    def loss(model: Any, tokens: Tensor, _: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens, labels=tokens).loss
        return found

    models = {"without": dense, f"p = {P:g}": dropping}
    train_by_turns(models, batches, loss, scale.steps, 3e-3, seed)
    sd.remove(dropping)
    return {name: model.eval() for name, model in models.items()}


def views(model: Any, held: Tensor, ranked_on: Tensor) -> dict[str, Any]:
    """Views of fewer layers: the first ones, and those that matter most for the loss."""
    layers = len(model.model.layers)
    example = {"input_ids": held[:1].to(device())}
    batch = {"input_ids": ranked_on.to(device()), "labels": ranked_on.to(device())}
    table = sd.importance(model, [batch], "greedy", of="blocks")
    found = {
        f"first {k}": sd.shallow(model, keep=range(k), example_inputs=example)
        for k in sorted({max(1, layers // 4), layers // 2, 3 * layers // 4})
    }
    for k in sorted({max(1, layers // 4), layers // 2}):
        found[f"best {k}"] = sd.shallow(model, keep=k, by=table, example_inputs=example)
    return found


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """How many tokens the model is given in each of its calls."""
    given: list[int] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield given
    finally:
        hook.remove()


def generate(model: Any, prompt: Tensor, new: int, assistant: Any = None) -> tuple[Tensor, float]:
    """The continuation, and the seconds of processor time that it took."""
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True}
    if assistant is not None:
        own = assistant.generation_config
        own.num_assistant_tokens, own.assistant_confidence_threshold = DRAFTS, 0.0
        own.num_assistant_tokens_schedule = "constant"
        options["assistant_model"] = assistant
    started = time.process_time()
    tokens: Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options
    )
    return tokens, time.process_time() - started


def measure(model: Any, held: Tensor, ranked_on: Tensor) -> dict[str, Any]:
    """Each held-out text continued by the model alone and with each view, by turns."""
    assistants = views(model, held, ranked_on)
    half = held.shape[1] // 2
    found: dict[str, Any] = {
        name: {"equal": [], "accepted": [], "ratio": []} for name in assistants
    }
    speeds = []
    for text in held:
        prompt = text[None, :half].to(device())
        alone, seconds = generate(model, prompt, half)
        speeds.append(half / seconds)
        for name, view in assistants.items():
            with counted(model) as given:
                tokens, assisted = generate(model, prompt, half, view)
            drafted = sum(given) - half - len(given) + 1  # the first call is given the prompt, too
            accepted = half - len(given)
            found[name]["equal"].append(torch.equal(tokens, alone))
            found[name]["accepted"].append(accepted / max(drafted, 1))
            found[name]["ratio"].append(seconds / assisted)
    return {"tokens per second": median(speeds), "views": found}


def report(store: Store, scale: Scale) -> None:
    """Print the table."""
    rows = []
    for run, found in store.runs.items():
        for name, view in found["views"].items():
            equal = view["equal"]
            rows.append(
                [
                    run,
                    f"{name} of {scale.layers}",
                    f"{sum(equal)} of {len(equal)}",
                    f"{100 * fmean(view['accepted']):.0f} %",
                    f"{found['tokens per second']:.0f}",
                    f"{median(view['ratio']):.2f}",
                ]
            )
    header = ["model", "view", "equal", "drafts accepted", "tokens/s alone", "speed with it, ×"]
    print(markdown(header, rows))


def main() -> None:
    size, seeds = arguments(__doc__, seeds=1)
    scale, store = SCALES[size], Store("assisted", size).load()
    sequences, held = load(scale)
    half = len(held) // 2
    for seed in range(seeds):
        names = [f"without, seed {seed}", f"p = {P:g}, seed {seed}"]
        if not all(name in store.runs for name in names):
            models = train(scale, seed, sequences)
            for name, model in zip(names, models.values(), strict=True):
                store.get(name, lambda m=model: measure(m, held[:half], held[half:]))
    report(store, scale)


if __name__ == "__main__":
    main()

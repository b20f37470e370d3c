"""Which tensors that enter a branch have the batch's samples, and are selected with it."""

import copy
import os
import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import stochastic_depth as sd

B, T, S, WIDTH = 4, 6, 7, 16
MASKED = "samples cannot be selected in 1 of 1 branches"


def count_rows(model: nn.Module, dim: int = 0) -> dict[str, Counter[int]]:
    """Filled with how many rows each linear layer is given, in how many calls."""
    rows: dict[str, Counter[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows[name] = Counter()
            module.register_forward_hook(
                lambda _, args, __, seen=rows[name]: seen.update([args[0].shape[dim]])
            )
    return rows


def assert_rows_are_selected(model: nn.Module, inputs: dict[str, Any], dim: int = 0) -> None:
    """In subset mode at p = 0.5, every linear layer in a branch sees half of the rows."""
    sd.apply(model, p=0.5, schedule="uniform", mode="subset", seed=0, example_inputs=inputs)
    assert sd.verify(model, inputs).passed
    blocks = {branch.name.split(":")[0] for branch in sd.branches(model)}
    rows = count_rows(model.train(), dim)
    model(**inputs)
    inside = {n: seen for n, seen in rows.items() if seen and n.startswith(tuple(blocks))}
    assert inside
    assert all(set(seen) == {B // 2} for seen in inside.values()), inside


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_decoder_s_memory_and_masks(batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(
        WIDTH, 2, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    target, memory = torch.randn(B, T, WIDTH), torch.randn(B, S, WIDTH)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 3:] = True
    inputs = {
        "tgt": target if batch_first else target.transpose(0, 1),
        "memory": memory if batch_first else memory.transpose(0, 1),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(T),
        "memory_key_padding_mask": padding,
    }
    assert_rows_are_selected(layer, inputs, dim=0 if batch_first else 1)


def config(kind: type) -> Any:
    return kind(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, use_cache=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [lambda: BertModel(config(BertConfig)), lambda: LlamaModel(config(LlamaConfig))],
    ids=["bert", "llama"],
)
def test_a_language_model_s_padding_mask_and_positions(build) -> None:
    mask = torch.ones(B, T, dtype=torch.long)
    mask[2, 3:] = 0
    inputs = {"input_ids": torch.randint(0, 50, (B, T)), "attention_mask": mask}
    assert_rows_are_selected(build(), inputs)


def test_whole_blocks_with_masks() -> None:
    model = BertModel(config(BertConfig)).train()
    inputs = {
        "input_ids": torch.randint(0, 50, (B, T)),
        "attention_mask": torch.ones(B, T, dtype=torch.long).tril(2),
    }
    sd.apply(model, 0.5, mode="subset", blocks="encoder.layer.[01]", example_inputs=inputs)
    assert sd.verify(model, inputs).passed
    sd.branches(model)[0].p = sd.branches(model)[1].p = 0.5
    rows = count_rows(model)
    model(**inputs)
    inside = [seen for name, seen in rows.items() if name.startswith("encoder.layer")]
    assert all(seen == Counter([B // 2]) for seen in inside)


class Attending(nn.Module):
    """x + attention(x, bias), where a bias may be for all samples or one for each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out((q @ k.transpose(1, 2) + bias).softmax(-1) @ v)


def applied(bias: Tensor, rows: int = B) -> nn.Module:
    x = torch.randn(rows, T, WIDTH)
    return sd.apply(Attending(), p=0.5, schedule="uniform", mode="subset", example_inputs=(x, bias))


def assert_right(model: nn.Module, rows: int, bias: Tensor) -> None:
    """Half of the samples are computed, without a warning, and the result is right."""
    x, seen = torch.randn(rows, T, WIDTH), count_rows(model)
    output = model(x, bias)
    assert set(seen["out"]) == {rows // 2}
    branch = sd.remove(copy.deepcopy(model))(x, bias) - x
    weights = ((output - x) / branch).detach().mean((1, 2)).round(decimals=3)
    assert sorted(weights.tolist()) == [0.0] * (rows - rows // 2) + [rows / (rows // 2)] * (
        rows // 2
    )


def test_a_mask_for_all_samples_stays_whole() -> None:
    model = applied(torch.zeros(T, T))
    seen = count_rows(model)
    model(torch.randn(B, T, WIDTH), torch.randn(T, T))
    model(torch.randn(2 * B, T, WIDTH), torch.randn(T, T))
    assert seen["out"] == Counter([B // 2, B])


def test_a_mask_for_all_is_one_also_where_it_has_the_size_of_the_batch() -> None:
    assert_right(applied(torch.zeros(T, T)), rows=T, bias=torch.randn(T, T))


def test_examples_to_which_no_sample_can_be_added_say_nothing() -> None:
    with pytest.warns(UserWarning, match=f"{MASKED}.*\n.*one sample more"):
        applied(torch.zeros(T, T), rows=T)


def test_a_table_with_as_many_rows_as_the_batch_is_not_cut() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, table: Tensor, index: Tensor) -> Tensor:
            return x + self.f(x * table[index])

    # The table has as many rows as the batch by chance: with more of them it works too.
    inputs = torch.randn(B, WIDTH), torch.randn(B, WIDTH), torch.arange(B) % 2
    model = Reading()
    expected = model(*inputs)
    with pytest.warns(UserWarning, match=MASKED):
        sd.apply(model, 0.5, schedule="uniform", mode="subset", scale="none", example_inputs=inputs)
    output = model(*inputs)
    kept = (output != inputs[0]).any(1)
    assert int(kept.sum()) == B // 2
    torch.testing.assert_close(output[kept], expected[kept])


def test_rows_that_the_model_mixes_are_not_selected() -> None:
    class Tiling(nn.Module):
        """timm's GCViT: the queries are repeated in another order than the windows."""

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, query: Tensor) -> Tensor:
            windows = x.flatten(0, 1)
            mixed = windows * query.repeat(len(windows) // len(query), 1)
            return x + self.out(mixed).view_as(x)

    inputs = torch.randn(B, T, WIDTH), torch.randn(B, WIDTH)
    with pytest.warns(UserWarning, match=f"{MASKED}.*\n.*depend on each other"):
        model = sd.apply(Tiling(), p=0.5, mode="row", example_inputs=inputs)
    assert sd.verify(model, inputs).passed


def test_on_the_meta_device_there_are_no_values_that_show_whether_rows_mix() -> None:
    with torch.device("meta"):
        model = nn.TransformerDecoderLayer(WIDTH, 2, 32, batch_first=True)
        inputs = torch.randn(B, T, WIDTH), torch.randn(B, S, WIDTH)
        with pytest.warns(UserWarning, match="samples cannot be selected in 3 of 3 branches"):
            sd.apply(model, p=0.5, mode="row", example_inputs=inputs)
    assert len(sd.branches(model)) == 3


@pytest.mark.parametrize("many", [1, B])
def test_one_sample_is_told_from_what_is_broadcast(many: int) -> None:
    assert_right(applied(torch.zeros(1, T, T), rows=1), rows=B, bias=torch.randn(many, T, T))


def test_a_bias_for_each_sample_where_one_for_all_was_shown() -> None:
    assert_right(applied(torch.zeros(1, T, T)), rows=B, bias=torch.randn(B, T, T))


def test_copies_and_pickles_know_the_rows_too() -> None:
    model = applied(torch.zeros(B, T, T))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        seen = count_rows(twin)
        twin(torch.randn(B, T, WIDTH), torch.randn(B, T, T))
        assert seen["out"] == Counter([B // 2])


@pytest.mark.filterwarnings("ignore:.*too little of its inputs:UserWarning")
@pytest.mark.parametrize("bias", [torch.randn(T, T), torch.randn(1, T, T), torch.randn(B, T, T)])
def test_without_examples_the_first_training_call_tells_the_samples(bias: Tensor) -> None:
    model = sd.apply(Attending(), 0.5, schedule="uniform", mode="subset")
    model(torch.randn(B, T, WIDTH), bias)
    assert_right(model, rows=B, bias=bias)


def test_looking_at_examples_counts_nothing_up() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + self.f(x * y)

    model, x = Block(), torch.randn(B, WIDTH)
    before = copy.deepcopy(model.state_dict())
    sd.apply(model, p=1.0, mode="row", example_inputs=(x, x))
    model(x, x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


PEAK = """
import resource, torch, stochastic_depth as sd
from torch import nn

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(64, 64)

    def forward(self, x, bias):
        return x + self.f(x + bias)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(24))

    def forward(self, x, bias):
        for block in self.blocks:
            x = block(x, bias)
        return x

inputs = torch.randn(4, 10000, 64), torch.randn(4, 1, 64)  # 10 MiB a block
model = Model()
with torch.no_grad():
    model(*inputs)
before = peak()
sd.apply(model, 0.2, mode="row", example_inputs=inputs)
print(peak() - before)
"""


def test_looking_at_examples_keeps_none_of_their_values() -> None:
    # glibc gives large tensors memory of their own here: else what is freed goes back piecemeal
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", PEAK]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    # MiB; all blocks' outputs are 240. The outputs that apply compares are some 110, in double.
    assert int(done.stdout) < 160

"""The engines' own tools, started as a user would start them: see docs/engines.md."""

import copy
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
from accelerate import Accelerator
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from peft import LoraConfig, get_peft_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import stochastic_depth as sd
from stochastic_depth.integrations.lightning import StochasticDepthCallback as LightningCallback
from stochastic_depth.integrations.transformers import StochasticDepthCallback

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*"),
    pytest.mark.filterwarnings("ignore:.*(Checkpoint directory|Experiment logs directory)"),
    pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.GradScaler.*"),
]


def dropped(model: nn.Module) -> int:
    return sum(branch.dropped for branch in sd.branches(model))


# Lightning's command line, from a YAML file.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(*[Block() for _ in range(4)], nn.Linear(8, 3))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, labels = batch
        return cross_entropy(self.model(x), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(32, 8, generator=generator)
        labels = torch.randint(3, (32,), generator=generator)
        return DataLoader(TensorDataset(x, labels), 4)


CONFIG = """
seed_everything: 7
trainer:
  accelerator: cpu
  max_epochs: {epochs}
  accumulate_grad_batches: 2
  precision: {precision}
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  callbacks:
    - class_path: stochastic_depth.integrations.lightning.StochasticDepthCallback
      init_args:
        rate_schedule: linear
        steps: 16
      dict_kwargs:
        p: 0.5
        mode: row
        schedule: uniform
        seed: 3
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        dirpath: {folder}
        filename: "{{epoch}}"
        save_top_k: -1
"""


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])  # LightningCLI warns of others than its own


def cli(folder: Path, epochs: int, *more: str, precision: str = "32-true") -> L.LightningModule:
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder, epochs=epochs, precision=precision))
    arguments = ["fit", "--config", str(config), *more]
    options = {"overwrite": True}  # the copy of the configuration that it leaves in the folder
    return LightningCLI(Module, Data, args=arguments, save_config_kwargs=options).model


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightnings_cli_takes_the_callback_from_yaml_and_resumes(tmp_path, precision):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = cli(tmp_path / "whole", 4, precision=precision)
    assert [branch.mode for branch in sd.branches(whole)] == ["row"] * 4
    assert [branch.target for branch in sd.branches(whole)] == [0.5] * 4  # uniform over depth
    assert [branch.p for branch in sd.branches(whole)] == [0.5] * 4  # after 16 optimizer steps
    assert dropped(whole) > 0
    cli(tmp_path / "cut", 2, precision=precision)
    resume = "--ckpt_path", str(tmp_path / "cut" / "epoch=1.ckpt"), "--weights_only", "false"
    resumed = cli(tmp_path / "cut", 4, *resume, precision=precision)
    assert dropped(resumed) == dropped(whole)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_lightning_averages_the_weights_of_a_checkpointed_model(tmp_path):
    """With a decay of 0 the average is the last step's, so training has to be as without it."""

    class Checkpointed(Module):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            x, labels = batch
            for block in self.model:
                x = checkpoint(block, x, use_reentrant=False)
            return cross_entropy(x, labels)

    def fit(module: type[Module], *more: L.Callback) -> Module:
        torch.manual_seed(0)
        trained = module()
        callback = LightningCallback("linear", steps=16, p=0.5, mode="row", seed=3)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[callback, *more],
        )
        trainer.fit(trained, Data())
        return trained

    whole = fit(Module)
    for trained in (
        fit(Module, EMAWeightAveraging(decay=0.0)),
        fit(Checkpointed, EMAWeightAveraging(decay=0.0)),
    ):
        assert dropped(trained) == dropped(whole) > 0
        for ours, theirs in zip(trained.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
    averaged = fit(Module, EMAWeightAveraging(decay=0.5))
    assert not torch.equal(averaged.model[0].linear.weight, whole.model[0].linear.weight)


# Accelerate, in this process and as its command does it.


class State:
    """What accelerate's save_state and load_state take along."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, object]:
        return sd.state_dict(self.model)

    def load_state_dict(self, state: dict[str, object]) -> None:
        sd.load_state_dict(self.model, state)


@pytest.mark.parametrize(
    ("lora", "checkpointed"), [(False, False), (True, True)], ids=["full", "checkpointed LoRA"]
)
def test_accelerate_resumes_checkpointed_with_lora_and_average(tmp_path, lora, checkpointed):
    def run(start: int, stop: int) -> tuple[nn.Module, nn.Module]:
        accelerator = Accelerator(cpu=True)
        model = bert(lora)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        batches = DataLoader(Texts(), 4, generator=torch.Generator())  # numbers of its own
        sd.apply(model, p=0.5, mode="row", seed=3, example_inputs=dict(next(iter(batches))))
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        prepared, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        accelerator.register_for_checkpointing(State(model), average)
        if start:
            accelerator.load_state(str(tmp_path))
        for step, batch in enumerate(batches):
            if start <= step < stop:
                accelerator.backward(prepared.train()(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(model)
        if stop == 4:
            accelerator.save_state(str(tmp_path))
        accelerator.free_memory()
        return model, average

    whole, average = run(0, 8)
    assert dropped(whole) > 0
    run(0, 4)
    resumed, again = run(4, 8)
    assert dropped(resumed) == dropped(whole)
    for ours, theirs in (
        *zip(resumed.parameters(), whole.parameters(), strict=True),
        *zip(again.parameters(), average.parameters(), strict=True),
    ):
        assert torch.equal(ours, theirs)


def test_accelerate_launch_starts_the_example(tmp_path):
    # One process: on CPUs, accelerate starts several by MPI alone.
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launch, "tests/run_example.py", "examples/on_accelerate.py"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,  # the watchdog
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"rank (\d): loss ([\d.]+), weights ([\d.]+), dropped (\d+)", done.stdout)
    ((rank, *_, count),) = lines
    assert rank == "0"
    assert int(count) > 0


# transformers' Trainer, from arguments as on a command line.


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(3, 50, (8,), generator=generator)
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones(8, dtype=int),
            "labels": index % 2,
        }


def bert(lora: bool) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"]))
    return model


def train(folder: Path, *given: str, lora: bool = False, resume: bool = False) -> Trainer:
    common = ["--output_dir", str(folder), "--use_cpu", "--max_steps", "8", "--save_steps", "4"]
    common += [
        "--per_device_train_batch_size",
        "4",
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
    ]
    common += ["--learning_rate", "0.01", "--gradient_accumulation_steps", "2"]
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        [*common, *given]
    )
    callback = StochasticDepthCallback("linear", steps=8, p=0.5, mode="row", seed=3)
    trainer = Trainer(bert(lora), arguments, train_dataset=Texts(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    return trainer


@pytest.mark.parametrize(
    ("given", "lora"),
    [([], False), (["--bf16"], True), (["--activation_checkpointing"], True)],
    ids=["plain", "bf16 LoRA", "activation checkpointing LoRA"],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_the_trainer_takes_its_arguments_and_resumes(tmp_path, given, lora):
    whole = train(tmp_path, *given, lora=lora)
    count = dropped(whole.model)
    assert count > 0
    assert [branch.p for branch in sd.branches(whole.model)][-1] == 0.5
    assert math.isfinite(whole.state.log_history[-1]["train_loss"])
    expected = [p.detach().clone() for p in whole.model.parameters()]
    resumed = train(tmp_path, *given, lora=lora, resume=True)
    assert dropped(resumed.model) == count
    for ours, theirs in zip(resumed.model.parameters(), expected, strict=True):
        assert torch.equal(ours, theirs)


# timm's own loop: its optimizer, scheduler, scaler, and average of the weights.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timms_loop(dtype):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    model.set_grad_checkpointing()
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(3, (16,))
    sd.apply(model, p=0.5, mode="row", example_inputs=images[:4], seed=0)
    plain = copy.deepcopy(sd.remove(copy.deepcopy(model)))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2, warmup_epochs=1)
    average, scaler = ModelEmaV3(model, decay=0.5), NativeScaler(device="cpu")
    losses = []
    for epoch in range(2):
        for i in range(0, 16, 4):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = cross_entropy(model(images[i : i + 4]), labels[i : i + 4]) / 2
            updates = i % 8 == 4  # the gradients of two batches
            scaler(loss, optimizer, 1.0, parameters=model.parameters(), need_update=updates)
            if updates:
                optimizer.zero_grad()
                average.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
    assert all(map(math.isfinite, losses))
    assert dropped(model) > 0
    # The average is a network like any other, and its checkpoint loads into a plain one.
    plain.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), average.module.eval()(images))

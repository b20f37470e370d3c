"""Lightning and transformers' Trainer: driven, logged, and resumed to the bit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import stochastic_depth as sd
from stochastic_depth.integrations import common
from stochastic_depth.integrations import lightning as on_lightning
from stochastic_depth.integrations import transformers as on_transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

IMAGES, BATCH, EPOCHS = 24, 4, 4
STEPS = EPOCHS * IMAGES // BATCH
TARGETS = [0.6 * (level / 4) for level in range(1, 5)]  # linear with depth


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block() for _ in range(4)])
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.dropout(self.blocks(x)))
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(IMAGES, 4, generator=generator)
    return TensorDataset(images, torch.randint(0, 3, (IMAGES,), generator=generator))


class Stop(Exception):
    """Stands for the power that goes off."""


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(map(torch.equal, ours, theirs))


def expected_rates(step: int, steps: int) -> list[float]:
    return [step / steps * rate for rate in TARGETS]


# Lightning


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Classifier()
        self.rates: list[list[float]] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.rates.append([branch.p for branch in sd.branches(self)])
        return self.model(*batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


class StopAt(L.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise Stop


def fit(folder: Path, callback: L.Callback, *callbacks: L.Callback, resume=None, **options):
    module = Module()
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[callback, *callbacks, ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )
    loader = DataLoader(data(), BATCH, shuffle=True)
    torch.manual_seed(5 if resume is None else 99)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=False)
    return module, trainer


def lightning_callback(**options: Any) -> L.Callback:
    options = {"p": 0.6, **options}
    return on_lightning.StochasticDepthCallback("linear", **options)


@pytest.mark.parametrize("seed", [None, 3], ids=["default generator", "own generator"])
@pytest.mark.parametrize("mode", ["batch", "row"])
def test_lightning_resumes_to_the_bit(tmp_path, mode, seed):
    whole, _ = fit(tmp_path / "whole", lightning_callback(mode=mode, seed=seed))
    assert whole.rates == [pytest.approx(expected_rates(step, STEPS)) for step in range(STEPS)]
    assert [branch.p for branch in sd.branches(whole)] == TARGETS

    cut = tmp_path / "cut"
    with pytest.raises(Stop):
        fit(cut, lightning_callback(mode=mode, seed=seed), StopAt(2))
    (checkpoint,) = cut.glob("epoch=1*.ckpt")
    resumed, _ = fit(cut, lightning_callback(mode=mode, seed=seed), resume=checkpoint)
    assert resumed.rates == whole.rates[STEPS // 2 :]
    assert_same(weights(resumed), weights(whole))
    counts = [[(b.decided, b.dropped) for b in sd.branches(m)] for m in (resumed, whole)]
    assert counts[0] == counts[1]
    assert sum(dropped for _, dropped in counts[0]) > 0


def test_lightning_logs_what_happens(tmp_path):
    fit(tmp_path, lightning_callback())
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    logged = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    depth = [float(row["stochastic_depth/expected_depth"]) for row in logged]
    assert depth == pytest.approx([4 - 1.5 * step / STEPS for step in range(STEPS)])
    dropped = [float(row["stochastic_depth/dropped"]) for row in logged]
    assert dropped == sorted(dropped)
    assert dropped[-1] > 0


def test_lightning_counts_optimizer_steps_and_not_batches(tmp_path):
    module, trainer = fit(tmp_path, lightning_callback(), accumulate_grad_batches=3)
    assert trainer.global_step == STEPS / 3
    for batch, rates in enumerate(module.rates):
        assert rates == pytest.approx(expected_rates(batch // 3, STEPS // 3))


def test_lightning_leaves_an_applied_model_and_its_rates(tmp_path):
    class Applied(on_lightning.StochasticDepthCallback):
        def setup(self, trainer, pl_module, stage):
            sd.apply(pl_module, 0.6, include="*.3:*")
            super().setup(trainer, pl_module, stage)

    module, _ = fit(tmp_path / "a", Applied())
    assert module.rates == [[0.6]] * STEPS
    with pytest.raises(ValueError, match="stochastic depth already, so p would have no effect"):
        fit(tmp_path / "b", Applied(p=0.1))


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_callback_without_a_schedule_leaves_the_rates_to_another(by_hand: bool) -> None:
    layers = [sd.StochasticDepth(nn.Linear(4, 4), 0.4) if by_hand else Block() for _ in range(2)]
    model = nn.Sequential(*layers)
    if not by_hand:
        sd.apply(model, 0.4, example_inputs=torch.ones(2, 4))
    mine = sd.RateSchedule(model, "linear", steps=4)
    common.ensure_applied(model, {})
    theirs = common.rate_schedule(model, None, None, 100)
    for share in (0.0, 0.25, 0.5):
        assert [b.p for b in sd.branches(model)] == [share * b.target for b in sd.branches(model)]
        assert theirs.metrics() == pytest.approx(mine.metrics())
        theirs.step()
        mine.step()


# transformers


class Rates(TrainerCallback):
    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.rates: list[list[float]] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.rates.append([branch.p for branch in sd.branches(model)])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_after:
            raise Stop


class Examples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, label = data()[index]
        return {"x": x, "labels": label}


def train(folder, callback, stop_after=None, resume=None, **options):
    torch.manual_seed(0)
    model, watching = Classifier(), Rates(stop_after)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        save_steps=5,
        logging_steps=1,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=5,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Examples(), callbacks=[callback, watching])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, trainer, watching.rates


def hf_callback(**options: Any) -> TrainerCallback:
    options = {"p": 0.6, **options}
    return on_transformers.StochasticDepthCallback("linear", **options)


@pytest.mark.parametrize(
    ("mode", "seed"), [("batch", None), ("row", 3)], ids=["default generator", "own generator"]
)
def test_the_trainer_resumes_to_the_bit(tmp_path, mode, seed):
    whole, _, rates = train(tmp_path / "whole", hf_callback(mode=mode, seed=seed))
    assert rates == [pytest.approx(expected_rates(step, STEPS)) for step in range(STEPS)]
    assert [branch.p for branch in sd.branches(whole)] == TARGETS

    cut = tmp_path / "cut"
    with pytest.raises(Stop):
        train(cut, hf_callback(mode=mode, seed=seed), stop_after=13)
    checkpoint = cut / "checkpoint-10"  # in the middle of an epoch
    resumed, _, later = train(cut, hf_callback(mode=mode, seed=seed), resume=checkpoint)
    assert later == rates[10:]
    assert_same(weights(resumed), weights(whole))
    counts = [[(b.decided, b.dropped) for b in sd.branches(m)] for m in (resumed, whole)]
    assert counts[0] == counts[1]
    assert sum(dropped for _, dropped in counts[0]) > 0


def test_the_trainer_logs_what_happens_and_counts_optimizer_steps(tmp_path):
    _, trainer, rates = train(tmp_path, hf_callback(), gradient_accumulation_steps=2)
    steps = STEPS // 2
    assert rates == [pytest.approx(expected_rates(step, steps)) for step in range(steps)]
    logged = [row for row in trainer.state.log_history if "loss" in row]
    depth = [row["stochastic_depth/expected_depth"] for row in logged]
    assert depth == pytest.approx([4 - 1.5 * (step + 1) / steps for step in range(steps)])
    assert logged[-1]["stochastic_depth/dropped"] > 0


def test_the_trainer_refuses_what_would_go_on_with_other_rates(tmp_path):
    train(tmp_path, hf_callback())
    with pytest.raises(ValueError, match="set it to False"):
        train(tmp_path / "new", hf_callback(), restore_callback_states_from_checkpoint=True)

    class Nothing(TrainerCallback):
        pass

    train(tmp_path / "plain", Nothing())
    with pytest.raises(ValueError, match="saved without this callback"):
        train(tmp_path / "plain", hf_callback(), resume=tmp_path / "plain" / "checkpoint-5")


def test_the_trainer_may_wrap_the_model_before_training(tmp_path):
    """As it does with FSDP1, which needs an accelerator."""
    model, callback = Classifier(), hf_callback()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    Trainer(model, arguments, callbacks=[callback])
    state = TrainerState(max_steps=STEPS)
    callback.on_train_begin(arguments, state, TrainerControl(), model=nn.Sequential(model))
    assert [branch.p for branch in sd.branches(model)] == [0.0] * len(TARGETS)
    for _ in range(STEPS):
        callback.on_step_end(arguments, state, TrainerControl())
    assert [branch.p for branch in sd.branches(model)] == TARGETS


@pytest.mark.filterwarnings("ignore:.*too little of its inputs:UserWarning")
@pytest.mark.parametrize("engine", ["lightning", "trainer"])
def test_a_model_that_waits_for_its_first_batch_resumes_to_the_bit(tmp_path, monkeypatch, engine):
    monkeypatch.setattr(sys.modules["stochastic_depth.apply"], "guess_inputs", lambda _: None)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    if engine == "lightning":
        expected, *_ = fit(whole, lightning_callback(seed=3))
        with pytest.raises(Stop):
            fit(cut, lightning_callback(seed=3), StopAt(2))
        resumed, *_ = fit(cut, lightning_callback(seed=3), resume=next(cut.glob("epoch=1*.ckpt")))
    else:
        expected, *_ = train(whole, hf_callback(seed=3))
        with pytest.raises(Stop):
            train(cut, hf_callback(seed=3), stop_after=13)
        resumed, *_ = train(cut, hf_callback(seed=3), resume=cut / "checkpoint-10")
    assert_same(weights(resumed), weights(expected))
    counts = [[(b.p, b.decided, b.dropped) for b in sd.branches(m)] for m in (resumed, expected)]
    assert counts[0] == counts[1]


def test_the_package_imports_no_engine():
    script = (
        "import sys, stochastic_depth, stochastic_depth.integrations; "
        "print({'lightning', 'transformers', 'accelerate', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr

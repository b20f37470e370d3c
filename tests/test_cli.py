"""What `finetune` leaves, how it is interrupted and resumed, and what `predict` makes of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

import stochastic_depth as sd
from stochastic_depth.cli import main
from stochastic_depth.cli.settings import Settings
from stochastic_depth.cli.task import Task
from stochastic_depth.cli.training import Turns, Variant

TINY = [
    *("--model", "timm/test_resnet", "--weights", "none", "--image-size", "32"),
    *("--epochs", "3", "--batch-size", "8", "--seeds", "1"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("images")
    for name, shade in (("dark", 40), ("bright", 200)):
        (root / name).mkdir()
        for index in range(16):
            colour = (shade, 8 * index, 128)
            Image.new("RGB", (32, 32), colour).save(root / name / f"{index}.png")
    return str(root)


def finetune(*options: object) -> int:
    return main(["finetune", *map(str, options)])


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / run / "model.pt", weights_only=True)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def untimed(results: list[dict]) -> list[dict]:
    return [{key: r[key] for key in r if key != "step_seconds"} for r in results]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.fixture(scope="module")
def uninterrupted(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert finetune("--data", images, *TINY, "--p", "0,0.5", "--out", folder) == 0
    return folder


def test_a_comparison_leaves_all_that_it_measured_and_no_checkpoints(uninterrupted):
    found = metrics(uninterrupted)
    assert found["settings"]["p"] == [0.0, 0.5]
    assert found["machine"]["torch"] == torch.__version__
    assert [(result["seed"], result["p"]) for result in found["results"]] == [(0, 0.0), (0, 0.5)]
    without, with_ = found["results"]
    assert without["expected_depth"] == without["realised_depth"] == 4
    assert with_["expected_depth"] == 2.75  # 4 branches, the last at 0.5
    assert 0 < with_["realised_depth"] < 4
    assert without["flops"] == 1
    assert 0 < with_["flops"] < 1
    for result in found["results"]:
        assert [sorted(epoch) for epoch in result["history"]] == 3 * [
            ["train_loss", "val_calibration_error", "val_error", "val_nll"]
        ]
        assert sorted(result["last"]) == ["calibration_error", "error", "nll"]
        assert result["step_seconds"] > 0
        errors = [epoch["val_error"] for epoch in result["history"]]
        assert errors[result["chosen_epoch"] - 1] == min(errors)
        assert len(set(result["ranking"])) == 4
        assert [point["branches"] for point in result["curve"]] == [4, 3, 2, 1]
        assert result["curve"][0]["error"] == result["chosen"]["error"]
    row = found["summary"]["test error, 2 of 4 branches left, %"]
    assert row["p = 0.5"] == [100 * with_["curve"][2]["error"]]
    ratio = found["summary"]["time per step, ms"]["p = 0.5 over without"]
    assert ratio["mean"] == pytest.approx(with_["step_seconds"] / without["step_seconds"])
    assert ratio["half_width_95"] is None
    models = ["model.json", "model.pt"]
    assert {path.name for path in uninterrupted.iterdir() if path.is_file()} == {
        *("curves.png", "metrics.json", "settings.json", "seed0.json")
    }
    for run in uninterrupted.glob("*/"):
        assert run.name in ("seed0-p0.5", "seed0-without")
        assert sorted(path.name for path in run.iterdir()) == models


def test_the_plan_names_runs_time_and_folder(images, tmp_path, capsys):
    options = ["--p", "0.2,0.5,0", "--seeds", 2, "--epochs", 1, "--label-noise", 0.25]
    out = tmp_path / "run"
    assert finetune("--data", images, *TINY, *options, "--out", out) == 0
    output = capsys.readouterr().out
    assert "6 of the 24 training images get the label of another class" in output
    assert (
        "Plan: 6 runs: 2 seeds, each without stochastic depth and p = 0.2 and p = 0.5, trained by "
        "turns; 1 epoch of 3 steps, at most 8 images each; about "
    ) in output
    assert f"Files go to {out}; if interrupted, continue with: " in output
    assert "seed 1 of 2, epoch 1 of 1: validation error " in output  # and the time left
    assert "seed 2 of 2, p = 0.5: test error" in output
    assert "With 25 % of the training labels wrong, stochastic depth at p = 0.2 " in output
    assert "95 % interval" in output
    found = metrics(out)
    assert len(found["findings"]) == 2
    assert len(found["results"]) == 6


def test_a_rate_that_never_drops_is_the_same_to_the_bit_as_without(images, tmp_path):
    """The same start, the same batches, the same draws: only dropped branches differ."""
    assert finetune("--data", images, *TINY, "--p", "0,1e-12", "--out", tmp_path / "run") == 0
    run = tmp_path / "run"
    assert_same(weights(run, "seed0-p1e-12"), weights(run, "seed0-without"))
    without, with_ = metrics(run)["results"]
    assert with_["last"] == without["last"]
    assert with_["history"] == without["history"]


def test_the_rates_are_trained_by_turns(images, tmp_path, monkeypatch):
    """So a busy machine slows all alike; who is first rotates."""
    order = []
    monkeypatch.setattr(Task, "seconds", lambda task: 1.0)  # takes steps too, for the plan
    monkeypatch.setattr(Variant, "forward", recording(order, Variant.forward))
    options = ["--p", "0,0.2,0.5", "--epochs", 2, "--out", tmp_path / "run"]
    assert finetune("--data", images, *TINY, *options) == 0
    turn = [0.0, 0.2, 0.5]
    by_step = [turn[step % 3 :] + turn[: step % 3] for step in range(3)]  # three steps an epoch
    assert order == 2 * [p for step in by_step for p in step]


def recording(order: list[float], forward: Callable) -> Callable:
    """The rates of the variants in the order of their training steps."""

    def record(self: Variant, images: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            order.append(self.p)
        return forward(self, images)

    return record


def test_realised_depth_counts_what_ran(images, tmp_path):
    options = ["--p", 1, "--schedule", "uniform", "--out", tmp_path / "run"]
    assert finetune("--data", images, *TINY, *options) == 0
    (result,) = metrics(tmp_path / "run")["results"]
    assert result["expected_depth"] == result["realised_depth"] == 0
    assert result["flops"] == pytest.approx(result["expected_flops"])


def interrupt(images: str, folder: Path) -> int:
    """What Ctrl-C in the third epoch gives."""

    def press(self: Turns) -> None:
        if self.current_epoch == 2:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Turns, "on_train_epoch_start", press)
            return finetune("--data", images, *TINY, "--p", "0,0.5", "--out", folder)
    finally:
        signal.signal(signal.SIGINT, before)  # which Lightning has switched off


@pytest.fixture
def interrupted(images: str, tmp_path: Path) -> Path:
    assert interrupt(images, tmp_path / "run") == 130
    return tmp_path / "run"


def test_ctrl_c_says_how_to_continue(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert interrupt(images, Path("run")) == 130
    command = f"stochastic-depth finetune --resume {tmp_path / 'run'}"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stochastic-depth finetune: interrupted; continue with: ")
    assert last.endswith(command)


def test_a_run_is_resumed_from_anywhere_and_ends_where_the_uninterrupted_one_does(
    images, uninterrupted, tmp_path, monkeypatch
):
    shutil.copytree(images, tmp_path / "here" / "images")
    monkeypatch.chdir(tmp_path / "here")
    assert interrupt("images", tmp_path / "run") == 130
    monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert finetune("--resume", "run") == 0
    for run in ("seed0-without", "seed0-p0.5"):
        assert_same(weights(tmp_path / "run", run), weights(uninterrupted, run))
    mine, theirs = (metrics(folder)["results"] for folder in (tmp_path / "run", uninterrupted))
    assert untimed(mine) == untimed(theirs)
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize(("damage", "spoiled"), [("cut", 1), ("flipped", 1), ("emptied", 2)])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(
    interrupted, uninterrupted, damage, spoiled, capsys
):
    kept = sorted((interrupted / "seed0-checkpoints").glob("*.ckpt"))
    assert len(kept) == 2
    for checkpoint in kept[-spoiled:]:
        content = bytearray(checkpoint.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 1
        else:
            del content[len(content) // 2 if damage == "cut" else 0 :]
        checkpoint.write_bytes(content)
    assert finetune("--resume", interrupted) == 0
    message = capsys.readouterr().err
    for checkpoint in kept[-spoiled:]:
        assert f"the checkpoint {checkpoint} is cut short or corrupted; continuing" in message
    assert message.count("cut short") == spoiled
    assert_same(weights(interrupted, "seed0-p0.5"), weights(uninterrupted, "seed0-p0.5"))


def test_a_finished_run_is_only_reported_again(uninterrupted, monkeypatch):
    before = (uninterrupted / "metrics.json").read_text()
    monkeypatch.setattr("lightning.Trainer.fit", lambda *args, **kwargs: pytest.fail("trained"))
    assert finetune("--resume", uninterrupted) == 0
    assert (uninterrupted / "metrics.json").read_text() == before


def test_what_is_left_out_is_said_and_kept(images, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    (data / "dark" / "3.png").write_bytes(b"not an image")
    (data / "dark" / "notes.txt").touch()
    (data / ".ipynb_checkpoints").mkdir()
    (data / "lone").mkdir()
    shutil.copy(data / "dark" / "1.png", data / "lone")
    out = tmp_path / "run"
    assert finetune("--data", data, *TINY, "--epochs", 1, "--logger", "csv", "--out", out) == 0
    output = capsys.readouterr().out
    assert "Images left out, as they cannot be read: 1\n" in output
    assert f"Files ignored, as they are no images: 1\n  {data / 'dark' / 'notes.txt'}" in output
    assert "Warning: class 'lone' is small: 1 training, 0 validation and 0 test images." in output
    found = metrics(out)
    assert str(data / "dark" / "3.png") in found["images_left_out"][0]
    assert found["files_ignored"] == [str(data / "dark" / "notes.txt")]
    header = (out / "logs" / "seed0" / "metrics.csv").read_text().splitlines()[0]
    assert {"p0.2/train_loss", "p0.2/val_error", "p0.2/val_nll"} <= set(header.split(","))


def test_predict_names_the_classes(uninterrupted, images, capsys):
    pictures = [str(Path(images, name, "0.png")) for name in ("dark", "bright")]
    assert main(["predict", str(uninterrupted), *pictures]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"Using {uninterrupted / 'seed0-'}")
    assert [line.split(": ")[0] for line in lines] == pictures
    assert all("dark" in line and "bright" in line and " %" in line for line in lines)
    assert main(["predict", str(uninterrupted / "seed0-p0.5"), pictures[0]]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_snippet_loads_the_model_that_predict_uses(uninterrupted, images, capsys):
    folder = uninterrupted / "seed0-p0.5"
    info = json.loads((folder / "model.json").read_text())
    assert info["classes"] == ["bright", "dark"]
    assert (info["model"], info["p"], info["image_size"]) == ("timm/test_resnet", 0.5, 32)
    names: dict = {}
    exec(info["snippet"], names)
    picture = Path(images, "dark", "0.png")
    with Image.open(picture) as image, torch.inference_mode():
        chance = names["model"](names["prepare"](image)[None]).softmax(1)[0, 1]
    assert main(["predict", str(folder), str(picture)]) == 0
    assert f"dark {100 * chance:.1f} %" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")  # by torchmetrics
def test_a_run_that_diverged_is_reported_all_the_same(images, tmp_path, capsys):
    options = ["--p", 0.5, "--lr", 1e30, "--out", tmp_path / "run"]
    assert finetune("--data", images, *TINY, *options) == 0
    output = capsys.readouterr().out
    assert "Kept p = 0.5, seed 1, as they cannot be ranked: every branch (the loss of" in output
    options = ["--keep", "3", "--out", str(tmp_path / "less.pt")]
    assert main(["prune", str(tmp_path / "run"), *options]) == 2
    assert "0 of the 4 branches of" in capsys.readouterr().err


def test_a_pruned_file_is_what_the_run_skipped_and_predict_and_the_snippet_use_it(
    uninterrupted, images, tmp_path, capsys
):
    run, out = uninterrupted / "seed0-p0.5", tmp_path / "new" / "less.pt"
    assert main(["prune", str(run), "--keep", "2", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    info = json.loads((run / "model.json").read_text())
    gone = info["ranking"][:2]
    assert f"took out 2 of 4 branches: {', '.join(gone)}." in output
    assert f"Test error: {100 * info['curve'][2]['error']:.1f} %, against" in output
    whole, less, pixels = {}, {}, torch.rand(4, 3, 32, 32)
    exec(info["snippet"], whole)
    exec(torch.load(out, weights_only=True)["info"]["snippet"], less)
    counts = [sum(p.numel() for p in made["model"].parameters()) for made in (whole, less)]
    assert f"Parameters: {counts[1]:,} of {counts[0]:,}" in output
    assert counts[1] < counts[0]
    with torch.no_grad():
        with sd.skip(whole["model"], gone, pixels):
            skipped = whole["model"](pixels)
        assert torch.equal(less["model"](pixels), skipped)
    picture = Path(images, "dark", "0.png")
    assert main(["predict", str(out), str(picture)]) == 0
    with Image.open(picture) as image, torch.inference_mode():
        chance = less["model"](less["prepare"](image)[None]).softmax(1)[0, 1]
    assert f"dark {100 * chance:.1f} %" in capsys.readouterr().out


def test_a_model_of_transformers_is_pruned_to_a_file(images, tmp_path, capsys):
    ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[2] * 4, num_labels=2)
    ).save_pretrained(tmp_path / "model")
    run, out = tmp_path / "run", tmp_path / "less.pt"
    options = ["--model", tmp_path / "model", *TINY[2:], "--p", 0.5, "--out", run]
    assert finetune("--data", images, *options) == 0
    (result,) = metrics(run)["results"]
    keep = len(result["curve"]) - 2
    assert main(["prune", str(run), "--keep", str(keep), "--out", str(out)]) == 0
    names: dict = {}
    exec(torch.load(out, weights_only=True)["info"]["snippet"], names)
    assert main(["predict", str(out), str(Path(images, "dark", "0.png"))]) == 0


def finetune_on_two_devices(*options: object, **environment: str) -> None:
    """In a process of its own, of which Lightning starts another one."""
    done = subprocess.run(
        [sys.executable, RUN_COMMAND, "finetune", *map(str, options)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=250,  # the watchdog
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Files go to") == 1, done.stdout  # the first process alone prints


RUN_COMMAND = Path(__file__).parent / "run_command.py"


@pytest.mark.timeout(600)  # four processes, each of which imports everything
def test_two_devices_see_every_image_once_and_resume(images, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--p", "0,0.5", "--devices", 2, "--strategy", "ddp", "--out", whole]
    finetune_on_two_devices("--data", images, *TINY, *options, COPY_TO=str(cut))
    results = metrics(whole)["results"]
    assert [len(result["history"]) for result in results] == [3, 3]
    assert 0 < results[1]["realised_depth"] < 4
    assert not (cut / "seed0.json").exists()
    finetune_on_two_devices("--resume", cut)
    assert_same(weights(cut, "seed0-p0.5"), weights(whole, "seed0-p0.5"))
    assert untimed(metrics(cut)["results"]) == untimed(results)


@pytest.mark.parametrize("quickest", [1, 2])
def test_the_quicker_number_of_threads_is_taken_and_kept(monkeypatch, quickest) -> None:
    task = object.__new__(Task)
    task.settings = Settings.from_options()
    seconds = lambda task: abs(torch.get_num_threads() - quickest)  # noqa: E731
    monkeypatch.setattr(Task, "step_seconds", seconds)
    try:
        torch.set_num_threads(2)
        task.choose_threads()
        assert (task.settings.threads, torch.get_num_threads()) == (quickest, quickest)
        monkeypatch.setattr(Task, "step_seconds", None)  # resumed, nothing is tried
        torch.set_num_threads(2)
        task.choose_threads()
        assert torch.get_num_threads() == quickest
    finally:
        torch.set_num_threads(1)

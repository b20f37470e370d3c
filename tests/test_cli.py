import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from stochastic_depth.cli import main
from stochastic_depth.cli.training import Recorder

TINY = [
    *("--model", "timm/test_resnet", "--weights", "none", "--image-size", "32"),
    *("--epochs", "3", "--batch-size", "8", "--compare", "--seeds", "1"),
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


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.fixture(scope="module")
def uninterrupted(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert finetune("--data", images, *TINY, "--p", 0.5, "--out", folder) == 0
    return folder


def test_a_comparison_leaves_all_that_it_measured(uninterrupted):
    metrics = json.loads((uninterrupted / "metrics.json").read_text())
    assert metrics["settings"]["p"] == 0.5
    assert metrics["machine"]["torch"] == torch.__version__
    assert [(run["seed"], run["arm"]) for run in metrics["runs"]] == [(0, "without"), (0, "with")]
    without, with_ = metrics["runs"]
    assert without["expected_depth"] == without["realised_depth"] == 4
    assert with_["expected_depth"] == 2.75  # 4 branches, the last at 0.5
    assert 0 < with_["realised_depth"] < 4
    for run in metrics["runs"]:
        assert len(run["history"]) == 3
        assert 0 <= run["test_error"] <= 1
        assert run["step_seconds"] > 0
    times = metrics["summary"]["time a step, ms"]
    assert times["ratio"] == pytest.approx([with_["step_seconds"] / without["step_seconds"]])
    with Image.open(uninterrupted / "curves.png") as curves:
        assert curves.size == (1000, 320)


def test_without_dropping_both_arms_are_the_same_to_the_bit(images, tmp_path):
    """The same start, the same batches: only dropped branches make a difference."""
    assert finetune("--data", images, *TINY, "--p", 0, "--out", tmp_path / "run") == 0
    assert_same(weights(tmp_path / "run", "seed0-with"), weights(tmp_path / "run", "seed0-without"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["summary"]["test error, %"]["difference"] == [0]


def test_realised_depth_counts_what_ran(images, tmp_path):
    options = ["--p", 1, "--schedule", "uniform", "--no-compare", "--out", tmp_path / "run"]
    assert finetune("--data", images, *TINY, *options) == 0
    (run,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"]
    assert run["arm"] == "with"
    assert run["expected_depth"] == run["realised_depth"] == 0


class Crash(Exception):
    """Stands for the power that goes off."""


@pytest.fixture
def interrupted(images: str, tmp_path: Path) -> Path:
    """A run that ended as the third epoch of its second arm began."""
    original = Recorder.on_train_epoch_start

    def crash(self: Recorder, trainer, module) -> None:
        original(self, trainer, module)
        if self.branches and trainer.current_epoch == 2:
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "on_train_epoch_start", crash)
        with pytest.raises(Crash):
            finetune("--data", images, *TINY, "--p", 0.5, "--out", tmp_path / "run")
    return tmp_path / "run"


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(interrupted, uninterrupted):
    assert not (interrupted / "metrics.json").exists()
    finished = (interrupted / "seed0-without" / "model.pt").stat().st_mtime_ns
    assert finetune("--resume", interrupted) == 0
    assert (interrupted / "seed0-without" / "model.pt").stat().st_mtime_ns == finished
    for run in ("seed0-without", "seed0-with"):
        assert_same(weights(interrupted, run), weights(uninterrupted, run))
    mine, theirs = (
        json.loads((folder / "metrics.json").read_text())["runs"][1]
        for folder in (interrupted, uninterrupted)
    )
    mine.pop("step_seconds"), theirs.pop("step_seconds")
    assert mine == theirs


@pytest.mark.parametrize(
    ("damage", "spoiled"), [("cut", 1), ("flipped", 1), ("emptied", 1), ("cut", 2)]
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(
    interrupted, uninterrupted, damage, spoiled, capsys
):
    kept = sorted((interrupted / "seed0-with").glob("*.ckpt"))
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
        assert f"the checkpoint {checkpoint} is cut short or corrupted; going on" in message
    assert message.count("cut short") == spoiled
    assert_same(weights(interrupted, "seed0-with"), weights(uninterrupted, "seed0-with"))


def test_a_finished_run_is_only_reported_again(uninterrupted, monkeypatch):
    before = (uninterrupted / "metrics.json").read_text()
    monkeypatch.setattr("lightning.Trainer.fit", lambda *args, **kwargs: pytest.fail("trained"))
    assert finetune("--resume", uninterrupted) == 0
    assert (uninterrupted / "metrics.json").read_text() == before


def test_skipped_images_are_told_and_kept(images, tmp_path, capsys):
    data = tmp_path / "data"
    for path in Path(images).rglob("*.png"):
        target = data / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    bad = data / "dark" / "3.png"
    bad.write_bytes(b"not an image")
    out = tmp_path / "run"
    assert finetune("--data", data, *TINY, "--no-compare", "--epochs", 1, "--out", out) == 0
    assert "cannot be read: 1 images" in capsys.readouterr().out
    (skipped,) = json.loads((out / "metrics.json").read_text())["skipped_images"]
    assert str(bad) in skipped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--model", "nosuchnet"], "--model nosuchnet: neither a known name nor a folder"),
        (["--weights", "nowhere.pth"], "--weights nowhere.pth: no such file"),
        (["--p", "1.5"], "must be in [0, 1], got 1.5"),
        (["--schedule", "wavy"], "wavy"),
        (["--mode", "wavy"], "mode must be one of"),
        (["--model", "squeezenet1_0"], "no residual branch"),
        (["--model", "timm/test_vit", "--image-size", "50"], "--image-size 50: timm/test_vit"),
        (["--resume", "nowhere", "--p", "0.1", "--lr", "1"], "drop --lr, --p"),
        (["--resume", "nowhere"], "--resume nowhere: needs the folder of a run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(images, options, message, tmp_path, capsys):
    given = options if "--resume" in options else ["--data", images, *TINY, *options]
    out = [] if "--resume" in options else ["--out", tmp_path / "run"]
    assert finetune(*given, *out) == 2
    error = capsys.readouterr().err
    assert error.startswith("stochastic-depth finetune: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(images, uninterrupted, capsys):
    assert finetune("--data", images, *TINY, "--out", uninterrupted) == 2
    assert f"--out {uninterrupted}: holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--seeds", "--image-size"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_counts_are_whole_and_positive(option, value, capsys):
    with pytest.raises(SystemExit) as end:
        finetune(option, value)
    assert end.value.code == 2
    assert option in capsys.readouterr().err


def test_inspect_prints_the_summary(capsys):
    options = ["--image-size", "64", "--p", "0.5", "--schedule", "uniform"]
    assert main(["inspect", "resnet18", *options]) == 0
    output = capsys.readouterr().out
    assert "layer4.1" in output
    assert "4.00 of 8" in output


def test_inspect_of_a_model_without_residual_branches(capsys):
    assert main(["inspect", "alexnet"]) == 2
    assert "no residual branch" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "stochastic_depth.cli.finetune", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert finetune() == 2
    assert "pip install 'stochastic-depth[cli]'" in capsys.readouterr().err


def test_the_library_and_the_parser_import_torch_alone():
    optional = "{'torchvision', 'timm', 'transformers', 'lightning', 'rich', 'matplotlib', 'PIL'}"
    script = (
        "import sys, stochastic_depth, stochastic_depth.cli as cli; cli.main.__module__; "
        f"print({optional} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def finetune_on_two_devices(*options: object, **environment: str) -> int:
    """In a process of its own, of which Lightning starts another one."""
    done = subprocess.run(
        [sys.executable, RUN_COMMAND, "finetune", *map(str, options)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=150,  # the watchdog
    )
    assert done.returncode == 0 or environment, done.stderr
    assert done.stdout.count("Results in") == 1, done.stdout  # the first process alone prints
    return done.returncode


RUN_COMMAND = Path(__file__).parent / "run_command.py"
TWO = ["--devices", 2, "--strategy", "ddp", "--no-compare", "--mode", "row"]


def test_two_devices_see_every_image_once_and_resume(images, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finetune_on_two_devices("--data", images, *TINY, "--p", 0.5, *TWO, "--out", whole)
    metrics = json.loads((whole / "metrics.json").read_text())
    (run,) = metrics["runs"]
    assert metrics["settings"]["devices"] == 2
    assert len(run["history"]) == 3
    assert 0 < run["realised_depth"] < 4
    assert sorted(path.name for path in whole.iterdir()) == [
        "curves.png",
        "metrics.json",
        "seed0-with",
        "settings.json",
    ]
    interrupted = ["--data", images, *TINY, "--p", 0.5, *TWO, "--out", cut]
    assert finetune_on_two_devices(*interrupted, STOP_AT_EPOCH="2") != 0
    assert not (cut / "seed0-with" / "result.json").exists()
    finetune_on_two_devices("--resume", cut)
    assert_same(weights(cut, "seed0-with"), weights(whole, "seed0-with"))
    (again,) = json.loads((cut / "metrics.json").read_text())["runs"]
    run.pop("step_seconds"), again.pop("step_seconds")
    assert again == run


def test_a_batch_is_shared_by_the_devices(images, tmp_path, capsys):
    options = ["--data", images, *TINY, "--devices", 3, "--out", tmp_path / "run"]
    assert finetune(*options) == 2
    assert "--batch-size 8: is shared by all devices" in capsys.readouterr().err

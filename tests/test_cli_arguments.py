"""Whatever a person can get wrong is one line, exit code 2, and no file; and it comes early."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import stochastic_depth_command
from stochastic_depth.cli import data, main, models
from stochastic_depth.cli.loggers import make_logger
from stochastic_depth.cli.settings import Settings

TINY = ["--model", "timm/test_resnet", "--weights", "none", "--image-size", "32", "--epochs", "1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for name in ("dark", "bright"):
        (root / name).mkdir()
        for index in range(8):
            Image.new("RGB", (32, 32)).save(root / name / f"{index}.png")
    return root


def refused(command: str, *given: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command refuses its arguments with."""
    assert main([command, *map(str, given)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"stochastic-depth {command}: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "--data nowhere: no such folder; give a folder with one folder of"),
        (["--data", __file__], "is a file; give a folder with one folder of images"),
        (["--model", "./nowhere"], "/nowhere: no such folder"),
        (["--model", __file__], "is a file; name its architecture here"),
        (["--weights", "nowhere.pth"], "--weights nowhere.pth: no such file; give 'pretrained'"),
        (["--batch-size", "8", "--devices", "3"], "--batch-size 8: is shared by all devices"),
        (["--logger", "wandb"], "--logger wandb: needs a package that is missing; pip install"),
        (["--resume", "nowhere", "--p", "0.1", "--lr", "1"], "leave out --lr, --p"),
        (["--resume", "nowhere"], "--resume nowhere: no such folder; give the folder of a run"),
        (["--resume", "."], "--resume .: has no settings.json; give the folder of a run"),
    ],
)
def test_bad_paths_and_combinations_come_before_anything_is_loaded(
    options, message, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    monkeypatch.setattr("stochastic_depth.cli.loggers.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    given = [] if "--resume" in options else ["--data", images, *TINY, "--out", tmp_path / "run"]
    assert message in refused("finetune", *given, *options, capsys=capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "is a file; name a folder"),
        ("file/run", "is a file, so no folder can be made in it"),
        ("held", "holds a run already; continue it with --resume, or name another"),
        ("/proc/run", "--out /proc/run: nothing can be written to /proc"),
    ],
)
def test_a_folder_for_the_results_that_cannot_be(
    out, message, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "settings.json").touch()
    given = ["--data", images, *TINY, "--out", tmp_path / out]
    assert message in refused("finetune", *given, capsys=capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nosuchnet"], "--model nosuchnet: neither a known name nor a folder"),
        (["--model", "vgg11"], "--model vgg11: no residual branch was found in it"),
        (["--model", "timm/test_vit", "--image-size", "50"], "--image-size 50: timm/test_vit"),
        (["--batch-size", "1"], "--batch-size 1: timm/test_resnet cannot be trained on 1 image of"),
        (["--batch-size", "32", "--devices", "32"], "--devices 32: more than there are training"),
    ],
)
def test_models_that_cannot_be_used(images, options, message, tmp_path, capsys):
    given = ["--data", images, *TINY, *options, "--out", tmp_path / "run"]
    error = refused("finetune", *given, capsys=capsys)
    assert message in error
    assert "=" not in error  # no argument of Python's
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["finetune", "inspect"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--p", "1.5", "must be a number from 0 to 1, got '1.5'"),
        ("--p", "-0.1", "must be a number from 0 to 1, got '-0.1'"),
        ("--p", "many", "must be a number from 0 to 1, got 'many'"),
        ("--schedule", "foo", "choose from"),
        ("--mode", "foo", "choose from"),
        ("--image-size", "abc", "must be a whole number of at least 1, got 'abc'"),
    ],
)
def test_options_of_both_commands(command, option, value, message, capsys):
    model = ["resnet18"] if command == "inspect" else []
    assert_usage([command, *model, f"{option}={value}"], option, message, capsys)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *((o, v, "a whole number of at least 1") for o in ("--epochs", "--seeds") for v in "0x"),
        ("--batch-size", "0", "must be a whole number of at least 1, got '0'"),
        ("--batch-size", "1.5", "must be a whole number of at least 1, got '1.5'"),
        ("--lr", "abc", "must be a number above 0, got 'abc'"),
        ("--lr", "-1", "must be a number above 0, got '-1'"),
        ("--lr", "nan", "must be a number above 0, got 'nan'"),
        ("--lr", "inf", "must be a number above 0, got 'inf'"),
        ("--p", "0,0.5,0", "must be different numbers"),
        ("--p", "0,,1", "must be a number from 0 to 1, got ''"),
        ("--label-noise", "1", "must be a number from 0 to below 1, got '1'"),
        ("--logger", "foo", "choose from"),
    ],
)
def test_options_of_finetune(option, value, message, capsys):
    assert_usage(["finetune", f"{option}={value}"], option, message, capsys)


def assert_usage(
    given: list[str], option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(given)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert option in last
    assert message in last


@pytest.mark.parametrize("given", [[], ["foo"], ["inspect"], ["predict"], ["predict", "run"]])
def test_missing_and_unknown_commands_show_the_usage(given, capsys):
    with pytest.raises(SystemExit) as end:
        main(given)
    assert end.value.code == 2
    assert "usage: stochastic-depth" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_answer_at_once(option):
    script = (
        "import sys, stochastic_depth_command as c\n"
        f"try: c.main(['{option}'])\n"
        "except SystemExit: print('torch' in sys.modules, 'stochastic_depth' in sys.modules)"
    )
    before = os.times().children_user
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    took = min(os.times().children_user - before, time.perf_counter() - started)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr
    assert "stochastic" in done.stdout
    assert took < 0.5


def test_the_help_names_the_choices(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "an image classifier: a name of torchvision, timm" in text
    assert "{linear,linear-timm,linear-efficientnet,uniform,alternating}" in text
    assert "{batch,row,subset}" in text


def test_the_choices_are_those_of_the_library():
    from stochastic_depth.rates import depth_rates

    for schedule in stochastic_depth_command.SCHEDULES:
        assert len(depth_rates(schedule, 0.5, 4)) == 4


def test_the_command_can_be_called_again_where_it_is_not_on_the_path(monkeypatch):
    monkeypatch.setattr(sys, "argv", [".venv/bin/stochastic-depth"])
    monkeypatch.setattr(stochastic_depth_command.shutil, "which", lambda name: None)
    assert stochastic_depth_command.program() == ".venv/bin/stochastic-depth"
    monkeypatch.setattr(stochastic_depth_command.shutil, "which", lambda name: "/bin/" + name)
    assert stochastic_depth_command.program() == "stochastic-depth"
    resume = stochastic_depth_command.command_line("finetune", "--resume", Path("my runs"))
    assert resume == "stochastic-depth finetune --resume 'my runs'"  # for a shell
    monkeypatch.setattr(sys, "argv", ["/site-packages/stochastic_depth/__main__.py"])
    again = stochastic_depth_command.command_line("predict", Path("run"))
    assert again == "python -m stochastic_depth predict run"


def test_a_resumed_run_does_not_log_over_its_first_part(tmp_path):
    for name in ("seed0", "seed0-part2", "seed0-part3"):
        logger = make_logger("csv", tmp_path, 0)
        assert Path(logger.log_dir) == tmp_path / "logs" / name
        logger.log_metrics({"loss": 1.0}, 1)
        logger.save()
    assert make_logger(None, tmp_path, 0) is None


def test_the_library_imports_torch_alone():
    optional = "{'torchvision', 'timm', 'transformers', 'lightning', 'rich', 'matplotlib', 'PIL'}"
    script = (
        f"import sys, stochastic_depth, stochastic_depth.cli; print({optional} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "stochastic_depth.cli.finetune", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "pip install 'stochastic-depth[cli]'" in refused("finetune", capsys=capsys)


def test_ctrl_c_while_loading(monkeypatch, images, tmp_path, capsys):
    def press(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", press)
    given = ["finetune", "--data", str(images), *TINY, "--out", str(tmp_path / "run")]
    assert main(given) == 130
    assert capsys.readouterr().err.endswith("interrupted before anything was written\n")


@pytest.mark.parametrize("content", ["not json", "[]", "{}", '{"p": [0.1], "colour": 3}'])
def test_settings_that_cannot_be_read(tmp_path, content, capsys):
    (tmp_path / "settings.json").write_text(content)
    message = refused("finetune", "--resume", tmp_path, capsys=capsys)
    assert "its settings.json cannot be read" in message


@pytest.mark.parametrize("content", [b"cut short", b"", b"PK\x03\x04"])
def test_results_of_a_seed_that_cannot_be_read(images, tmp_path, content, capsys):
    out = tmp_path / "run"
    assert main(["finetune", "--data", str(images), *TINY, "--out", str(out)]) == 0
    (out / "seed0-p0.2" / "model.pt").write_bytes(content)
    picture = images / "dark" / "0.png"
    assert "model.pt: cannot be used" in refused("predict", out, picture, capsys=capsys)
    (out / "seed0.json").write_bytes(content)
    message = refused("finetune", "--resume", out, capsys=capsys)
    assert "its seed0.json cannot be read" in message
    assert "delete that file to train this seed again" in message


@pytest.mark.parametrize(
    ("model", "size", "block", "depth"),
    [
        ("resnet18", 64, "layer4.1", "4.00 of 8"),
        ("resnet18", 7, "layer4.1", "4.00 of 8"),
        ("resnet50", 64, "layer4.2", "8.00 of 16"),
        ("vit_b_16", 224, "encoder_layer_11", "12.00 of 24"),
        ("timm/test_vit", 160, "blocks.5", "6.00 of 12"),
        ("transformers/resnet", 64, "resnet.encoder.stages.3.layers.2", "8.00 of 16"),
    ],
)
def test_inspect_prints_the_summary(model, size, block, depth, capsys):
    options = ["--image-size", str(size), "--p", "0.5", "--schedule", "uniform"]
    assert main(["inspect", model, *options]) == 0
    output = capsys.readouterr().out
    assert block in output
    assert depth in output


def test_inspect_shows_the_rates_that_are_asked_for_in_every_mode(capsys):
    tables = set()
    for mode in ("batch", "row", "subset"):
        assert (
            main(["inspect", "resnet18", "--image-size", "32", "--p", "0.2", "--mode", mode]) == 0
        )
        tables.add(capsys.readouterr().out)
    (table,) = tables
    assert "0.200" in table


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("alexnet", "--model alexnet: no residual branch was found in it"),
        ("densenet121", "--model densenet121: no residual branch was found in it"),
        ("/nonexistent/path", "--model /nonexistent/path: no such folder"),
        ("transformers/bert", "is a bert model, which transformers has no image classifier for"),
        ("transformers/nosuch", "Unrecognized"),
        ("resnet5", "did you mean resnet50"),
    ],
)
def test_models_that_inspect_refuses(model, message, capsys):
    error = refused("inspect", model, capsys=capsys)
    assert message in error
    for word in ("whole=", "example_inputs", "AutoModel", "--weights", "Repo id"):
        assert word not in error
    names = error.partition("did you mean ")[2].rstrip("?\n").split(", ")
    assert len(names) == len(set(names))


def test_predict_refuses_what_is_no_run_and_no_image(tmp_path, images, capsys):
    picture = images / "dark" / "0.png"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    for run, image, message in (
        (tmp_path / "nowhere", picture, "RUN " + str(tmp_path / "nowhere") + ": no such folder"),
        (tmp_path, picture, "holds no finished model"),
        (tmp_path, tmp_path / "none.png", "none.png: no such file; give image files"),
        (tmp_path, tmp_path, "is a folder; give image files"),
        (tmp_path, broken, "cannot be read as an image"),
    ):
        assert message in refused("predict", run, image, capsys=capsys)
    (tmp_path / "model.json").write_text("{}")
    assert "lacks classes" in refused("predict", tmp_path, picture, capsys=capsys)


def saved(folder: Path, **changed: object) -> Path:
    """A folder as `finetune` leaves it, of a network with random weights."""
    network = models.load("timm/test_resnet", weights="none", classes=2)
    folder.mkdir()
    torch.save(network.model.state_dict(), folder / "model.pt")
    names = ["layer1.0:conv1", "layer2.0:conv2", "layer3.0:conv2", "layer4.0:conv1"]
    info = {
        "model": "timm/test_resnet", "config": None, "classes": ["a", "b"], "image_size": 32,
        "mean": [0.5] * 3, "std": [0.5] * 3, "ranking": names,
        "curve": [{"branches": n, "error": 0.5} for n in (4, 3, 2, 1)],
        **changed,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({}, ["--keep", "4"], "--keep 4: must be less than the 4 branches of"),
        ({}, ["--keep", "9"], "--keep 9: must be less than the 4 branches of"),
        ({"ranking": ["layer1.0:conv1"]}, ["--keep", "2"], "1 of the 4 branches"),
        ({"ranking": ["nothing"]}, ["--keep", "3"], "--keep 3: 'nothing' is no branch"),
        ({"ranking": None}, ["--keep", "3"], "has no ranking of the branches"),
        ({"curve": []}, ["--keep", "3"], "has no ranking of the branches"),
        ({"curve": [{"error": 0.5}]}, ["--keep", "3"], "has no ranking of the branches"),
        (
            {"model": "timm/test_vit", "image_size": 160},
            ["--keep", "3"],
            "model.pt: cannot be used",
        ),
        ({"model": "timm/none"}, ["--keep", "3"], "--model timm/none"),
    ],
)
def test_prune_refuses_what_cannot_be(changed, options, message, tmp_path, capsys):
    run = saved(tmp_path / "run", **changed)
    out = tmp_path / "less.pt"
    assert message in refused("prune", run, *options, "--out", out, capsys=capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_prune_refuses_runs_and_files_that_cannot_be(tmp_path, capsys, monkeypatch):
    run, other = saved(tmp_path / "run"), tmp_path / "other.pt"
    torch.save({"conv1.weight": torch.zeros(1)}, other)
    out = tmp_path / "less.pt"
    for place, to, message in (
        (run, run, f"--out {run}: is there already; name another file"),
        (run, other, f"--out {other}: is there already; name another file"),
        (run, other / "less.pt", "is a file, so no folder can be made in it"),
        (run, "/proc/less.pt", "nothing can be written to /proc"),
        (tmp_path / "no", out, "no: no such folder; give the folder of a run"),
        (tmp_path / "run" / "model.json", out, "model.json: cannot be used"),
        (other, out, "other.pt: is no file that stochastic-depth prune wrote"),
    ):
        given = [place, "--keep", 2, "--out", to]
        assert message in refused("prune", *given, capsys=capsys)
    assert main(["prune", str(run), "--keep", "2", "--out", str(out)]) == 0
    capsys.readouterr()
    given = [out, "--keep", 1, "--out", tmp_path / "lesser.pt"]
    assert "less.pt: is pruned already; give the run" in refused("prune", *given, capsys=capsys)
    (run / "model.pt").write_bytes(b"cut short")
    given = [run, "--keep", 1, "--out", tmp_path / "lesser.pt"]
    assert "model.pt: cannot be used" in refused("prune", *given, capsys=capsys)
    assert not (tmp_path / "lesser.pt").exists()


def test_options_of_prune(capsys):
    message = "must be a whole number of at least 1, got '0'"
    assert_usage(["prune", "run", "--keep=0", "--out=less.pt"], "--keep", message, capsys)
    assert_usage(["prune", "run", "--out=less.pt"], "--keep", "required", capsys)
    assert_usage(["prune", "run", "--keep=2"], "--out", "required", capsys)


def test_defaults_depend_on_what_is_given(tmp_path):
    demo = Settings.from_options()
    assert (demo.p, demo.label_noise, demo.seeds) == ((0.0, 0.5), 0.4, 3)
    own = Settings.from_options(model="resnet18")
    assert (own.p, own.label_noise, own.seeds) == ((0.2,), 0.0, 1)
    assert Settings.from_options(model="resnet18", p=(0.5, 0.0)).p == (0.0, 0.5)
    assert Settings.from_options(quick=True).seeds == 1


def test_paths_are_kept_absolute(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    torch.save({}, tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_options(model="resnet18", data="photos", weights="weights.pt")
    assert settings.model == "resnet18"
    assert settings.data == str(tmp_path / "photos")
    assert settings.weights == str(tmp_path / "weights.pt")

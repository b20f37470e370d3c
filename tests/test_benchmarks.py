"""The benchmarks run and write their page; what they measure is not tested."""

import copy
import json
from functools import partial

import pytest
import torch
import torchvision
from benchmarks import ddp_cost, depth, models, overhead, page, ranks, regional, step_time


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    subjects = {
        "small": models.Subject(lambda: models.cifar_resnet(8), (4, 3, 16, 16)),
        "tokens": models.Subject(lambda: models.llama(6, 16, 2), (4, 5, 16)),
    }
    for module in (models, step_time, depth):
        monkeypatch.setattr(module, "SUBJECTS", subjects)
    monkeypatch.setattr(step_time, "ON_CPU", list(subjects))
    monkeypatch.setattr(step_time, "RESULTS", tmp_path / "results" / "step_time.json")
    monkeypatch.setattr(page, "DOCS", tmp_path)
    (tmp_path / "images").mkdir()


def run(monkeypatch: pytest.MonkeyPatch, module, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    module.main()


def test_step_time_measures_every_side_and_the_page_shows_it(
    small, monkeypatch, tmp_path, capsys
) -> None:
    many = [f"p={p}" for p in (0, 0.2, 0.3, 0.5, 0.7)]
    run(monkeypatch, step_time, "--full", "--rounds", "2", "--save")
    run(monkeypatch, step_time, "small", "--settings", *many, "--rounds", "2", "--save")
    kept = json.loads((tmp_path / "results" / "step_time.json").read_text())
    ((where, results),) = kept.items()
    assert where in capsys.readouterr().out
    by_setting = {(r["model"], r["setting"]): r for r in results}
    assert len(by_setting) == len(results) == 2 * 4 + 2
    row = by_setting["tokens", "p=0.5"]
    assert set(row["times"]) == {
        "batch",
        "row",
        "subset",
        "torchvision",
        "timm",
        "torchtune",
        "DINOv2",
    }
    assert all(len(times) == 2 for times in row["times"].values())
    assert 0 < row["bound"] < 1
    assert row["bounds"]["subset"] == pytest.approx([row["bound"]] * 2, rel=1e-3)  # half of 4 rows

    page.main()
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.count("| small |") == 3 * 4  # time, distance from the bound, memory
    assert "time_against_p.png" in text
    assert (tmp_path / "images" / "time_against_p.png").exists()


# Dynamo looks at the .grad of what enters a block.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_step_time_measures_in_bfloat16_and_compiled(small, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    few = models.Subject(lambda: models.llama(1, 16, 2), (4, 5, 16))
    monkeypatch.setitem(step_time.SUBJECTS, "tokens", few)
    given = ["tokens", "--settings", "p=0.5", "--rounds", "2", "--dtype", "bfloat16", "--compiled"]
    run(monkeypatch, step_time, *given, "--modes", "batch", "subset")
    out = capsys.readouterr().out
    assert "bfloat16 autocast" in out
    for side in ("plain", "batch", "subset"):
        assert f"| {side}, compiled |" in out


def test_depth_compares_with_the_whole_model_and_what_chance_does(
    small, monkeypatch, capsys
) -> None:
    run(monkeypatch, depth, "small", "tokens", "--rounds", "2")
    rows = [r.split(" | ") for r in capsys.readouterr().out.splitlines() if r.startswith("| ")][1:]
    taken = [row[:4] for row in rows if row[0] == "| tokens"]
    assert [row[1] for row in taken] == ["nothing", "3 blocks", "6 of 12 branches"]
    assert [row[2] for row in taken[:2]] == [row[3] for row in taken[:2]] == ["1.00", "0.50"]
    assert len(rows) == 6


def test_overhead_compares_with_a_second_plain_model_and_an_if(monkeypatch, capsys) -> None:
    monkeypatch.setattr(overhead, "BLOCKS", 3)
    monkeypatch.setattr(overhead, "MANY", 3)
    monkeypatch.setattr(overhead, "efficientnet_b7", torchvision.models.resnet18)
    run(monkeypatch, overhead, "--rounds", "2")
    rows = [r.split(" | ") for r in capsys.readouterr().out.splitlines() if r.startswith("| ")]
    names = ["plain", "plain again", "p = 0", "if, dropped", "ours, dropped", "if, kept"]
    assert [row[0].strip("| ") for row in rows[1:]] == [*names, "ours, kept"]
    assert all(row[3] != "|" for row in rows if row[0].startswith("| ours"))


def test_a_setting_is_a_rate_and_a_schedule() -> None:
    assert step_time.read_setting("p=0.3") == (0.3, "uniform")
    assert step_time.read_setting("linear 0.5") == (0.5, "linear")
    with pytest.raises(ValueError, match="setting must be like"):
        step_time.read_setting("0.5")


def test_ddp_cost_compares_with_plain_ddp(monkeypatch, capfd) -> None:
    # Deep enough that no step drops every layer: find_unused_parameters would wait for ever.
    run(monkeypatch, ddp_cost, "--rounds", "2", "--width", "4")
    out = capfd.readouterr().out
    assert out.count("\n| ours, p=") == out.count("\n| find_unused_parameters, p=") == 3
    assert "\n| plain | " in out


def test_ranks_measures_time_and_memory_of_every_way_to_draw(monkeypatch, capfd) -> None:
    sizes = ["--depth", "4", "--width", "8", "--batch", "4", "--ms", "0"]
    run(monkeypatch, ranks, "--ranks", "2", "--rounds", "2", "--steps", "5", *sizes)
    out = capfd.readouterr().out
    assert out.count("\n| | plain | separate | shared | balanced |") == 5
    assert out.count("\n| | plain | independent | balanced |") == 4
    assert out.count("\n| 2 ranks | ") == 5


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_regional_counts_the_graphs_of_compiled_blocks(monkeypatch, capsys) -> None:
    monkeypatch.setattr(regional, "MODES", ("batch",))
    few = models.llama(2, 16, 2), torch.randn(2, 5, 16)
    monkeypatch.setattr(regional, "build", lambda name, args: copy.deepcopy(few))
    sizes = ["--models", "Llama", "--batch", "2", "--steps", "3", "--rounds", "2"]
    run(monkeypatch, regional, *sizes, "--backend", "eager")
    out = capsys.readouterr().out
    assert "\n| Llama | batch | apply, compile | " in out
    assert "\n| Llama | batch | compile, apply | " in out
    assert out.count("\n| Llama | batch | ") == 3

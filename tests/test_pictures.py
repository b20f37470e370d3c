"""What is drawn, and what notebooks show."""

import itertools
import sys
from html.parser import HTMLParser

import matplotlib
import pytest
from PIL import Image
from torch import nn

import stochastic_depth as sd
from models import SMALL_BRANCHES, small, small_batch
from stochastic_depth.check.summary import Row
from stochastic_depth.check.verification import Check
from stochastic_depth.cli import main

matplotlib.use("Agg")
RATES = [0.1, 0.2, 0.3, 0.4]


def applied() -> nn.Module:
    return sd.apply(small(), None, schedule=RATES, example_inputs=small_batch())


def widths(axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches if bar.get_height() == pytest.approx(0.7)]


def test_the_picture_has_the_branches_in_the_order_in_which_they_run() -> None:
    summary = sd.summary(applied(), small_batch())
    network, rates, compute = summary.plot().axes
    assert [label.get_text() for label in network.get_yticklabels()] == SMALL_BRANCHES
    assert network.yaxis_inverted()  # the first is on top
    assert widths(rates) == RATES
    assert not [line for line in rates.lines if line.get_label() == "dropped so far"]
    shares = [100 * row.flops for row in summary.rows]
    runs = [share * (1 - p) for share, p in zip(shares, RATES, strict=True)]
    assert widths(compute) == pytest.approx([*shares, *runs])
    opacity = [bar.get_facecolor()[3] for bar in network.patches if bar.get_width() == 0.8]
    assert opacity == pytest.approx([1 - p for p in RATES])


def test_the_picture_shows_how_much_of_nested_branches_runs() -> None:
    outer = Row("0:f", "identity", 0.2, 0.0, 0.6)
    inner = Row("0.f:fc", "identity", 0.5, 0.0, 0.4, inside="0:f")
    compute = sd.Summary((outer, inner), (), ()).plot().axes[2]
    assert widths(compute) == pytest.approx([60, 40, 80 * (0.2 + 0.2), 80 * 0.2])


def test_the_picture_shows_what_was_dropped_in_training() -> None:
    model = applied()
    for _ in range(10):
        model(small_batch())
    rates = sd.summary(model).plot().axes[1]
    (line,) = [line for line in rates.lines if line.get_label() == "dropped so far"]
    expected = [branch.dropped / branch.decided for branch in sd.branches(model)]
    assert list(line.get_xdata()) == expected
    assert list(line.get_ydata()) == [0, 1, 2, 3]
    assert rates.get_xlim()[1] > max(expected)


def test_without_example_inputs_the_picture_says_that_compute_is_not_measured() -> None:
    compute = sd.summary(applied()).plot().axes[2]
    assert [text.get_text() for text in compute.texts] == ["not measured:\ngive example_inputs"]


@pytest.mark.parametrize("depth", [8, 96])
def test_no_name_of_a_branch_covers_the_next(depth: int) -> None:
    rows = (Row(f"model.layers.{i}:self_attn", "identity", 0.2, 0.0, 0.01) for i in range(depth))
    figure = sd.Summary(tuple(rows), (), ()).plot()
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == depth
    assert all(lower.y1 <= upper.y0 for upper, lower in itertools.pairwise(boxes))
    assert all(box.x0 >= 0 for box in boxes)


def test_without_matplotlib_an_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'stochastic-depth\[plot\]'"):
        sd.summary(applied()).plot()


def test_inspect_draws_into_a_file(tmp_path, capsys) -> None:
    target = tmp_path / "model.png"
    assert main(["inspect", "resnet18", "--image-size", "32", "--png", str(target)]) == 0
    assert "expected depth" in capsys.readouterr().out
    with Image.open(target) as image:
        assert image.format == "PNG"
    assert main(["inspect", "resnet18", "--png", str(tmp_path / "none" / "model.png")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["inspect", "resnet18", "--image-size", "32", "--png", str(tmp_path)]) == 2
    assert "cannot be written: Is a directory" in capsys.readouterr().err


class Table(HTMLParser):
    """The cells of a table, by rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data) -> None:
        if self.rows and self.rows[-1] and self.lasttag in ("td", "th"):
            self.rows[-1][-1] += data


def test_notebooks_show_tables() -> None:
    model = applied()
    summary = Table(sd.summary(model, small_batch())._repr_html_()).rows
    assert summary[0] == ["branch", "kind", "p", "params", "FLOPs"]
    assert [row[0] for row in summary[1:]] == SMALL_BRANCHES
    branches = Table(sd.branches(model)._repr_html_()).rows
    assert [row[0] for row in branches[1:]] == SMALL_BRANCHES
    assert branches[1][2:4] == ["0.100", "batch"]
    checks = Table(sd.verify(model, small_batch())._repr_html_()).rows
    assert checks[0] == ["check", "result"]
    assert {row[1] for row in checks[1:]} == {"ok"}


def test_what_is_written_is_escaped() -> None:
    html = sd.Verification((Check("a < b", "<class 'int'>"),))._repr_html_()
    assert Table(html).rows == [["check", "result"], ["a < b", "<class 'int'>"]]
    assert "<class" not in html

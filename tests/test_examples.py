"""The examples run on two CPU processes, end with equal weights, and have dropped branches."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
LINE = re.compile(r"rank (\d): loss ([\d.]+), weights ([\d.]+), dropped (\d+) of (\d+)")


@pytest.mark.parametrize(
    ("script", "launcher"),
    [
        ("ddp.py", TORCHRUN),
        ("fsdp2.py", TORCHRUN),
        ("on_lightning.py", []),
        ("on_accelerate.py", [*ACCELERATE, "--main_process_port", "0"]),
        ("hf_trainer.py", TORCHRUN),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_example_runs_on_two_processes(script, launcher, tmp_path):
    done = subprocess.run(
        [sys.executable, *launcher, EXAMPLES / script],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,  # the watchdog
    )
    assert done.returncode == 0, done.stderr
    found = sorted(LINE.findall(done.stdout))
    assert [rank for rank, *_ in found] == ["0", "1"], done.stdout
    (_, _, weights, dropped, decided), (_, _, theirs, their_drops, _) = found
    assert weights == theirs
    assert 0 < int(dropped) < int(decided)
    assert script == "fsdp2.py" or dropped != their_drops  # each rank its own coins
    assert all(float(loss) < 1.38 for _, loss, *_ in found)  # that of guessing is log 4 = 1.386


def test_every_example_is_run():
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"task.py"}
    (cases,) = test_an_example_runs_on_two_processes.pytestmark
    assert scripts == {script for script, _ in cases.args[1]}

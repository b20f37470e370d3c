"""The examples run on two CPU processes, end with equal weights, and have dropped branches."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN = Path(__file__).parent / "run_example.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LINE = re.compile(r"rank (\d): loss ([\d.]+), weights ([\d.]+), dropped (\d+) of (\d+)")


ALONE = ["uncertainty.py"]  # on one process: see depth/test_sampling.py
SCRIPTS = ["ddp.py", "fsdp2.py", "hf_trainer.py", "on_accelerate.py", "on_lightning.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs_on_two_processes(script, tmp_path):
    done = subprocess.run(
        [sys.executable, *TORCHRUN, RUN, EXAMPLES / script],
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
    assert dropped == their_drops  # balanced, or shared
    assert all(float(loss) < 1.38 for _, loss, *_ in found)  # that of guessing is log 4 = 1.386


def test_every_example_is_run():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(
        [*SCRIPTS, "task.py", *ALONE]
    )

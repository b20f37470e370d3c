"""Start processes that talk over the loopback interface, and never wait for ever."""

import datetime
import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a process that has imported these, and done nothing else.
multiprocessing.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "stochastic_depth"]
)


def launch(
    function: Callable[..., None],
    ranks: int,
    *args: Any,
    seconds: float = 240,
    timeout: float = 40,
) -> None:
    """Run ``function(rank, *args)`` in a gloo process group of ``ranks``.

    Args:
        function: what each rank runs, importable.
        ranks: how many.
        args: further arguments.
        seconds: after so long the watchdog ends it.
        timeout: seconds that a rank waits in a collective that the others do not join.

    Raises:
        Exception: what a rank raised.
        TimeoutError: the watchdog's.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        given = (function, ranks, Path(folder, "store"), timeout, args)
        processes = mp.start_processes(
            _start, given, nprocs=ranks, join=False, daemon=True, start_method="forkserver"
        )
        deadline = time.monotonic() + seconds
        try:
            while not processes.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__}: hangs, or takes over {seconds} s")
        finally:
            for process in processes.processes:
                process.kill()
                process.join()


def _start(
    rank: int,
    function: Callable[..., None],
    ranks: int,
    store: Path,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    faulthandler.enable()  # a crash says where
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), ranks),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    # FSDP's modules keep gloo's threads alive, and one that frees a tensor while the interpreter
    # is being taken down aborts the process ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def gathered(values: torch.Tensor) -> list[torch.Tensor]:
    """``values`` of every rank."""
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    return everyone

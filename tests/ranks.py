"""Runs functions in several processes of one gloo process group, for the tests past one device."""

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TIMEOUT = 20  # seconds for one collective, after which a rank that waits for the others fails
WHOLE_TIMEOUT = 100


def run(world: int, directory: Path, *cases: Callable[[Path], None]) -> None:
    """Call each of `cases`, top-level functions, with `directory` on `world` ranks; an error on any rank is this one's."""
    store = directory / f"store-{world}-{time.monotonic_ns()}"
    context = multiprocessing.spawn(_rank, (world, store, directory, cases), nprocs=world, join=False)
    end = time.monotonic() + WHOLE_TIMEOUT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"{world} ranks still run after {WHOLE_TIMEOUT} seconds"
    finally:
        for process in context.processes:
            process.kill()


def _rank(rank: int, world: int, store: Path, directory: Path, cases: tuple[Callable[[Path], None], ...]) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world,
                            timeout=timedelta(seconds=TIMEOUT))
    for case in cases:
        torch.manual_seed(0)
        try:
            case(directory)
        except BaseException as error:
            raise AssertionError(f"{case.__name__} on rank {rank} of {world}:\n{traceback.format_exc()}") from error
    dist.destroy_process_group()

"""Runs functions in several processes of one gloo process group, for the tests past one device."""

import faulthandler
import gc
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

TIMEOUT = 60  # seconds for one collective, after which a rank that waits for the others fails
WHOLE_TIMEOUT = 170

Cases = tuple[Callable[[Path], None], ...]


def run(directory: Path, *parts: tuple[int, Cases]) -> None:
    """For each (world, cases) in turn, call the cases, top-level functions, with `directory` on `world` ranks.

    The processes are started once, which takes longer than most cases. An error on any rank is raised here.
    """
    processes = max(world for world, _ in parts)
    context = multiprocessing.spawn(_process, (directory, parts), nprocs=processes, join=False)
    end = time.monotonic() + WHOLE_TIMEOUT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"ranks still run after {WHOLE_TIMEOUT} seconds"
    finally:
        for process in context.processes:
            process.kill()


def _process(rank: int, directory: Path, parts: tuple[tuple[int, Cases], ...]) -> None:
    faulthandler.enable()  # a signal would end a rank without a word of where
    torch.set_num_threads(1)
    for number, (world, cases) in enumerate(parts):
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{directory}/store-{number}", rank=rank, world_size=world,
                                    timeout=timedelta(seconds=TIMEOUT))
            for case in cases:
                _call(case, directory)
            # Models in reference cycles hold on to their groups, whose sockets would close in the middle of the next part.
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()


def _call(case: Callable[[Path], None], directory: Path) -> None:
    torch.manual_seed(0)
    try:
        case(directory)
    except BaseException as error:
        where = f"{case.__name__} on rank {dist.get_rank()} of {dist.get_world_size()}"
        raise AssertionError(f"{where}:\n{traceback.format_exc()}") from error

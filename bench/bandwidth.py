"""The ceiling: how fast this machine copies memory, bytes read plus bytes written."""

import ctypes
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from .machine import cache_bytes


def copied_bytes(device: torch.device) -> int:
    """Read plus written by one `copy_call`. A GPU needs more than its cache to reach its bandwidth at all."""
    return 8 * cache_bytes(device.type) * (4 if device.type == "cuda" else 1)


@functools.cache
def copy_call(device: torch.device) -> Callable[[], object]:
    """The fastest copy at hand between two buffers of four last-level caches each.

    On a CPU torch's copy reads every destination line before it overwrites it; the C library's does not. Which of the two is
    faster depends on the machine, and a ceiling is the higher of the two.
    """
    size = copied_bytes(device) // 2
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)

    def by_torch():
        target.copy_(source)

    if device.type == "cuda":
        return by_torch
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    memcpy = ctypes.CDLL(None).memcpy  # ctypes lets go of the interpreter lock
    memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    piece = -(-size // threads)

    def copy_piece(i: int):
        memcpy(target.data_ptr() + i * piece, source.data_ptr() + i * piece, min(piece, size - i * piece))

    def by_memcpy():
        list(pool.map(copy_piece, range(threads)))

    times: dict[Callable, list[float]] = {by_torch: [], by_memcpy: []}
    for _ in range(11):
        for call, own in times.items():
            begin = time.perf_counter()
            call()
            own.append(time.perf_counter() - begin)
    return min(times, key=lambda call: min(times[call]))

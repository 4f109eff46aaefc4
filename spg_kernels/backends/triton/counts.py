"""Step counts on the CPU, one tensor a parameter, as torch keeps them unless an optimizer is fused or capturable.

They are read and written at their addresses: through torch that would take longer than all the rest of a step.
"""

import functools
from array import array
from ctypes import c_float

import torch
from torch import Tensor

from .. import library
from . import launch
from .plans import Words


def read(place: launch.Place, addresses: Words) -> array:
    """The counts before this step."""
    if place.capturing:
        raise RuntimeError("spg_kernels: step counts on the CPU would be frozen into the CUDA graph; build the inner "
                           "optimizer with capturable=True")
    functions = library.load()[0]
    if functions is None:
        return array("f", [c_float.from_address(address).value for address in addresses])
    counts = array("f", [0]) * len(addresses)
    functions.spg_read_floats(len(addresses), _table(addresses).buffer_info()[0], counts.buffer_info()[0])
    return counts


def increment(addresses: Words) -> None:
    functions = library.load()[0]
    if functions is None:
        for count in map(c_float.from_address, addresses):
            count.value += 1
    else:
        functions.spg_increment_floats(len(addresses), _table(addresses).buffer_info()[0])


@functools.lru_cache(maxsize=64)
def _table(addresses: Words) -> array:
    return array("Q", addresses)


def apart(place: launch.Place, counts: array) -> tuple[Tensor, float]:
    """(each count relative to the first, the first after this step).

    Counts advance together, so the differences stay in the cache and only a plain argument changes from step to step.
    """
    first = counts[0]
    are_equal = (counts[:1] * len(counts)).tobytes() == counts.tobytes()  # an array compares its floats one by one
    differences = () if are_equal else tuple(count - first for count in counts)
    return launch.cached(place, ("apart", len(counts), differences), lambda: torch.tensor(
        differences or [0.0] * len(counts), dtype=torch.float32, device="cpu")), first + 1

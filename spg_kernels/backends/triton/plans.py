"""The launches that a call's tensors fall into: by device and dtypes, and by whether every address is aligned."""

import functools
import operator
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..plans import LISTS, STATES, Plans

# With TRITON_INTERPRET=1 Triton runs kernels in Python, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "yes", "y")
_STEPS = LISTS["masked_adamw_"].index("state_steps")
_ALIGNMENT = 16  # bytes, of the widest load


class Group(NamedTuple):
    """Tensors of one device and of the same dtypes. `one_value`: the positions, in the group, of gammas that are one value."""

    indices: tuple[int, ...] | None  # None for all tensors of the call
    device: torch.device
    dtype: torch.dtype  # of parameters and gradients
    gamma: torch.dtype
    state: torch.dtype
    steps_on_host: bool
    sizes: tuple[int, ...]
    one_value: tuple[int, ...]


class Piece(NamedTuple):
    """What one launch takes: for each list of the call the addresses, of tensors that all are aligned or need not be."""

    group: Group
    aligned: bool
    columns: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    one_value: tuple[int, ...]


class Launches:
    """The groups of one call's tensors."""

    def __init__(self, op: str, named: dict[str, list[Tensor]]):
        self.gammas = LISTS[op].index("gammas")
        self.groups = _groups(named)

    def pieces(self, lists: tuple[list[Tensor], ...]) -> list[Piece]:
        """The launches of a call with tensors at these addresses."""
        columns = tuple([tuple(map(Tensor.data_ptr, tensors)) for tensors in lists])
        found = []
        for group in self.groups:
            own = columns if group.indices is None else tuple(
                [tuple([column[i] for i in group.indices]) if column else () for column in columns])
            # The steps, last, are read one at a time.
            if functools.reduce(operator.or_, map(_low_bits, own[:_STEPS])) % _ALIGNMENT == 0:
                found.append(Piece(group, True, own, group.sizes, group.one_value))
            else:
                found.extend(_split(group, own, self.gammas))
        return found


def on_host(step: Tensor) -> bool:
    """Whether a step count lives on the CPU, as torch keeps it unless an optimizer is fused or capturable."""
    return step.device.type == "cpu"


def _groups(named: dict[str, list[Tensor]]) -> tuple[Group, ...]:
    first = next(tensors for name, tensors in named.items() if name != "gammas")
    states = next((tensors for name, tensors in named.items() if name in STATES), first)
    steps = named.get("state_steps", ())
    gammas = named["gammas"]
    kinds = [(p.device, p.dtype, states[i].dtype, bool(steps) and on_host(steps[i])) for i, p in enumerate(first)]
    one_value = [gamma.dim() == 0 and gamma.dtype == torch.float32 for gamma in gammas]
    # A gamma that is one value goes with whatever launch there is.
    hosts: dict[tuple, torch.dtype] = {}
    for kind, gamma, one in zip(kinds, gammas, one_value):
        if not one:
            hosts.setdefault(kind, gamma.dtype)
    members: dict[tuple, list[int]] = {}
    for i, (kind, gamma, one) in enumerate(zip(kinds, gammas, one_value)):
        members.setdefault((kind, hosts.get(kind, torch.float32) if one else gamma.dtype), []).append(i)
    return tuple(
        Group(None if len(part) == len(first) else tuple(part), device, dtype, gamma, state, on_host,
              tuple(first[i].numel() for i in part), tuple(k for k, i in enumerate(part) if one_value[i]))
        for ((device, dtype, state, on_host), gamma), part in members.items())


@functools.lru_cache(maxsize=1024)
def _low_bits(addresses: tuple[int, ...]) -> int:
    return functools.reduce(operator.or_, addresses, 0)


@functools.lru_cache(maxsize=256)
def _split(group: Group, columns: tuple[tuple[int, ...], ...], gammas: int) -> tuple[Piece, ...]:
    """Aligned tensors and the others apart. `gammas`: which of the columns has them."""
    parts: dict[bool, list[int]] = {}
    for i in range(len(group.sizes)):
        wide = (column[i] for k, column in enumerate(columns[:_STEPS])
                if column and not (k == gammas and i in group.one_value))
        parts.setdefault(_low_bits(tuple(wide)) % _ALIGNMENT == 0, []).append(i)
    return tuple(
        Piece(group, aligned, tuple(tuple(column[i] for i in part) if column else () for column in columns),
              tuple(group.sizes[i] for i in part), tuple(k for k, i in enumerate(part) if i in group.one_value))
        for aligned, part in parts.items())


_plans = Plans("cpu" if INTERPRETED else "cuda", Launches)
check, take = _plans.check, _plans.take

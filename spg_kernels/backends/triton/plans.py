"""The launches that a call's tensors fall into: by device and dtypes, and by whether every address is aligned."""

import functools
import itertools
import operator
import os
from array import array
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from ..plans import LISTS, STATES, Plans, is_one_value

# With TRITON_INTERPRET=1 Triton runs kernels in Python, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "yes", "y")
_STEPS = LISTS["masked_adamw_"].index("state_steps")
_ALIGNMENT = 16  # bytes, of the widest load
_ADDRESSES = 16  # sets of addresses to remember: a training loop sees few


class Words(tuple):
    """Whole numbers that a table on the device is found by, hashed once: a tuple hashes every element in every look-up."""

    def __init__(self, _):
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class Group(NamedTuple):
    """Tensors of one device and of the same dtypes. `one_value`: the positions, in the group, of gammas that are one value."""

    indices: tuple[int, ...]  # in the call
    device: torch.device
    dtype: torch.dtype  # of parameters and gradients
    gamma: torch.dtype
    state: torch.dtype
    steps_on_host: bool
    sizes: tuple[int, ...]
    one_value: frozenset[int]


class Piece(NamedTuple):
    """What one launch takes: for each list of the call the addresses, of tensors that all are aligned or need not be."""

    group: Group
    indices: tuple[int, ...]  # in the call
    aligned: bool
    columns: tuple[Words, ...]
    sizes: Words
    one_value: tuple[int, ...]
    ready: dict  # what `launch.run` keeps


class Launches:
    """The groups of one call's tensors, and the launches for the addresses they were last seen at."""

    def __init__(self, op: str, named: dict[str, list[Tensor]]):
        self.gammas = LISTS[op].index("gammas")
        self.lengths = [len(named.get(name, ())) for name in LISTS[op]]
        self.count = max(self.lengths)
        self.groups = _groups(op, named)
        self._pieces: OrderedDict[bytes, list[Piece]] = OrderedDict()
        self._last: tuple[bytes, list[Piece]] = b"", []

    def pieces(self, addresses: array) -> list[Piece]:
        """The launches of a call with tensors at these addresses."""
        key = addresses.tobytes()
        last, pieces = self._last
        if key != last:  # or it would be hashed, which takes longer than to compare it
            pieces = self._look_up(key, addresses)
            self._last = key, pieces
        return pieces

    def _look_up(self, key: bytes, addresses: array) -> list[Piece]:
        pieces = self._pieces.get(key)
        if pieces is None:
            pieces = self._pieces[key] = self._cut(addresses)
            while len(self._pieces) > _ADDRESSES:
                self._pieces.popitem(last=False)
        return pieces

    def _cut(self, addresses: array) -> list[Piece]:
        ends = list(itertools.accumulate(self.lengths))
        columns = [addresses[end - length:end] for end, length in zip(ends, self.lengths)]
        found = []
        for group in self.groups:
            own = tuple([tuple([column[i] for i in group.indices]) if column else () for column in columns])
            parts: dict[bool, list[int]] = {}
            for k in range(len(group.sizes)):
                # The steps, last, are read one at a time, and so is a gamma of one value.
                wide = [column[k] for c, column in enumerate(own[:_STEPS])
                        if column and not (c == self.gammas and k in group.one_value)]
                parts.setdefault(functools.reduce(operator.or_, wide) % _ALIGNMENT == 0, []).append(k)
            found += [Piece(group, tuple(group.indices[k] for k in part), aligned,
                            tuple(Words(column[k] for k in part if column) for column in own),
                            Words(group.sizes[k] for k in part),
                            tuple(j for j, k in enumerate(part) if k in group.one_value), {})
                      for aligned, part in parts.items()]
        return found


def on_host(step: Tensor) -> bool:
    """Whether a step count lives on the CPU, as torch keeps it unless an optimizer is fused or capturable."""
    return step.device.type == "cpu"


def _groups(op: str, named: dict[str, list[Tensor]]) -> tuple[Group, ...]:
    first = next(tensors for name, tensors in named.items() if name != "gammas")
    states = next((tensors for name, tensors in named.items() if name in STATES), first)
    steps = named.get("state_steps", ())
    gammas = named["gammas"]
    kinds = [(p.device, p.dtype, states[i].dtype, bool(steps) and on_host(steps[i])) for i, p in enumerate(first)]
    one_value = [is_one_value(op, gamma) for gamma in gammas]
    # A gamma that is one value goes with whatever launch there is.
    hosts: dict[tuple, torch.dtype] = {}
    for kind, gamma, one in zip(kinds, gammas, one_value):
        if not one:
            hosts.setdefault(kind, gamma.dtype)
    members: dict[tuple, list[int]] = {}
    for i, (kind, gamma, one) in enumerate(zip(kinds, gammas, one_value)):
        members.setdefault((kind, hosts.get(kind, torch.float32) if one else gamma.dtype), []).append(i)
    return tuple(
        Group(tuple(part), device, dtype, gamma, state, on_host, tuple(first[i].numel() for i in part),
              frozenset(k for k, i in enumerate(part) if one_value[i]))
        for ((device, dtype, state, on_host), gamma), part in members.items())


PLANS = Plans("cpu" if INTERPRETED else "cuda", Launches)

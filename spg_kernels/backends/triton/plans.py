"""What the tensors of a call are: the launches they fall into, and which of them a kernel cannot take.

Looking at every tensor's type, dtype, device and strides from Python costs more than a step, so the answer is kept with a
guard that compares all of it in one call into torch's C++. Addresses are no part of it: they are read in every call.
"""

import functools
import itertools
import operator
import os
from typing import NamedTuple

import torch
from torch import Tensor

try:  # what torch.compile checks its inputs with; not public, so its absence only costs time
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

# With TRITON_INTERPRET=1 Triton runs kernels in Python, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "yes", "y")
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LISTS = {
    "accumulate_importance_": ("gammas", "grads"),
    "soft_mask_": ("grads", "gammas"),
    "update_mask_": ("params", "old_params", "gammas"),
    "masked_sgd_": ("params", "grads", "gammas", "momentum_buffers"),
    "masked_adamw_": ("params", "grads", "gammas", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
}
_STATES = ("momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
_PLAIN = {Tensor, torch.nn.Parameter}  # a subclass may keep its numbers elsewhere: DTensor, FakeTensor
_STEPS = LISTS["masked_adamw_"].index("state_steps")
_PLANS_PER_KEY = 16
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


class Plan:
    """The groups of one call's tensors, or the reasons why some cannot be taken."""

    def __init__(self, op: str, lists: tuple[list[Tensor], ...]):
        # A list may be empty (no momentum, no amsgrad); the others are parallel to the first.
        named = {name: tensors for name, tensors in zip(LISTS[op], lists) if tensors}
        reasons = ((i, _refusal({name: tensors[i] for name, tensors in named.items()}))
                   for i in range(len(lists[0])))
        self.gammas = LISTS[op].index("gammas")
        self.refused = {i: reason for i, reason in reasons if reason}
        self.groups = () if self.refused else _groups(named)
        # Whether other tensors are like these; no reference to a tensor stays.
        self.holds = None if self.refused else _guard(list(itertools.chain(*lists)))

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


_plans: dict[tuple, list[Plan]] = {}
_checked: dict[tuple, tuple[list[Tensor], Plan]] = {}


def check(op: str, lists: tuple[list[Tensor], ...]) -> dict[int, str]:
    """The indices of tensors that cannot be taken, and why. If there are none, the plan waits for the call."""
    plan = _plan(op, lists)
    if plan.refused or len(_checked) > 64:  # a refusal may keep the calls checked before it from running
        _checked.clear()
    if not plan.refused:
        _checked[op, id(lists[0])] = (lists[0], plan)  # with the list, whose id is its own as long as it lives
    return plan.refused


def take(op: str, lists: tuple[list[Tensor], ...]) -> Plan:
    """The plan of a call whose `check` just before saw the same list objects."""
    checked = _checked.pop((op, id(lists[0])), None)
    return checked[1] if checked else _plan(op, lists)


def _plan(op: str, lists: tuple[list[Tensor], ...]) -> Plan:
    tensors = list(itertools.chain(*lists))
    known = _plans.setdefault((op, *map(len, lists)), [])
    for plan in known:
        if plan.holds(tensors):
            return plan
    plan = Plan(op, lists)
    if not plan.refused:
        known.insert(0, plan)
        del known[_PLANS_PER_KEY:]
    return plan


def on_host(step: Tensor) -> bool:
    """Whether a step count lives on the CPU, as torch keeps it unless an optimizer is fused or capturable."""
    return step.device.type == "cpu"


def _guard(tensors: list[Tensor]):
    """A function that says whether tensors have the types, dtypes, devices, shapes and strides of these."""
    try:
        guards = TensorGuards(*tensors, dynamic_dims_sizes=[list(t.shape) for t in tensors],
                              dynamic_dims_strides=[list(t.stride()) for t in tensors])
        return lambda others: guards.check(*others)
    except TypeError:  # there is none, or it takes other arguments
        pass
    described = _describe(tensors)
    return lambda others: _describe(others) == described


def _describe(tensors: list[Tensor]) -> list[tuple]:
    return [(type(t), t.layout, t.layout == torch.strided and (t.dtype, t.device, t.shape, t.stride())) for t in tensors]


def _refusal(tensors: dict[str, Tensor]) -> str | None:
    name, first = next((name, t) for name, t in tensors.items() if name != "gammas")
    states = {t.dtype for name, t in tensors.items() if name in _STATES}
    for name, tensor in tensors.items():
        if type(tensor) not in _PLAIN:
            return f"has {name} of type {type(tensor).__name__}"
        if name == "state_steps":
            if tensor.device.type not in ("cpu", DEVICE_TYPE) or tensor.dtype != torch.float32:
                return f"has {name} of {tensor.dtype} on {tensor.device}"
            continue
        if tensor.layout != torch.strided or tensor.device.type != DEVICE_TYPE or tensor.device != first.device:
            return f"has {name} on {tensor.device} with layout {tensor.layout}, expected strided on {DEVICE_TYPE}"
        if name == "gammas":
            if tensor.dtype not in (torch.float32, torch.uint8):
                return f"has {name} of {tensor.dtype}"
            if tensor.dim() == 0 and tensor.dtype == torch.float32:
                continue
        elif tensor.dtype not in DTYPES:
            return f"has {name} of {tensor.dtype}"
        elif name in _STATES:
            if len(states) > 1 or tensor.dtype not in (torch.float32, first.dtype):
                return f"has {name} of {tensor.dtype} for a parameter of {first.dtype}"
        elif tensor.dtype != first.dtype:
            return f"has {name} of {tensor.dtype} for a parameter of {first.dtype}"
        if tensor.numel() != first.numel():
            return f"has {name} of {tensor.numel()} elements, expected {first.numel()}"
        if not _same_memory_order(tensor, first):
            return f"has {name} in another memory layout (strides {tensor.stride()}, expected {first.stride()}, dense)"
    return None


def _same_memory_order(tensor: Tensor, first: Tensor) -> bool:
    """Whether both lie densely in memory and in the same order: the k-th element of one belongs to the k-th of the other."""
    if tensor.is_contiguous() and first.is_contiguous():
        return True
    if tensor.numel() == 0:
        return True
    strides, others = ([(stride, n) for stride, n in zip(t.stride(), t.shape) if n > 1] for t in (tensor, first))
    dense = 1
    for stride, n in sorted(strides):
        if stride != dense:
            return False
        dense *= n
    return strides == others


def _groups(named: dict[str, list[Tensor]]) -> tuple[Group, ...]:
    first = next(tensors for name, tensors in named.items() if name != "gammas")
    states = next((tensors for name, tensors in named.items() if name in _STATES), first)
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

"""What the tensors of a call are, and which of them a backend cannot take.

Looking at every tensor's type, dtype, device and strides from Python costs more than a step, so the answer is kept with a
guard that compares all of it in one call into torch's C++. Addresses are no part of it: they are read in every call.
"""

import itertools
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:  # what torch.compile checks its inputs with; not public, so its absence only costs time
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LISTS = {
    "accumulate_importance_": ("gammas", "grads"),
    "soft_mask_": ("grads", "gammas"),
    "update_mask_": ("params", "old_params", "gammas"),
    "masked_sgd_": ("params", "grads", "gammas", "momentum_buffers"),
    "masked_adamw_": ("params", "grads", "gammas", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
}
Lists = tuple[list[Tensor], ...]
STATES = ("momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
PLAIN = {Tensor, torch.nn.Parameter}  # a subclass may keep its numbers elsewhere: DTensor, FakeTensor
_PLANS_PER_KEY = 16
_KEYS = 32  # the number of tensors may be another in every step, where experts or heads take turns
_ADDRESSES_PER_PLAN = 64


class Plan:
    """One call's tensors: the reasons why some cannot be taken, or what `build` makes of them for the launch."""

    def __init__(self, op: str, lists: Lists, device_type: str, build: Callable):
        # A list may be empty (no momentum, no amsgrad); the others are parallel to the first.
        named = {name: tensors for name, tensors in zip(LISTS[op], lists) if tensors}
        reasons = ((i, _refusal(op, {name: tensors[i] for name, tensors in named.items()}, device_type))
                   for i in range(len(lists[0])))
        self.refused: dict[int, str] = {i: reason for i, reason in reasons if reason}
        self.launch: Any = None if self.refused else build(op, named)
        # Whether other tensors are like these; no reference to a tensor stays.
        self.holds = None if self.refused else _guard(list(itertools.chain(*lists)))
        self._disjoint_at: set[bytes] = set()

    def is_disjoint(self, addresses: array) -> bool:
        """Whether tensors like these, at these addresses, are known to share no memory with what the call writes."""
        return addresses.tobytes() in self._disjoint_at

    def remember_disjoint(self, addresses: array) -> None:
        if len(self._disjoint_at) >= _ADDRESSES_PER_PLAN:
            self._disjoint_at.clear()
        self._disjoint_at.add(addresses.tobytes())

    def first_refusal(self) -> tuple[int, str]:
        return next(iter(self.refused.items()))


class Plans:
    """A backend's plans: for tensors on `device_type`, with what `build(op, {list name: tensors})` keeps for a launch."""

    def __init__(self, device_type: str, build: Callable[[str, dict[str, list[Tensor]]], Any]):
        self.device_type = device_type
        self.build = build
        self._plans: dict[tuple, list[Plan]] = {}

    def known(self, op: str, lists: Lists) -> Plan | None:
        """The plan of an earlier call whose tensors were like these in all but their addresses and numbers."""
        tensors = list(itertools.chain(*lists))
        return next((plan for plan in self._plans.get((op, *map(len, lists)), ()) if plan.holds(tensors)), None)

    def make(self, op: str, lists: Lists) -> Plan:
        """A plan for these tensors, of which none is known; `known` from now on, unless it refuses some."""
        plan = Plan(op, lists, self.device_type, self.build)
        if not plan.refused:
            known = self._plans.setdefault((op, *map(len, lists)), [])
            known.insert(0, plan)
            del known[_PLANS_PER_KEY:]
            while len(self._plans) > _KEYS:
                self._plans.pop(next(iter(self._plans)), None)
        return plan


def addresses_of(lists: Lists) -> array:
    """The addresses of all tensors of a call, list after list."""
    return array("Q", list(map(Tensor.data_ptr, itertools.chain(*lists))))  # a list's length is known: a sixth faster


def is_one_value(op: str, gamma: Tensor) -> bool:
    """Whether a gamma is one value for a whole tensor. Where importance is folded in, it is a tensor of one element."""
    return op != "accumulate_importance_" and gamma.dim() == 0 and gamma.dtype == torch.float32


def _guard(tensors: list[Tensor]) -> Callable[[list[Tensor]], bool]:
    """A function that says whether tensors have the types, dtypes, devices, shapes and strides of these."""
    if TensorGuards is None:
        described = _describe(tensors)
        return lambda others: _describe(others) == described
    # It says no to a tensor that comes twice, as the heads' one gamma does: repeats are held to the place they repeat.
    first: dict[int, int] = {}
    repeats = [(i, first[id(t)]) for i, t in enumerate(tensors) if first.setdefault(id(t), i) != i]
    kept = list(first.values())
    guards = TensorGuards(*(tensors[i] for i in kept), dynamic_dims_sizes=[list(tensors[i].shape) for i in kept],
                          dynamic_dims_strides=[list(tensors[i].stride()) for i in kept])
    if not repeats:
        return lambda others: guards.check(*others)
    return lambda others: all([others[i] is others[j] for i, j in repeats]) and guards.check(*[others[i] for i in kept])


def _describe(tensors: list[Tensor]) -> list[tuple]:
    return [(type(t), t.layout, t.layout == torch.strided and (t.dtype, t.device, t.shape, t.stride())) for t in tensors]


def _refusal(op: str, tensors: dict[str, Tensor], device_type: str) -> str | None:
    first = next(t for name, t in tensors.items() if name != "gammas")
    states = {t.dtype for name, t in tensors.items() if name in STATES}
    for name, tensor in tensors.items():
        if type(tensor) not in PLAIN:
            return f"has {name} of type {type(tensor).__name__}"
        if name == "state_steps":
            if not (tensor.is_cpu or tensor.device == first.device) or tensor.dtype != torch.float32 or tensor.numel() != 1:
                return f"has {name} of {tensor.numel()} {tensor.dtype} on {tensor.device}"
            continue
        if tensor.layout != torch.strided or tensor.device.type != device_type or tensor.device != first.device:
            return f"has {name} on {tensor.device} with layout {tensor.layout}, expected strided on {device_type}"
        if tensor.is_neg():
            return f"has {name} that are a lazily negated view"
        if name == "gammas":
            if tensor.dtype not in (torch.float32, torch.uint8):
                return f"has {name} of {tensor.dtype}"
            if is_one_value(op, tensor):
                continue
        elif tensor.dtype not in DTYPES:
            return f"has {name} of {tensor.dtype}"
        elif name in STATES:
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
    """Whether both lie densely in memory, with their elements in the same order: the k-th of one belongs to the k-th of the other."""
    if tensor.numel() == 0 or (tensor.is_contiguous() and first.is_contiguous()):
        return True
    strides, others = ([(stride, n) for stride, n in zip(t.stride(), t.shape) if n > 1] for t in (tensor, first))
    dense = 1
    for stride, n in sorted(strides):
        if stride != dense:
            return False
        dense *= n
    return strides == others

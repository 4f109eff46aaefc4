"""What the tensors of a call are, and which of them a backend cannot take.

The answer is kept, and serves for as long as the tensors are alike in all but their addresses, which every call reads anew.
"""

import itertools
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tensors import PLAIN, Lists, addresses_of, locator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LISTS = {
    "accumulate_importance_": ("gammas", "grads"),
    "soft_mask_": ("grads", "gammas"),
    "update_mask_": ("params", "old_params", "gammas"),
    "masked_sgd_": ("params", "grads", "gammas", "momentum_buffers"),
    "masked_adamw_": ("params", "grads", "gammas", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
}
STATES = ("momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
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
        # Gives the addresses of tensors that are like this plan's own in all but addresses and values; None for others. There
        # is no such function if a tensor may have been refused for something that a locator does not compare.
        self.locate: Callable[[Lists], array | None] | None = None
        if not self.refused or all(map(_is_described, itertools.chain(*lists))):
            self.locate = _locator(op, lists)
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

    def known(self, op: str, lists: Lists) -> tuple[Plan, array | None] | None:
        """The plan of an earlier call whose tensors were like these, and these tensors' addresses; without those if it refuses
        some tensor.
        """
        for plan in self._plans.get((op, *map(len, lists)), ()):
            if (addresses := plan.locate(lists)) is not None:
                return plan, None if plan.refused else addresses
        return None

    def make(self, op: str, lists: Lists) -> tuple[Plan, array | None]:
        """A plan for these tensors, of which none is known, and their addresses; without those if it refuses some tensor."""
        plan = Plan(op, lists, self.device_type, self.build)
        if plan.locate is None:
            return plan, None
        known = self._plans.setdefault((op, *map(len, lists)), [])
        known.insert(0, plan)
        del known[_PLANS_PER_KEY:]
        for key in list(self._plans)[:-_KEYS]:  # in one go: other threads make plans too
            self._plans.pop(key, None)
        return plan, None if plan.refused else addresses_of(lists)


def _locator(op: str, lists: Lists) -> Callable[[Lists], array | None]:
    # A negated view is the imaginary part of a conjugate: every second element, so it is dense only if it has one. Other
    # negated views, made by as_strided or torch's private _neg_view, are noticed when a plan is made, but not in every call.
    may_be_negated = [(k, i) for k, tensors in enumerate(lists) if LISTS[op][k] != "state_steps"
                      for i, tensor in enumerate(tensors) if tensor.numel() == 1]
    locate = locator(lists)
    if not may_be_negated:
        return locate

    def locate_unless_negated(others: Lists) -> array | None:
        addresses = locate(others)
        return addresses if addresses and not any(others[k][i].is_neg() for k, i in may_be_negated) else None

    return locate_unless_negated


def _is_described(tensor: Tensor) -> bool:
    """Whether a locator sees all of it that `_refusal` does."""
    return (type(tensor) in PLAIN and tensor.layout == torch.strided and not tensor.is_neg()
            and (tensor.data_ptr() != 0 or not tensor.numel()))


def is_one_value(op: str, gamma: Tensor) -> bool:
    """Whether a gamma is one value for a whole tensor. Where importance is folded in, it is a tensor of one element."""
    return op != "accumulate_importance_" and gamma.dim() == 0 and gamma.dtype == torch.float32


def _refusal(op: str, tensors: dict[str, Tensor], device_type: str) -> str | None:
    first = next(t for name, t in tensors.items() if name != "gammas")
    states = {t.dtype for name, t in tensors.items() if name in STATES}
    for name, tensor in tensors.items():  # of all first: of others there is little to ask
        if tensor.layout != torch.strided:
            return f"has {name} on {tensor.device} with layout {tensor.layout}, expected strided on {device_type}"
    for name, tensor in tensors.items():
        if type(tensor) not in PLAIN:
            return f"has {name} of type {type(tensor).__name__}"
        if name == "state_steps":
            if not (tensor.is_cpu or tensor.device == first.device) or tensor.dtype != torch.float32 or tensor.numel() != 1:
                return f"has {name} of {tensor.numel()} {tensor.dtype} on {tensor.device}"
            continue
        if tensor.device.type != device_type or tensor.device != first.device:
            return f"has {name} on {tensor.device}, expected {device_type}"
        if tensor.is_neg():
            return f"has {name} that are a lazily negated view"
        if tensor.numel() and not tensor.data_ptr():
            return f"has {name} without memory"  # torch's zero tensors, a storage that was resized away
        if name == "gammas":
            if tensor.dtype not in (torch.float32, torch.uint8):
                return f"has {name} of {tensor.dtype}"
            if is_one_value(op, tensor):
                continue
        elif tensor.dtype not in DTYPES:
            return f"has {name} of {tensor.dtype}"
        elif name in STATES:
            if len(states) > 1 or tensor.dtype not in (torch.float32, first.dtype):
                return f"has states of {', '.join(sorted(map(str, states)))} for a parameter of {first.dtype}"
        elif tensor.dtype != first.dtype:
            return f"has {name} of {tensor.dtype} for a parameter of {first.dtype}"
        if tensor.shape != first.shape:  # an optimizer loads a state of any shape
            return f"has {name} of shape {tuple(tensor.shape)}, expected {tuple(first.shape)}"
        if not _same_memory_order(tensor, first):
            return f"has {name} in another memory layout (strides {tensor.stride()}, expected {first.stride()}, dense)"
    return None


def _same_memory_order(tensor: Tensor, first: Tensor) -> bool:
    """Whether both lie densely in memory, their elements in the same order: the k-th of one belongs to the other's k-th."""
    if tensor.numel() == 0 or (tensor.is_contiguous() and first.is_contiguous()):
        return True
    strides, others = ([(stride, n) for stride, n in zip(t.stride(), t.shape) if n > 1] for t in (tensor, first))
    dense = 1
    for stride, n in sorted(strides):
        if stride != dense:
            return False
        dense *= n
    return strides == others

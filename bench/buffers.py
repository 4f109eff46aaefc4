"""The memory a pass works on: sets of equal lists of tensors that rotate, so that no call finds its data in the cache."""

import functools
from math import ceil

import torch
from torch import Tensor

from spg_kernels import ops

from .machine import cache_bytes
from .sets import ParameterSet

KINDS = ("params", "old_params", "grads", "gammas", "codes", "momentum_buffers", "exp_avgs", "exp_avg_sqs")
_PERIOD = 2**20 + 7  # of the values, which repeat; no shape is a multiple of it
_MOST_SETS = 8


class Buffers:
    """Lists of tensors of a parameter set's shapes, by kind, `slots` times.

    Values repeat a short random period, each tensor starting elsewhere in it, so that any tensor can be made anew at any
    time without a second copy of the whole set.

    Args:
        least_bytes: bytes per parameter that the most frugal contender touches.
        dtype: of everything but importance.
    """

    def __init__(self, parameter_set: ParameterSet, kinds: tuple[str, ...], least_bytes: float, device: torch.device,
                 dtype: torch.dtype = torch.float32):
        self.set = parameter_set
        self.dtype = dtype
        self.device = device
        # Four times the cache between two visits to the same buffer; one set that is as large as that evicts itself.
        needed = ceil(4 * cache_bytes(device.type) / (least_bytes * parameter_set.parameters))
        # Sets of tiny tensors stay in the cache in real training too, and would take thousands of sets to leave it.
        self.cold = needed <= _MOST_SETS
        self.slots = needed if self.cold else 1
        self.lists = [{kind: [self._empty(kind, shape) for shape in parameter_set.shapes] for kind in kinds}
                      for _ in range(self.slots)]
        for slot in range(self.slots):
            self.fill(slot, kinds)

    def fill(self, slot: int, kinds: tuple[str, ...]) -> None:
        """Give every tensor of these kinds its initial value."""
        for kind in kinds:
            for i, tensor in enumerate(self.lists[slot][kind]):
                self._fill(tensor, kind, i)

    def initial(self, kind: str, i: int) -> Tensor:
        """Tensor i's initial value, newly made."""
        tensor = self._empty(kind, self.set.shapes[i])
        self._fill(tensor, kind, i)
        return tensor

    def _empty(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        dtype = {"codes": torch.uint8, "gammas": torch.float32}.get(kind, self.dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _fill(self, tensor: Tensor, kind: str, i: int) -> None:
        flat, period = tensor.detach().view(-1), _period(kind, self.device)
        begin, start = 0, i * 7919 % _PERIOD
        while begin < flat.numel():
            length = min(flat.numel() - begin, _PERIOD - start)
            flat[begin : begin + length].copy_(period[start : start + length])
            begin, start = begin + length, 0


@functools.cache
def _period(kind: str, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    if kind == "codes":
        return ops.encode_gamma(_period("gammas", device))
    values = torch.randn(_PERIOD, generator=generator)
    if kind == "gammas":
        # As importance is distributed, with some elements free and some frozen.
        values = values.tanh().abs()
        values[::16], values[5::64] = 0, 1
    return (values.square() if kind == "exp_avg_sqs" else values).to(device)

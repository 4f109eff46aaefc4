"""The CPU backend: `csrc/` as a plain shared library, called through ctypes.

Every call passes addresses; what C++ assumes about the memory behind them is checked when a plan is made.
"""

import itertools
from array import array

import torch
from torch import Tensor

from . import library
from .plans import Plans, is_one_value

DEVICE_TYPES = ("cpu",)
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_ONE_VALUE = 4  # the code of a gamma that is one float32 for the whole tensor

# What the functions take between the sizes and the scalars: a list's dtype codes, or its addresses.
_ARGUMENTS = {
    "accumulate_importance_": ("gammas:code", "gammas", "grads:code", "grads"),
    "soft_mask_": ("grads:code", "grads", "gammas:code", "gammas"),
    "update_mask_": ("params:code", "params", "old_params", "gammas:code", "gammas"),
    "masked_sgd_": ("params:code", "params", "grads", "gammas:code", "gammas", "momentum_buffers:code", "momentum_buffers"),
    "masked_adamw_": ("params:code", "params", "grads", "gammas:code", "gammas", "exp_avgs:code", "exp_avgs", "exp_avg_sqs",
                      "max_exp_avg_sqs", "state_steps"),
}


def unavailable() -> str | None:
    return library.load()[1]


def describe() -> str:
    """Instruction set and threads, for `python -m spg_kernels`."""
    functions = library.load()[0]
    threads = (f"{torch.get_num_threads()} OpenMP threads" if functions.spg_has_openmp()
               else "one thread (built without OpenMP)")
    return f"{functions.spg_isa().decode()}, {threads}"


class _Launch:
    """A call of one C++ function: what it is told of the tensors besides their addresses, and where those stand."""

    def __init__(self, op: str, named: dict[str, list[Tensor]]):
        self._function = getattr(library.load()[0], f"spg_{op[:-1]}")
        self._numel = array("q", [t.numel() for t in next(iter(named.values()))])
        self.count = len(self._numel)
        self._codes = {name: array("i", [_ONE_VALUE if name == "gammas" and is_one_value(op, t) else _CODES[t.dtype]
                                         for t in tensors]) for name, tensors in named.items()}
        starts = dict(zip(named, itertools.accumulate(map(len, named.values()), initial=0)))
        # (True, a place among the addresses of a call, in bytes) or (False, an address; None for a list that is empty)
        self._arguments: list[tuple[bool, int | None]] = []
        for argument in _ARGUMENTS[op]:
            name, _, is_code = argument.partition(":")
            if name not in named:
                self._arguments.append((False, None))
            elif is_code:
                self._arguments.append((False, self._codes[name].buffer_info()[0]))
            else:
                self._arguments.append((True, starts[name] * 8))

    def __call__(self, addresses: array, *scalars) -> None:
        base = addresses.buffer_info()[0]
        status = self._function(self.count, self._numel.buffer_info()[0],
                                *[base + value if is_offset else value for is_offset, value in self._arguments],
                                *scalars, torch.get_num_threads())
        if status == 1:
            raise MemoryError(f"{self._function.__name__}: no memory for its work list")
        if status:  # a dtype that a plan should have refused: a bug of this package
            raise RuntimeError(f"{self._function.__name__}: status {status}")


PLANS = Plans("cpu", _Launch)


def accumulate_importance_(launch: _Launch, addresses: array) -> Tensor:
    finite = torch.empty(launch.count, dtype=torch.bool, device="cpu")
    launch(addresses, finite.data_ptr())
    return finite


def soft_mask_(launch: _Launch, addresses: array) -> None:
    launch(addresses)


def update_mask_(launch: _Launch, addresses: array) -> None:
    launch(addresses)


def masked_sgd_(launch: _Launch, addresses: array, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0,
                nesterov=False, maximize=False, is_first_step=False, mask="update", grad_scale=None, found_inf=None) -> None:
    if not found_inf:
        launch(addresses, float(lr), momentum, dampening, weight_decay, _grad_factor(maximize, grad_scale), nesterov,
               is_first_step, mask == "gradient")


def masked_adamw_(launch: _Launch, addresses: array, *, lr, beta1=0.9, beta2=0.999, eps=1e-8,
                  weight_decay=1e-2, decoupled=True, maximize=False, mask="update", grad_scale=None, found_inf=None) -> None:
    if not found_inf:
        launch(addresses, float(lr), beta1, beta2, eps, weight_decay, _grad_factor(maximize, grad_scale), decoupled,
               mask == "gradient")


def _grad_factor(maximize: bool, grad_scale: Tensor | None) -> float:
    """What gradients are multiplied by before anything else; C++ rounds it to float32, as GradScaler.unscale_ does."""
    sign = -1.0 if maximize else 1.0
    return sign if grad_scale is None else sign * float(grad_scale.double().reciprocal())

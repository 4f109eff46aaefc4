"""The CPU backend: `csrc/` as a plain shared library, called through ctypes.

Every call passes arrays of addresses; what C++ assumes about the memory behind them is checked when a plan is made.
"""

import ctypes
import functools
from array import array
from ctypes import c_double, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from .plans import Plans, is_one_value

DEVICE_TYPES = ("cpu",)
ABI_VERSION = 1
LIBRARY = Path(__file__).with_name("libspg_kernels.so")

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_ONE_VALUE = 4  # the code of a gamma that is one float32 for the whole tensor

_SIGNATURES = {
    "spg_accumulate_importance": [c_int64] + [c_void_p] * 6 + [c_int32],
    "spg_soft_mask": [c_int64] + [c_void_p] * 5 + [c_int32],
    "spg_update_mask": [c_int64] + [c_void_p] * 6 + [c_int32],
    "spg_masked_sgd": [c_int64] + [c_void_p] * 8 + [c_double] * 4 + [c_int32] * 5,
    "spg_masked_adamw": [c_int64] + [c_void_p] * 11 + [c_double] * 5 + [c_int32] * 4,
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """(the library, None) or (None, why not). After `import torch` it shares torch's OpenMP threads: one libgomp.so.1."""
    if not LIBRARY.exists():
        return None, f"{LIBRARY.name} was not built; install the package with a C++ compiler at hand (pip install .)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"{LIBRARY.name} does not load: {error}"
    if library.spg_abi_version() != ABI_VERSION:
        return None, f"{LIBRARY.name} is of another version; reinstall the package"
    for name, argtypes in _SIGNATURES.items():
        getattr(library, name).argtypes = argtypes
        getattr(library, name).restype = c_int32
    library.spg_isa.restype = ctypes.c_char_p
    return library, None


def unavailable() -> str | None:
    return _load()[1]


def describe() -> str:
    """Instruction set and threads, for `python -m spg_kernels`."""
    library = _load()[0]
    threads = f"{torch.get_num_threads()} OpenMP threads" if library.spg_has_openmp() else "one thread (built without OpenMP)"
    return f"{library.spg_isa().decode()}, {threads}"


class _Launch:
    """What C++ is told of a call's tensors besides their addresses: sizes, and the dtype codes of each list."""

    def __init__(self, op: str, named: dict[str, list[Tensor]]):
        self.numel = array("q", [t.numel() for t in next(iter(named.values()))])
        self.codes = {name: array("i", [_ONE_VALUE if name == "gammas" and is_one_value(op, t) else _CODES[t.dtype]
                                        for t in tensors]) for name, tensors in named.items()}


PLANS = Plans("cpu", _Launch)


def _address(values: array | Tensor | None) -> int | None:
    if values is None:
        return None
    return values.data_ptr() if isinstance(values, Tensor) else values.buffer_info()[0]


def _invoke(function: str, launch: _Launch, codes_and_tensors: tuple[str | list[Tensor] | Tensor, ...], *scalars) -> None:
    """Call C++ with, in order, the dtype codes of a list (by its name), or the addresses of its tensors."""
    arrays = [launch.codes.get(x) if isinstance(x, str) else x if isinstance(x, Tensor) else
              array("Q", map(Tensor.data_ptr, x)) if x else None for x in codes_and_tensors]
    status = getattr(_load()[0], function)(len(launch.numel), _address(launch.numel), *map(_address, arrays), *scalars,
                                           torch.get_num_threads())
    if status == 1:
        raise MemoryError(f"{function}: no memory for its work list")
    if status:
        raise RuntimeError(f"{function}: status {status}")  # a dtype that a plan let through: ours to mend


def accumulate_importance_(launch: _Launch, gammas: list[Tensor], grads: list[Tensor]) -> Tensor:
    finite = torch.empty(len(grads), dtype=torch.bool, device="cpu")
    _invoke("spg_accumulate_importance", launch, ("gammas", gammas, "grads", grads, finite))
    return finite


def soft_mask_(launch: _Launch, grads: list[Tensor], gammas: list[Tensor]) -> None:
    _invoke("spg_soft_mask", launch, ("grads", grads, "gammas", gammas))


def update_mask_(launch: _Launch, params: list[Tensor], old_params: list[Tensor], gammas: list[Tensor]) -> None:
    _invoke("spg_update_mask", launch, ("params", params, old_params, "gammas", gammas))


def masked_sgd_(launch: _Launch, params, grads, gammas, momentum_buffers, *, lr, momentum=0.0, dampening=0.0,
                weight_decay=0.0, nesterov=False, maximize=False, is_first_step=False, mask="update") -> None:
    _invoke("spg_masked_sgd", launch, ("params", params, grads, "gammas", gammas, "momentum_buffers", momentum_buffers),
            float(lr), momentum, dampening, weight_decay, nesterov, maximize, is_first_step, mask == "gradient")


def masked_adamw_(launch: _Launch, params, grads, gammas, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, *, lr,
                  beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2, decoupled=True, maximize=False,
                  mask="update") -> None:
    _invoke("spg_masked_adamw", launch,
            ("params", params, grads, "gammas", gammas, "exp_avgs", exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps),
            float(lr), beta1, beta2, eps, weight_decay, decoupled, maximize, mask == "gradient")

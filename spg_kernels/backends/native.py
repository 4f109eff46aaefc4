"""The CPU backend: `csrc/` as a plain shared library, called through ctypes.

Every call passes arrays of addresses; what C++ assumes about the memory behind them is checked here, in `refusals`.
"""

import ctypes
import functools
from array import array
from ctypes import c_double, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

DEVICE_TYPES = ("cpu",)
ABI_VERSION = 1
LIBRARY = Path(__file__).with_name("libspg_kernels.so")

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_ONE_VALUE = 4  # the code of a gamma that is one float32 for the whole tensor
_PLAIN = {Tensor, torch.nn.Parameter}  # a subclass may keep its numbers elsewhere: DTensor, FakeTensor

# The tensor lists of each operator, and the C signature of what follows the lists.
_LISTS = {
    "accumulate_importance_": ("gammas", "grads"),
    "soft_mask_": ("grads", "gammas"),
    "update_mask_": ("params", "old_params", "gammas"),
    "masked_sgd_": ("params", "grads", "gammas", "momentum_buffers"),
    "masked_adamw_": ("params", "grads", "gammas", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
}
_STATES = {"momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"}
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


def refusals(op: str, lists: tuple[list[Tensor], ...]) -> dict[int, str]:
    """The indices whose tensors C++ cannot take, and why: type, dtype, device or memory layout."""
    named = {name: tensors for name, tensors in zip(_LISTS[op], lists) if tensors}
    if _all_plain(named):
        return {}
    reasons = ((i, _refusal({name: tensors[i] for name, tensors in named.items()})) for i in range(len(lists[0])))
    return {i: reason for i, reason in reasons if reason}


def _all_plain(named: dict[str, list[Tensor]]) -> bool:
    """The common case, decided for whole lists at a time: everything a contiguous CPU tensor of one dtype and of equal sizes."""
    sizes = None
    for name, tensors in named.items():
        if not {type(t) for t in tensors} <= _PLAIN or not all([t.is_cpu and t.is_contiguous() for t in tensors]):
            return False
        dtypes = {t.dtype for t in tensors}
        if name == "gammas":
            sizes = sizes or [t.numel() for t in tensors]
            if not dtypes <= {torch.float32, torch.uint8}:
                return False
            if any([t.numel() != n and t.dim() for t, n in zip(tensors, sizes)]):
                return False
            continue
        if name == "state_steps":
            if dtypes != {torch.float32}:
                return False
            continue
        if len(dtypes) != 1 or not dtypes <= _CODES.keys():
            return False
        if name in ("grads", "old_params") and "params" in named and dtypes != {named["params"][0].dtype}:
            return False
        if name in _STATES and not dtypes <= {torch.float32, named["params"][0].dtype}:
            return False
        if sizes is None:
            sizes = [t.numel() for t in tensors]
        elif sizes != [t.numel() for t in tensors]:
            return False
    return True


def _refusal(tensors: dict[str, Tensor]) -> str | None:
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if type(tensor) not in _PLAIN:
            return f"has {name} of type {type(tensor).__name__}"
        if tensor.layout != torch.strided or not tensor.is_cpu:
            return f"has {name} on {tensor.device} with layout {tensor.layout}"
        if tensor.dtype not in _CODES:
            return f"has {name} of {tensor.dtype}"
        if name in ("gammas", "state_steps") and tensor.dim() == 0:
            continue
        if name in ("grads", "old_params") and "params" in tensors and tensor.dtype != first.dtype:
            return f"has {name} of {tensor.dtype} for a parameter of {first.dtype}"
        if name in _STATES and tensor.dtype not in (torch.float32, first.dtype):
            return f"has {name} of {tensor.dtype} for a parameter of {first.dtype}"
        if tensor.numel() != first.numel():
            return f"has {name} of {tensor.numel()} elements, expected {first.numel()}"
        if tensor.numel() > 1 and not _same_memory_order(tensor, first):
            return f"has {name} in another memory layout (strides {tensor.stride()}, expected {first.stride()}, dense)"
    return None


def _same_memory_order(tensor: Tensor, first: Tensor) -> bool:
    """Whether walking both memories from their first address to their last visits the same elements in the same order."""
    if tensor.is_contiguous() and first.is_contiguous():
        return True
    strides = [[(stride, n) for stride, n in zip(t.stride(), t.shape) if n > 1] for t in (tensor, first)]
    dense = 1
    for stride, n in sorted(strides[0]):
        if stride != dense:
            return False
        dense *= n
    return strides[0] == strides[1]


def _address(values: array | Tensor) -> int:
    return values.data_ptr() if isinstance(values, Tensor) else values.buffer_info()[0]


def _pointers(tensors: list[Tensor]) -> array:
    return array("Q", [t.data_ptr() for t in tensors])


def _codes(tensors: list[Tensor]) -> array:
    return array("i", [_CODES[t.dtype] for t in tensors])


def _gamma_codes(gammas: list[Tensor]) -> array:
    return array("i", [_CODES[g.dtype] if g.dim() or g.dtype == torch.uint8 else _ONE_VALUE for g in gammas])


def _invoke(function: str, tensors: list[Tensor], arrays: list[array | Tensor], *scalars) -> None:
    """Call C++; `arrays` stay referenced here until it returns."""
    numel = array("q", [t.numel() for t in tensors])
    status = getattr(_load()[0], function)(len(tensors), _address(numel), *[_address(a) if len(a) else None for a in arrays],
                                           *scalars, torch.get_num_threads())
    if status == 1:
        raise MemoryError(f"{function}: no memory for its work list")
    if status:
        raise RuntimeError(f"{function}: status {status}")  # a dtype that refusals let through: ours to mend


def accumulate_importance_(gammas: list[Tensor], grads: list[Tensor]) -> Tensor:
    finite = torch.empty(len(grads), dtype=torch.bool, device="cpu")
    _invoke("spg_accumulate_importance", grads,
            [_codes(gammas), _pointers(gammas), _codes(grads), _pointers(grads), finite])
    return finite


def soft_mask_(grads: list[Tensor], gammas: list[Tensor]) -> None:
    _invoke("spg_soft_mask", grads, [_codes(grads), _pointers(grads), _gamma_codes(gammas), _pointers(gammas)])


def update_mask_(params: list[Tensor], old_params: list[Tensor], gammas: list[Tensor]) -> None:
    _invoke("spg_update_mask", params,
            [_codes(params), _pointers(params), _pointers(old_params), _gamma_codes(gammas), _pointers(gammas)])


def masked_sgd_(params, grads, gammas, momentum_buffers, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0,
                nesterov=False, maximize=False, is_first_step=False, mask="update") -> None:
    _invoke("spg_masked_sgd", params,
            [_codes(params), _pointers(params), _pointers(grads), _gamma_codes(gammas), _pointers(gammas),
             _codes(momentum_buffers), _pointers(momentum_buffers)],
            float(lr), momentum, dampening, weight_decay, nesterov, maximize, is_first_step, mask == "gradient")


def masked_adamw_(params, grads, gammas, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, *, lr, beta1=0.9, beta2=0.999,
                  eps=1e-8, weight_decay=1e-2, decoupled=True, maximize=False, mask="update") -> None:
    _invoke("spg_masked_adamw", params,
            [_codes(params), _pointers(params), _pointers(grads), _gamma_codes(gammas), _pointers(gammas), _codes(exp_avgs),
             _pointers(exp_avgs), _pointers(exp_avg_sqs), _pointers(max_exp_avg_sqs), _pointers(state_steps)],
            float(lr), beta1, beta2, eps, weight_decay, decoupled, maximize, mask == "gradient")

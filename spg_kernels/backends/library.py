"""`csrc/` as a plain shared library, through ctypes."""

import ctypes
import functools
import os
import warnings
from ctypes import c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path

ABI_VERSION = 3
CAPS = ("avx512vbmi", "avx512", "avx2", "baseline")  # what csrc/ knows of SPG_CPU_CAPABILITY; any other value caps nothing
LIBRARY = Path(__file__).with_name("libspg_kernels.so")
# What functions return, and what they take.
_SIGNATURES = {
    "spg_isa": (c_char_p, []),
    "spg_accumulate_importance": (c_int32, [c_int64] + [c_void_p] * 6 + [c_int32]),
    "spg_soft_mask": (c_int32, [c_int64] + [c_void_p] * 5 + [c_int32]),
    "spg_update_mask": (c_int32, [c_int64] + [c_void_p] * 6 + [c_int32]),
    "spg_masked_sgd": (c_int32, [c_int64] + [c_void_p] * 8 + [c_double] * 5 + [c_int32] * 4),
    "spg_masked_adamw": (c_int32, [c_int64] + [c_void_p] * 11 + [c_double] * 6 + [c_int32] * 3),
    "spg_read_floats": (None, [c_int64, c_void_p, c_void_p]),
    "spg_increment_floats": (None, [c_int64, c_void_p]),
}


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """(the library, None) or (None, why not). After `import torch` it shares torch's OpenMP threads: one libgomp.so.1."""
    if not LIBRARY.exists():
        return None, (f"{LIBRARY.name} was not built in {LIBRARY.parent}; install the package with a C++ compiler at hand: "
                      "pip install -e . (without -e it is in site-packages; Python started beside the sources imports these)")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"{LIBRARY.name} does not load: {error}"
    if library.spg_abi_version() != ABI_VERSION:
        return None, f"{LIBRARY.name} is of another version; reinstall the package"
    for name, (restype, argtypes) in _SIGNATURES.items():
        getattr(library, name).restype, getattr(library, name).argtypes = restype, argtypes
    cap = os.environ.get("SPG_CPU_CAPABILITY")
    if cap and cap not in CAPS:
        warnings.warn(f"SPG_CPU_CAPABILITY: expected one of {', '.join(CAPS)}, got {cap!r}: the instruction set is not capped")
    return library, None

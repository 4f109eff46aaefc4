"""The GPU backend: Triton kernels that take a whole model in one launch.

Importing it imports no Triton and probes no device.
"""

import functools
import importlib.util
from collections.abc import Callable

import numpy
import torch
from torch.torch_version import TorchVersion

from .plans import INTERPRETED, PLANS  # noqa: F401  (PLANS is part of what a backend offers)

# With TRITON_INTERPRET=1 this backend takes CPU tensors, when asked for by name; "auto" has no use for that.
DEVICE_TYPES = ("cuda",)


@functools.cache
def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if INTERPRETED:
        return interpreter_unavailable()
    return None if torch.cuda.is_available() else "there is no CUDA or ROCm device"


def interpreter_unavailable() -> str | None:
    """Triton before 3.7 takes a loop's bounds from arrays of one element, which NumPy 2.4 no longer turns into a number.

    Not left to that error: the launch it ends leaves the work queue's counters as they were, and the next would wait for ever.
    """
    import triton

    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy.__version__) >= "2.4":
        return (f"Triton {triton.__version__}'s interpreter does not run under NumPy {numpy.__version__} "
                "(pip install 'numpy<2.4', or Triton 3.7)")
    return None


def describe() -> str:
    """Triton's version and the devices, for `python -m spg_kernels`."""
    import triton

    if INTERPRETED:
        return f"triton {triton.__version__}, interpreted on the CPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"triton {triton.__version__} on {', '.join(names)}"


_ROOMS = {"accumulate_importance_": "importance", "soft_mask_": "elementwise", "update_mask_": "elementwise",
          "masked_sgd_": "steps", "masked_adamw_": "steps"}


def __getattr__(name: str) -> Callable:
    """An operator's function, from the room of its kernels: they are imported with their first use."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)

"""The GPU backend: Triton kernels that take a whole model in one launch.

Importing it imports no Triton and probes no device.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from . import plans

# With TRITON_INTERPRET=1 this backend takes CPU tensors, when asked for by name; "auto" has no use for that.
DEVICE_TYPES = ("cuda",)


@functools.cache
def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not plans.INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA or ROCm device"
    return None


def describe() -> str:
    """Triton's version and the devices, for `python -m spg_kernels`."""
    import triton

    if plans.INTERPRETED:
        return f"triton {triton.__version__}, interpreted on the CPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"triton {triton.__version__} on {', '.join(names)}"


def refusals(op: str, lists: tuple[list[Tensor], ...]) -> dict[int, str]:
    """The indices whose tensors no kernel takes, and why: type, dtype, device or memory layout."""
    return plans.check(op, lists)


def accumulate_importance_(gammas: list[Tensor], grads: list[Tensor]) -> Tensor:
    from .importance import accumulate_importance_ as run

    return run(gammas, grads)


def soft_mask_(grads: list[Tensor], gammas: list[Tensor]) -> None:
    from .elementwise import soft_mask_ as run

    run(grads, gammas)


def update_mask_(params: list[Tensor], old_params: list[Tensor], gammas: list[Tensor]) -> None:
    from .elementwise import update_mask_ as run

    run(params, old_params, gammas)


def masked_sgd_(*lists: list[Tensor], **settings) -> None:
    from .steps import masked_sgd_ as run

    run(*lists, **settings)


def masked_adamw_(*lists: list[Tensor], **settings) -> None:
    from .steps import masked_adamw_ as run

    run(*lists, **settings)

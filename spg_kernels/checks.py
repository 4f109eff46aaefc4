"""What the arguments of each operator must be: errors that name the list, the index, what was expected and what came."""

import torch
from torch import Tensor

from .backends.plans import LISTS

MASKS = ("update", "gradient")
GAMMA_DTYPES = (torch.float32, torch.uint8)


def _check_lists(like: str, tensors: list[Tensor], **others: list[Tensor]) -> None:
    """Every list in `others` is parallel to `tensors`: as long, same shapes, same devices."""
    for name, other in others.items():
        if len(other) != len(tensors):
            raise ValueError(f"{name}: expected {len(tensors)} tensors, one for each of {like}, got {len(other)}")
        for i, (tensor, twin) in enumerate(zip(tensors, other)):
            if twin.shape != tensor.shape:
                raise ValueError(f"{name}[{i}]: expected shape {tuple(tensor.shape)} of {like}[{i}], got {tuple(twin.shape)}")
            if twin.device != tensor.device:
                raise ValueError(f"{name}[{i}]: expected device {tensor.device} of {like}[{i}], got {twin.device}")


def is_floating(tensor: Tensor) -> bool:
    """Whether it is floating point, and of a dtype that can be computed with, which float8 is not."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _check_floating(name: str, tensors: list[Tensor], complex_too: bool = False) -> None:
    for i, tensor in enumerate(tensors):
        if not (is_floating(tensor) or (complex_too and tensor.is_complex())):
            raise TypeError(f"{name}[{i}]: expected a floating point tensor, got {tensor.dtype}")


def _check_strided(name: str, tensors: list[Tensor], sparse_too: bool = False) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.is_nested or (tensor.layout != torch.strided and not sparse_too):
            raise TypeError(f"{name}[{i}]: expected a strided tensor, got {'nested' if tensor.is_nested else tensor.layout}")


def check_grad(grad: Tensor) -> None:
    if not isinstance(grad, Tensor) or not (grad.is_floating_point() or grad.is_complex()):
        seen = grad.dtype if isinstance(grad, Tensor) else type(grad).__name__
        raise TypeError(f"grad: expected a floating point tensor, got {seen}")


def _check_gammas(like: str, tensors: list[Tensor], gammas: list[Tensor], one_value: bool = True) -> None:
    """gammas[i] has the shape of tensors[i], float32 or 8-bit code; or, if `one_value`, is one 0-d float32 for all of it."""
    _check_strided("gammas", gammas)
    for i, gamma in enumerate(gammas):
        if gamma.dtype not in GAMMA_DTYPES:
            raise TypeError(f"gammas[{i}]: expected torch.float32, or torch.uint8 for 8-bit codes, got {gamma.dtype}")
    elementwise = gammas
    if one_value and len(gammas) == len(tensors):
        elementwise = [tensor if gamma.dim() == 0 and gamma.dtype == torch.float32 and gamma.device == tensor.device else gamma
                       for tensor, gamma in zip(tensors, gammas)]
    _check_lists(like, tensors, gammas=elementwise)


def _check_accumulate(gammas, grads) -> None:
    _check_strided("grads", grads, sparse_too=True)
    _check_floating("grads", grads, complex_too=True)
    _check_gammas("grads", grads, gammas, one_value=False)


def _check_soft_mask(grads, gammas) -> None:
    _check_strided("grads", grads)
    _check_floating("grads", grads, complex_too=True)
    _check_gammas("grads", grads, gammas)


def _check_update_mask(params, old_params, gammas) -> None:
    _check_strided("params", params)
    _check_strided("old_params", old_params)
    _check_floating("params", params, complex_too=True)
    _check_lists("params", params, old_params=old_params)
    _check_gammas("params", params, gammas)
    for i, (param, old) in enumerate(zip(params, old_params)):
        if param.dtype != old.dtype:
            raise TypeError(f"old_params[{i}]: expected {param.dtype} of params[{i}], got {old.dtype}")


def _check_step(params, grads, gammas, **states: list[Tensor]) -> None:
    lists = {"params": params, "grads": grads, **states}
    for name, tensors in lists.items():
        _check_strided(name, tensors)
    _check_lists("params", params, grads=grads, **states)
    for name, tensors in lists.items():
        _check_floating(name, tensors)
    _check_gammas("params", params, gammas)


def _check_sgd(params, grads, gammas, momentum_buffers) -> None:
    _check_step(params, grads, gammas, **({"momentum_buffers": momentum_buffers} if momentum_buffers else {}))


def _check_adamw(params, grads, gammas, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps) -> None:
    amsgrad = {"max_exp_avg_sqs": max_exp_avg_sqs} if max_exp_avg_sqs else {}
    _check_step(params, grads, gammas, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, **amsgrad)
    if len(state_steps) != len(params):
        raise ValueError(f"state_steps: expected {len(params)} tensors, one for each of params, got {len(state_steps)}")
    for i, step in enumerate(state_steps):
        if step.numel() != 1 or step.dtype != torch.float32:
            raise TypeError(f"state_steps[{i}]: expected one float32 value, got {step.dtype} of shape {tuple(step.shape)}")


_CHECKS = {"accumulate_importance_": _check_accumulate, "soft_mask_": _check_soft_mask, "update_mask_": _check_update_mask,
           "masked_sgd_": _check_sgd, "masked_adamw_": _check_adamw}


def check_list(name: str, tensors: list[Tensor]) -> None:
    if not isinstance(tensors, (list, tuple)):  # not a union, which the compiler of torch 2.6 cannot follow
        raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")


def _check_tensors(name: str, tensors: list[Tensor]) -> None:
    check_list(name, tensors)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):  # as the gradient of a parameter that was not used, None
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(tensor).__name__}")


def check_lists(op: str, lists: tuple[list[Tensor], ...]) -> None:
    for name, tensors in zip(LISTS[op], lists):
        _check_tensors(name, tensors)
    _CHECKS[op](*lists)


def check_scaler(grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """What a GradScaler hands a step is one float32 value each, or None."""
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            raise TypeError(f"{name}: expected a torch.float32 tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one value, got shape {tuple(value.shape)}")


def check_mask(mask: str) -> None:
    if mask not in MASKS:
        raise ValueError(f"mask: expected 'update' or 'gradient', got {mask!r}")


def check_settings(op: str, lists: tuple[list[Tensor], ...], settings: dict) -> dict:
    """The settings of a masked step, with floats for numbers; a tensor lr as it is, for a device may change it."""
    check_mask(settings.get("mask", "update"))
    check_scaler(settings.get("grad_scale"), settings.get("found_inf"))
    settings = {name: as_number(name, value) if name in _NUMBERS else value for name, value in settings.items()}
    if op == "masked_sgd_":
        check_list("params", lists[0])
        check_list("momentum_buffers", lists[3])
        if settings.get("momentum") and len(lists[3]) != len(lists[0]):
            raise ValueError(f"momentum_buffers: expected {len(lists[0])} tensors with momentum = {settings['momentum']}, "
                             f"got {len(lists[3])}")
    return settings


_NUMBERS = {"lr", "momentum", "dampening", "weight_decay", "beta1", "beta2", "eps"}


def as_number(name: str, value: object) -> float | Tensor:
    """`value` as a float; an lr that is a tensor as it is. TypeError, ValueError if it is no number, or no such one."""
    if name == "lr" and isinstance(value, Tensor):
        if value.numel() != 1 or value.layout != torch.strided:
            raise ValueError(f"lr: expected one value, got shape {tuple(value.shape)}, {value.layout}")
        return value
    if not hasattr(value, "__float__") or (isinstance(value, Tensor) and value.numel() != 1):
        seen = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a number, got {seen}")
    if not torch.compiler.is_compiling():
        value = float(value)
    if name in ("beta1", "beta2") and not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number from 0, less than 1, got {value}")
    return value

"""The operators: schemas, argument checks, fake kernels, and the choice of a backend.

Every operator works on lists of tensors, one call for a whole model, in place, and is registered as
`torch.ops.spg_kernels.<name>`, opaque to torch.compile with its mutated arguments declared. A backend is a module with

- `DEVICE_TYPES`: where its tensors live,
- `unavailable() -> str | None`: what is missing here, None if it runs,
- `refusals(op, lists) -> dict[int, str]`: the indices whose tensors it cannot take, and why,
- one function for each operator, with the signature of its twin in `reference.py`.
"""

import importlib
import logging
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import reference
from .reference import decode, encode_gamma, mean_gamma, squash  # noqa: F401  (importance.py reads gammas through this room)

log = logging.getLogger("spg_kernels")

BACKENDS = ("auto", "triton", "native", "reference")
_MODULES = {"triton": "spg_kernels.backends.triton", "native": "spg_kernels.backends.native"}
MASKS = ("update", "gradient")
GAMMA_DTYPES = (torch.float32, torch.uint8)


class SPGError(Exception):
    """Base class of the package's own errors."""


class NonFiniteGradientError(SPGError, FloatingPointError):
    """A gradient holds an inf or a NaN. `names` lists every such parameter; their gamma is untouched."""

    def __init__(self, names: list[str]):
        self.names = list(names)
        super().__init__(f"inf or NaN in the gradient of {', '.join(self.names)}: their importance is unchanged")

    def __reduce__(self):
        return type(self), (self.names,)  # an exception pickles its message as its arguments


class BackendError(SPGError, RuntimeError):
    """A backend asked for by name does not run here, or cannot take a tensor it was given."""


def backend_module(name: str) -> ModuleType:
    return reference if name == "reference" else importlib.import_module(_MODULES[name])


def why_unavailable(name: str) -> str | None:
    """What backend `name` lacks on this machine; None if it runs."""
    return None if name == "reference" else backend_module(name).unavailable()


def require_backend(backend: str) -> None:
    """ValueError if there is no such backend, BackendError if it is asked for by name and does not run here."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto" and (missing := why_unavailable(backend)):
        raise BackendError(f"backend {backend!r} does not run here: {missing}")


def resolve(backend: str, device_type: str) -> ModuleType:
    """The module that serves `backend` for tensors on `device_type`."""
    if backend == "auto":
        for name in _MODULES:
            if device_type in backend_module(name).DEVICE_TYPES and why_unavailable(name) is None:
                return backend_module(name)
        return reference
    require_backend(backend)
    return backend_module(backend)


def choose(op: str, lists: tuple[list[Tensor], ...], backend: str) -> tuple[ModuleType, dict[int, str]]:
    """The backend that will run `op`, and which tensors it cannot take: an error, nothing done, if it was asked for by name."""
    chosen = resolve(backend, lists[0][0].device.type)
    refused = {} if chosen is reference else chosen.refusals(op, lists)
    if refused and backend != "auto":
        index, reason = next(iter(refused.items()))
        raise BackendError(f"backend {backend!r}, {op}: tensor {index} of {len(lists[0])} {reason}")
    return chosen, refused


def _execute(op: str, lists: tuple[list[Tensor], ...], kwargs: dict, backend: str):
    """Run `op` on the chosen backend; under "auto", tensors it cannot take go to the reference."""
    if not lists[0]:
        return reference.accumulate_importance_([], []) if op == "accumulate_importance_" else None
    chosen, refused = choose(op, lists, backend)
    run = getattr(chosen, op)
    if not refused:
        return run(*lists, **kwargs)
    index, reason = next(iter(refused.items()))
    log.debug("%s: %d of %d tensors take the reference, the first (%d) because it %s",
              op, len(refused), len(lists[0]), index, reason)
    taken = [i for i in range(len(lists[0])) if i not in refused]
    results = [(part, implementation(*([tensors[i] for i in part] if tensors else [] for tensors in lists), **kwargs))
               for part, implementation in ((taken, run), (list(refused), getattr(reference, op))) if part]
    if results[0][1] is None:
        return None
    merged = torch.empty(len(lists[0]), dtype=results[0][1].dtype, device=results[0][1].device)
    for part, result in results:
        merged[part] = result
    return merged


_SGD = ("float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, bool maximize=False, "
        "bool is_first_step=False, str mask='update'")
_ADAMW = ("float beta1=0.9, float beta2=0.999, float eps=1e-8, float weight_decay=1e-2, bool decoupled=True, "
          "bool maximize=False, str mask='update'")
_SGD_LISTS = "Tensor(a!)[] params, Tensor[] grads, Tensor[] gammas, Tensor(b!)[] momentum_buffers"
_ADAMW_LISTS = ("Tensor(a!)[] params, Tensor[] grads, Tensor[] gammas, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
                "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps")
_SCHEMAS = {
    "importance": "(Tensor grad, *, str backend='auto') -> (Tensor, Tensor)",
    "accumulate_importance_": "(Tensor(a!)[] gammas, Tensor[] grads, *, str backend='auto') -> Tensor",
    "soft_mask_": "(Tensor(a!)[] grads, Tensor[] gammas, *, str backend='auto') -> ()",
    "update_mask_": "(Tensor(a!)[] params, Tensor[] old_params, Tensor[] gammas, *, str backend='auto') -> ()",
    "masked_sgd_": f"({_SGD_LISTS}, *, float lr, {_SGD}, str backend='auto') -> ()",
    "masked_sgd_.tensor_lr": f"({_SGD_LISTS}, *, Tensor lr, {_SGD}, str backend='auto') -> ()",
    "masked_adamw_": f"({_ADAMW_LISTS}, *, float lr, {_ADAMW}, str backend='auto') -> ()",
    "masked_adamw_.tensor_lr": f"({_ADAMW_LISTS}, *, Tensor lr, {_ADAMW}, str backend='auto') -> ()",
}
# The positions of the lists that a schema marks as written.
_MUTATED = {op: [i for i, argument in enumerate(schema.split(", ")) if "!" in argument] for op, schema in _SCHEMAS.items()}
_LIBRARY = torch.library.Library("spg_kernels", "DEF")


def _run(op: str, lists: tuple[list[Tensor], ...], kwargs: dict, backend: str):
    """Run `op` now, and tell autograd what was written."""
    with torch.no_grad():
        result = _execute(op, lists, kwargs, backend)
    _tell_autograd(op, lists)
    return result


def _tell_autograd(op: str, lists: tuple[list[Tensor], ...]) -> None:
    # Kernels write through raw pointers, which it cannot see.
    torch.autograd.graph.increment_version([t for i in _MUTATED[op] for t in lists[i]])


def _call(op: str, *lists: list[Tensor], backend: str, **kwargs):
    """Run `op`, through torch's dispatcher only where somebody traces it: with long lists the way there costs more than a step."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        # Named, or a tensor lr would become a float, which on a GPU is a synchronization.
        overload = "tensor_lr" if isinstance(kwargs.get("lr"), Tensor) else "default"
        return getattr(getattr(torch.ops.spg_kernels, op), overload)(*lists, backend=backend, **kwargs)
    return _run(op, lists, kwargs, backend)


class Call(NamedTuple):
    """A masked optimizer step over lists that are known to match: one parameter group's."""

    op: str
    lists: tuple[list[Tensor], ...]
    settings: dict


def try_calls(calls: list[Call], common: dict, backend: str) -> bool:
    """Run every call on the fused backend, or none: False where there is none, or where it cannot take some tensor."""
    calls = [call for call in calls if call.lists[0]]
    if torch.compiler.is_compiling():
        for op, lists, settings in calls:
            _call(op, *lists, backend=backend, **settings, **common)
        return True
    chosen = []
    for op, lists, _ in calls:
        chosen.append(resolve(backend, lists[0][0].device.type))
        if chosen[-1] is reference:
            return False
        if refused := chosen[-1].refusals(op, lists):
            index, reason = next(iter(refused.items()))
            log.debug("%s: the generic step instead, because tensor %d of %d %s", op, index, len(lists[0]), reason)
            return False
    for module, (op, lists, settings) in zip(chosen, calls):
        getattr(module, op)(*lists, **settings, **common)
        _tell_autograd(op, lists)
    return True


def _importance(grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    # gamma = max(0, a) = a: the fold into zeros is the importance itself.
    gamma = _empty_importance(grad).zero_()
    finite = _run("accumulate_importance_", ([gamma], [grad.detach()]), {}, backend)
    return gamma, finite[0].clone()


def _empty_importance(grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        return torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
    return torch.empty_like(grad, dtype=torch.float32, requires_grad=False)


def _register(name: str, schema: str) -> None:
    op = name.partition(".")[0]

    def kernel(*lists, backend="auto", **kwargs):
        return _importance(*lists, backend) if op == "importance" else _run(op, lists, kwargs, backend)

    def fake(*lists, backend="auto", **kwargs):
        if op == "importance":
            return _empty_importance(lists[0]), torch.empty((), dtype=torch.bool, device=lists[0].device)
        if op == "accumulate_importance_":
            return torch.empty(len(lists[1]), dtype=torch.bool, device=lists[1][0].device if lists[1] else None)
        return None

    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"spg_kernels::{name}", fake, lib=_LIBRARY)


for _name, _schema in _SCHEMAS.items():
    _register(_name, _schema)


# Each check first asks whole lists at a time, which costs a small model less than its step, and only then which tensor it is.


def _check_lists(like: str, tensors: list[Tensor], **others: list[Tensor]) -> None:
    """Every list in `others` is parallel to `tensors`: as long, same shapes, same devices."""
    shapes, devices = [t.shape for t in tensors], [t.device for t in tensors]
    for name, other in others.items():
        if len(other) != len(tensors):
            raise ValueError(f"{name}: expected {len(tensors)} tensors, one for each of {like}, got {len(other)}")
        if [t.shape for t in other] == shapes and [t.device for t in other] == devices:
            continue
        for i, twin in enumerate(other):
            if twin.shape != shapes[i]:
                raise ValueError(f"{name}[{i}]: expected shape {tuple(shapes[i])} of {like}[{i}], got {tuple(twin.shape)}")
            if twin.device != devices[i]:
                raise ValueError(f"{name}[{i}]: expected device {devices[i]} of {like}[{i}], got {twin.device}")


def _check_floating(name: str, tensors: list[Tensor], complex_too: bool = False) -> None:
    if all([tensor.is_floating_point() for tensor in tensors]):
        return
    for i, tensor in enumerate(tensors):
        if not (tensor.is_floating_point() or (complex_too and tensor.is_complex())):
            raise TypeError(f"{name}[{i}]: expected a floating point tensor, got {tensor.dtype}")


def _check_gammas(like: str, tensors: list[Tensor], gammas: list[Tensor], one_value: bool = True) -> None:
    """gammas[i] has the shape of tensors[i], float32 or 8-bit code; or, if `one_value`, is one 0-d float32 for all of it."""
    if not {gamma.dtype for gamma in gammas} <= set(GAMMA_DTYPES):
        i, wrong = next((i, gamma.dtype) for i, gamma in enumerate(gammas) if gamma.dtype not in GAMMA_DTYPES)
        raise TypeError(f"gammas[{i}]: expected torch.float32, or torch.uint8 for 8-bit codes, got {wrong}")
    elementwise = gammas
    if one_value and len(gammas) == len(tensors):
        elementwise = [tensor if gamma.dim() == 0 and gamma.dtype == torch.float32 and gamma.device == tensor.device else gamma
                       for tensor, gamma in zip(tensors, gammas)]
    _check_lists(like, tensors, gammas=elementwise)


def _check_step(params, grads, gammas, mask: str, **states: list[Tensor]) -> None:
    _check_floating("params", params)
    _check_lists("params", params, grads=grads, **{name: state for name, state in states.items() if state})
    for name, tensors in {"grads": grads, **states}.items():
        _check_floating(name, tensors)
    _check_gammas("params", params, gammas)
    if mask not in MASKS:
        raise ValueError(f"mask: expected 'update' or 'gradient', got {mask!r}")


def _require_finite(finite: Tensor, names: list[str]) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(finite.all(), "spg_kernels: inf or NaN in a gradient, its importance is unchanged")
    elif not finite.all():
        raise NonFiniteGradientError([name for name, ok in zip(names, finite.reshape(-1).tolist()) if not ok])


def importance(grad: Tensor, *, backend: str = "auto") -> Tensor:
    """Importance of every element to one task: a = |tanh((g - mean(g)) / std(g))| (Konishi et al. 2023).

    Args:
        grad: floating point or complex tensor of any shape, the gradient accumulated over a task's data.
        backend: "auto", "triton", "native" or "reference".

    Returns:
        float32 tensor of `grad`'s shape, in [0, 1]; all 0 if `grad` is constant or has fewer than two elements.

    Raises:
        NonFiniteGradientError: `grad` holds an inf or a NaN.
    """
    _check_floating("grad", [grad], complex_too=True)
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        value, finite = torch.ops.spg_kernels.importance(grad, backend=backend)
    else:
        value, finite = _importance(grad, backend)
    _require_finite(finite, ["grad"])
    return value


def accumulate_importance_(gammas: list[Tensor], grads: list[Tensor], *, backend: str = "auto") -> None:
    """gamma_i <- max(gamma_i, importance(grad_i)), in place, for a whole model in one call.

    Args:
        gammas: float32 importances, or uint8 for 8-bit codes, one of each gradient's shape.
        grads: floating point or complex gradients.

    Raises:
        ValueError, TypeError: lists that do not match; nothing has changed.
        NonFiniteGradientError: naming every `grads[i]` that holds an inf or a NaN; their gammas are untouched, the
            others are folded in, which is harmless: folding the same gradient in again changes nothing.
    """
    _check_floating("grads", grads, complex_too=True)
    _check_gammas("grads", grads, gammas, one_value=False)
    fold(gammas, grads, [f"grads[{i}]" for i in range(len(grads))], backend)


def fold(gammas: list[Tensor], grads: list[Tensor], names: list[str], backend: str) -> None:
    """`accumulate_importance_` for lists known to match, with the names a NonFiniteGradientError reports."""
    _require_finite(_call("accumulate_importance_", gammas, grads, backend=backend), names)


def soft_mask_(grads: list[Tensor], gammas: list[Tensor], *, backend: str = "auto") -> None:
    """grad_i <- (1 - gamma_i) grad_i, in place: the paper's soft mask. 0 where gamma = 1, even if the gradient is not finite.

    Args:
        grads: floating point or complex tensors.
        gammas: of each gradient's shape, float32 or 8-bit codes (uint8); or 0-d float32, one value for the whole
            tensor (the heads' mean gamma).

    Raises:
        ValueError, TypeError: lists that do not match; nothing has changed.
    """
    _check_floating("grads", grads, complex_too=True)
    _check_gammas("grads", grads, gammas)
    _call("soft_mask_", grads, gammas, backend=backend)


def update_mask_(params: list[Tensor], old_params: list[Tensor], gammas: list[Tensor], *, backend: str = "auto") -> None:
    """param_i <- old_i + (1 - gamma_i)(param_i - old_i), in place: the soft mask around any optimizer's step.

    Exactly `old_i` where gamma = 1 and exactly `param_i` where gamma = 0. Arguments and errors as in `soft_mask_`.
    """
    _check_floating("params", params, complex_too=True)
    _check_lists("params", params, old_params=old_params)
    _check_gammas("params", params, gammas)
    for i, (param, old) in enumerate(zip(params, old_params)):
        if param.dtype != old.dtype:
            raise TypeError(f"old_params[{i}]: expected {param.dtype} of params[{i}], got {old.dtype}")
    _call("update_mask_", params, old_params, gammas, backend=backend)


def masked_sgd_(params: list[Tensor], grads: list[Tensor], gammas: list[Tensor], momentum_buffers: list[Tensor] = (), *,
                lr: float | Tensor, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
                nesterov: bool = False, maximize: bool = False, is_first_step: bool = False, mask: str = "update",
                backend: str = "auto") -> None:
    """One step of torch.optim.SGD under the soft mask, in place, in one pass over memory.

    Args:
        params, grads: floating point tensors.
        gammas: as in `soft_mask_`.
        momentum_buffers: torch.optim.SGD's, of each parameter's shape; empty if `momentum` is 0.
        is_first_step: the buffers are uninitialized and become the gradients.
        mask: "update" scales what the step adds to a parameter, "gradient" what enters the step (the paper's rule).
        lr, momentum, dampening, weight_decay, nesterov, maximize: torch.optim.SGD's.

    Raises:
        ValueError, TypeError: arguments that do not match; nothing has changed.
    """
    _check_step(params, grads, gammas, mask, momentum_buffers=momentum_buffers)
    if momentum and len(momentum_buffers) != len(params):
        raise ValueError(f"momentum_buffers: expected {len(params)} tensors with momentum = {momentum}, got {len(momentum_buffers)}")
    _call("masked_sgd_", params, grads, gammas, list(momentum_buffers) if momentum else [], lr=lr, momentum=momentum,
          dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
          is_first_step=is_first_step, mask=mask, backend=backend)


def masked_adamw_(params: list[Tensor], grads: list[Tensor], gammas: list[Tensor], exp_avgs: list[Tensor],
                  exp_avg_sqs: list[Tensor], max_exp_avg_sqs: list[Tensor], state_steps: list[Tensor], *,
                  lr: float | Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
                  weight_decay: float = 1e-2, decoupled: bool = True, maximize: bool = False, mask: str = "update",
                  backend: str = "auto") -> None:
    """One step of torch.optim.AdamW, or of Adam (`decoupled=False`), under the soft mask, in one pass over memory.

    Args:
        params, grads: floating point tensors.
        gammas: as in `soft_mask_`.
        exp_avgs, exp_avg_sqs: torch's state, of each parameter's shape.
        max_exp_avg_sqs: likewise with amsgrad; empty without.
        state_steps: torch's step counts, one float32 scalar tensor a parameter; incremented by this call.
        mask: "update" or "gradient", as in `masked_sgd_`.
        lr, beta1, beta2, eps, weight_decay, maximize: torch.optim.AdamW's.

    Raises:
        ValueError, TypeError: arguments that do not match; nothing has changed.
    """
    _check_step(params, grads, gammas, mask, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, max_exp_avg_sqs=max_exp_avg_sqs)
    for name, states in {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "state_steps": state_steps}.items():
        if len(states) != len(params):
            raise ValueError(f"{name}: expected {len(params)} tensors, one for each of params, got {len(states)}")
    for i, step in enumerate(state_steps):
        if step.numel() != 1 or step.dtype != torch.float32:
            raise TypeError(f"state_steps[{i}]: expected one float32 value, got {step.dtype} of shape {tuple(step.shape)}")
    _call("masked_adamw_", params, grads, gammas, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, lr=lr, beta1=beta1,
          beta2=beta2, eps=eps, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize, mask=mask, backend=backend)

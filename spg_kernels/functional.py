"""The functional interface: each operator as a function of lists of tensors, in place, one call for a whole model."""

from collections.abc import Sequence

from torch import Tensor

from . import ops
from .checks import check_grad, check_list, check_settings


def importance(grad: Tensor, *, backend: str = "auto") -> Tensor:
    """Importance of every element to one task: a = |tanh((g - mean(g)) / std(g))| (Konishi et al. 2023).

    Args:
        grad: floating point or complex tensor of any shape, the gradient accumulated over a task's data.
        backend: "auto", "triton", "native" or "reference".

    Returns:
        float32 tensor of `grad`'s shape, in [0, 1]; all 0 if `grad` is constant or has fewer than two elements. A complex
        one is standardized over real and imaginary parts, and an element stands out as the larger of its two does.

    Raises:
        NonFiniteGradientError: `grad` holds an inf or a NaN. TypeError: it is no floating point or complex tensor.
        ValueError: there is no such backend. BackendError: `backend` does not run here, or cannot take `grad`.
    """
    check_grad(grad)
    return ops.importance_of(grad, backend)


def accumulate_importance_(gammas: Sequence[Tensor], grads: Sequence[Tensor], *, backend: str = "auto") -> None:
    """gamma_i <- max(gamma_i, importance(grad_i)), in place, for a whole model in one call.

    Args:
        gammas: float32 importances, or uint8 for 8-bit codes, one of each gradient's shape.
        grads: floating point or complex gradients.
        backend: as in `importance`.

    Raises:
        ValueError, TypeError: lists that do not match; nothing has changed. BackendError: as in `importance`.
        NonFiniteGradientError: naming every `grads[i]` that holds an inf or a NaN; their gammas are untouched, the
            others are folded in, which is harmless: folding the same gradient in again changes nothing.
    """
    check_list("grads", grads)
    ops.fold(gammas, grads, [f"grads[{i}]" for i in range(len(grads))], backend)


def soft_mask_(grads: Sequence[Tensor], gammas: Sequence[Tensor], *, backend: str = "auto") -> None:
    """grad_i <- (1 - gamma_i) grad_i, in place: the paper's soft mask. 0 where gamma = 1, even if the gradient is not finite.

    Args:
        grads: floating point or complex tensors.
        gammas: of each gradient's shape, float32 or 8-bit codes (uint8); or 0-d float32, one value for the whole
            tensor (the heads' mean gamma).
        backend: as in `importance`.

    Raises:
        ValueError, TypeError: lists that do not match; nothing has changed. BackendError: as in `importance`.
    """
    ops.call("soft_mask_", (grads, gammas), backend)


def update_mask_(params: Sequence[Tensor], old_params: Sequence[Tensor], gammas: Sequence[Tensor], *,
                 backend: str = "auto") -> None:
    """param_i <- old_i + (1 - gamma_i)(param_i - old_i), in place: the soft mask around any optimizer's step.

    Exactly `old_i` where gamma = 1 and exactly `param_i` where gamma = 0.

    Args:
        params, old_params: floating point or complex tensors, after the step and before; of the same shapes and dtypes.
        gammas, backend: as in `soft_mask_`, and so are the errors.
    """
    ops.call("update_mask_", (params, old_params, gammas), backend)


def masked_sgd_(params: Sequence[Tensor], grads: Sequence[Tensor], gammas: Sequence[Tensor],
                momentum_buffers: Sequence[Tensor] = (), *, lr: float | Tensor, momentum: float = 0.0, dampening: float = 0.0,
                weight_decay: float = 0.0, nesterov: bool = False, maximize: bool = False, is_first_step: bool = False,
                mask: str = "update", grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
                backend: str = "auto") -> None:
    """One step of torch.optim.SGD under the soft mask, in place, in one pass over memory.

    Args:
        params, grads: floating point tensors.
        gammas, backend: as in `soft_mask_`.
        momentum_buffers: torch.optim.SGD's, of each parameter's shape; empty if `momentum` is 0.
        is_first_step: the buffers are uninitialized and become the gradients.
        mask: "update" scales what the step adds to a parameter, "gradient" what enters the step (the paper's rule).
        grad_scale: one float32 value that gradients are divided by before anything else, as torch.amp.GradScaler gives it.
        found_inf: one float32 value; unless it is 0, nothing at all changes.
        lr, momentum, dampening, weight_decay, nesterov, maximize: torch.optim.SGD's.

    Raises:
        ValueError, TypeError: arguments that do not match; nothing has changed. BackendError: as in `importance`.
    """
    lists = params, grads, gammas, momentum_buffers
    settings = check_settings("masked_sgd_", lists, dict(
        lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
        is_first_step=is_first_step, mask=mask, grad_scale=grad_scale, found_inf=found_inf))
    ops.call("masked_sgd_", (*lists[:3], list(momentum_buffers) if settings["momentum"] else []), backend, **settings)


def masked_adamw_(params: Sequence[Tensor], grads: Sequence[Tensor], gammas: Sequence[Tensor], exp_avgs: Sequence[Tensor],
                  exp_avg_sqs: Sequence[Tensor], max_exp_avg_sqs: Sequence[Tensor], state_steps: Sequence[Tensor], *,
                  lr: float | Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
                  weight_decay: float = 1e-2, decoupled: bool = True, maximize: bool = False, mask: str = "update",
                  grad_scale: Tensor | None = None, found_inf: Tensor | None = None, backend: str = "auto") -> None:
    """One step of torch.optim.AdamW, or of Adam (`decoupled=False`), under the soft mask, in place, in one pass over memory.

    Args:
        params, grads: floating point tensors.
        gammas, backend: as in `soft_mask_`.
        exp_avgs, exp_avg_sqs: torch's state, of each parameter's shape.
        max_exp_avg_sqs: likewise with amsgrad; empty without.
        state_steps: torch's step counts, one float32 scalar tensor a parameter; incremented by this call.
        mask, grad_scale, found_inf: as in `masked_sgd_`.
        lr, beta1, beta2, eps, weight_decay, maximize: torch.optim.AdamW's.

    Raises:
        ValueError, TypeError: arguments that do not match; nothing has changed. BackendError: as in `importance`.
    """
    lists = params, grads, gammas, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps
    ops.call("masked_adamw_", lists, backend, **check_settings("masked_adamw_", lists, dict(
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize, mask=mask,
        grad_scale=grad_scale, found_inf=found_inf)))

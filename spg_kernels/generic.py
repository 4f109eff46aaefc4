"""The mask around the step of any optimizer, whatever it computes: on what it adds to the parameters, or what it is given."""

from collections.abc import Callable
from itertools import compress

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import distributed, ops
from .backends.tensors import PLAIN
from .checks import is_floating
from .functional import soft_mask_, update_mask_
from .memory import check_disjoint
from .state import SCALER


def is_differentiable(inner: Optimizer, backend: str) -> bool:
    """Whether `inner` has `differentiable=True`: autograd follows the step then, which it can only through the reference."""
    differentiable = inner.defaults.get("differentiable", False)
    if differentiable and backend not in ("auto", "reference"):
        raise ops.BackendError(f"backend {backend!r}: autograd cannot see through its kernels, and {type(inner).__name__} has "
                               "differentiable=True")
    return differentiable


def update_masked_step(step: Callable, closure: Callable | None, parameters: list[Tensor],
                       gamma_of: Callable[[Tensor], Tensor], backend: str, differentiable: bool):
    """p <- p_old + (1 - gamma)(p_new - p_old) around `step(closure)`. If that fails, parameters are as before."""
    # Frozen parameters too, if they have a gradient or a closure may give them one: inner steps ask for nothing else.
    moving = [p for p in parameters if p.requires_grad or p.grad is not None or (closure is not None and _may_train(p))]
    gammas = [distributed.local(gamma_of(p)) for p in moving]
    values = moving if differentiable else _values(moving)
    if differentiable:
        with torch.enable_grad():
            old = [p.clone() for p in values]
    else:
        old = _copies(values)
    if moving and not torch.compiler.is_compiling():
        # Whatever raises must do so before the inner step changes its state.
        ops.choose("update_mask_", (values, old, gammas), backend)
        check_disjoint({"params": values}, {})
    try:
        loss = step(closure)
        if differentiable:
            with torch.enable_grad():
                ops.reference.update_mask_(values, old, gammas)
        else:  # looked up again: a closure may have given a parameter other memory
            update_mask_(_values(moving), old, gammas, backend=backend)
    except BaseException:
        for parameter, value in zip(_values(moving), old):
            parameter.copy_(value)
        raise
    return loss


def gradient_masked_step(step: Callable, closure: Callable | None, parameters: list[Tensor],
                         gamma_of: Callable[[Tensor], Tensor], backend: str, differentiable: bool):
    """`step` on masked copies of the gradients. A closure makes new gradients, which are masked after it ran."""
    originals: list[tuple[Tensor, Tensor]] = []

    def restore() -> None:
        for parameter, grad in originals:
            parameter.grad = grad
        originals.clear()

    def mask() -> None:
        with_grad = [p for p in parameters if p.grad is not None]
        if differentiable:
            with torch.enable_grad():
                masked = [ops.reference.scale(p.grad, gamma_of(p)) for p in with_grad]
        else:
            grads = [distributed.placed(p.grad.detach(), p) for p in with_grad]
            masked = _masked_copies(grads, list(map(gamma_of, with_grad)), backend)
        for parameter, grad in zip(with_grad, masked):
            originals.append((parameter, parameter.grad))
            parameter.grad = grad

    def masked_closure():
        restore()
        with torch.enable_grad():
            loss = closure()
        mask()
        return loss

    try:
        if closure is None:
            mask()
        loss = step(closure and masked_closure)
        restore()
    except BaseException:
        restore()  # again, if it was interrupted
        raise
    return loss


def step_alone(step: Callable, inner: Optimizer, own: list[Tensor]) -> None:
    """`step(None)` for which only `own` of `inner`'s parameters have a gradient, with what a GradScaler told `inner` done
    around it: no step, or one on unscaled copies of gradients.
    """
    told = {name: value for name, value in vars(inner).items() if name in SCALER}
    moving = set(map(id, own))
    grads = [(p, p.grad) for group in inner.param_groups for p in group["params"]]

    def restore() -> None:
        for parameter, grad in grads:
            parameter.grad = grad
        vars(inner).update(told)

    try:
        for name in told:  # or a fused inner step would unscale once more
            delattr(inner, name)
        if not told.get("found_inf"):
            grad_scale = told.get("grad_scale")
            factor = None if grad_scale is None else float(grad_scale.double().reciprocal().float())  # as GradScaler.unscale_
            for parameter, grad in grads:
                if id(parameter) not in moving:
                    parameter.grad = None
                elif factor is not None and grad is not None:
                    parameter.grad = grad.detach() * factor
            step(None)
        restore()
    except BaseException:
        restore()  # again, if it was interrupted
        raise


def _may_train(parameter: Tensor) -> bool:
    """Whether its dtype can have gradients, as integers and float8 cannot."""
    return is_floating(parameter) or parameter.is_complex()


def _values(parameters: list[Tensor]) -> list[Tensor]:
    """What kernels mask: parameters without their autograd history, this rank's shards of DTensors."""
    return [distributed.local(p).detach() for p in parameters]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in memory of their own: on a GPU in few launches, where `clone` takes one for each."""
    plain = [type(tensor) in PLAIN and tensor.layout == torch.strided for tensor in tensors]
    copies = [torch.empty_like(tensor) if own else tensor.clone() for tensor, own in zip(tensors, plain)]
    if any(plain):
        torch._foreach_copy_(list(compress(copies, plain)), list(compress(tensors, plain)))
    return copies


@torch.no_grad()
def _masked_copies(grads: list[Tensor], gammas: list[Tensor], backend: str) -> list[Tensor]:
    """(1 - gamma) grad for each; of a sparse gradient, the elements it has."""
    masked = [grad.coalesce().clone() if grad.layout == torch.sparse_coo else None for grad in grads]
    dense = [i for i, sparse in enumerate(masked) if sparse is None]
    for i, copied in zip(dense, _copies([grads[i] for i in dense])):
        masked[i] = copied
    # One call for each device and dtype, so that a kind that no kernel takes does not keep the others from theirs.
    calls: dict[object, list[int]] = {}
    for i, grad in enumerate(masked):
        calls.setdefault((grad.device, grad.dtype) if grad.layout == torch.strided else i, []).append(i)
    for call in calls.values():
        factors = [_at_values_of(masked[i], gammas[i]) for i in call]
        soft_mask_([_values_of(masked[i]) for i in call], factors, backend=backend)
    return masked


def _values_of(grad: Tensor) -> Tensor:
    return grad.values() if grad.layout == torch.sparse_coo else distributed.local(grad)


def _at_values_of(grad: Tensor, gamma: Tensor) -> Tensor:
    """gamma of the elements that a gradient has."""
    if grad.layout == torch.sparse_coo:
        return gamma[tuple(grad.indices())] if gamma.dim() else gamma
    return distributed.local(gamma)

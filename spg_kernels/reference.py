"""SPG in plain PyTorch: the specification of every kernel here, and the fallback, in the order of T. Konishi et al., ICML 2023
(PMLR 202:17492-17505). Statistics are float64, the rest is `opmath`: float32 or wider. The 8-bit code, which is not the
paper's, comes last."""

from collections.abc import Callable

import torch
from torch import Tensor


def standardize(grad: Tensor) -> Tensor:
    """z = (g - mean(g)) / std(g) over all elements, std unbiased, as float64; 0 where nothing stands out (std = 0)."""
    x = grad.double()
    if x.numel() < 2:
        return x - x
    x = x - x.flatten()[0]  # z is the same; a constant becomes exactly 0, and a small spread keeps its digits
    largest = x.abs().max()
    if largest == 0:
        return x
    x = x / largest  # z is the same; squares stay in range
    return (x - x.mean()) / x.std()


def importance(grad: Tensor) -> Tensor:
    """a = |tanh(z)|, float32, of `grad`'s shape, in [0, 1]. NaN throughout if `grad` holds an inf or a NaN."""
    return squash(_standing_out(grad), torch.float32)


def squash(z: Tensor, dtype: torch.dtype) -> Tensor:
    """tanh(|z|) as `dtype` stores it: float32 or the 8-bit code."""
    return (z * CODE_SCALE).ceil().clamp(max=255).to(torch.uint8) if dtype == torch.uint8 else z.tanh().float()


def _standing_out(grad: Tensor) -> Tensor:
    """|z| as float64, dense and of `grad`'s shape."""
    grad = grad.to_dense() if grad.layout != torch.strided else grad
    if grad.is_complex():  # standardized over both parts; an element stands out as the larger one does
        return standardize(torch.view_as_real(grad.resolve_conj())).abs().amax(-1)
    return standardize(grad).abs()


def accumulate_importance_(gammas: list[Tensor], grads: list[Tensor]) -> Tensor:
    """gamma <- max(gamma, a), in place. Returns a bool per tensor: False where a gradient is not finite, gamma untouched."""
    finite = torch.ones(len(grads), dtype=torch.bool, device="cpu")
    for i, (gamma, z) in enumerate(zip(gammas, map(_standing_out, grads), strict=True)):
        finite[i] = bool(z.isfinite().all())
        if finite[i]:
            gamma.copy_(torch.maximum(gamma, squash(z, gamma.dtype)))
    return finite.to(grads[0].device) if grads else finite


def mean_gamma(gammas: list[Tensor], device: torch.device | None = None) -> Tensor:
    """The mean over all elements of all trunk tensors, 0-d float32; heads are scaled by one minus it. In small pieces."""
    total = torch.zeros((), dtype=torch.float64, device=device or (gammas[0].device if gammas else "cpu"))
    for piece in (piece for gamma in gammas for piece in gamma.flatten().split(1 << 20)):
        total += (decode(piece) if piece.dtype == torch.uint8 else piece).double().sum().to(total.device)
    return (total / max(1, sum(gamma.numel() for gamma in gammas))).float()


def keep(gamma: Tensor, opmath: torch.dtype) -> Tensor:
    """1 - gamma: the share of a gradient or an update that passes the mask. Exactly 0 where gamma = 1."""
    return code_table()[1].to(gamma.device)[gamma.int()].to(opmath) if gamma.dtype == torch.uint8 else 1 - gamma.to(opmath)


def opmath(tensor: Tensor) -> torch.dtype:
    """The real dtype that arithmetic on `tensor` happens in."""
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


def _by_parts(mask: Callable, *tensors: Tensor, gamma: Tensor) -> Tensor:
    """A mask of real and imaginary parts: a product of complex numbers mixes them, and inf * 0 is NaN."""
    parts = [torch.view_as_real(tensor.resolve_conj()) for tensor in tensors]
    return torch.view_as_complex(mask(*parts, gamma.unsqueeze(-1) if gamma.dim() else gamma).contiguous())


def scale(grad: Tensor, gamma: Tensor) -> Tensor:
    """(1 - gamma) g. A select at gamma = 1: a protected element stays 0 even where g is inf or NaN."""
    if grad.is_complex():
        return _by_parts(scale, grad, gamma=gamma)
    passes = keep(gamma, opmath(grad))
    return torch.where(passes == 0, 0, grad.to(torch.promote_types(grad.dtype, passes.dtype)) * passes)


def blend(new: Tensor, old: Tensor, gamma: Tensor) -> Tensor:
    """old + (1 - gamma)(new - old), exactly `old` at gamma = 1 and exactly `new` at gamma = 0, finite or not."""
    if new.is_complex():
        return _by_parts(blend, new, old, gamma=gamma)
    passes = keep(gamma, opmath(new))
    between = (old + passes * (new.to(torch.promote_types(new.dtype, passes.dtype)) - old)).to(new.dtype)
    return torch.where(passes == 0, old, torch.where(passes == 1, new, between))


def soft_mask_(grads: list[Tensor], gammas: list[Tensor]) -> None:
    """g <- (1 - gamma) g, in place."""
    for grad, gamma in zip(grads, gammas, strict=True):
        grad.copy_(scale(grad, gamma))


def update_mask_(params: list[Tensor], old_params: list[Tensor], gammas: list[Tensor]) -> None:
    """p <- old + (1 - gamma)(p - old), in place: around any optimizer's step."""
    for param, old, gamma in zip(params, old_params, gammas, strict=True):
        param.copy_(blend(param, old, gamma))


def _entering(params, grads, gammas, maximize, mask, grad_scale, found_inf):
    """(i, parameter, gradient as it enters the step) of every tensor, in opmath; of none if `found_inf`."""
    factor = 1 if grad_scale is None else float(grad_scale.double().reciprocal().float())  # rounded as in GradScaler.unscale_
    for i, (param, grad, gamma) in enumerate(() if found_inf else zip(params, grads, gammas, strict=True)):
        grad = grad.to(opmath(param)) * (-factor if maximize else factor)
        yield i, param.to(grad.dtype), scale(grad, gamma) if mask == "gradient" else grad


def masked_sgd_(params, grads, gammas, momentum_buffers, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
                maximize=False, is_first_step=False, mask="update", grad_scale=None, found_inf=None) -> None:
    """One step of torch.optim.SGD under the soft mask, in place; none if `found_inf`. `momentum_buffers` is empty without."""
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr  # with a shape it would give the update one, and its dtype
    for i, old, grad in _entering(params, grads, gammas, maximize, mask, grad_scale, found_inf):
        grad = grad + weight_decay * old if weight_decay else grad
        if momentum:
            buffer = grad if is_first_step else momentum * momentum_buffers[i].to(old.dtype) + (1 - dampening) * grad
            momentum_buffers[i].copy_(buffer)
            grad = grad + momentum * buffer if nesterov else buffer
        new = old - lr * grad
        params[i].copy_(blend(new, old, gammas[i]) if mask == "update" else new)


def masked_adamw_(params, grads, gammas, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, *, lr, beta1=0.9, beta2=0.999,
                  eps=1e-8, weight_decay=1e-2, decoupled=True, maximize=False, mask="update", grad_scale=None, found_inf=None):
    """The same of torch.optim.AdamW (`decoupled`) or Adam. Without amsgrad no `max_exp_avg_sqs`."""
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    for i, old, grad in _entering(params, grads, gammas, maximize, mask, grad_scale, found_inf):
        new = old * (1 - lr * weight_decay) if decoupled else old
        grad = grad if decoupled or not weight_decay else grad + weight_decay * old
        step = float(state_steps[i].add_(1))
        exp_avg = torch.lerp(exp_avgs[i].to(old.dtype), grad, 1 - beta1)  # from the nearer end: with beta1 = 0 the gradient
        exp_avg_sq = beta2 * exp_avg_sqs[i].to(old.dtype) + (1 - beta2) * grad * grad
        exp_avgs[i].copy_(exp_avg)
        exp_avg_sqs[i].copy_(exp_avg_sq)
        if max_exp_avg_sqs:
            exp_avg_sq = torch.maximum(max_exp_avg_sqs[i], exp_avg_sq)
            max_exp_avg_sqs[i].copy_(exp_avg_sq)
        new = new - lr / (1 - beta1**step) * exp_avg / (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5 + eps)
        params[i].copy_(blend(new, old, gammas[i]) if mask == "update" else new)


# An 8-bit importance code stores |z|, not gamma: code = ceil(28 |z|), saturating at 255. The maximum of codes is the code of
# the maximum, rounding up never under-protects, and 1 - gamma keeps its relative precision where gamma is close to 1.
CODE_SCALE = 28.0


def code_table() -> tuple[Tensor, Tensor]:
    """(gamma, 1 - gamma) of 256 codes, float32: tanh(z) and 2 / (1 + exp(2z)) at z = code / 28; 0 where gamma rounds to 1."""
    z = torch.arange(256, dtype=torch.float64, device="cpu") / CODE_SCALE
    gamma = z.tanh().float()
    return gamma, (2 / (1 + (2 * z).exp())).float().where(gamma < 1, 0.0)


def encode_gamma(gamma: Tensor) -> Tensor:
    """The smallest 8-bit code that protects at least as much as `gamma`, of values in [0, 1]."""
    return torch.searchsorted(code_table()[0].to(gamma.device), gamma.float().contiguous()).to(torch.uint8)


def decode(code: Tensor) -> Tensor:
    """gamma, float32, of 8-bit codes."""
    return code_table()[0].to(code.device)[code.int()]

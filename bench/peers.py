"""What a user writes without this package: each pass as an eager loop, with `torch._foreach_*`, and compiled.

float32 gamma throughout, because nobody has 8-bit importance by hand. All under `torch.no_grad()`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# inductor's cache on disk serves a loop that was generated under another ATEN_CPU_CAPABILITY and compiles it for this one:
# then it steps 16 elements and writes 8, or the other way round.
torch.compiler.config.cache_key_tag += f" {torch.backends.cpu.get_cpu_capability()}"
# The parts of a list longer than `_LARGEST_GRAPH` have up to 14 shapes; past torch's limit of 8 they would run uncompiled.
torch._dynamo.config.cache_size_limit = 64  # recompile_limit since torch 2.7

# Importance: gamma <- max(gamma, |tanh((g - mean) / std)|)


def eager_importance(gammas: list[Tensor], grads: list[Tensor]) -> None:
    for gamma, grad in zip(gammas, grads):
        z = (grad - grad.mean()) / grad.std()
        torch.maximum(gamma, z.tanh().abs(), out=gamma)


def foreach_importance(gammas: list[Tensor], grads: list[Tensor]) -> None:
    """There is no `_foreach_mean` or `_foreach_std`; their values as scalars keep the rest on the fast path of a GPU.

    By `_foreach_norm` of what is centred it takes a third less time with large tensors, and is 2e-5 off.
    """
    statistics = torch.stack([value for grad in grads for value in torch.std_mean(grad)]).tolist()
    z = torch._foreach_sub(grads, statistics[1::2])
    torch._foreach_div_(z, statistics[::2])
    torch._foreach_tanh_(z)
    torch._foreach_abs_(z)
    torch._foreach_maximum_(gammas, z)


def one_importance(gamma: Tensor, grad: Tensor) -> None:
    std, mean = torch.std_mean(grad)
    gamma.copy_(torch.maximum(gamma, ((grad - mean) / std).tanh().abs()))


# Soft mask: g <- (1 - gamma) g


def eager_soft_mask(grads: list[Tensor], gammas: list[Tensor]) -> None:
    for grad, gamma in zip(grads, gammas):
        grad.mul_(1 - gamma)


def foreach_soft_mask(grads: list[Tensor], gammas: list[Tensor]) -> None:
    torch._foreach_addcmul_(grads, grads, gammas, value=-1)


def one_soft_mask(grad: Tensor, gamma: Tensor) -> None:
    grad.mul_(1 - gamma)


# Update mask: p <- old + (1 - gamma)(p - old)


def eager_update_mask(params: list[Tensor], old_params: list[Tensor], gammas: list[Tensor]) -> None:
    for param, old, gamma in zip(params, old_params, gammas):
        param.lerp_(old, gamma)


def foreach_update_mask(params: list[Tensor], old_params: list[Tensor], gammas: list[Tensor]) -> None:
    torch._foreach_lerp_(params, old_params, gammas)


def one_update_mask(param: Tensor, old: Tensor, gamma: Tensor) -> None:
    param.lerp_(old, gamma)


# torch's own optimizer step, masked from outside


def eager_mask_step(params: list[Tensor], gammas: list[Tensor], step: Callable) -> None:
    eager_soft_mask([p.grad for p in params], gammas)
    step()


def foreach_mask_step(params: list[Tensor], gammas: list[Tensor], step: Callable) -> None:
    foreach_soft_mask([p.grad for p in params], gammas)
    step()


def copy_step_lerp(old: list[Tensor], params: list[Tensor], gammas: list[Tensor], step: Callable) -> None:
    """`old` is memory that is kept: with new copies in every step it takes twice as long."""
    torch._foreach_copy_(old, params)
    step()
    foreach_update_mask(params, old, gammas)


# Optimizer steps with the mask in them, for torch.compile


def one_masked_sgd(param: Tensor, grad: Tensor, gamma: Tensor, lr: float) -> None:
    param.sub_(lr * grad * (1 - gamma))


def one_masked_momentum(param: Tensor, grad: Tensor, gamma: Tensor, buffer: Tensor, lr: float, momentum: float) -> None:
    buffer.mul_(momentum).add_(grad)
    param.sub_(lr * buffer * (1 - gamma))


def one_masked_adamw(param: Tensor, grad: Tensor, gamma: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, correction1: Tensor,
                     correction2: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    update = exp_avg / correction1 / ((exp_avg_sq / correction2).sqrt() + eps) + weight_decay * param
    param.sub_(lr * update * (1 - gamma))


# torch.compile


@functools.cache
def why_not_compiled(device: torch.device) -> str | None:
    """Why torch.compile does not work here (no compiler, most often), None if it does."""
    try:
        torch.compile(torch.cos)(torch.ones(64, device=device))
    except Exception as error:  # whatever inductor meets
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


# Tensors in a graph. Compile time grows faster than the graph: a list longer than the first is cut into parts of the second.
_LARGEST_GRAPH, _PART = 200, 25


@functools.cache
def _compiled(one: Callable, shapes: tuple[torch.Size, ...]) -> Callable:
    """`one` for each tensor of lists of these shapes, as one graph."""
    torch.compiler.reset()  # what was compiled for other shapes counts towards a limit, past which all runs uncompiled

    def whole(lists: list[list[Tensor]], scalars: tuple) -> None:
        for tensors in zip(*lists):
            one(*tensors, *scalars)

    return torch.compile(whole, dynamic=False)


def compiled_over(one: Callable, lists: list[list[Tensor]]) -> Callable[..., None]:
    """`one` compiled, over flat views of parallel lists: whole lists at once, since a graph a tensor takes twice as long."""
    flat = [[tensor.detach().view(-1) for tensor in tensors] for tensors in lists]
    function = _compiled(one, tuple(tensor.shape for tensor in flat[0]))
    length = len(flat[0])
    size = length if length <= _LARGEST_GRAPH else _PART
    parts = [[tensors[i:i + size] for tensors in flat] for i in range(0, length, size)]

    def call(*scalars) -> None:
        for part in parts:
            function(part, scalars)

    return call

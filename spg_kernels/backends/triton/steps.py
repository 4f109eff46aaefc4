"""masked_sgd_ and masked_adamw_: the whole optimizer step and the mask in one pass over memory, one launch for all tensors.

Whatever changes from step to step is a plain argument or is read from the device, so no value of it compiles a kernel anew,
and a captured graph follows a learning rate, step counts and a GradScaler's values that live on the device.
"""

import math
from array import array

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import counts, launch, plans
from .elementwise import (
    ELEMENT,
    address,
    blend,
    launch_arguments,
    load,
    load_keep,
    locate,
    one_value_keep,
    scale,
    store,
    vector,
)

CHUNK = 8192


@triton.jit
def _under_scaler(sign, items, grad_scale, found_inf):
    """(what gradients are multiplied by before anything else, how many chunks there are to do), with a GradScaler's values.

    grad_scale and found_inf are addresses, or None.
    """
    factor = sign
    if grad_scale is not None:
        factor = tl.div_rn(sign, tl.load(grad_scale))
    if found_inf is not None:
        items = tl.where(tl.load(found_inf) == 0, items, 0)
    return factor, items


@triton.jit
def _gradient(grad, offsets, count, factor, keep, GRADIENT_MASK: tl.constexpr, MASKED: tl.constexpr):
    g = factor * load(grad, offsets, count, MASKED)
    if GRADIENT_MASK:
        g = scale(g, keep)
    return g


@triton.jit
def _decayed(g, p, weight_decay):
    """g + weight_decay p, and g where there is no decay, even if p is not finite."""
    return g + tl.where(weight_decay == 0, 0.0, weight_decay * p)


@triton.jit
def _sgd_block(param, grad, gamma, buffer, offsets, count, one_value, value, keeps, lr, momentum, undamped, weight_decay,
               factor, FIRST_STEP: tl.constexpr, NESTEROV: tl.constexpr, GRADIENT_MASK: tl.constexpr, MOMENTUM: tl.constexpr,
               MASKED: tl.constexpr):
    p = load(param, offsets, count, MASKED)
    keep = load_keep(gamma, offsets, count, one_value, value, keeps, MASKED)
    g = _decayed(_gradient(grad, offsets, count, factor, keep, GRADIENT_MASK, MASKED), p, weight_decay)
    if MOMENTUM:
        if FIRST_STEP:
            m = g
        else:
            m = momentum * load(buffer, offsets, count, MASKED) + undamped * g
        store(buffer, offsets, m, count, MASKED)
        if NESTEROV:
            g = g + momentum * m
        else:
            g = m
    new = p - lr * g
    if not GRADIENT_MASK:
        new = blend(new, p, keep)
    store(param, offsets, new, count, MASKED)


@triton.jit(do_not_specialize=["items", "lr", "grad_scale", "found_inf"])
def masked_sgd_kernel(parameters, grads, gammas, buffers, keeps, chunks, items, lr, momentum, undamped, weight_decay, sign,
                      grad_scale, found_inf, PARAM: tl.constexpr, GAMMA: tl.constexpr, STATE: tl.constexpr,
                      LR_ON_DEVICE: tl.constexpr, FIRST_STEP: tl.constexpr, NESTEROV: tl.constexpr,
                      GRADIENT_MASK: tl.constexpr, MOMENTUM: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr,
                      BLOCK: tl.constexpr):
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    rate = lr
    if LR_ON_DEVICE:
        rate = tl.load(lr).to(tl.float32)
    factor, todo = _under_scaler(sign, items, grad_scale, found_inf)
    for item in range(tl.program_id(0), todo, tl.num_programs(0)):
        start, tensor, count, one_value = locate(chunks, item)
        param = address(parameters, tensor, start, PARAM, ALIGNED)
        grad = address(grads, tensor, start, PARAM, ALIGNED)
        gamma = address(gammas, tensor, start, GAMMA, ALIGNED)
        buffer = param
        if MOMENTUM:
            buffer = address(buffers, tensor, start, STATE, ALIGNED)
        value = one_value_keep(gammas, tensor, one_value)
        whole = count // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            _sgd_block(param, grad, gamma, buffer, first + lanes, count, one_value, value, keeps, rate, momentum, undamped,
                       weight_decay, factor, FIRST_STEP, NESTEROV, GRADIENT_MASK, MOMENTUM, False)
        if whole < count:
            _sgd_block(param, grad, gamma, buffer, whole + lanes, count, one_value, value, keeps, rate, momentum, undamped,
                       weight_decay, factor, FIRST_STEP, NESTEROV, GRADIENT_MASK, MOMENTUM, True)


@triton.jit
def _one_minus_power(log_beta, step):
    """1 - beta^step from log(beta), to float32's precision also where beta^step is close to 1.

    A GPU's exp is off by up to 3 units, which weigh less the smaller beta^step is.
    """
    x = log_beta * step
    series = 1 + x * (1 / 11)
    for k in tl.static_range(10, 1, -1):
        series = 1 + x * (1 / k) * series
    return tl.where(x > -1, -x * series, 1 - tl.exp(x))


@triton.jit
def _adamw_block(param, grad, gamma, exp_avg, exp_avg_sq, max_exp_avg_sq, offsets, count, one_value, value, keeps, step_size,
                 root_correction, decay, weight_decay, beta2, rest1, rest2, eps, factor, DECOUPLED: tl.constexpr,
                 AMSGRAD: tl.constexpr, GRADIENT_MASK: tl.constexpr, MASKED: tl.constexpr):
    p = load(param, offsets, count, MASKED)
    m = load(exp_avg, offsets, count, MASKED)
    v = load(exp_avg_sq, offsets, count, MASKED)
    keep = load_keep(gamma, offsets, count, one_value, value, keeps, MASKED)
    g = _gradient(grad, offsets, count, factor, keep, GRADIENT_MASK, MASKED)
    new = p
    if DECOUPLED:
        new = p * decay
    else:
        g = _decayed(g, p, weight_decay)
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    store(exp_avg, offsets, m, count, MASKED)
    store(exp_avg_sq, offsets, v, count, MASKED)
    if AMSGRAD:
        v = tl.maximum(load(max_exp_avg_sq, offsets, count, MASKED), v, propagate_nan=tl.PropagateNan.ALL)
        store(max_exp_avg_sq, offsets, v, count, MASKED)
    new = new - tl.div_rn(step_size * m, tl.sqrt_rn(v) * root_correction + eps)
    if not GRADIENT_MASK:
        new = blend(new, p, keep)
    store(param, offsets, new, count, MASKED)


@triton.jit(do_not_specialize=["items", "lr", "grad_scale", "found_inf"])
def masked_adamw_kernel(parameters, grads, gammas, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, keeps, chunks, items, steps, lr,
                        ahead, log_beta1, log_beta2, beta2, rest1, rest2, eps, weight_decay, sign, grad_scale, found_inf,
                        PARAM: tl.constexpr, GAMMA: tl.constexpr, STATE: tl.constexpr, LR_ON_DEVICE: tl.constexpr,
                        STEPS_ON_HOST: tl.constexpr, DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr,
                        GRADIENT_MASK: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    rate = lr
    if LR_ON_DEVICE:
        rate = tl.load(lr).to(tl.float32)
    factor, todo = _under_scaler(sign, items, grad_scale, found_inf)
    for item in range(tl.program_id(0), todo, tl.num_programs(0)):
        start, tensor, count, one_value = locate(chunks, item)
        param = address(parameters, tensor, start, PARAM, ALIGNED)
        grad = address(grads, tensor, start, PARAM, ALIGNED)
        gamma = address(gammas, tensor, start, GAMMA, ALIGNED)
        exp_avg = address(exp_avgs, tensor, start, STATE, ALIGNED)
        exp_avg_sq = address(exp_avg_sqs, tensor, start, STATE, ALIGNED)
        max_exp_avg_sq = exp_avg_sq
        if AMSGRAD:
            max_exp_avg_sq = address(max_exp_avg_sqs, tensor, start, STATE, ALIGNED)
        value = one_value_keep(gammas, tensor, one_value)
        if STEPS_ON_HOST:
            step = tl.load(steps + tensor) + ahead
        else:
            step = tl.load(tl.load(steps + tensor).to(tl.pointer_type(tl.float32))) + ahead
        # div_rn: plain division is off by up to 2 units, and these factors would put every update off in the same direction.
        step_size = tl.div_rn(rate, _one_minus_power(log_beta1, step))
        root_correction = tl.div_rn(1.0, tl.sqrt_rn(_one_minus_power(log_beta2, step)))
        decay = 1 - rate * weight_decay
        whole = count // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            _adamw_block(param, grad, gamma, exp_avg, exp_avg_sq, max_exp_avg_sq, first + lanes, count, one_value, value,
                         keeps, step_size, root_correction, decay, weight_decay, beta2, rest1, rest2, eps, factor, DECOUPLED,
                         AMSGRAD, GRADIENT_MASK, False)
        if whole < count:
            _adamw_block(param, grad, gamma, exp_avg, exp_avg_sq, max_exp_avg_sq, whole + lanes, count, one_value, value,
                         keeps, step_size, root_correction, decay, weight_decay, beta2, rest1, rest2, eps, factor, DECOUPLED,
                         AMSGRAD, GRADIENT_MASK, True)


@triton.jit(do_not_specialize=["tensors", "found_inf"])
def increment_kernel(steps, tensors, found_inf, LANES: tl.constexpr):
    """One more for every step count, whose addresses `steps` holds; nothing if a GradScaler has found an inf.

    A launch of its own: programs of the step read the counts, and the wait for the last of them costs each 8 to 16 registers.
    """
    taken = 1.0
    if found_inf is not None:
        taken = tl.where(tl.load(found_inf) == 0, 1.0, 0.0)
    for first in range(tl.program_id(0) * LANES, tensors, tl.num_programs(0) * LANES):
        index = first + tl.arange(0, LANES)
        step = tl.load(steps + index, mask=index < tensors, other=0).to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(step, mask=index < tensors, other=0) + taken, mask=index < tensors)


def _rate(lr: float | Tensor, device: torch.device) -> tuple[float | Tensor, bool]:
    """What a kernel takes for the learning rate, and whether it must read it from the device."""
    if not isinstance(lr, Tensor) or lr.device != device:
        return float(lr), False
    return lr, True


def masked_sgd_(launches: plans.Launches, addresses: array, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0,
                nesterov=False, maximize=False, is_first_step=False, mask="update", grad_scale=None, found_inf=None) -> None:
    for piece in launches.pieces(addresses):
        group = piece.group
        if not any(piece.sizes):
            continue
        rate, lr_on_device = _rate(lr, group.device)
        flags = lr_on_device, bool(is_first_step), bool(nesterov), mask == "gradient", bool(momentum)
        values = (rate, float(momentum), float(1 - dampening), float(weight_decay), -1.0 if maximize else 1.0,
                  _moved(grad_scale, group.device), _moved(found_inf, group.device))
        with launch.on(group.device):
            place = launch.here(group.device)
            launch.run(masked_sgd_kernel, place, piece.ready, flags, values,
                       lambda: launch_arguments(place, piece, piece.columns, CHUNK, _constants(piece, flags)))


def masked_adamw_(launches: plans.Launches, addresses: array, *, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2,
                  decoupled=True, maximize=False, mask="update", grad_scale=None, found_inf=None) -> None:
    for piece in launches.pieces(addresses):
        group = piece.group
        *columns, steps = piece.columns
        rate, lr_on_device = _rate(lr, group.device)
        flags = lr_on_device, group.steps_on_host, bool(decoupled), bool(columns[-1]), mask == "gradient"
        scale, skip = _moved(grad_scale, group.device), _moved(found_inf, group.device)
        with launch.on(group.device):
            place = launch.here(group.device)
            if group.steps_on_host:
                table, ahead = counts.apart(place, counts.read(place, steps))
            else:
                table, ahead = launch.table(place, steps), 1.0
            values = (table, rate, ahead, _log(beta1), _log(beta2), float(beta2), float(1 - beta1), float(1 - beta2),
                      float(eps), float(weight_decay), -1.0 if maximize else 1.0, scale, skip)
            if any(piece.sizes):
                launch.run(masked_adamw_kernel, place, piece.ready, flags, values,
                           lambda: launch_arguments(place, piece, tuple(columns), CHUNK, _constants(piece, flags)))
            # The kernel took the step ahead: whatever raises above leaves the counts as they were.
            if not group.steps_on_host:
                blocks = -(-len(steps) // launch.THREADS)
                launch.run(increment_kernel, place, piece.ready, (), (skip,),
                           lambda: launch.Arguments(blocks, (table, len(steps)), (launch.THREADS,)))
            elif not found_inf:  # which waits for the device: counts on the host have no other way to know
                counts.increment(steps)


def _constants(piece: plans.Piece, flags: tuple[bool, ...]) -> tuple:
    """The compile-time arguments, which end every kernel's."""
    group = piece.group
    width = vector(group.dtype, group.gamma, group.state)
    return (ELEMENT[group.dtype], ELEMENT[group.gamma], ELEMENT[group.state], *flags, piece.aligned, width,
            launch.THREADS * width)


def _moved(value: Tensor | None, device: torch.device) -> Tensor | None:
    """A GradScaler's value on `device`, where it is unless a model spans several."""
    return None if value is None else value.to(device, non_blocking=True)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf

"""masked_sgd_ and masked_adamw_: the whole optimizer step and the mask in one pass over memory, one launch for all tensors.

Whatever changes from step to step is a plain argument or is read from the device, so no value of it compiles a kernel anew,
and a captured graph follows a learning rate and step counts that live on the device.
"""

import ctypes
import functools
import math
from array import array

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plans import Lists
from . import launch, plans
from .elementwise import ELEMENT, address, blend, keep_table, load, load_keep, locate, one_value_keep, scale, store, vector

CHUNK = 8192


@triton.jit
def _gradient(grad, offsets, count, sign, keep, GRADIENT_MASK: tl.constexpr, MASKED: tl.constexpr):
    g = sign * load(grad, offsets, count, MASKED)
    if GRADIENT_MASK:
        g = scale(g, keep)
    return g


@triton.jit
def _decayed(g, p, weight_decay):
    """g + weight_decay p, and g where there is no decay, even if p is not finite."""
    return g + tl.where(weight_decay == 0, 0.0, weight_decay * p)


@triton.jit
def _sgd_block(param, grad, gamma, buffer, offsets, count, one_value, value, keeps, lr, momentum, undamped, weight_decay, sign,
               FIRST_STEP: tl.constexpr, NESTEROV: tl.constexpr, GRADIENT_MASK: tl.constexpr, MOMENTUM: tl.constexpr,
               MASKED: tl.constexpr):
    p = load(param, offsets, count, MASKED)
    keep = load_keep(gamma, offsets, count, one_value, value, keeps, MASKED)
    g = _decayed(_gradient(grad, offsets, count, sign, keep, GRADIENT_MASK, MASKED), p, weight_decay)
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


@triton.jit(do_not_specialize=["items", "lr"])
def masked_sgd_kernel(parameters, grads, gammas, buffers, keeps, chunks, items, lr, momentum, undamped, weight_decay, sign,
                      PARAM: tl.constexpr, GAMMA: tl.constexpr, STATE: tl.constexpr, LR_ON_DEVICE: tl.constexpr,
                      FIRST_STEP: tl.constexpr, NESTEROV: tl.constexpr, GRADIENT_MASK: tl.constexpr, MOMENTUM: tl.constexpr,
                      ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    rate = lr
    if LR_ON_DEVICE:
        rate = tl.load(lr).to(tl.float32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
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
                       weight_decay, sign, FIRST_STEP, NESTEROV, GRADIENT_MASK, MOMENTUM, False)
        if whole < count:
            _sgd_block(param, grad, gamma, buffer, whole + lanes, count, one_value, value, keeps, rate, momentum, undamped,
                       weight_decay, sign, FIRST_STEP, NESTEROV, GRADIENT_MASK, MOMENTUM, True)


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
                 root_correction, decay, weight_decay, beta2, rest1, rest2, eps, sign, DECOUPLED: tl.constexpr,
                 AMSGRAD: tl.constexpr, GRADIENT_MASK: tl.constexpr, MASKED: tl.constexpr):
    p = load(param, offsets, count, MASKED)
    m = load(exp_avg, offsets, count, MASKED)
    v = load(exp_avg_sq, offsets, count, MASKED)
    keep = load_keep(gamma, offsets, count, one_value, value, keeps, MASKED)
    g = _gradient(grad, offsets, count, sign, keep, GRADIENT_MASK, MASKED)
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


@triton.jit(do_not_specialize=["items", "lr"])
def masked_adamw_kernel(parameters, grads, gammas, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, keeps, chunks, items, lr,
                        ahead, log_beta1, log_beta2, beta2, rest1, rest2, eps, weight_decay, sign, PARAM: tl.constexpr,
                        GAMMA: tl.constexpr, STATE: tl.constexpr, LR_ON_DEVICE: tl.constexpr, STEPS_ON_HOST: tl.constexpr,
                        DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr, GRADIENT_MASK: tl.constexpr, ALIGNED: tl.constexpr,
                        VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    rate = lr
    if LR_ON_DEVICE:
        rate = tl.load(lr).to(tl.float32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
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
                         keeps, step_size, root_correction, decay, weight_decay, beta2, rest1, rest2, eps, sign, DECOUPLED,
                         AMSGRAD, GRADIENT_MASK, False)
        if whole < count:
            _adamw_block(param, grad, gamma, exp_avg, exp_avg_sq, max_exp_avg_sq, whole + lanes, count, one_value, value,
                         keeps, step_size, root_correction, decay, weight_decay, beta2, rest1, rest2, eps, sign, DECOUPLED,
                         AMSGRAD, GRADIENT_MASK, True)


def _rate(lr: float | Tensor, device: torch.device) -> tuple[float | Tensor, bool]:
    """What a kernel takes for the learning rate, and whether it must read it from the device."""
    if not isinstance(lr, Tensor) or lr.device != device:
        return float(lr), False
    return lr, True


def masked_sgd_(launches: plans.Launches, addresses: array, lists: Lists, *, lr, momentum=0.0, dampening=0.0,
                weight_decay=0.0, nesterov=False, maximize=False, is_first_step=False, mask="update") -> None:
    for piece in launches.pieces(addresses):
        group = piece.group
        with launch.on(group.device):
            place = launch.here(group.device)
            chunks, items = launch.chunks(place, piece.sizes, CHUNK, piece.one_value)
            if not items:
                continue
            rate, lr_on_device = _rate(lr, group.device)
            width = vector(group.dtype, group.gamma, group.state)
            tables = [launch.table(place, column) for column in piece.columns]
            masked_sgd_kernel[(launch.programs(place, items),)](
                *tables, launch.cached(place, ("keep",), keep_table), chunks, items, rate, float(momentum),
                float(1 - dampening), float(weight_decay), -1.0 if maximize else 1.0, ELEMENT[group.dtype],
                ELEMENT[group.gamma], ELEMENT[group.state], lr_on_device, bool(is_first_step), bool(nesterov),
                mask == "gradient", bool(momentum), piece.aligned, width, launch.THREADS * width,
                num_warps=launch.warps(group.device), enable_fp_fusion=launch.FP_FUSION)


def masked_adamw_(launches: plans.Launches, addresses: array, lists: Lists, *, lr, beta1=0.9, beta2=0.999, eps=1e-8,
                  weight_decay=1e-2, decoupled=True, maximize=False, mask="update") -> None:
    *_, max_exp_avg_sqs, state_steps = lists
    for piece in launches.pieces(addresses):
        group = piece.group
        with launch.on(group.device):
            place = launch.here(group.device)
            chunks, items = launch.chunks(place, piece.sizes, CHUNK, piece.one_value)
            counts = _host_counts(place, piece.columns[-1]) if group.steps_on_host else ()
            if items:
                steps, ahead = _apart(place, counts) if counts else (launch.table(place, piece.columns[-1]), 1.0)
                rate, lr_on_device = _rate(lr, group.device)
                width = vector(group.dtype, group.gamma, group.state)
                tables = [launch.table(place, column) for column in piece.columns[:-1]]
                masked_adamw_kernel[(launch.programs(place, items),)](
                    *tables, steps, launch.cached(place, ("keep",), keep_table), chunks, items, rate, ahead, _log(beta1),
                    _log(beta2), float(beta2), float(1 - beta1), float(1 - beta2), float(eps), float(weight_decay),
                    -1.0 if maximize else 1.0, ELEMENT[group.dtype], ELEMENT[group.gamma], ELEMENT[group.state], lr_on_device,
                    group.steps_on_host, bool(decoupled), bool(max_exp_avg_sqs), mask == "gradient", piece.aligned, width,
                    launch.THREADS * width, num_warps=launch.warps(group.device), enable_fp_fusion=launch.FP_FUSION)
        # The kernel took the step ahead: whatever raises above leaves the counts as they were.
        for count, value in zip(_host_floats(piece.columns[-1]) if counts else (), counts):
            count.value = value + 1
    for group in launches.groups:
        if not group.steps_on_host:
            torch._foreach_add_([state_steps[i] for i in group.indices], 1.0)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _host_counts(place: launch.Place, addresses: tuple[int, ...]) -> list[float]:
    if place.capturing:
        raise RuntimeError("spg_kernels: step counts on the CPU would be frozen into the CUDA graph; build the inner "
                           "optimizer with capturable=True")
    return [count.value for count in _host_floats(addresses)]


@functools.lru_cache(maxsize=64)
def _host_floats(addresses: tuple[int, ...]) -> tuple[ctypes.c_float, ...]:
    """The floats at these addresses. To read and write them through torch would take longer than all the rest of a step."""
    return tuple(map(ctypes.c_float.from_address, addresses))


def _apart(place: launch.Place, counts: list[float]) -> tuple[Tensor, float]:
    """(each step count relative to the first, the first after this step), the counts of tensors on the CPU.

    Counts advance together, so the differences stay in the cache and only a plain argument changes from step to step.
    """
    apart = (0.0,) * len(counts) if counts.count(counts[0]) == len(counts) else tuple(count - counts[0] for count in counts)
    return launch.cached(place, ("steps", apart), lambda: torch.tensor(apart, dtype=torch.float32, device="cpu")), counts[0] + 1

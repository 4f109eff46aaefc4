"""torch's SGD, Adam and AdamW as masked operator calls, on torch's own settings and state.

The wrapper can be taken off at any time: the state is what torch's own step would have made, through torch's own
`_init_group`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from . import ops


def patched_step(inner: Optimizer) -> Callable | None:
    """A step that somebody put on this one object; learning-rate schedulers, which only count, do not change it."""
    patched = vars(inner).get("step")
    return None if getattr(patched, "_wrapped_by_lr_sched", False) else patched


def takes(inner: Optimizer) -> bool:
    """Whether a masked operator computes exactly what this optimizer's own step would."""
    if type(inner) not in (SGD, Adam, AdamW) or patched_step(inner) is not None:
        return False
    return all(_has_plain_settings(group) for group in inner.param_groups)


def _has_plain_settings(group: dict) -> bool:
    scalars = [group["weight_decay"], *group.get("betas", ())]
    return not (group["differentiable"] or any(isinstance(x, Tensor) for x in scalars))


@torch.no_grad()
def step(inner: Optimizer, gamma_of: Callable[[Tensor], Tensor], mask: str, backend: str) -> bool:
    """One masked step of `inner` in a call a parameter group. False, with nothing done, where a backend must refuse."""
    calls = [call for group in inner.param_groups for call in (_sgd if type(inner) is SGD else _adam)(inner, group, gamma_of)]
    if not ops.try_calls(calls, {"mask": mask}, backend):
        return False
    if type(inner) is SGD:
        for call in calls:
            params, _, _, buffers = call.lists
            for parameter, buffer in zip(params, buffers):
                inner.state[parameter]["momentum_buffer"] = buffer
    return True


def _sgd(inner: SGD, group: dict, gamma_of: Callable) -> list[ops.Call]:
    params, grads, buffers = [], [], []
    inner._init_group(group, params, grads, buffers)
    gammas = [gamma_of(p) for p in params]
    settings = {key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")}
    if not buffers:
        return [ops.Call("masked_sgd_", (params, grads, gammas, []), settings)]
    if all(buffer is not None for buffer in buffers):  # `in` would compare tensors
        return [ops.Call("masked_sgd_", (params, grads, gammas, buffers), settings)]
    calls = []
    for is_first_step in (True, False):
        part = [i for i, buffer in enumerate(buffers) if (buffer is None) == is_first_step]
        own = [torch.empty_like(params[i]) if is_first_step else buffers[i] for i in part]
        lists = ([params[i] for i in part], [grads[i] for i in part], [gammas[i] for i in part], own)
        calls.append(ops.Call("masked_sgd_", lists, {**settings, "is_first_step": is_first_step}))
    return calls


def _adam(inner: Adam, group: dict, gamma_of: Callable) -> list[ops.Call]:
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps = [], [], [], [], [], []
    # Before torch 2.7 AdamW was a class of its own, whose _init_group asks for this setting too.
    amsgrad = [] if isinstance(inner, Adam) else [group["amsgrad"]]
    inner._init_group(group, params, grads, *amsgrad, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    settings = {key: group[key] for key in ("lr", "eps", "weight_decay", "maximize")}
    settings["beta1"], settings["beta2"] = group["betas"]
    # AdamW was a class of its own before it became Adam with this group setting.
    settings["decoupled"] = group.get("decoupled_weight_decay", False) or type(inner) is AdamW
    lists = (params, grads, [gamma_of(p) for p in params], exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    return [ops.Call("masked_adamw_", lists, settings)]

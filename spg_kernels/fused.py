"""torch's SGD, Adam and AdamW as masked operator calls, on torch's own settings and state.

The wrapper can be taken off at any time: the state is what torch's own step would have made, through torch's own
`_init_group`.
"""

from array import array
from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from . import distributed, ops
from .backends.tensors import describe
from .checks import as_number, check_scaler
from .importance import Importance
from .memory import check_disjoint
from .state import SCALER, init_group, same_objects


def patched_step(inner: Optimizer) -> Callable | None:
    """A step that somebody put on this one object; learning-rate schedulers, which only count, do not change it."""
    patched = vars(inner).get("step")
    return None if getattr(patched, "_wrapped_by_lr_sched", False) else patched


def takes(inner: Optimizer) -> bool:
    """Whether a masked operator computes exactly what this optimizer's own step would."""
    if type(inner) not in (SGD, Adam, AdamW) or patched_step(inner) is not None or not _is_torchs(type(inner).step):
        return False
    return all(_has_plain_settings(group) for group in inner.param_groups)


def _is_torchs(step: Callable | None) -> bool:
    """Whether all of a class's step is torch's own, which somebody may have replaced for every optimizer of that class."""
    while step is not None and step.__globals__["__name__"].startswith("torch.optim."):
        step = getattr(step, "__wrapped__", None)
    return step is None


def _has_plain_settings(group: dict) -> bool:
    scalars = [group["weight_decay"], *group.get("betas", ())]
    return not (group["differentiable"] or any(isinstance(x, Tensor) for x in scalars))


def begins_momentum(inner: Optimizer) -> bool:
    """Whether the next step makes a momentum buffer: torch's fused SGD leaves it uninitialized if `found_inf` skips."""
    return isinstance(inner, SGD) and any(inner.state.get(p, {}).get("momentum_buffer") is None for group in inner.param_groups
                                          if group["momentum"] for p in group["params"] if p.grad is not None)


class _Found(NamedTuple):
    """What the step of one parameter group works on, besides its gradients."""

    group: list[Tensor]  # group["params"] as it was
    without_grad: list[Tensor]
    names: tuple[str | None, ...]  # of the states that the operator takes, None for one that it does without
    params: list[Tensor]  # those with a gradient; likewise:
    states: list[dict]
    gammas: list[Tensor]


class FusedStep:
    """The step of torch's SGD, Adam or AdamW as masked operator calls, one for each parameter group.

    Looking states, gammas and kernels up parameter by parameter takes longer than all else on the host, so what was found is
    kept for as long as parameters, state dictionaries and gammas are the same objects. Tensors are read from them in every
    step. What no kernel takes, such as a sparse gradient or a complex parameter, does not keep the others from theirs.
    """

    def __init__(self):
        self._found: list[_Found] = []
        self._left: list[Tensor] = []  # parameters that have a gradient and that no kernel takes
        self._left_like: list[tuple] = []  # what those and their gradients were
        self._seen: list = []  # where: the optimizer, its state, the importance, and each of the state's dictionaries
        self._layout = -1
        self._is_sharded = False
        self._kernels: list[ops.Kernel] = []  # of the last step's calls
        self._backend = ""

    def take(self, inner: Optimizer, importance: Importance, gamma_of: Callable[[Tensor], Tensor], mask: str, backend: str,
             step_alone: Callable[[list[Tensor]], None]) -> None:
        """One masked step of `inner`; of parameters that no kernel takes by `step_alone`, before all others move."""
        common = {"mask": mask, **{name: getattr(inner, name, None) for name in SCALER}}
        is_held = not torch.compiler.is_compiling() and self._backend == backend and self._holds(inner, importance)
        if is_held and self._take_again(inner, common, step_alone):
            return
        # Whether parameters still have the gradients that they had is seen here, or by the kernels that were to run again.
        if not is_held or any(p.grad is None for found in self._found for p in found.params):
            self._find(inner, importance, gamma_of)
            self._backend = backend
        self._take_anew(inner, common, step_alone)

    def _take_anew(self, inner: Optimizer, common: dict, step_alone: Callable) -> None:
        calls = self._calls(inner)
        if not (calls or self._left):  # a GradScaler that saw no gradient has no tensors to give
            return
        _check(calls, common)
        if any(map(_is_first, calls)) and common["found_inf"]:
            return  # no step, and no momentum buffer yet: only this once the host must know, and waits for the device
        on_shards = self._on_shards(calls)
        if torch.compiler.is_compiling():
            ops.trace(on_shards, common, self._backend)
        else:
            kernels, addresses, refused = ops.find_kernels(on_shards, self._backend)
            if refused:
                self._leave({id(calls[k].lists[0][i]) for k, i in refused})
                calls = self._calls(inner)
                on_shards = self._on_shards(calls)
                kernels, addresses, _ = ops.find_kernels(on_shards, self._backend)
            if self._left:
                step_alone(self._left)
            _launch(kernels, addresses, on_shards, common)
            if not self._is_sharded:  # each step has tensors of its own for the shards
                self._kernels = kernels
        for call in filter(_is_first, calls):
            for parameter, buffer in zip(call.lists[0], call.lists[3]):
                inner.state[parameter]["momentum_buffer"] = buffer

    def _take_again(self, inner: Optimizer, common: dict, step_alone: Callable) -> bool:
        """The step with the last one's kernels, if they take the tensors that there are now."""
        calls = self._calls(inner) if self._kernels else []
        if not calls or len(calls) != len(self._kernels) or any(map(_is_first, calls)):
            return False
        addresses = [kernel.plan.locate(call.lists) for kernel, call in zip(self._kernels, calls)]
        if not all(addresses):
            return False
        _check(calls, common)
        if self._left:
            step_alone(self._left)
        _launch(self._kernels, addresses, calls, common)
        return True

    def _leave(self, left: set[int]) -> None:
        """Leave these parameters, by id, to the optimizer's own step."""
        for k, found in enumerate(self._found):
            taken = [id(p) not in left for p in found.params]
            self._left += [p for p, is_taken in zip(found.params, taken) if not is_taken]
            lists = ([x for x, is_taken in zip(each, taken) if is_taken] for each in (found.params, found.states, found.gammas))
            self._found[k] = _Found(found.group, found.without_grad, found.names, *lists)
        self._left_like = _described(self._left)

    def _on_shards(self, calls: list[ops.Call]) -> list[ops.Call]:
        if not self._is_sharded:
            return calls
        return [call._replace(lists=distributed.local_lists(call.lists)) for call in calls]

    def _calls(self, inner: Optimizer) -> list[ops.Call]:
        step = _sgd if isinstance(inner, SGD) else _adam
        return [call for group, found in zip(inner.param_groups, self._found) if found.params
                for call in step(inner, group, found, list(map(_grad, found.params))) if call.lists[0]]

    def _holds(self, inner: Optimizer, importance: Importance) -> bool:
        return (self._layout == importance.layout and len(self._found) == len(inner.param_groups)
                and same_objects([inner, inner.state, importance, *inner.state.values()], self._seen)
                and all(same_objects(group["params"], found.group) and _names(inner, group) == found.names
                        and all(found.states)  # else emptied, to be set up anew
                        and not any(p.grad is not None for p in found.without_grad)
                        for group, found in zip(inner.param_groups, self._found))
                and (not self._left or self._left_like == _described(self._left)))  # else a kernel may take them now

    @torch.no_grad()
    def _find(self, inner: Optimizer, importance: Importance, gamma_of: Callable) -> None:
        self._found, self._left, self._left_like, self._kernels = [], [], [], []  # an error below leaves nothing half found
        found = []
        moving = [[p for p in group["params"] if p.grad is not None] for group in inner.param_groups]
        params = [p for own in moving for p in own]
        # Whatever refuses must do so before torch sets up a state.
        gammas = [[gamma_of(p) for p in own] for own in moving]
        check_disjoint({"params": [distributed.local(p) for p in params]}, {})
        for group, stepped, masked in zip(inner.param_groups, moving, gammas):
            init_group(inner, group)
            names = _names(inner, group)
            states = [inner.state[p] for p in stepped] if any(names) else []
            found.append(_Found(list(group["params"]), [p for p in group["params"] if p.grad is None], names, stepped, states,
                                masked))
        self._is_sharded = any(map(distributed.is_dtensor, params))
        self._found, self._layout = found, importance.layout
        self._seen = [inner, inner.state, importance, *inner.state.values()]


def _launch(kernels: list[ops.Kernel], addresses: list[array], calls: list[ops.Call], common: dict) -> None:
    for kernel, at, call in zip(kernels, addresses, calls):
        kernel.launch(at, call, common)


def _check(calls: list[ops.Call], common: dict) -> None:
    """Whatever a launch would refuse, before the first of them."""
    check_scaler(common["grad_scale"], common["found_inf"])
    for settings in () if torch.compiler.is_compiling() else [call.settings for call in calls]:
        if not _PLAIN.issuperset(map(type, settings.values())):
            settings.update({name: as_number(name, value) for name, value in settings.items() if type(value) not in _PLAIN})


_PLAIN = {float, int, bool}  # what a launch takes as it is


def _described(parameters: list[Tensor]) -> list[tuple]:
    return describe([*parameters, *map(_grad, parameters)])


def _is_first(call: ops.Call) -> bool:
    return call.settings.get("is_first_step", False)


def _names(inner: Optimizer, group: dict) -> tuple[str | None, ...]:
    if isinstance(inner, SGD):
        return ("momentum_buffer" if group["momentum"] else None,)
    return "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None, "step"


_grad = attrgetter("grad")


def _sgd(inner: SGD, group: dict, found: _Found, grads: list[Tensor]) -> list[ops.Call]:
    settings = {key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")}
    if not group["momentum"]:
        return [ops.Call("masked_sgd_", (found.params, grads, found.gammas, []), settings)]
    buffers = [state.get("momentum_buffer") for state in found.states]
    if all(buffer is not None for buffer in buffers):
        return [ops.Call("masked_sgd_", (found.params, grads, found.gammas, buffers), settings)]
    calls = []
    for is_first_step in (True, False):
        part = [i for i, buffer in enumerate(buffers) if (buffer is None) == is_first_step]
        own = [torch.empty_like(found.params[i]) if is_first_step else buffers[i] for i in part]
        lists = ([found.params[i] for i in part], [grads[i] for i in part], [found.gammas[i] for i in part], own)
        calls.append(ops.Call("masked_sgd_", lists, {**settings, "is_first_step": is_first_step}))
    return calls


def _adam(inner: Adam, group: dict, found: _Found, grads: list[Tensor]) -> list[ops.Call]:
    settings = {key: group[key] for key in ("lr", "eps", "weight_decay", "maximize")}
    settings["beta1"], settings["beta2"] = group["betas"]
    # AdamW was a class of its own before it became Adam with this group setting; torch 2.6, which loads the setting from a later
    # torch's checkpoint all the same, does not read it.
    has_setting = "decoupled_weight_decay" in inner.defaults
    settings["decoupled"] = group["decoupled_weight_decay"] if has_setting else isinstance(inner, AdamW)
    states = [list(map(itemgetter(name), found.states)) if name else [] for name in found.names]
    return [ops.Call("masked_adamw_", (found.params, grads, found.gammas, *states), settings)]

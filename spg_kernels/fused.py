"""torch's SGD, Adam and AdamW as masked operator calls, on torch's own settings and state.

The wrapper can be taken off at any time: the state is what torch's own step would have made, through torch's own
`_init_group`.
"""

from array import array
from collections.abc import Callable
from itertools import compress
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


class _CachedGroup(NamedTuple):
    """What the step of one parameter group works on, besides its gradients."""

    all_params: list[Tensor]  # group["params"] as it was
    without_grad: list[Tensor]
    state_names: tuple[str | None, ...]  # in the operator's order, None for a state that this group does without
    params: list[Tensor]  # those with a gradient that a kernel takes; `states` and `gammas` are parallel to it
    states: list[dict]
    gammas: list[Tensor]


class FusedStep:
    """The step of torch's SGD, Adam or AdamW as masked operator calls, one for each parameter group.

    Looking up states, gammas and kernels parameter by parameter takes longer than all else on the host. So they are cached for
    as long as parameters, state dictionaries and gammas are the same objects. Gradients and the tensors of a state are read
    anew in every step. Parameters that no kernel takes (complex ones, or with a sparse gradient) go to the optimizer's own
    step; the others keep their kernels.
    """

    def __init__(self):
        self._groups: list[_CachedGroup] = []
        self._unsupported: list[Tensor] = []  # parameters that have a gradient and that no kernel takes
        self._unsupported_kinds: list[tuple] = []  # what they and their gradients were when no kernel took them
        self._cached_for: list = []  # the optimizer, its state, the importance, and each of the state's dictionaries
        self._key: tuple[str, int] = "", -1  # the backend and `importance.layout`
        self._is_sharded = False
        self._kernels: list[ops.Kernel] = []  # of the last step's calls

    def step(self, inner: Optimizer, importance: Importance, gamma_of: Callable[[Tensor], Tensor], mask: str, backend: str,
             step_alone: Callable[[list[Tensor]], None]) -> None:
        """One masked step of `inner`. Parameters that no kernel takes are stepped by `step_alone`, before all others move."""
        common = {"mask": mask, **{name: getattr(inner, name, None) for name in SCALER}}
        is_cached = not torch.compiler.is_compiling() and self._is_valid_for(inner, importance, backend)
        if is_cached and self._step_with_cached_kernels(inner, common, step_alone):
            return
        # A gradient that has become None is noticed here, for the cached kernels did not take it.
        if not is_cached or any(p.grad is None for cached in self._groups for p in cached.params):
            self._rebuild(inner, importance, gamma_of, backend)
        self._step(inner, common, backend, step_alone)

    def _step(self, inner: Optimizer, common: dict, backend: str, step_alone: Callable) -> None:
        calls = self._calls(inner)
        if not (calls or self._unsupported):  # a GradScaler that saw no gradient has no tensors to give
            return
        _check_settings(calls, common)
        if any(map(_is_first, calls)) and common["found_inf"]:
            return  # no step, and no momentum buffer yet: only this once the host must know, and waits for the device
        on_shards = self._on_shards(calls)
        if torch.compiler.is_compiling():
            ops.trace(on_shards, common, backend)
        else:
            kernels, addresses, refused = ops.find_kernels(on_shards, backend)
            if refused:
                self._set_apart({id(calls[k].lists[0][i]) for k, i in refused})
                calls = self._calls(inner)
                on_shards = self._on_shards(calls)
                kernels, addresses, _ = ops.find_kernels(on_shards, backend)
            if self._unsupported:
                step_alone(self._unsupported)
            _launch(kernels, addresses, on_shards, common)
            if not self._is_sharded:  # a step's shards are new tensor objects
                self._kernels = kernels
        for call in filter(_is_first, calls):
            for parameter, buffer in zip(call.lists[0], call.lists[3]):
                inner.state[parameter]["momentum_buffer"] = buffer

    def _step_with_cached_kernels(self, inner: Optimizer, common: dict, step_alone: Callable) -> bool:
        """Whether the last step's kernels take the tensors that there are now; then the step is done with them."""
        calls = self._calls(inner) if self._kernels else []
        if not calls or len(calls) != len(self._kernels) or any(map(_is_first, calls)):
            return False
        addresses = [kernel.plan.locate(call.lists) for kernel, call in zip(self._kernels, calls)]
        if not all(addresses):
            return False
        _check_settings(calls, common)
        if self._unsupported:
            step_alone(self._unsupported)
        _launch(self._kernels, addresses, calls, common)
        return True

    def _set_apart(self, unsupported: set[int]) -> None:
        """Move these parameters, by id, from the groups to `_unsupported`."""
        for k, cached in enumerate(self._groups):
            is_kept = [id(p) not in unsupported for p in cached.params]
            self._unsupported += [p for p, kept in zip(cached.params, is_kept) if not kept]
            params, states, gammas = (list(compress(each, is_kept)) for each in (cached.params, cached.states, cached.gammas))
            self._groups[k] = cached._replace(params=params, states=states, gammas=gammas)
        self._unsupported_kinds = _kinds(self._unsupported)

    def _on_shards(self, calls: list[ops.Call]) -> list[ops.Call]:
        if not self._is_sharded:
            return calls
        return [call._replace(lists=distributed.local_lists(call.lists)) for call in calls]

    def _calls(self, inner: Optimizer) -> list[ops.Call]:
        calls_of = _sgd_calls if isinstance(inner, SGD) else _adam_calls
        return [call for group, cached in zip(inner.param_groups, self._groups) if cached.params
                for call in calls_of(inner, group, cached, list(map(_grad, cached.params))) if call.lists[0]]

    def _is_valid_for(self, inner: Optimizer, importance: Importance, backend: str) -> bool:
        return (self._key == (backend, importance.layout) and len(self._groups) == len(inner.param_groups)
                and same_objects([inner, inner.state, importance, *inner.state.values()], self._cached_for)
                and all(same_objects(group["params"], cached.all_params) and _state_names(inner, group) == cached.state_names
                        and all(cached.states)  # an emptied one must be initialized again
                        and not any(p.grad is not None for p in cached.without_grad)
                        for group, cached in zip(inner.param_groups, self._groups))
                and (not self._unsupported or self._unsupported_kinds == _kinds(self._unsupported)))

    @torch.no_grad()
    def _rebuild(self, inner: Optimizer, importance: Importance, gamma_of: Callable, backend: str) -> None:
        # Without groups the cache is not valid, if an error below leaves it so.
        self._groups, self._unsupported, self._unsupported_kinds, self._kernels = [], [], [], []
        groups = []
        with_grad = [[p for p in group["params"] if p.grad is not None] for group in inner.param_groups]
        params = [p for own in with_grad for p in own]
        # Whatever raises must do so before torch initializes a state.
        gammas = [[gamma_of(p) for p in own] for own in with_grad]
        check_disjoint({"params": [distributed.local(p) for p in params]}, {})
        for group, own, own_gammas in zip(inner.param_groups, with_grad, gammas):
            init_group(inner, group)
            names = _state_names(inner, group)
            states = [inner.state[p] for p in own] if any(names) else []
            without_grad = [p for p in group["params"] if p.grad is None]
            groups.append(_CachedGroup(list(group["params"]), without_grad, names, own, states, own_gammas))
        self._is_sharded = any(map(distributed.is_dtensor, params))
        self._groups, self._key = groups, (backend, importance.layout)
        self._cached_for = [inner, inner.state, importance, *inner.state.values()]


def _launch(kernels: list[ops.Kernel], addresses: list[array], calls: list[ops.Call], common: dict) -> None:
    for kernel, at, call in zip(kernels, addresses, calls):
        kernel.launch(at, call, common)


def _check_settings(calls: list[ops.Call], common: dict) -> None:
    """Raise what a launch would raise before the first of them, and make numbers of settings that a launch would not take."""
    check_scaler(common["grad_scale"], common["found_inf"])
    for settings in () if torch.compiler.is_compiling() else [call.settings for call in calls]:
        if not _PLAIN.issuperset(map(type, settings.values())):
            settings.update({name: as_number(name, value) for name, value in settings.items() if type(value) not in _PLAIN})


_PLAIN = {float, int, bool}  # the types of settings that a launch takes as they are


def _kinds(parameters: list[Tensor]) -> list[tuple]:
    return describe([*parameters, *map(_grad, parameters)])


def _is_first(call: ops.Call) -> bool:
    return call.settings.get("is_first_step", False)


def _state_names(inner: Optimizer, group: dict) -> tuple[str | None, ...]:
    if isinstance(inner, SGD):
        return ("momentum_buffer" if group["momentum"] else None,)
    return "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None, "step"


_grad = attrgetter("grad")


def _sgd_calls(inner: SGD, group: dict, cached: _CachedGroup, grads: list[Tensor]) -> list[ops.Call]:
    settings = {key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")}
    if not group["momentum"]:
        return [ops.Call("masked_sgd_", (cached.params, grads, cached.gammas, []), settings)]
    buffers = [state.get("momentum_buffer") for state in cached.states]
    if all(buffer is not None for buffer in buffers):
        return [ops.Call("masked_sgd_", (cached.params, grads, cached.gammas, buffers), settings)]
    calls = []
    for is_first_step in (True, False):
        part = [i for i, buffer in enumerate(buffers) if (buffer is None) == is_first_step]
        own = [torch.empty_like(cached.params[i]) if is_first_step else buffers[i] for i in part]
        lists = ([cached.params[i] for i in part], [grads[i] for i in part], [cached.gammas[i] for i in part], own)
        calls.append(ops.Call("masked_sgd_", lists, {**settings, "is_first_step": is_first_step}))
    return calls


def _adam_calls(inner: Adam, group: dict, cached: _CachedGroup, grads: list[Tensor]) -> list[ops.Call]:
    settings = {key: group[key] for key in ("lr", "eps", "weight_decay", "maximize")}
    settings["beta1"], settings["beta2"] = group["betas"]
    # Since torch 2.7 AdamW is Adam with this group setting. Torch 2.6 does not read it, even where it was loaded from a later
    # torch's checkpoint.
    has_setting = "decoupled_weight_decay" in inner.defaults
    settings["decoupled"] = group["decoupled_weight_decay"] if has_setting else isinstance(inner, AdamW)
    states = [list(map(itemgetter(name), cached.states)) if name else [] for name in cached.state_names]
    return [ops.Call("masked_adamw_", (cached.params, grads, cached.gammas, *states), settings)]

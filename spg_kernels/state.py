"""The state of a wrapped optimizer: the inner optimizer's own, in which every parameter also shows its importance.

torch.distributed.checkpoint, asked to flatten, loads only what `optimizer.state[parameter]` lists. The importance must be
listed there, and must not be written there: Adam sets its moments up only where a parameter's state is empty.
"""

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.optim import ASGD, Optimizer, Rprop

KEY = "spg_importance"  # of a parameter's gamma in its state and in the state dict
TASKS = "spg_tasks"  # of the number of tasks so far, in the state dict beside "state"
SCALER = ("grad_scale", "found_inf")  # what a GradScaler sets on an optimizer for one step


class State(MutableMapping):
    """`inner`, an optimizer's state by parameter, written through; each parameter's has its importance added when read.

    Args:
        inner: the inner optimizer's `state`.
        read: gives a parameter's gamma as stored; None for one that the optimizer no longer has.
        write: called with a parameter and its new gamma.
    """

    def __init__(self, inner: MutableMapping, read: Callable[[Tensor], Tensor | None],
                 write: Callable[[Tensor, Tensor], None]):
        self.inner, self.read, self.write = inner, read, write

    def __getitem__(self, parameter: Tensor) -> "MutableMapping | object":
        entry = self.inner[parameter]  # as in torch's own, a parameter that has none yet is given one
        return _ParameterState(entry, parameter, self) if isinstance(entry, MutableMapping) else entry

    def __setitem__(self, parameter: Tensor, entry: object) -> None:
        self.inner[parameter] = without_importance(entry)

    def __delitem__(self, parameter: Tensor) -> None:
        del self.inner[parameter]

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.inner

    def get(self, parameter: Tensor, default: object = None) -> object:
        return self[parameter] if parameter in self.inner else default

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)

    def __repr__(self) -> str:
        return repr(dict(self))


class _ParameterState(MutableMapping):
    def __init__(self, inner: MutableMapping, parameter: Tensor, state: State):
        self._inner, self._parameter, self._state = inner, parameter, state

    def _gamma(self) -> Tensor | None:
        return self._state.read(self._parameter)

    def __getitem__(self, key: str) -> object:
        gamma = self._gamma() if key == KEY else None
        return self._inner[key] if gamma is None else gamma

    def __setitem__(self, key: str, value: object) -> None:
        if key == KEY:
            self._state.write(self._parameter, value)
        else:
            self._inner[key] = value

    def __delitem__(self, key: str) -> None:
        del self._inner[key]

    def __iter__(self) -> Iterator[str]:
        yield from self._inner
        if self._gamma() is not None:
            yield KEY

    def __len__(self) -> int:
        return len(self._inner) + (self._gamma() is not None)

    def __repr__(self) -> str:
        return repr(dict(self))


def same_objects(objects: Sequence, others: Sequence) -> bool:
    """Whether two sequences hold the same objects; == would compare tensors."""
    return len(objects) == len(others) and all(map(operator.is_, objects, others))


def without_importance(entry: object) -> object:
    """A parameter's state as the inner optimizer keeps it."""
    if isinstance(entry, Mapping) and KEY in entry:
        return {key: value for key, value in entry.items() if key != KEY}
    return entry


def init_group(inner: Optimizer, group: dict) -> None:
    """Let torch set up the state of a group's parameters, those with a gradient, as a step does before all else."""
    lists = list(inspect.signature(inner._init_group).parameters)[1:]  # to fill; before torch 2.7 AdamW's amsgrad too
    inner._init_group(group, *(group[name] if name == "amsgrad" else [] for name in lists))


@torch.inference_mode(False)  # trainers save in it after a validation; state made in it could not be stepped outside
def initialize(inner: Optimizer) -> None:
    """Give every parameter the state that torch's optimizers make lazily, in the first step that sees its gradient."""
    if not hasattr(inner, "_init_group"):
        return
    for group in inner.param_groups:
        # Frozen ones too: with its importance alone in its state, a plain optimizer could not step one that is unfrozen later.
        missing = [p for p in group["params"] if not inner.state.get(p)]
        without_grad = [p for p in missing if p.grad is None]
        try:
            for parameter in without_grad:
                dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype  # newer torch lets gradients have their own
                parameter.grad = parameter.detach().new_zeros((), dtype=dtype).expand_as(parameter)
            init_group(inner, {**group, "params": missing})
        finally:
            for parameter in without_grad:
                parameter.grad = None


def forget_rates(inner: Optimizer) -> None:
    """Delete the state of parameters that Rprop or ASGD has not stepped yet, for the first step to make anew.

    Both store the learning rate in it; what `initialize` stored, for a checkpoint, may have changed by then.
    """
    if isinstance(inner, Rprop | ASGD):
        for parameter, entry in list(inner.state.items()):
            if "step" in entry and not entry["step"]:
                del inner.state[parameter]

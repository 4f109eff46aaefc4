"""Importance: gamma by parameter name, one buffer a parameter however many tasks there are."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from . import distributed, files, ops
from .capacity import Capacity, LayerCapacity, totals_of
from .checks import GAMMA_DTYPES, is_floating
from .names import as_named, by_name


class _OfTheClass(classmethod):
    """A class method that cannot be called on an instance, where it would seem to load into it."""

    def __get__(self, instance: object, owner: type | None = None):
        if instance is not None:
            raise AttributeError("load makes a new Importance: give Importance.load(path) to SPGOptimizer(..., "
                                 "importance=...), or its state_dict() to load_state_dict()")
        return super().__get__(None, owner)


class Importance(Mapping):
    """gamma, the importance of every trunk parameter to the tasks so far, by parameter name.

    Args:
        named_parameters: (name, parameter) pairs, as `model.named_parameters()` gives them.
        dtype: torch.float32 (exact), or torch.uint8: an 8-bit code, a quarter of the memory and traffic, at most 7 % off
            in 1 - gamma and never less protective.

    `importance[name_or_parameter]` is gamma as a new float32 tensor of the parameter's shape; a KeyError if it is not known.
    Assigning sets it, to a tensor of that shape with finite values in [0, 1] (else ValueError) and a floating point dtype, or
    uint8 codes (else TypeError). `tasks` counts finished measuring passes.

    gamma of a DTensor parameter is a DTensor with its placements; it can be set from one, or from a whole tensor that is the
    same on every rank. Over sharded parameters every call that reads or sets values is collective: make it on every rank.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]] = (), dtype: torch.dtype = torch.float32):
        if dtype not in GAMMA_DTYPES:
            raise ValueError(f"dtype: expected torch.float32 or torch.uint8 (8-bit codes), got {dtype!r}")
        self.dtype = dtype
        self.tasks = 0
        self.layout = 0  # grows when a parameter gets another gamma tensor, not when numbers change
        self._active = False
        self._gammas: dict[str, Tensor] = {}  # as stored: float32 or codes
        self._versions: dict[str, int] = {}  # of these tensors when their numbers were last known, in the same order
        self._parameters: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._means: dict[torch.device, Tensor] = {}
        self._means_are_stale = False
        self._is_handed_out = False  # since the last step
        self._add_all(as_named(named_parameters))

    @property
    def active(self) -> bool:
        """Whether any gamma may differ from 0: one was measured, or set, or written to where it was handed out as stored."""
        if not self._active and self._was_written():
            self._active = True
        return self._active

    def _was_written(self) -> bool:
        if torch.compiler.is_compiling():  # it cannot compare versions
            return self._is_handed_out
        return list(map(distributed.version, self._gammas.values())) != list(self._versions.values())

    # Names and parameters

    @torch.inference_mode(False)  # whatever is made in it could not be written outside
    def add(self, name: str, parameter: Tensor) -> None:
        """Know `parameter` as `name`, with gamma = 0 if the name is new.

        Raises:
            ValueError: it is known by another name, its shape is not that of the name's gamma, or FSDP1 flattened it.
            TypeError: it is neither floating point nor complex.
        """
        self._check_parameter(name, parameter)
        if name not in self._gammas:
            self._gammas[name] = torch.zeros_like(parameter, dtype=self.dtype, requires_grad=False)
        else:
            self._active = self._active or distributed.version(self._gammas[name]) != self._versions[name]
            self._gammas[name] = _placed(self._gammas[name], parameter)
        self._versions[name] = distributed.version(self._gammas[name])
        if name in self._parameters:
            del self._names[id(self._parameters[name])]
        self._parameters[name] = parameter
        self._names[id(parameter)] = name
        self._means_are_stale = True
        self.layout += 1

    def bind(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Attach new Parameter objects under the names known here (after `fully_shard`, `to_empty`, a reload).

        Other names are left alone: heads, for one, hold no gamma.

        Raises:
            ValueError: a shape differs, or a parameter is no longer sharded; TypeError: no such pairs. Nothing has changed.
        """
        self._add_all([(name, parameter) for name, parameter in as_named(named_parameters) if name in self._gammas])

    def attach(self, named_parameters: Sequence[tuple[str, Tensor]], all_are_named: bool) -> None:
        """`add` parameters, which must be among them the ones of a loaded importance.

        Args:
            all_are_named: these are a whole model's, named by the user, so that a name known here of which there is none was
                renamed or removed. Else another optimizer may hold it, unless this model was built anew and has other names.

        Raises:
            ValueError: a name known here has no parameter, no parameter's name is known here although there is importance,
                two parameters have the same, a shape differs; TypeError: a dtype. Nothing has changed.
        """
        parameters = by_name(named_parameters)
        missing = self._gammas.keys() - parameters.keys()
        if not all_are_named and not (self.active and self._are_built_anew(parameters)):
            missing -= self._parameters.keys()
        if missing:
            raise ValueError(f"importance: no parameter is called {', '.join(sorted(missing))}: it is of another model, or "
                             "its names were others; named_parameters=model.named_parameters() names them all")
        self._add_all(named_parameters)

    def _are_built_anew(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether none of `parameters` is one known here, and some name is not."""
        known = [name for name in parameters if name in self._gammas]
        return len(known) < len(parameters) and all(self.parameter(name) is not parameters[name] for name in known)

    def _add_all(self, named_parameters: Sequence[tuple[str, Tensor]]) -> None:
        names = {id(parameter): name for name, parameter in by_name(named_parameters).items()}
        for name, parameter in named_parameters:
            self._check_parameter(name, parameter)
            if names[id(parameter)] != name:
                raise ValueError(f"{name}: this parameter is also called {names[id(parameter)]}")
        for name, parameter in named_parameters:
            self.add(name, parameter)

    def _check_parameter(self, name: str, parameter: Tensor) -> None:
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise TypeError(f"{name}: expected a floating point parameter, got {parameter.dtype}; leave out what is never "
                            "trained")
        distributed.refuse_flattened(name, parameter)
        known_as = self.name_of(parameter)
        if known_as not in (None, name):
            raise ValueError(f"{name}: this parameter is already known as {known_as}")
        if name in self._gammas:
            self._check_fits(name, parameter)

    def name_of(self, parameter: Tensor) -> str | None:
        """The name `parameter` is known by, None if it is not."""
        return self._names.get(id(parameter))

    def parameter(self, name: str) -> Tensor | None:
        """The parameter that is known as `name`, None if there is none."""
        return self._parameters.get(name)

    def gamma(self, parameter: Tensor) -> Tensor | None:
        """gamma of `parameter` as it is stored (float32 or codes), where and laid out as the parameter is; None if unknown."""
        name = self._names.get(id(parameter))
        if name is None:
            return None
        gamma = self._gammas[name]
        if gamma.device != parameter.device or not _lies_as(gamma, parameter):  # the model was moved after it was wrapped
            self.add(name, parameter)
        return self._gammas[name]

    def hand_out(self, parameter: Tensor) -> Tensor | None:
        """`gamma`, for somebody who may write to it before the next step."""
        self._is_handed_out = True
        return self.gamma(parameter)

    def _key(self, key: str | Tensor) -> str:
        name = self.name_of(key) if isinstance(key, Tensor) else key
        if name not in self._gammas:
            raise KeyError(f"no importance of {'this parameter' if isinstance(key, Tensor) else repr(key)}")
        return name

    def __getitem__(self, key: str | Tensor) -> Tensor:
        gamma = self._gammas[self._key(key)]
        return distributed.on_shards(ops.decode, gamma) if self.dtype == torch.uint8 else gamma.clone()

    def __setitem__(self, key: str | Tensor, value: Tensor) -> None:
        name = self._key(key)
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}") from error
        self.store({name: value})

    def __contains__(self, key: object) -> bool:
        return (self.name_of(key) if isinstance(key, Tensor) else key) in self._gammas

    def __iter__(self) -> Iterator[str]:
        return iter(self._gammas)

    def __len__(self) -> int:
        return len(self._gammas)

    __eq__ = object.__eq__  # Mapping would compare tensors
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        elements = sum(gamma.numel() for gamma in self._gammas.values())
        size = elements * self.dtype.itemsize
        memory = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
        return f"Importance({len(self)} parameters, {elements:,} elements, {self.dtype}, {memory}, tasks={self.tasks})"

    # Folding, reading, reporting

    def accumulate(self, parameters: Iterable[Tensor], backend: str = "auto") -> None:
        """gamma <- max(gamma, importance of `.grad`) for each of `parameters` that has a gradient.

        Raises:
            NonFiniteGradientError: names every parameter with an inf or NaN in its gradient; their gamma is untouched.
        """
        self.fold([(p, p.grad) for p in parameters if p.grad is not None], backend)

    def fold(self, gradients: Iterable[tuple[Tensor, Tensor]], backend: str = "auto") -> None:
        """`accumulate` of (parameter, gradient) pairs: a gradient need not be the parameter's `.grad`, nor of its dtype."""
        folded = {self._key(p): (p, grad) for p, grad in gradients}
        for name, (parameter, _) in folded.items():
            distributed.refuse_flattened(name, parameter)  # again: it may have been flattened since it was added
        self._will_change(bool(folded))
        distributed.fold([self.gamma(p) for p, _ in folded.values()], [grad for _, grad in folded.values()], list(folded),
                         backend)
        # Now, not at the next step: a CUDA graph's replay calls nothing here, and reads the heads' mean where it lies.
        self._refresh_means(look=False)

    def _will_change(self, active: bool) -> None:
        # Called before any gamma changes: if the change is interrupted, the next step masks by what was written so far.
        self._active = self.active or active
        self._means_are_stale = True

    def mean(self) -> Tensor:
        """The mean of gamma over all elements of all trunk tensors, a 0-d float32 tensor: heads are scaled by 1 - mean."""
        device = next(iter(self._gammas.values())).device if self._gammas else torch.device("cpu")
        mean = self.mean_on(device)
        self._refresh_means(look=True)
        return mean.clone()

    def mean_on(self, device: torch.device) -> Tensor:
        """`mean()` on `device`. One tensor for good, brought up to date in place: a captured CUDA graph keeps its address."""
        if device not in self._means:
            with torch.inference_mode(False):  # a tensor made in it could not be brought up to date outside
                self._means[device] = torch.zeros((), dtype=torch.float32, device=device)
            self._means_are_stale = True
        self._refresh_means(look=False)
        return self._means[device]

    def update_means(self) -> None:
        """Before a step: bring the tensors of `mean_on` up to date."""
        self._refresh_means(look=self._is_handed_out)
        self._is_handed_out = False

    def _refresh_means(self, look: bool) -> None:
        # `look`: compare the version of every gamma, in case somebody wrote to it. It takes a tenth of a step's host time.
        if self._means and (self._means_are_stale or (look and self._was_written())):
            self._active = self.active
            for kept in self._means.values():
                kept.copy_(distributed.mean_gamma(list(self._gammas.values()), kept.device))
            self._note_versions(self._gammas)
            self._means_are_stale = False

    def _note_versions(self, names: Iterable[str]) -> None:
        self._versions |= {name: distributed.version(self._gammas[name]) for name in names}

    def summary(self) -> Capacity:
        """The capacity table: how much of each parameter tensor the tasks so far have used up. `print` it, or read `.rows`."""
        rows = []
        for name, gamma in self._gammas.items():
            shares = [total / max(1, gamma.numel()) for total in distributed.totals(gamma, totals_of)]
            rows.append(LayerCapacity(name, gamma.numel(), *shares))
        return Capacity(tuple(rows), 1 - float(self.mean()), self.tasks)

    # Saving and loading

    def check(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`values` in this importance's dtype, on their gammas' devices.

        Raises:
            ValueError: a name is unknown, a shape differs, or a value is not finite and in [0, 1]. TypeError: a dtype.
        """
        stored = {}
        for name, value in values.items():
            if name not in self._gammas:
                raise ValueError(f"{name}: no parameter of that name has an importance here")
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
            if value.layout != torch.strided or value.is_meta:
                raise TypeError(f"{name}: expected a strided tensor with values, got {value.layout} on {value.device}")
            self._check_shape(name, value)
            value = distributed.placed(value.detach(), self._gammas[name])
            stored[name] = _as_stored(name, value, self.dtype).to(self._gammas[name].device)
        return stored

    def _check_fits(self, name: str, parameter: Tensor) -> None:
        self._check_shape(name, parameter)
        if distributed.is_dtensor(self._gammas[name]) and not distributed.is_dtensor(parameter):
            raise ValueError(f"{name}: was sharded and is not any more; FSDP2 keeps parameters gathered after a forward pass "
                             "that no backward follows, and trains none of these: call model.reshard() first")

    def _check_shape(self, name: str, value: Tensor) -> None:
        if value.shape != self._gammas[name].shape:
            raise ValueError(f"{name}: expected shape {tuple(self._gammas[name].shape)}, got {tuple(value.shape)}")

    def store(self, values: Mapping[str, Tensor]) -> None:
        """Set gammas by name: float tensors in [0, 1], or uint8 codes. All are checked before any is set."""
        checked = self.check(values)
        self._will_change(any(distributed.some(value) for value in checked.values()))
        for name, value in checked.items():
            self._gammas[name].copy_(value)
        self._note_versions(checked)

    def state_dict(self) -> dict:
        """{"version", "tasks", "gammas": {name: tensor as stored}}."""
        self._is_handed_out = True
        return {"version": files.VERSION, "tasks": self.tasks, "gammas": dict(self._gammas)}

    def load_state_dict(self, state: Mapping) -> None:
        """Take over every gamma and the task count. The names must be the ones known here; heads have none, old or new.

        Raises:
            ValueError, TypeError: another version, missing or unexpected names, shapes, values; nothing has changed.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("gammas"), Mapping):
            raise TypeError("state: expected what state_dict() gives: a mapping with 'version', 'tasks' and "
                            "a mapping 'gammas'")
        files.check_version(state.get("version"))
        files.check_tasks(state.get("tasks"))
        gammas = state["gammas"]
        missing, unexpected = [n for n in self if n not in gammas], [n for n in gammas if n not in self]
        if missing or unexpected:
            raise ValueError(f"importance does not match the model: missing {missing}, unexpected {unexpected}")
        self.store(gammas)
        self.tasks = state["tasks"]

    def save(self, path: str | os.PathLike) -> None:
        """Write to `path` in safetensors, whole or not at all: a crash or a full disk leaves the file that was there before.

        A process killed in here leaves a file `.<start of the name>.<random>.tmp` beside it, which may be deleted. Of sharded
        gammas a collective call: the first rank gathers and writes them, the others do not wait for it.
        torch.distributed.checkpoint writes shards as they are, from the optimizer's state dict or `state_dict()`.

        Raises:
            OSError: what the operating system refused, with `path`. ValueError: `tasks` is no integer from 0, or `load` would
                refuse a name, such as one that leads out of a directory.
        """
        writes = distributed.writes(self._gammas.values())
        gammas = {}
        for name, gamma in self._gammas.items():
            gamma = distributed.whole(gamma)
            if writes:
                gammas[name] = gamma.cpu()  # one at a time: a device that holds shards need not have room for all of them
        if writes:
            files.write(path, gammas, self.tasks, self.dtype)

    @_OfTheClass
    def load(cls, path: str | os.PathLike) -> "Importance":
        """Read what `save` wrote; the parameters are attached by `bind`, or by handing it to SPGOptimizer.

        Raises:
            ValueError: not such a file, damaged, another version, or values outside [0, 1]. OSError: it cannot be read.
        """
        gammas, tasks, dtype = files.read(path)
        importance = cls(dtype=dtype)
        importance._gammas = {name: torch.zeros_like(gamma) for name, gamma in gammas.items()}
        importance._note_versions(gammas)
        try:
            importance.store(gammas)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
        importance.tasks = tasks
        return importance

    def __copy__(self) -> "Importance":
        copied = type(self).__new__(type(self))
        gammas = {name: gamma.clone() for name, gamma in self._gammas.items()}
        copied.__setstate__({**self.__getstate__(), "_gammas": gammas, "_parameters": dict(self._parameters)})
        return copied

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_active": self.active, "_versions": {}, "_names": None, "_means": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._note_versions(self._gammas)


def _lies_as(gamma: Tensor, parameter: Tensor) -> bool:
    """Whether `gamma` has the shape and memory layout of `parameter`, or of what is made like it where that has gaps."""
    if gamma.shape != parameter.shape:
        return False
    return gamma.stride() == parameter.stride() or gamma.stride() == torch.empty_like(parameter, device="meta").stride()


def _placed(gamma: Tensor, parameter: Tensor) -> Tensor:
    """`gamma` on the device, in the memory layout and sharded as `parameter`, which fused kernels walk through together."""
    gamma = distributed.placed(gamma, parameter)
    if parameter.is_meta or (gamma.device == parameter.device and gamma.stride() == parameter.stride()):
        return gamma
    placed = torch.zeros_like(parameter, dtype=gamma.dtype, requires_grad=False)
    return placed if gamma.is_meta else placed.copy_(gamma)  # nothing was measured on a meta device


def _as_stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value`, gammas in [0, 1] or uint8 codes, as `dtype` stores it."""
    if value.dtype == torch.uint8:
        return value if dtype == torch.uint8 else distributed.on_shards(ops.decode, value)
    if not is_floating(value):
        raise TypeError(f"{name}: expected floating point gammas or torch.uint8 codes, got {value.dtype}")
    if distributed.some(distributed.on_shards(_outside, value)):
        seen = distributed.whole(value)
        raise ValueError(f"{name}: expected finite values in [0, 1], got {seen.min().item()} to {seen.max().item()}")
    return distributed.on_shards(ops.encode_gamma, value) if dtype == torch.uint8 else value.float()


def _outside(gamma: Tensor) -> Tensor:
    return ~((gamma >= 0) & (gamma <= 1))

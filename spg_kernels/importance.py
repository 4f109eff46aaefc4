"""Importance: gamma by parameter name, one buffer a parameter however many tasks there are; and the measuring pass."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import distributed, ops

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerCapacity:
    """How much of one parameter tensor is used up: mean gamma, shares of its elements with gamma > 0.5 and > 0.99."""

    name: str
    elements: int
    mean: float
    above_half: float
    above_99: float


@dataclass(frozen=True)
class Capacity:
    """The capacity table: a row per parameter tensor, and the factor 1 - mean(gamma) that the heads move by."""

    rows: tuple[LayerCapacity, ...]
    head_factor: float
    tasks: int

    def __str__(self) -> str:
        table = Table("parameter", title=f"capacity after {self.tasks} tasks; heads move by {self.head_factor:.4f}")
        for column in ("elements", "mean gamma", "gamma > 0.5", "gamma > 0.99"):
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(row.name, f"{row.elements:,}", f"{row.mean:.4f}", f"{row.above_half:.1%}", f"{row.above_99:.1%}")
        console = Console(width=100)
        with console.capture() as text:
            console.print(table)
        return text.get()


class Importance(Mapping):
    """gamma, the importance of every trunk parameter to the tasks so far, by parameter name.

    Args:
        named_parameters: (name, parameter) pairs, as `model.named_parameters()` gives them.
        dtype: torch.float32 (exact), or torch.uint8: an 8-bit code, a quarter of the memory and traffic, at most 7 % off
            in 1 - gamma and never less protective.

    `importance[name_or_parameter]` is gamma as a new float32 tensor of the parameter's shape; assigning sets it. `tasks`
    counts finished measuring passes. gamma of a DTensor parameter is a DTensor with its placements; it can be set from one, or
    from a whole tensor that is the same on every rank. Over sharded parameters every call that reads or sets values is
    collective: make it on every rank.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]] = (), dtype: torch.dtype = torch.float32):
        if dtype not in ops.GAMMA_DTYPES:
            raise ValueError(f"dtype: expected torch.float32 or torch.uint8 (8-bit codes), got {dtype}")
        self.dtype = dtype
        self.tasks = 0
        self.active = False  # whether any gamma may differ from 0
        self._gammas: dict[str, Tensor] = {}  # as stored: float32 or codes
        self._parameters: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._means: dict[torch.device, Tensor] = {}
        self._means_are_stale = False
        for name, parameter in named_parameters:
            self.add(name, parameter)

    # Names and parameters

    def add(self, name: str, parameter: Tensor) -> None:
        """Know `parameter` as `name`, with gamma = 0 if the name is new."""
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise TypeError(f"{name}: expected a floating point parameter, got {parameter.dtype}")
        distributed.refuse_flattened(name, parameter)
        known_as = self.name_of(parameter)
        if known_as not in (None, name):
            raise ValueError(f"{name}: this parameter is already known as {known_as}")
        if name not in self._gammas:
            self._gammas[name] = torch.zeros_like(parameter, dtype=self.dtype, requires_grad=False)
        else:
            self._check_fits(name, parameter)
            self._gammas[name] = _placed(self._gammas[name], parameter)
        if name in self._parameters:
            del self._names[id(self._parameters[name])]
        self._parameters[name] = parameter
        self._names[id(parameter)] = name
        self._means_are_stale = True

    def bind(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Attach new Parameter objects under the names known here (after `fully_shard`, `to_empty`, a reload).

        Other names are left alone: heads, for one, hold no gamma.

        Raises:
            ValueError: a shape differs, or a parameter is no longer sharded; nothing has changed.
        """
        known = [(name, parameter) for name, parameter in named_parameters if name in self._gammas]
        for name, parameter in known:
            self._check_fits(name, parameter)
        for name, parameter in known:
            self.add(name, parameter)

    def name_of(self, parameter: Tensor) -> str | None:
        """The name `parameter` is known by, None if it is not."""
        return self._names.get(id(parameter))

    def gamma(self, parameter: Tensor) -> Tensor | None:
        """gamma of `parameter` as it is stored (float32 or codes), on the parameter's device; None if unknown."""
        name = self._names.get(id(parameter))
        if name is None:
            return None
        gamma = self._gammas[name]
        if gamma.device != parameter.device:  # the model was moved after it was wrapped
            gamma = self._gammas[name] = _placed(gamma, parameter)
            self._means_are_stale = True
        return gamma

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
        self.store({name: torch.as_tensor(value)})

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
        return f"Importance({len(self)} parameters, {elements:,} elements, {self.dtype}, tasks={self.tasks})"

    # Folding, reading, reporting

    def accumulate(self, parameters: Iterable[Tensor], backend: str = "auto") -> None:
        """gamma <- max(gamma, importance of `.grad`) for each of `parameters` that has a gradient.

        Raises:
            NonFiniteGradientError: names every parameter with an inf or NaN in its gradient; their gamma is untouched.
        """
        folded = {self._key(p): p for p in parameters if p.grad is not None}
        for name, parameter in folded.items():
            distributed.refuse_flattened(name, parameter)  # once more: after it was known, somebody may have
        self.active = self.active or bool(folded)
        try:
            parameters = folded.values()
            distributed.fold([self.gamma(p) for p in parameters], [p.grad for p in parameters], list(folded), backend)
        finally:
            self._means_are_stale = True

    def mean(self) -> Tensor:
        """The mean of gamma over all elements of all trunk tensors, a 0-d float32 tensor: heads are scaled by 1 - mean."""
        device = next(iter(self._gammas.values())).device if self._gammas else torch.device("cpu")
        return self.mean_on(device).clone()

    def mean_on(self, device: torch.device) -> Tensor:
        """`mean()` on `device`. One tensor for good, brought up to date in place: a captured CUDA graph keeps its address."""
        if self._means_are_stale:
            for kept in self._means.values():
                kept.copy_(distributed.mean_gamma(list(self._gammas.values()), kept.device))
            self._means_are_stale = False
        if device not in self._means:
            self._means[device] = distributed.mean_gamma(list(self._gammas.values()), device)
        return self._means[device]

    def summary(self) -> Capacity:
        """The capacity table: how much of each parameter tensor the tasks so far have used up. `print` it, or read `.rows`."""
        rows = []
        for name in self:
            gamma = self[name]
            mean = float(distributed.mean_gamma([gamma], gamma.device))
            shares = [above / max(1, gamma.numel()) for above in distributed.sums([gamma > 0.5, gamma > 0.99])]
            rows.append(LayerCapacity(name, gamma.numel(), mean, *shares))
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
        for name, value in self.check(values).items():
            self._gammas[name].copy_(value)
            self.active = self.active or distributed.some(value)
        self._means_are_stale = True

    def state_dict(self) -> dict:
        """{"version", "tasks", "gammas": {name: tensor as stored}}."""
        return {"version": FORMAT_VERSION, "tasks": self.tasks, "gammas": dict(self._gammas)}

    def load_state_dict(self, state: Mapping) -> None:
        """Take over every gamma and the task count. The names must be the ones known here.

        Raises:
            ValueError: another version, missing or unexpected names, shapes, values; nothing has changed.
        """
        if state.get("version") != FORMAT_VERSION:
            raise ValueError(f"version: expected {FORMAT_VERSION}, got {state.get('version')!r}")
        gammas = state["gammas"]
        missing, unexpected = [n for n in self if n not in gammas], [n for n in gammas if n not in self]
        if missing or unexpected:
            raise ValueError(f"importance does not match the model: missing {missing}, unexpected {unexpected}")
        self.store(gammas)
        self.tasks = state["tasks"]

    def save(self, path: str | os.PathLike) -> None:
        """Write to `path` in safetensors, whole or not at all: a crash leaves the file that was there before.

        Of sharded gammas a collective call: the first rank gathers and writes them, the others do not wait for it.
        torch.distributed.checkpoint writes shards as they are, from the optimizer's state dict or `state_dict()`.
        """
        path = Path(path)
        writes = distributed.writes(self._gammas.values())
        tensors = {}
        for name, gamma in self._gammas.items():
            gamma = distributed.whole(gamma)
            if writes:
                tensors[name] = gamma.contiguous()
        if not writes:
            return
        metadata = {"format": "spg_importance", "version": str(FORMAT_VERSION), "tasks": str(self.tasks),
                    "dtype": str(self.dtype).removeprefix("torch."), "names": json.dumps(list(self))}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Importance":
        """Read what `save` wrote; the parameters are attached by `bind`, or by handing it to SPGOptimizer.

        Raises:
            ValueError: not such a file, another version, or values outside [0, 1].
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "spg_importance":
                raise ValueError(f"{path}: expected an importance file, metadata says {metadata}")
            if metadata.get("version") != str(FORMAT_VERSION):
                raise ValueError(f"{path}: expected version {FORMAT_VERSION}, got {metadata.get('version')!r}")
            # In the model's order, which the file does not keep.
            gammas = {name: file.get_tensor(name) for name in json.loads(metadata["names"])}
        importance = cls(dtype={"float32": torch.float32, "uint8": torch.uint8}[metadata["dtype"]])
        importance._gammas = {name: torch.zeros_like(gamma) for name, gamma in gammas.items()}
        importance.store(gammas)
        importance.tasks = int(metadata["tasks"])
        return importance

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_names": None, "_means": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}


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
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected floating point gammas or torch.uint8 codes, got {value.dtype}")
    if distributed.some(distributed.on_shards(_outside, value)):
        seen = distributed.whole(value)
        raise ValueError(f"{name}: expected finite values in [0, 1], got {seen.min().item()} to {seen.max().item()}")
    return distributed.on_shards(ops.encode_gamma, value) if dtype == torch.uint8 else value.float()


def _outside(gamma: Tensor) -> Tensor:
    return ~((gamma >= 0) & (gamma <= 1))


def cross_head_losses(model: nn.Module, task: int, loss: Callable[[Tensor, Tensor], Tensor]) -> list[Callable]:
    """The losses L(t, tau) of the measuring pass after task t, one for each head tau = 0 .. t, to be called with a batch.

    Args:
        model: called as `model(x, tau)`, giving head tau's outputs.
        task: t, the task just trained.
        loss: the task's own loss, called as `loss(outputs, y)`; old heads are probed with the sum of their outputs
            (cross-head importance).

    Returns:
        t + 1 functions of a batch (x, y), which is moved to the model's device.
    """
    if task < 0:
        raise ValueError(f"task: expected 0 or more, got {task}")

    def loss_of(head: int) -> Callable:
        def of_batch(batch: Sequence[Tensor]) -> Tensor:
            device = next(model.parameters()).device
            x, y = (tensor.to(device, non_blocking=True) for tensor in batch)
            outputs = model(x, head)
            return loss(outputs, y) if head == task else outputs.sum()

        return of_batch

    return [loss_of(head) for head in range(task + 1)]


def measure(loader: Iterable, losses: Sequence[Callable], clear: Callable[[], None], fold: Callable[[], None],
            progress: bool) -> None:
    """The measuring pass: for each loss, `clear` the gradients, accumulate them over `loader`, `fold` them in."""
    losses = list(losses)
    if not losses:
        raise ValueError("losses: expected at least one, got none")
    if isinstance(loader, Iterator):
        raise ValueError("loader: expected something to run over once a loss, such as a DataLoader; "
                         "an iterator is empty after the first")
    try:
        with torch.enable_grad(), tqdm(total=_batches(loader, losses), desc="importance", unit="batch",
                                       disable=not progress, leave=False) as bar:
            for head, loss in enumerate(losses):
                bar.set_postfix_str(f"loss {head + 1} of {len(losses)}")
                clear()
                batches = 0
                for batch in loader:
                    loss(batch).backward()
                    batches += 1
                    bar.update()
                if not batches:
                    raise ValueError("loader: expected at least one batch, got none")
                fold()
    finally:
        clear()


def _batches(loader: Iterable, losses: list) -> int | None:
    try:
        return len(loader) * len(losses)
    except TypeError:  # an iterable without a length
        return None

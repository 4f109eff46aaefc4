"""The measuring pass after a task: the losses of cross-head importance, and the sweeps over the data for their gradients."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import distributed
from .state import same_objects

Fold = Callable[[Iterable[tuple[Tensor, Tensor]]], None]


def cross_head_losses(model: nn.Module, task: int, loss: Callable[[Tensor, Tensor], Tensor]) -> list[Callable]:
    """The losses L(t, tau) of the measuring pass after task t, one for each head tau = 0 .. t, to be called with a batch.

    Args:
        model: called as `model(x, tau)`, giving head tau's outputs.
        task: t, the task just trained.
        loss: the task's own loss, called as `loss(outputs, y)`; old heads are probed with the sum of their outputs
            (cross-head importance). Gradients add up over batches: a mean weighs every batch alike, a sum every example.

    Returns:
        t + 1 functions of a batch, a pair of tensors (x, y), which are moved to the model's device.

    Raises:
        ValueError: `task` is negative. TypeError: it is no whole number; when a loss is called, a batch that is no pair, or an
            old head whose outputs are not one tensor.
    """
    _check_task(task)

    def loss_of(head: int) -> Callable:
        def of_batch(batch: Sequence[Tensor]) -> Tensor:
            x, y = _moved(batch, model)
            outputs = model(x, head)
            return loss(outputs, y) if head == task else _probe(outputs, f"model(x, {head})")

        return of_batch

    return [loss_of(head) for head in range(task + 1)]


class SharedTrunkLosses(Sequence):
    """The losses of `cross_head_losses` for a model with trunk and heads apart: one pass through the trunk serves many heads.

    A sequence of t + 1 functions of a batch (x, y) like any other. `SPGOptimizer.measure_importance` runs the trunk once a
    batch for many heads and computes gradients of the trunk alone: the same importance as by one pass a head. For ten heads
    that is about half the time with the network and dropout of `examples/`, 0.7 of it without dropout, and saves less where
    weights are large beside a batch. In train mode dropout draws one mask a batch for all heads, and running statistics (batch
    normalization) are updated once a batch. Where hooks of `.backward()` may make gradients what they are, as wherever
    torch.distributed is initialized or a parameter has a post-accumulate-grad hook, it takes one pass a head.
    DistributedDataParallel reduces what went through it alone: around trunk and heads together it needs `cross_head_losses`.

    Args:
        trunk: called as `trunk(x)`, giving the features, one tensor; a module or any function of one. It must allow
            torch.autograd.grad, which torch's reentrant activation checkpointing does not.
        heads: an nn.ModuleList or a sequence of modules, called as `heads[tau](features)`, on whose device batches are moved.
        task, loss: as in `cross_head_losses`.
        memory: bytes for gradients, float32 or wider: one sum of the trunk's size for each head in a sweep over the data,
            and one more for the batch at hand. Heads that do not fit take another sweep; under three, one pass a head.

    Raises:
        TypeError: `heads` is no sequence of modules, `memory` no number; in a pass, a batch is no pair, the trunk gives no
            tensor, or hides parameters in such checkpoints. ValueError: no such task, or no head for it; in a pass on several
            ranks, a trunk whose gradients nobody reduces.
    """

    def __init__(self, trunk: Callable[[Tensor], Tensor], heads: Sequence[nn.Module] | nn.ModuleList, task: int,
                 loss: Callable[[Tensor, Tensor], Tensor], *, memory: int = 2**30):
        _check_task(task)
        if not isinstance(heads, Sequence | nn.ModuleList):
            raise TypeError(f"heads: expected a sequence of modules, got {type(heads).__name__}")
        for i, head in enumerate(heads):
            if not isinstance(head, nn.Module):
                raise TypeError(f"heads[{i}]: expected a module, got {type(head).__name__}")
        if not isinstance(memory, int | float):
            raise TypeError(f"memory: expected a number of bytes, got {type(memory).__name__}")
        if len(heads) <= task:
            raise ValueError(f"heads: expected at least {task + 1}, one for each of the tasks 0 to {task}, got {len(heads)}")
        self.trunk, self.heads, self.task, self.loss, self.memory = trunk, heads, task, loss, memory

    def __len__(self) -> int:
        return self.task + 1

    def __getitem__(self, index: int) -> Callable[[Sequence[Tensor]], Tensor]:
        return partial(self._of_batch, range(len(self))[operator.index(index)])

    def _of_batch(self, head: int, batch: Sequence[Tensor]) -> Tensor:
        return next(self.of_batch([head], batch))

    def of_batch(self, heads: Iterable[int], batch: Sequence[Tensor]) -> Iterator[Tensor]:
        """The losses of `heads` on one batch, on the graph of one forward pass through the trunk."""
        x, y = _moved(batch, self.heads[self.task])
        features = self.trunk(x)
        if not isinstance(features, Tensor):
            raise TypeError(f"trunk: expected trunk(x) to give one tensor, got {type(features).__name__}")
        for head in heads:
            outputs = self.heads[head](features.clone())  # a head may begin with an operation in place
            yield self.loss(outputs, y) if head == self.task else _probe(outputs, f"heads[{head}](features)")


def measure(loader: Iterable, losses: Sequence[Callable], parameters: Sequence[Tensor], first: int, clear: Callable[[], None],
            fold: Fold, finished: Callable[[int], None], progress: bool) -> None:
    """Sum the gradients of each loss over `loader` and `fold` them in.

    Args:
        first: losses that are folded in already.
        parameters: the trunk's, whose gradients are wanted.
        clear: clears every `.grad`.
        fold: takes (parameter, gradient) pairs of one loss.
        finished: told the number of losses that are folded in, after each.

    Raises:
        ValueError: there is no loss, no batch, or no gradient from any loss. TypeError: no list of such losses.
    """
    if isinstance(losses, Mapping) or not isinstance(losses, Iterable):
        raise TypeError(f"losses: expected a list of functions, as cross_head_losses gives, got {type(losses).__name__}")
    if not isinstance(losses, Sequence):
        losses = list(losses)
    if not losses:
        raise ValueError("losses: expected at least one, got none")
    for i, loss in enumerate(losses):
        if not callable(loss):
            raise TypeError(f"losses[{i}]: expected a function of a batch, got {type(loss).__name__}")
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(f"loader: expected something to run over, such as a DataLoader, got {type(loader).__name__}")
    if isinstance(loader, Iterator):
        raise ValueError("loader: expected something to run over once a loss, such as a DataLoader; "
                         "an iterator is empty after the first")
    together = _losses_together(losses, parameters)
    # From the last to the first: a task's own loss is the one that fails at its labels or for want of a head, and of a pass
    # that fails there nothing shall have been folded in.
    order = range(len(losses))[::-1]
    sweeps = [order[start:start + together] for start in range(first, len(losses), together)]
    sums_of = _shared_sums if together > 1 else _plain_sums
    reached = first > 0
    try:
        with (torch.inference_mode(False), torch.enable_grad(),
              tqdm(total=_batches(loader, len(sweeps)), desc="importance", unit="batch", disable=not progress,
                   leave=False) as bar):
            for sweep in sweeps:
                which = f"losses {sweep[-1] + 1} to {sweep[0] + 1}" if together > 1 else f"loss {sweep[0] + 1}"
                bar.set_postfix_str(f"{which} of {len(losses)}")
                clear()
                sums = sums_of(_counted(loader, bar, sweep is sweeps[0]), losses, sweep, parameters)
                reached = _fold(sweep, sums, parameters, fold, lambda loss: finished(len(losses) - loss), reached)
                del sums  # before the next ones are made
        clear()
        if parameters and not reached:
            raise ValueError("losses: expected a gradient for some trunk parameter, got none from any of them. They must run "
                             "a model that has these parameters, and leave gradients in `.grad`, as FSDP2 does where "
                             "set_requires_gradient_sync is True")
    except BaseException:
        clear()  # again, if it was interrupted
        raise


def _losses_together(losses: Sequence[Callable], parameters: Sequence[Tensor]) -> int:
    """How many losses one sweep over the data serves."""
    if not isinstance(losses, SharedTrunkLosses) or not parameters:
        return 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _refuse_past_reducer(losses.trunk, parameters)
        return 1  # DDP and FSDP reduce gradients in hooks of .backward(), which torch.autograd.grad does not call
    if any(p._post_accumulate_grad_hooks for p in parameters):
        return 1  # nor these, which may mask or clip
    sums_that_fit = losses.memory // max(1, sum(p.numel() * _sum_dtype(p).itemsize for p in parameters))
    return max(1, min(sums_that_fit - 1, len(losses)))


def _refuse_past_reducer(trunk: Callable, parameters: Sequence[Tensor]) -> None:
    """A module inside DistributedDataParallel runs past it: each rank would measure its own batches alone."""
    if (isinstance(trunk, nn.Module) and torch.distributed.get_world_size() > 1
            and not any(map(distributed.is_dtensor, parameters))
            and not any(isinstance(part, nn.parallel.DistributedDataParallel) for part in trunk.modules())):
        raise ValueError("trunk: expected DistributedDataParallel or a sharded module on several ranks, or every rank has an "
                         "importance of its own; DistributedDataParallel around the whole model goes with "
                         "cross_head_losses(model, ...), which takes no more passes here")


def _fold(sweep: range, sums: list[list], parameters: Sequence[Tensor], fold: Fold, folded: Callable[[int], None],
          reached: bool) -> bool:
    """Fold in the gradient sums of a sweep's losses, and tell `folded` of each. Whether any loss so far gave a gradient, as
    `reached` says of earlier ones.
    """
    for loss, gradients in zip(sweep, sums):
        pairs = [(p, gradient) for p, gradient in zip(parameters, gradients) if gradient is not None]
        fold(pairs)
        reached = reached or bool(pairs)
        if reached:  # else the next call, which resumes after the losses told here, would count a pass without any gradient
            folded(loss)
    return reached


def _plain_sums(batches: Iterable, losses: Sequence[Callable], sweep: range, parameters: Sequence[Tensor]) -> list[list]:
    # In half precision, as its parameter has it, `.grad` would stop growing: what a batch adds is rounded off.
    half = [i for i, p in enumerate(parameters) if _sum_dtype(p) != p.dtype]
    rounding = [parameters[i] for i in half]
    wide: list[Tensor | None] = [None] * len(half)
    for batch in batches:
        _scalar(losses[sweep[0]](batch), sweep[0]).backward()
        _add(wide, [p.grad for p in rounding], rounding)
        for parameter in rounding:
            parameter.grad = None
    sums = [p.grad for p in parameters]
    for i, total in zip(half, wide):
        sums[i] = total
    return [sums]


def _scalar(loss: object, index: int) -> Tensor:
    """`loss`, checked: torch.autograd.grad would sum up a tuple, where .backward() fails without a name."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        seen = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"losses[{index}]: expected a function that gives a tensor of one element, got {seen}")
    if not loss.requires_grad:
        raise ValueError(f"losses[{index}]: expected a loss that depends on a parameter, got one that requires no gradient")
    return loss


def _probe(outputs: Tensor, of: str) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"{of}: expected one tensor of outputs, whose sum probes an old head, got {type(outputs).__name__}")
    return outputs.sum()


def _shared_sums(batches: Iterable, losses: SharedTrunkLosses, sweep: range, parameters: Sequence[Tensor]) -> list[list]:
    """Each loss's gradient sums, None for a parameter that it does not reach."""
    sums: list[list[Tensor | None]] = [[None] * len(parameters) for _ in sweep]
    for i, batch in enumerate(batches):
        for own, head, loss in zip(sums, sweep, losses.of_batch(sweep, batch)):
            # The last head frees what the trunk's graph holds, before the next batch makes another.
            retain = head != sweep[-1]
            gradients = torch.autograd.grad(_scalar(loss, head), parameters, retain_graph=retain, allow_unused=True)
            if i == 0 and any(gradient is None for gradient in gradients):
                _refuse_reentrant_checkpoint(loss)
            _add(own, gradients, parameters)
    return sums


def _refuse_reentrant_checkpoint(loss: Tensor) -> None:
    """TypeError for reentrant checkpoints, whose parameters torch.autograd.grad may leave out without an error."""
    nodes, seen = [loss.grad_fn], {None}
    while nodes:
        if (node := nodes.pop()) not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if node.name() == "CheckpointFunctionBackward":
                raise TypeError("trunk: it has activation checkpoints with use_reentrant=True, which hide parameters from "
                                "torch.autograd.grad; make them with use_reentrant=False, or measure with cross_head_losses")


@torch.no_grad()
def _add(sums: list[Tensor | None], gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
    reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
    for i in reached:
        if sums[i] is None:  # as .backward() does: the parameter's memory layout, which kernels walk through
            sums[i] = torch.zeros_like(parameters[i], dtype=_sum_dtype(parameters[i]), requires_grad=False)
    if reached:  # torch refuses empty lists, and DTensors beside others
        torch._foreach_add_([distributed.local(sums[i]) for i in reached],
                            [distributed.local(distributed.placed(gradients[i], parameters[i])) for i in reached])


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _counted(loader: Iterable, bar: tqdm, is_first: bool) -> Iterator:
    batches = 0
    for batch in loader:
        yield batch
        batches += 1
        bar.update()
    if not batches:
        raise ValueError("loader: expected at least one batch, got none"
                         + ("" if is_first else " after the losses before used its batches up; it must begin anew for each"))


def _batches(loader: Iterable, sweeps: int) -> int | None:
    try:
        return len(loader) * sweeps
    except Exception:  # no length; the __len__ of some data sets raises NotImplementedError
        return None


def _moved(batch: Sequence[Tensor], module: nn.Module) -> list[Tensor]:
    pair = list(batch)
    if isinstance(batch, Mapping | Tensor) or len(pair) != 2:
        raise TypeError(f"batch: expected a pair of tensors (inputs, targets), got {type(batch).__name__} of {len(pair)}")
    parameter = next(module.parameters(), None)
    if parameter is None:
        return pair
    for i, part in enumerate(pair):
        if not hasattr(part, "to"):
            raise TypeError(f"batch[{i}]: expected a tensor, got {type(part).__name__}")
    device = distributed.device_of(parameter)
    return [tensor.to(device, non_blocking=True) for tensor in pair]


def _check_task(task: int) -> None:
    if not hasattr(task, "__index__"):
        raise TypeError(f"task: expected a whole number, got {type(task).__name__}")
    if task < 0:
        raise ValueError(f"task: expected 0 or more, got {task}")


class Interrupted:
    """What an interrupted measuring pass had folded in, for the next call that asks for the same one."""

    def __init__(self):
        self._finished = 0
        self._arguments: tuple = ()
        self._versions: list[tuple[Tensor, int]] = []

    def note(self, finished: int, loader: Iterable, losses: Sequence[Callable], tensors: Iterable[Tensor]) -> None:
        self._finished, self._arguments = finished, self._told_apart(loader, losses)
        self._versions = [(t, distributed.version(t)) for t in tensors]

    def finished(self, loader: Iterable, losses: Sequence[Callable], tensors: Sequence[Tensor]) -> int:
        """The losses folded in so far; 0 if the arguments are others, or any tensor was replaced or written since."""
        if not (same_objects(self._told_apart(loader, losses), self._arguments)
                and same_objects(tensors, [t for t, _ in self._versions])):
            return 0
        return self._finished if all(distributed.version(t) == version for t, version in self._versions) else 0

    @staticmethod
    def _told_apart(loader: Iterable, losses: Sequence[Callable]) -> tuple:
        return loader, losses, *(losses if isinstance(losses, list | tuple) else ())  # a list may be changed in place

"""Step hooks and the profiler's range, where there are any."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__  # of torch's own around the step of every optimizer


def with_hooks(step: Callable) -> Callable:
    """An optimizer's `step` that goes through torch's own wrapper only where that has something to do.

    The wrapper calls step hooks and opens a profiler range. It is used if there is a hook or a profiler, or a closure, which
    may register one. Otherwise it would take longer than a small model's step: up to 0.2 ms after a pass over a large one.
    (torch.profiler.ExecutionTraceObserver, used without a profiler, then has no range for the step.)
    """
    in_wrapper = Optimizer.profile_hook_step(step)

    @wraps(step)
    def maybe_in_wrapper(self, *args, **kwargs):
        if type(self).step is maybe_in_wrapper:  # a subclass with a step of its own has torch's wrapper around that
            if (args or kwargs or _global_optimizer_pre_hooks or _global_optimizer_post_hooks or self._optimizer_step_pre_hooks
                    or self._optimizer_step_post_hooks or torch.compiler.is_compiling() or torch.autograd._profiler_enabled()):
                return in_wrapper(self, *args, **kwargs)
            with _RecordFunctionFast(f"Optimizer.step#{type(self).__name__}.step"):  # for a profiler of all threads
                return step(self)
        return step(self, *args, **kwargs)

    maybe_in_wrapper.hooked = True  # or torch would wrap it once more
    return maybe_in_wrapper


def without_hooks(step: Callable) -> Callable:
    """An optimizer class's `step` without torch's wrapper, if it is in one.

    Recognized by its code: `functools.wraps` copies `hooked` and `__wrapped__` to any wrapper that a user puts around it.
    """
    # torch.compile disables itself in LBFGS and SparseAdam, by a function around torch's wrapper or inside it.
    for bare in (step, getattr(step, "_torchdynamo_orig_callable", None)):
        if getattr(bare, "__code__", None) is _WRAPPER:
            return bare.__wrapped__
    return step


@contextmanager
def own_hooks_suspended(inner: Optimizer) -> Iterator[None]:
    """Within this context `inner` has no step hooks of its own. Hooks that torch has for all optimizers still run."""
    kept = inner._optimizer_step_pre_hooks, inner._optimizer_step_post_hooks
    inner._optimizer_step_pre_hooks, inner._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for hooks, new in zip(kept, (inner._optimizer_step_pre_hooks, inner._optimizer_step_post_hooks)):
            hooks.update(new)  # what a closure registers
        inner._optimizer_step_pre_hooks, inner._optimizer_step_post_hooks = kept

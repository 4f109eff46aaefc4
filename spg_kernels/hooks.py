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


def watched(step: Callable) -> Callable:
    """An optimizer's `step` in torch's own wrapper, which calls hooks and names the step to a profiler, where there is one of
    either, or a closure, which may bring one. Else the wrapper takes longer than the step of a small model: up to 0.2 ms after
    a pass over a large one. (torch.profiler.ExecutionTraceObserver, used without a profiler, then has no range for the step.)
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


def unwatched(step: Callable) -> Callable:
    """An optimizer class's `step` without torch's wrapper, if that is what it is: `hooked` and `__wrapped__` do not tell, for
    `functools.wraps` copies them to whatever a user puts around it.
    """
    # torch.compile keeps itself out of LBFGS and SparseAdam: around torch's wrapper, or inside it where that came later.
    for bare in (step, getattr(step, "_torchdynamo_orig_callable", None)):
        if getattr(bare, "__code__", None) is _WRAPPER:
            return bare.__wrapped__
    return step


@contextmanager
def unheard(inner: Optimizer) -> Iterator[None]:
    """Whatever calls `inner`'s own step hooks in here finds none. Those of all optimizers it finds."""
    kept = inner._optimizer_step_pre_hooks, inner._optimizer_step_post_hooks
    inner._optimizer_step_pre_hooks, inner._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for hooks, new in zip(kept, (inner._optimizer_step_pre_hooks, inner._optimizer_step_post_hooks)):
            hooks.update(new)  # what a closure registers
        inner._optimizer_step_pre_hooks, inner._optimizer_step_post_hooks = kept

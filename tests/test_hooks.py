"""Step hooks and profilers see a step once, of a subclass too, and what torch would show them."""

import functools

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from spg_kernels import SPGOptimizer

from .models import set_gradients
from .wrapping import INNER, closure_for, equal, values, wrap


@pytest.mark.dropin(line=15)
@pytest.mark.parametrize("gamma", [None, 1.0])
@pytest.mark.parametrize("on", ["auto", "reference"])
def test_hooks_fire_once_and_see_masked_parameters(net, gamma, on):
    inner = INNER["AdamW"](net.parameters())
    calls = []
    inner.register_step_pre_hook(lambda *_: calls.append("inner pre"))
    optimizer = SPGOptimizer(inner, heads=net.heads, backend=on)
    for name in optimizer.importance if gamma else ():
        optimizer.importance[name] = torch.ones_like(optimizer.importance[name])
    before = values(net)
    optimizer.register_step_post_hook(lambda *_: calls.append(("post", equal(values(net), before))))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global post"))
    set_gradients(net.parameters())
    with torch.profiler.profile() as profile:
        optimizer.step()
    handle.remove()
    assert calls == ["inner pre", ("post", bool(gamma)), "global post"]
    assert [e.name for e in profile.events() if e.name.startswith("Optimizer.step")] == ["Optimizer.step#SPGOptimizer.step"]


@pytest.mark.dropin(line=15)
@pytest.mark.parametrize("gamma", [None, 0.5])
@pytest.mark.parametrize("register", [lambda opt, hook: opt.register_step_pre_hook(hook),
                                      lambda opt, hook: opt.register_step_post_hook(hook),
                                      lambda _, hook: register_optimizer_step_pre_hook(hook),
                                      lambda _, hook: register_optimizer_step_post_hook(hook)], ids=range(4))
def test_hooks_come_and_go_and_get_what_torch_gives_them(net, register, gamma):
    def calls(optimizer):
        seen = []

        def hook(*arguments):
            seen.append(arguments)

        closure = closure_for(net, torch.randn(8, 10))
        optimizer.step()
        handle = register(optimizer, hook)
        for step in (lambda: optimizer.step(), lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
            step()
        handle.remove()
        optimizer.step()
        return [(own is optimizer, args[0] is optimizer, len(args), list(kwargs)) for own, args, kwargs in seen]

    set_gradients(net.parameters())
    wrapped = wrap(net, "AdamW", gamma)
    expected = calls(INNER["AdamW"](net.parameters()))
    assert calls(wrapped) == expected and len(expected) == 3


@pytest.mark.dropin(line=15)
@pytest.mark.parametrize("watch", ["hook", "profiler", "profiler of all threads"])
def test_a_step_of_a_subclass_is_seen_once(net, watch):
    class Own(SPGOptimizer):
        def step(self, closure=None):
            return super().step(closure)

    optimizer = Own(INNER["AdamW"](net.parameters()), heads=net.heads)
    set_gradients(net.parameters())
    seen = []
    if watch == "hook":
        optimizer.register_step_post_hook(lambda *_: seen.append("Optimizer.step#Own.step"))
        optimizer.step()
    else:
        seen = ranges(optimizer, watch)
    assert seen == ["Optimizer.step#Own.step"]


def ranges(optimizer, watch):
    options = None
    if watch == "profiler of all threads":
        try:
            options = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        except TypeError:
            pytest.skip(f"torch {torch.__version__} profiles one thread")
    with torch.profiler.profile(experimental_config=options) as profile:
        optimizer.step()
    return [e.name for e in profile.events() if e.name.startswith("Optimizer.step")]


@pytest.mark.dropin(line=15)
def test_a_profiler_of_all_threads_sees_a_step_once(net):
    optimizer = wrap(net, "AdamW", 0.5)
    set_gradients(net.parameters())
    assert ranges(optimizer, "profiler of all threads") == ["Optimizer.step#SPGOptimizer.step"]


@pytest.mark.dropin(line=15)
def test_a_hook_that_the_closure_registers_is_heard(net):
    optimizer, calls = wrap(net, "AdamW", 0.5), []
    set_gradients(net.parameters())

    def closure():
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        return torch.tensor(1.0)

    optimizer.step(closure)
    assert calls == ["post"]


@pytest.mark.dropin(line=15)
def test_a_hook_that_gives_other_arguments_is_heard(net):
    optimizer = wrap(net, "AdamW", 0.5)
    optimizer.register_step_pre_hook(lambda own, args, kwargs: ((own, lambda: torch.tensor(7.0)), {}))
    set_gradients(net.parameters())
    assert optimizer.step().item() == 7


@pytest.mark.dropin(line=15)
@pytest.mark.parametrize("gamma", [None, 0.5])
@pytest.mark.parametrize("whose", ["a subclass", "torch's class"])
def test_a_step_that_somebody_put_around_torchs_runs_and_hooks_fire_once(net, monkeypatch, whose, gamma):
    """`functools.wraps` makes it look like torch's own wrapper, which calls the hooks."""
    torch.optim.AdamW(net.parameters())  # from now on torch's class has the wrapper
    calls, torchs = [], torch.optim.AdamW.step

    @functools.wraps(torchs)
    def step(self, closure=None):
        calls.append("step")
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1e-9)
        return torchs(self, closure)

    class Own(torch.optim.AdamW):
        pass

    cls = Own if whose == "a subclass" else torch.optim.AdamW
    monkeypatch.setattr(cls, "step", step)
    optimizer = SPGOptimizer(cls(net.parameters(), lr=0.1, eps=1.0, weight_decay=0), heads=net.heads)
    for name in optimizer.importance if gamma else ():
        optimizer.importance[name] = torch.full_like(optimizer.importance[name], gamma)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    set_gradients(net.parameters())
    before = values(net)
    optimizer.step()
    assert calls == ["pre", "step", "post"]
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(values(net), before)), "the gradient was clipped"


@pytest.mark.dropin(line=15)
@pytest.mark.parametrize("wrapped", ["before", "after"])
def test_hooks_fire_once_after_torch_compile_has_replaced_a_step(net, wrapped, monkeypatch):
    """As it does with LBFGS's and SparseAdam's, once a process, when it first compiles anything."""
    torch.optim.RMSprop(net.parameters())  # from now on torch's class has the wrapper
    step = torch.optim.RMSprop.step
    monkeypatch.setattr(torch.optim.RMSprop, "step", torch._dynamo.disable(step if wrapped == "before" else step.__wrapped__))
    optimizer, calls = wrap(net, "RMSprop", 0.5), []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global post"))
    set_gradients(net.parameters())
    optimizer.step()
    handle.remove()
    assert calls == ["post", "global post"]


@pytest.mark.dropin(line=15)
def test_a_hook_that_the_closure_registers_on_the_inner_optimizer_stays(net):
    optimizer, calls = wrap(net, "RMSprop", 0.5), []
    optimizer.register_step_pre_hook(lambda *_: None)
    closure = closure_for(net, torch.randn(8, 10))

    def registers():
        optimizer.inner.register_step_post_hook(lambda *_: calls.append("post"))
        return closure()

    optimizer.step(registers)
    assert calls == ["post"]

"""Interrupts and failures in the middle of a step, a measuring pass or a load: what is left is whole, the next step right."""

import copy
import dis
import itertools
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import spg_kernels
from spg_kernels import SPGOptimizer, cross_head_losses

from .interrupts import STEPS, masked
from .models import Net, tasks
from .wrapping import equal, train, values, wrap

ROOT = Path(__file__).parents[1]
STRIDE = 5
FILES = {str(path) for path in Path(spg_kernels.__file__).parent.rglob("*.py")}


class Interrupt:
    """KeyboardInterrupt at the n-th moment in which Python looks for signals while it runs the package: after a call or a jump
    back, and on the way into a function."""

    def __init__(self, n: int):
        self.left = n
        self.raised = False
        self.last: dict[FrameType, str] = {}

    def trace(self, frame, event, _):
        if frame.f_code.co_filename not in FILES or self.raised:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            last, self.last[frame] = self.last.get(frame, "RESUME"), dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if last.startswith(("CALL", "RESUME", "JUMP")):
                self.left -= 1
                if self.left < 0:
                    self.raised = True
                    raise KeyboardInterrupt
        return self.trace

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, kind, *_):
        sys.settrace(None)
        return kind is KeyboardInterrupt


def interrupt_everywhere(make, act, check, stride):
    """`act` on what `make` gives, interrupted at every `stride`-th moment in turn, and `check` what is left each time."""
    for n in itertools.count(0, stride):
        made = make()
        with Interrupt(n) as interrupt:
            act(*made)
        check(*made)
        assert torch.is_grad_enabled()
        if not interrupt.raised:
            return n // stride


@pytest.mark.parametrize("inner, mask, backend", STEPS)
def test_a_step_interrupted_anywhere_leaves_every_tensor_before_or_after_it(inner, mask, backend):
    net, optimizer = masked(inner, mask, backend)
    before, grads = values(net), [p.grad.clone() for p in net.parameters()]
    gammas = {name: optimizer.importance[name] for name in optimizer.importance}
    optimizer.step()
    after = values(net)

    def check(net, optimizer):
        for parameter, old, new in zip(net.parameters(), before, after, strict=True):
            assert torch.equal(parameter, old) or torch.equal(parameter, new), "neither the old nor the masked new value"
        assert equal([p.grad for p in net.parameters()], grads), "a masked gradient was left behind"
        assert all(torch.equal(optimizer.importance[name], gammas[name]) for name in gammas)
        if backend == "auto" and inner != "RMSprop" and equal(values(net), before):
            optimizer.step()  # nothing at all had happened
            assert equal(values(net), after)
        optimizer.step()
        assert mask == "gradient" or equal(net.trunk[0].parameters(), before[:2]), "gamma = 1 moved"

    # All moments (a stride of 1) pass as well, in up to half a minute each.
    assert interrupt_everywhere(lambda: masked(inner, mask, backend), lambda _, optimizer: optimizer.step(), check,
                                STRIDE) > 30


def test_measuring_interrupted_anywhere_can_be_measured_again():
    batches = tasks()[0][:2]

    def make():
        return masked("SGD", "update", "auto")

    def measure(net, optimizer):
        losses = [lambda batch, t=t: F.cross_entropy(net(batch[0], t), batch[1]) for t in range(2)]
        optimizer.measure_importance(batches, losses, progress=False)

    net, optimizer = make()
    before = values(net)
    first, mean = dict(optimizer.importance.items()), float(optimizer.importance.mean())
    measure(net, optimizer)
    measured, measured_mean = dict(optimizer.importance.items()), optimizer.importance.mean()
    assert measured_mean > mean + 0.01

    def check(net, optimizer):
        importance = optimizer.importance
        assert equal(values(net), before) and all(p.grad is None for p in net.parameters()) and net.training
        assert all(((first[name] <= importance[name]) & (importance[name] <= measured[name])).all() for name in first)
        exact = torch.cat([importance[name].flatten() for name in importance]).double().mean()
        assert abs(float(importance.mean()) - float(exact)) < 1e-6, "the heads' factor is not of these gammas"
        assert importance.tasks in (0, 1)
        measure(net, optimizer)
        assert all(torch.equal(importance[name], measured[name]) for name in first) and importance.mean() == measured_mean

    def make_with_mean():
        net, optimizer = make()
        net.zero_grad()
        optimizer.importance.mean()
        return net, optimizer

    assert interrupt_everywhere(make_with_mean, measure, check, 3 * STRIDE) > 30


class Failing(torch.optim.AdamW):
    """An inner optimizer that fails after it has taken over a state."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        raise RuntimeError("inner failed")


def snapshot(net, optimizer):
    state = optimizer.inner.state
    return copy.deepcopy([values(net), [state[p] for p in net.parameters()], optimizer.inner.state_dict()["param_groups"],
                          dict(optimizer.importance.items()), float(optimizer.importance.mean())])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) if isinstance(a, list) else a == b


@pytest.mark.parametrize("damage, kind, message", [
    (lambda state: [], ValueError, "state_dict"),
    (lambda state: {"state": state["state"]}, ValueError, "param_groups"),
    (lambda state: {"param_groups": state["param_groups"]}, ValueError, "'state'"),
    (lambda state: {**state, "param_groups": []}, ValueError, "number of parameter groups"),
    (lambda state: {**state, "param_groups": [{"lr": 1.0}]}, ValueError, "'params'"),
    (lambda state: {**state, "param_groups": [{**state["param_groups"][0], "params": [0, 1]}]}, ValueError, "match the size"),
    (lambda state: state["state"][0].update(spg_importance=torch.full((16, 10), float("nan"))), ValueError,
     "trunk.0.weight.*finite"),
    (lambda state: state["state"][0].update(spg_importance=torch.zeros(10, 16)), ValueError, r"trunk.0.weight.*\(10, 16\)"),
    (lambda state: state["state"][0].update(spg_importance=torch.zeros(16, 10).int()), TypeError, "trunk.0.weight.*int32"),
    (lambda state: state["state"][3].update(spg_importance="0.5"), TypeError, "state.3.*spg_importance.*str"),
    (lambda state: state["state"][4].update(spg_importance=1.0), TypeError, "state.4.*spg_importance.*float"),
    (lambda state: state["state"][0].pop("step"), KeyError, "step"),
])
def test_a_damaged_optimizer_state_changes_nothing(net, damage, kind, message):
    optimizer = wrap(net, "AdamW", 0.5)
    train(net, optimizer)
    bad = copy.deepcopy(optimizer.state_dict())
    for state in bad["state"].values():
        state["exp_avg"].fill_(7)
        state["spg_importance"].mul_(0.5)
    bad["param_groups"][0]["lr"] = 7.0
    before = snapshot(net, optimizer)
    damaged = damage(bad)
    with pytest.raises(kind, match=message):
        optimizer.load_state_dict(damaged if isinstance(damaged, dict | list) else bad)
    assert same(snapshot(net, optimizer), before)


@pytest.mark.parametrize("how", ["inner", "inner post hook", "inner pre hook"])
def test_an_inner_optimizer_that_fails_to_load_is_as_before(net, how):
    def fail(*_):
        raise RuntimeError("inner failed")

    inner = (Failing if how == "inner" else torch.optim.AdamW)(net.parameters(), lr=0.01)
    if how != "inner":
        getattr(inner, f"register_load_state_dict_{how.split()[1]}_hook")(fail)
    optimizer = SPGOptimizer(inner, heads=net.heads)
    optimizer.importance.store({name: torch.rand(optimizer.importance[name].shape) for name in optimizer.importance})
    train(net, optimizer)
    other = Net()
    source = wrap(other, "AdamW", 0.25)
    train(other, source)
    before = snapshot(net, optimizer)
    with pytest.raises(RuntimeError, match="inner failed"):
        optimizer.load_state_dict(source.state_dict())
    assert same(snapshot(net, optimizer), before)
    train(net, optimizer)


@pytest.mark.parametrize("inner, mask, backend", STEPS)
def test_a_closure_that_fails_leaves_everything_and_the_next_step_is_right(inner, mask, backend):
    net, optimizer = masked(inner, mask, backend)
    twin_net, twin = masked(inner, mask, backend)
    before = values(net)

    def broken():
        net.zero_grad()
        F.cross_entropy(net(torch.ones(2, 10), 0), torch.tensor([0, 1])).backward()
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        optimizer.step(broken)
    assert equal(values(net), before)
    unmasked = copy.deepcopy(net)
    unmasked.zero_grad()
    F.cross_entropy(unmasked(torch.ones(2, 10), 0), torch.tensor([0, 1])).backward()
    assert all((p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
               for p, q in zip(net.parameters(), unmasked.parameters()))
    for parameter, other in zip(net.parameters(), twin_net.parameters()):
        parameter.grad = other.grad.clone()
    optimizer.step()
    twin.step()
    assert equal(values(net), values(twin_net))


def test_data_loader_workers_beside_it_change_nothing():
    def run(workers):
        net, optimizer = masked("AdamW", "update", "auto")
        x, y = (torch.cat(part) for part in zip(*tasks()[0]))
        loader = DataLoader(TensorDataset(x, y), batch_size=8, num_workers=workers)
        for batch, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(batch, 0), labels).backward()
            optimizer.step()
        optimizer.measure_importance(loader, cross_head_losses(net, 1, F.cross_entropy), progress=False)
        return values(net) + list(optimizer.importance.values())

    assert equal(run(2), run(0))


def test_real_interrupts_of_a_training_process():
    command = [sys.executable, "-m", "tests.interrupts", "--interrupts", "40"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert output.returncode == 0 and "40 interrupts" in output.stdout, output.stdout + output.stderr


@pytest.mark.parametrize("work", ["save", "training"])
def test_kills_at_random_moments(work):
    command = [sys.executable, "-m", "tests.kills", work, "--kills", "40"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert output.returncode == 0 and "40 kills survived" in output.stdout, output.stdout + output.stderr

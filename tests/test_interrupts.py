"""Two training threads, a fork after use, and Ctrl-C in the middle of a step: the next step is right."""

import multiprocessing
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import spg_kernels
from spg_kernels import SPGOptimizer

from . import stepping
from .models import Net, set_gradients
from .stepping import snapshot
from .wrapping import equal, train, values, wrap

PACKAGE = str(Path(spg_kernels.__file__).parent)


def trained(seed: int, inner: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    net = Net()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    optimizer = wrap(net, inner)
    for fold in range(3):
        set_gradients(net.parameters(), seed + fold)
        optimizer.accumulate_importance()
        train(net, optimizer, steps=10, seed=seed)
    grad, gamma = torch.randn(70_000, generator=generator), torch.zeros(70_000)  # enough for threads of each thread's own
    for _ in range(3):
        spg_kernels.accumulate_importance_([gamma], [grad], backend="native")
        spg_kernels.soft_mask_([grad], [gamma], backend="native")
    return [*values(net), *(optimizer.importance[name] for name in optimizer.importance), grad, gamma]


@pytest.mark.parametrize("inner", ["SGD momentum", "AdamW", "RMSprop"])
def test_two_threads_train_as_each_would_alone(inner):
    alone = [trained(seed, inner) for seed in range(2)]
    together = [None, None]

    def work(k: int) -> None:
        together[k] = trained(k, inner)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert equal(together[0], alone[0]) and equal(together[1], alone[1])


def test_threads_that_push_each_others_plans_out_do_not_fail():
    failures = []

    def work(k: int) -> None:
        try:
            for n in (i * (k + 3) % 61 + 1 for i in range(1000)):  # more lengths than plans are kept for
                grads = [torch.ones(3) for _ in range(n)]
                spg_kernels.soft_mask_(grads, [torch.full((3,), 0.5)] * n, backend="native")
                assert all(bool((grad == 0.5).all()) for grad in grads)
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        workers = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


def masked_in_a_child(queue) -> None:
    torch.set_num_threads(1)  # as DataLoader does for its workers: after a fork OpenMP, torch's own too, has no other threads
    grad, gamma = torch.linspace(-1, 1, 100_000), torch.linspace(0, 1, 100_000)
    spg_kernels.soft_mask_([grad], [gamma], backend="native")
    queue.put(grad.numpy())


def test_a_fork_after_use_works_in_both_processes():
    grad, gamma = torch.linspace(-1, 1, 100_000), torch.linspace(0, 1, 100_000)
    expected = grad * (1 - gamma)
    spg_kernels.soft_mask_([grad.clone()], [gamma], backend="native")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=masked_in_a_child, args=(queue,), daemon=True)
    child.start()
    assert torch.equal(torch.from_numpy(queue.get()), expected)
    child.join()
    assert child.exitcode == 0
    spg_kernels.soft_mask_([grad], [gamma], backend="native")
    assert torch.equal(grad, expected)


class InterruptAt:
    """Raises KeyboardInterrupt in place of the `line`th line of the package that runs in its block."""

    def __init__(self, line: int):
        self.left = line
        self.raised = False

    def __enter__(self):
        sys.settrace(lambda frame, *_: self.trace if frame.f_code.co_filename.startswith(PACKAGE) else None)
        return self

    def trace(self, frame, event, _):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.raised = True
                raise KeyboardInterrupt
        return self.trace

    def __exit__(self, kind, *_):
        sys.settrace(None)
        return kind is KeyboardInterrupt


INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def active(inner: str, mask: str) -> SPGOptimizer:
    torch.manual_seed(0)
    trunk, head = nn.Linear(3, 2), nn.Linear(2, 2)
    parameters = [*trunk.parameters(), *head.parameters()]
    optimizer = SPGOptimizer(INNER[inner]([{"params": parameters[:2]}, {"params": parameters[2:]}]), heads=head, mask=mask)
    set_gradients(parameters, 1)
    optimizer.accumulate_importance()
    optimizer.step()
    set_gradients(parameters, 2)
    return optimizer


@pytest.mark.filterwarnings("ignore:mask='gradient'")
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("inner", INNER)
def test_a_step_interrupted_anywhere_leaves_what_the_next_step_needs(inner, mask):
    """Every fifth line. Gradients are the next step's own: masked ones may stand where Ctrl-C stops their restoring."""
    line = 0
    while True:
        line += 5
        optimizer = active(inner, mask)
        before = snapshot(optimizer)
        with InterruptAt(line) as interrupt:
            optimizer.step()
        if not interrupt.raised:
            break
        stopped = snapshot(optimizer)
        for was, now in zip(before, stopped):
            assert mask == "gradient" or torch.equal(was.grad, now.grad), line
            assert was.gamma is None or torch.equal(was.gamma, now.gamma)
            now.grad = was.grad
        whole = stepping.step(before, inner, mask)
        groups = [slice(0, 2), slice(2, 4)]
        for group in groups:  # a group's parameters have moved or they have not
            moved = [not torch.equal(was.value, now.value) for was, now in zip(before[group], stopped[group])]
            assert all(moved) or not any(moved), line
            if all(moved):
                stepping.assert_stepped(before[group], stopped[group], whole[group], mask)
        set_gradients([p for group in optimizer.param_groups for p in group["params"]], 3)
        stopped = snapshot(optimizer)
        expected = stepping.step(stopped, inner, mask)
        optimizer.step()
        stepping.assert_stepped(stopped, snapshot(optimizer), expected, mask)
    assert line > 50, "the step has lines to be interrupted at"


def test_a_fold_interrupted_at_any_line_is_made_good_by_folding_again():
    def folded(line: int | None) -> tuple[list, bool]:
        optimizer = active("SGD", "update")
        with InterruptAt(line or 1 << 30) as interrupt:
            optimizer.accumulate_importance()
        if interrupt.raised:
            optimizer.accumulate_importance()
        optimizer.step()  # with heads scaled by what is now the mean
        return snapshot(optimizer), interrupt.raised

    right, _ = folded(None)
    line, raised = 0, True
    while raised:
        line += 1
        now, raised = folded(line)
        assert stepping.same(right, now), line
    assert line > 30

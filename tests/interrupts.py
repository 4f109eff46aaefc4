"""Real SIGINTs at random moments of masked steps and measuring passes: `python -m tests.interrupts --interrupts 1000`."""

import argparse
import collections
import os
import random
import signal
import threading

import torch
import torch.nn.functional as F

from spg_kernels import cross_head_losses

from .models import Net, set_gradients, tasks
from .wrapping import equal, values, wrap

STEPS = [("SGD momentum", "update", "auto"), ("AdamW", "update", "auto"), ("RMSprop", "update", "auto"),
         ("AdamW", "gradient", "auto"), ("RMSprop", "gradient", "reference"), ("AdamW", "update", "reference")]


def masked(inner, mask, backend):
    """A network whose first layer has gamma = 1 and the second 0.5, and gradients."""
    torch.manual_seed(0)
    net = Net()
    optimizer = wrap(net, inner, 0.5, mask=mask, backend=backend)
    for name in ("trunk.0.weight", "trunk.0.bias"):
        optimizer.importance[name] = torch.ones(optimizer.importance[name].shape)
    set_gradients(net.parameters())
    return net, optimizer


def interrupt_soon() -> None:
    threading.Timer(random.uniform(0, 0.05), os.kill, (os.getpid(), signal.SIGINT)).start()


def interrupted_steps(step) -> str:
    """Steps until the interrupt, each beside a twin that makes it first: what the twin was not half through must be whole."""
    (net, optimizer), (ahead, twin) = masked(*step), masked(*step)
    optimizer.step(), twin.step()  # torch's own first step, which makes the state, can leave half of it behind
    grads, gammas = [p.grad.clone() for p in net.parameters()], dict(optimizer.importance.items())
    before = after = values(net)
    now = "elsewhere"
    try:
        interrupt_soon()
        for _ in range(20_000):
            twin.step()
            before, after = after, values(ahead)
            now = "step"
            optimizer.step()
            now = "elsewhere"
    except KeyboardInterrupt:
        assert equal([p.grad for p in net.parameters()], grads), "a masked gradient was left behind"
        assert all(torch.equal(optimizer.importance[name], gammas[name]) for name in gammas)
        for parameter, old, new in zip(net.parameters(), before, after, strict=True):
            assert torch.equal(parameter, old) or torch.equal(parameter, new), "neither the old nor the masked new value"
        first = [p.clone() for p in net.trunk[0].parameters()]
        optimizer.step()
        assert step[1] == "gradient" or equal(net.trunk[0].parameters(), first), "gamma = 1 moved"
    return now


def interrupted_measuring() -> str:
    """Measuring passes until the interrupt; the one it hit is made again, and the importance is that of a run without."""
    def measure(model, optimizer, batches):
        optimizer.measure_importance(batches, cross_head_losses(model, 2, F.cross_entropy), progress=False)

    net, optimizer = masked(*STEPS[0])
    net.zero_grad()
    importance, before, stream = optimizer.importance, values(net), tasks(300)
    now, done = "elsewhere", 0
    try:
        interrupt_soon()
        for done, batches in enumerate(stream):
            now = "measuring"
            measure(net, optimizer, batches)
            now = "elsewhere"
    except KeyboardInterrupt:
        assert equal(values(net), before), "a parameter moved"
        assert all(p.grad is None for p in net.parameters())
        assert importance.tasks in (done, done + 1)
        measure(net, optimizer, stream[done])
        twin_net, twin = masked(*STEPS[0])
        for batches in stream[:done + 1]:
            measure(twin_net, twin, batches)
        assert all(torch.equal(importance[name], twin.importance[name]) for name in importance)
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interrupts", type=int, default=1000)
    torch.set_num_threads(1)
    hit = collections.Counter()
    for i in range(parser.parse_args().interrupts):
        hit[interrupted_measuring() if i % 2 else interrupted_steps(STEPS[i // 2 % len(STEPS)])] += 1
    print(f"{hit.total()} interrupts survived, in " + ", ".join(f"{phase} {count}" for phase, count in hit.most_common()))


if __name__ == "__main__":
    main()

"""Every torch optimizer wrapped around the same small network, for the tests of SPGOptimizer."""

import warnings

import torch

from spg_kernels import SPGOptimizer

INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, maximize=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, weight_decay=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}
FUSABLE = [name for name in INNER if name.startswith(("SGD", "Adam", "AdamW")) and name not in ("Adamax", "Adafactor")]


def wrap(net, inner="SGD", gamma=None, **kwargs):
    if kwargs.get("mask") == "gradient":
        warnings.simplefilter("ignore", UserWarning)
    optimizer = SPGOptimizer(INNER[inner](net.parameters()), heads=net.heads, named_parameters=net.named_parameters(), **kwargs)
    if gamma is not None:
        for name in optimizer.importance:
            optimizer.importance[name] = torch.full(optimizer.importance[name].shape, gamma)
        optimizer.importance.active = True
    return optimizer


def closure_for(net, x):
    def closure():
        net.zero_grad()
        loss = sum(net(x, t).square().mean() for t in range(3))
        loss.backward()
        return loss

    return closure


def train(net, optimizer, steps=3, seed=0):
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(seed))
    return [float(optimizer.step(closure_for(net, x)).detach()) for _ in range(steps)]


def values(net):
    return [p.detach().clone() for p in net.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

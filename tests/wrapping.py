"""Every torch optimizer wrapped around the same small network, for the tests of SPGOptimizer."""

import warnings
from functools import partial

import torch

from spg_kernels import SPGOptimizer


def _matrices(parameters):
    return [p for p in parameters if p.dim() == 2]


INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, maximize=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
}
FUSABLE = list(INNER)
INNER |= {
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on; for matrices alone
    INNER["Muon"] = lambda p: torch.optim.Muon(_matrices(p), lr=0.01, weight_decay=0.1)
for _class, _settings in {
    torch.optim.NAdam: {"lr": 0.01, "weight_decay": 0.1},
    torch.optim.RAdam: {"lr": 0.01, "weight_decay": 0.1},
    torch.optim.Adagrad: {"lr": 0.01, "weight_decay": 0.1},
    torch.optim.Adadelta: {"lr": 0.1, "weight_decay": 0.1},
    torch.optim.Adamax: {"lr": 0.01, "weight_decay": 0.1},
    torch.optim.ASGD: {"lr": 0.01, "weight_decay": 0.1},
    torch.optim.RMSprop: {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
    torch.optim.Rprop: {"lr": 0.01},
}.items():
    INNER[_class.__name__] = partial(_class, **_settings, foreach=False)
    INNER[f"{_class.__name__} foreach"] = partial(_class, **_settings, foreach=True)


def wrap(net, inner="SGD", gamma=None, **kwargs):
    if kwargs.get("mask") == "gradient" or inner == "LBFGS":
        warnings.simplefilter("ignore", UserWarning)
    optimizer = SPGOptimizer(INNER[inner](net.parameters()), heads=net.heads, named_parameters=net.named_parameters(),
                             **kwargs)
    if gamma is not None:
        for name in optimizer.importance:
            optimizer.importance[name] = torch.full(optimizer.importance[name].shape, gamma)
        optimizer.importance._active = True
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

"""One training run for every framework: a small model, its data in a fixed order, SGD with momentum or AdamW, a schedule."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from spg_kernels import SPGOptimizer

from ..models import Net
from ..wrapping import INNER

STEPS = 6  # of a whole run; an interrupted one stops after half of them
BATCH = 8
INNERS = ("SGD momentum", "AdamW", "RMSprop")


def network() -> Net:
    torch.manual_seed(0)
    return Net(tasks=1)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH * STEPS // 2, 10, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def loader() -> DataLoader:
    """Half of a run's batches: a run is two epochs."""
    return DataLoader(dataset(), batch_size=BATCH)


def loss_of(net: Net, batch) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(net(x, 0), y)


def wrapped(net: Net, inner: str, gamma: float | None) -> SPGOptimizer:
    """Around a fresh inner optimizer. None: nothing measured yet, as in a process that is about to load a checkpoint."""
    optimizer = SPGOptimizer(INNER[inner](net.parameters()), heads=net.heads, named_parameters=net.named_parameters())
    for i, name in enumerate(optimizer.importance if gamma is not None else ()):
        shape = optimizer.importance[name].shape
        optimizer.importance[name] = (torch.rand(shape, generator=torch.Generator().manual_seed(i)) if gamma < 1
                                      else torch.ones(shape))
    return optimizer


def schedule(optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.8)


def plain_run(inner: str, gamma: float, *, bf16: bool = False, clip: float | None = None) -> list[torch.Tensor]:
    """The parameters after the run in a plain loop: what every framework must arrive at."""
    net = network()
    optimizer = wrapped(net, inner, gamma)
    scheduler = schedule(optimizer)
    for _ in range(2):
        for batch in loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = loss_of(net, batch)
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            scheduler.step()
    return [p.detach() for p in net.parameters()]


def check(net: Net, optimizer, expected: list[torch.Tensor]) -> None:
    """The run ended where the plain loop does, and the schedule has reached the inner optimizer."""
    for parameter, value in zip(net.parameters(), expected, strict=True):
        assert (parameter - value).abs().max() < 1e-6
    assert abs(optimizer.inner.param_groups[0]["lr"] / (optimizer.inner.defaults["lr"] * 0.8**STEPS) - 1) < 1e-9


def check_frozen(net: Net) -> None:
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), network().parameters(), strict=True))

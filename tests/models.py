"""The small networks and streams of tasks that the tests train on."""

import torch
from torch import nn


class Net(nn.Module):
    """A trunk of two linear layers, and a head a task."""

    def __init__(self, tasks: int = 3, features: int = 10, hidden: int = 16, classes: int = 3):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(hidden, classes) for _ in range(tasks))

    def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
        return self.heads[task](self.trunk(x))


def tasks(count: int = 3, batches: int = 4, dtype: torch.dtype = torch.float32) -> list[list]:
    """For every task a list of batches (x, y)."""
    generator = torch.Generator().manual_seed(1)
    stream = []
    for _ in range(count):
        centres = torch.randn(3, 10, generator=generator, dtype=dtype)
        labels = [torch.randint(0, 3, (8,), generator=generator) for _ in range(batches)]
        stream.append([(centres[y] + torch.randn(8, 10, generator=generator, dtype=dtype), y) for y in labels])
    return stream


def set_gradients(parameters, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

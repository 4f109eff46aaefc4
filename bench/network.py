"""A small network and its data: one whole training step, and the measuring pass, where kernels are not all there is."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spg_kernels import Importance

HEADS, FEATURES, HIDDEN, CLASSES, BATCH, BATCHES = 10, 784, 512, 10, 64, 2


class Network(nn.Module):
    """A trunk of two hidden layers, and a head a task."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU())
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, CLASSES) for _ in range(HEADS))

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](self.trunk(x))


@dataclass
class Problem:
    """A network in the middle of its life: `task` heads are trained, and the trunk has importance."""

    model: Network
    loader: list[tuple[Tensor, Tensor]]

    def loss(self) -> Tensor:
        x, y = self.loader[0]
        return F.cross_entropy(self.model(x, 0), y)

    def trunk(self) -> list[tuple[str, Tensor]]:
        return [(f"trunk.{name}", p) for name, p in self.model.trunk.named_parameters()]

    def importance(self, dtype: torch.dtype) -> Importance:
        importance = Importance(self.trunk(), dtype)
        generator = torch.Generator().manual_seed(2)
        importance.store({name: torch.randn(p.shape, generator=generator).tanh().abs() for name, p in self.trunk()})
        return importance

    def gammas(self, importance: Importance) -> list[Tensor]:
        """What masks each of the model's parameters, as a full tensor each."""
        known = [importance.gamma(p) for p in self.model.parameters()]
        return [importance.mean().expand_as(p) if gamma is None else gamma for p, gamma in zip(self.model.parameters(), known)]


def problem(device: torch.device) -> Problem:
    """The same one every time."""
    torch.manual_seed(0)
    model = Network()
    loader = [(torch.randn(BATCH, FEATURES), torch.randint(0, CLASSES, (BATCH,))) for _ in range(BATCHES)]
    return Problem(model.to(device), [(x.to(device), y.to(device)) for x, y in loader])

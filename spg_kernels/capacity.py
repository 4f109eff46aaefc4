"""The capacity table: how full the tasks so far have left a model."""

import io
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor

from . import ops


@dataclass(frozen=True)
class LayerCapacity:
    """How much of one parameter tensor is used up: mean gamma, shares of its elements with gamma > 0.5 and > 0.99."""

    name: str
    elements: int
    mean: float
    above_half: float
    above_99: float


@dataclass(frozen=True)
class Capacity:
    """The capacity table: a row per parameter tensor, and the factor 1 - mean(gamma) that the heads move by."""

    rows: tuple[LayerCapacity, ...]
    head_factor: float
    tasks: int

    def __str__(self) -> str:
        table = Table(Column("parameter", overflow="fold"),  # long names differ in their ends
                      title=f"capacity after {self.tasks} tasks; heads move by {self.head_factor:.4f}")
        for column in ("elements", "mean gamma", "gamma > 0.5", "gamma > 0.99"):
            table.add_column(column, justify="right")
        for row in self.rows:
            shares = f"{row.above_half:.1%}", f"{row.above_99:.1%}"
            table.add_row(escape(row.name), f"{row.elements:,}", f"{row.mean:.4f}", *shares)
        text = io.StringIO()  # the same into a file and onto a terminal
        Console(file=text, width=100, height=25, force_terminal=False, color_system=None).print(table)
        return text.getvalue()


def totals_of(piece: Tensor) -> Tensor:
    """The sum of gammas, and how many are above 0.5 and 0.99."""
    gamma = ops.decode(piece) if piece.dtype == torch.uint8 else piece
    return torch.stack([part.sum(dtype=torch.float64) for part in (gamma, gamma > 0.5, gamma > 0.99)])

"""Digits, two classes a task, learned in several processes under DDP or FSDP2: the accuracies of one process.

    torchrun --nproc-per-node 2 examples/parallel.py --parallel ddp
    torchrun --nproc-per-node 2 examples/parallel.py --parallel fsdp2
    python examples/parallel.py                                        # one process, to compare with

Every process takes its share of every batch. Dropout is off: each process would draw its own. What is left between the runs is
the order in which float32 numbers are added up.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import models
import report
from data import Batches, load, split
from methods import Run, evaluate
from split_images import positive_integer
from spg_kernels import SPGOptimizer, cross_head_losses

TASKS, BATCH_SIZE, SEED = 5, 32, 0
INNER = {"SGD": (torch.optim.SGD, 0.2), "AdamW": (torch.optim.AdamW, 0.003)}


class Shares(Batches):
    """This process's share of every batch."""

    def __init__(self, task, rank: int, world: int, seed: int):
        super().__init__(task.train_x, task.train_y, BATCH_SIZE, seed)
        self.part = slice(rank, None, world)

    def __iter__(self):
        for x, y in super().__iter__():
            yield x[self.part], y[self.part]


def run(inner: str, parallel: str, images, epochs: int, rank: int, world: int) -> Run:
    tasks = split(images, TASKS, SEED)
    torch.manual_seed(SEED)  # the same model in every process
    model = models.build(tuple(images.train_x.shape[1:]), [len(task.classes) for task in tasks], dropout=(0.0, 0.0))
    forward = model
    if parallel == "ddp":
        # Of the heads each step uses one.
        forward = DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True)
    elif parallel == "fsdp2":
        # Before the optimizer is made: it replaces the parameters. Without resharding they would stay gathered after a test,
        # and the next task's optimizer would be given those.
        fully_shard(model, reshard_after_forward=True)

    def loss(outputs, y):
        # DDP and FSDP2 average gradients over processes: this makes it the sum over the whole batch, divided by its size.
        return F.cross_entropy(outputs, y, reduction="sum") * world / BATCH_SIZE

    optimizer_class, learning_rate = INNER[inner]
    importance = None
    result = Run(f"SPG {inner}", SEED, [task.classes for task in tasks], [len(task.test_y) for task in tasks], [], [], 0.0)
    for t, task in enumerate(tasks):
        loader = Shares(task, rank, world, SEED + t)
        opt = SPGOptimizer(optimizer_class(model.parameters(), lr=learning_rate), heads=model.heads,
                           named_parameters=model.named_parameters(), importance=importance)
        model.train()
        for _ in range(epochs):
            for x, y in loader:
                opt.zero_grad()
                loss(forward(x, t), y).backward()
                opt.step()
        opt.measure_importance(loader, cross_head_losses(forward, t, loss), progress=False)
        importance = opt.importance
        result.accuracy.append([evaluate(model, j, tasks[j]) for j in range(t + 1)])
    return result


def table(runs: list[Run]) -> Table:
    columns = ("", *(f"task {j + 1}" for j in range(TASKS)), "all", "BWT")
    result = Table(*columns, title="test accuracy after the last task, percent")
    for each in runs:
        figures = [*each.accuracy[-1], report.average_accuracy(each), report.backward_transfer(each)]
        result.add_row(each.method, *(f"{100 * figure:.2f}" for figure in figures))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=["none", "ddp", "fsdp2"], default="none", help="needs torchrun unless none")
    parser.add_argument("--epochs", type=positive_integer, default=20, help="per task (default: 20)")
    options = parser.parse_args()
    if options.parallel != "none" and "RANK" not in os.environ:
        parser.error(f"--parallel {options.parallel} needs processes: torchrun --nproc-per-node 2 {parser.prog} ...")
    rank, world = 0, 1
    if options.parallel != "none":
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    images = load("digits")
    runs = [run(inner, options.parallel, images, options.epochs, rank, world) for inner in INNER]
    if rank == 0:
        Console().print(table(runs))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

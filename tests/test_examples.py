"""The experiment of `make demo`: its readers, its figures, and a short run from the command line."""

import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import data
import models
import report
from methods import METHODS, Run
from readers import DataError, read_cifar, read_idx


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(">BBBB", 0, 0, kind, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def cifar(path: Path, images: np.ndarray, labels: list, changes: dict = {}) -> None:
    """Like the published files: a dictionary with byte strings for keys (Python 3 writes them from protocol 3 on)."""
    path.parent.mkdir(exist_ok=True)
    content = {b"data": images, b"fine_labels": labels, b"filenames": [b"a.png"] * len(labels), **changes}
    path.write_bytes(pickle.dumps(content, protocol=3))


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_idx_files_are_read_compressed_or_not(tmp_path, images, compress):
    (tmp_path / "a").write_bytes(compress(idx(images)))
    assert np.array_equal(read_idx(tmp_path / "a", dimensions=3), images)


@pytest.mark.parametrize("content, message", [
    (b"", "not an IDX file"),
    (b"\x89PNG1234", "not an IDX file"),
    (idx(np.zeros(3, np.uint8), kind=0x0D), "element type 0x0d"),
    (idx(np.zeros((2, 2), np.uint8)), "2 dimensions, expected 3"),
    (idx(np.zeros((2, 2, 2), np.uint8))[:-1], "announces 8 bytes.*has 7"),
    (idx(np.zeros((2, 2, 2), np.uint8)) + b"x", "announces 8 bytes.*has more"),
    (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 2**31), "expected 1 to 1073741824"),
    (struct.pack(">BBBB3I", 0, 0, 8, 3, 0, 2**32 - 1, 2**32 - 1), "announces 0 bytes"),
    (struct.pack(">BBBB3I", 0, 0, 8, 3, 60000, 28, 28), "announces 47040000 bytes.*has 0"),
    (gzip.compress(idx(np.zeros((2, 2, 2), np.uint8)))[:-9], "cannot be read|announces"),
    (gzip.compress(idx(np.zeros((2, 2, 2), np.uint8)))[:10] + b"\xff" * 20, "cannot be read"),
], ids=["empty", "another format", "floats", "labels for images", "cut off", "too long", "absurd header", "absurd and empty",
        "no data", "cut off in gzip", "damaged in gzip"])
def test_a_damaged_idx_file_says_what_is_wrong(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "a", dimensions=3)


def test_cifar_files_are_read(tmp_path):
    flat = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    cifar(tmp_path / "d/train", flat, [3, 1, 4, 1, 5])
    x, y = read_cifar(tmp_path / "d/train")
    assert np.array_equal(x, flat.reshape(5, 3, 32, 32)) and y.tolist() == [3, 1, 4, 1, 5]


class Evil:
    def __reduce__(self):
        return os.system, ("echo owned > owned",)


@pytest.mark.parametrize("changes, message", [
    ({"extra": Evil()}, "refused.*system"),
    ({"extra": np.zeros(3)}, "not of unsigned bytes"),
    ({"extra": slice}, "refused.*slice"),
    ({b"data": np.zeros((5, 10), np.uint8)}, "3072"),
    ({b"data": "x"}, "3072"),
    ({b"fine_labels": [1, 2]}, "5 images and 2 labels"),
    ({b"fine_labels": [-1] * 5}, "integers from 0"),
    ({b"fine_labels": [2**70] * 5}, "integers from 0"),
    ({b"data": np.zeros(5 * 3072, np.uint8)}, "not a matrix"),
])
def test_a_cifar_file_can_neither_run_code_nor_be_another_thing(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path / "d/train", np.zeros((5, 3072), np.uint8), [0] * 5, changes)
    with pytest.raises(DataError, match=message):
        read_cifar(tmp_path / "d/train")
    assert not (tmp_path / "owned").exists()


def test_a_pickle_that_is_none_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"not a pickle")
    with pytest.raises(DataError, match="not a CIFAR file"):
        read_cifar(tmp_path / "a")


def test_fashion_mnist_and_cifar100_are_loaded_from_a_directory(tmp_path):
    rng = np.random.default_rng(0)
    for half, count in (("train", 40), ("t10k", 20)):
        (tmp_path / f"{half}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(idx(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))))
        (tmp_path / f"{half}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    for half in ("train", "test"):
        cifar(tmp_path / "cifar-100-python" / half, rng.integers(0, 256, (200, 3072), dtype=np.uint8),
              [i % 100 for i in range(200)])
    fashion = data.load("fashion-mnist", tmp_path, train_per_class=3)
    assert fashion.train_x.shape == (30, 1, 28, 28) and fashion.test_x.shape == (20, 1, 28, 28)
    assert abs(fashion.train_x.mean()) < 1e-5 and abs(fashion.train_x.std() - 1) < 1e-3
    assert data.load("cifar100", tmp_path).train_x.shape == (200, 3, 32, 32)
    with pytest.raises(DataError, match=r"cifar100.*--root.*cs.toronto.edu"):
        data.load("cifar100")
    with pytest.raises(DataError, match="no file train-images-idx3-ubyte"):
        data.load("fashion-mnist", tmp_path / "nowhere")


def test_tasks_share_no_class_and_keep_every_image():
    digits = data.load("digits")
    tasks = data.split(digits, 5, seed=3)
    assert sorted(label for task in tasks for label in task.classes) == list(range(10))
    assert sum(len(task.train_y) for task in tasks) == len(digits.train_y)
    for task in tasks:
        assert set(task.train_y.tolist()) == {0, 1}
        original = digits.train_y[(digits.train_y[:, None] == torch.tensor(task.classes)).any(1)]
        assert [task.classes[y] for y in task.train_y.tolist()] == original.tolist()
    assert tasks[0].classes != data.split(digits, 5, seed=4)[0].classes
    with pytest.raises(DataError, match="10 classes.*3 tasks"):
        data.split(digits, 3, seed=0)


def test_tasks_are_made_on_the_images_device():
    """On a GPU torch refuses to look up what lies on the CPU; of fake tensors it gives the result's device away."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        x, y = torch.empty(20, 1, 8, 8, device="meta"), torch.empty(20, dtype=torch.int64, device="meta")
        for task in data.split(SimpleNamespace(classes=10, train_x=x, train_y=y, test_x=x, test_y=y), 5, seed=0):
            assert {t.device.type for t in (task.train_x, task.train_y, task.test_x, task.test_y)} == {"meta"}


def test_the_paper_network_for_its_image_sizes():
    model = models.build((3, 32, 32), [10] * 10, (0.3, 0.4))
    assert [tuple(c.weight.shape) for c in model.trunk if isinstance(c, torch.nn.Conv2d)] == [
        (64, 3, 4, 4), (128, 64, 3, 3), (256, 128, 2, 2)]
    assert model.heads[0].in_features == 2048 and model(torch.randn(2, 3, 32, 32), 4).shape == (2, 10)


def test_the_figures_are_those_of_the_definitions():
    def made(method, accuracy):
        return Run(method, 0, [(0,), (1,), (2,)], [10, 20, 10], accuracy, [], 0.0)

    runs = [made(m.name, [[0.9], [None, 0.8], [None, None, 0.7]] if m.alone else [[1.0], [0.7, 0.9], [0.5, 0.6, 0.8]])
            for m in METHODS]
    figures = report.metrics(runs)["SPG SGD"]
    assert figures["accuracy"] == [pytest.approx((0.5 * 10 + 0.6 * 20 + 0.8 * 10) / 40)]
    assert figures["bwt"] == [pytest.approx(((0.5 - 1.0) + (0.6 - 0.9)) / 2)]
    assert figures["fwt"] == [pytest.approx(((1.0 - 0.9) + (0.9 - 0.8) + (0.8 - 0.7)) / 3)]


def command(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.run([sys.executable, EXAMPLES / "split_images.py", *map(str, arguments)], env=environment,
                          capture_output=True, text=True)


def test_a_short_run_writes_results_and_pictures(tmp_path):
    result = command("--epochs", 1, "--seeds", 1, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "SPG AdamW, update" in result.stdout and "epoch/s" in result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["runs"]) == len(METHODS) and results["versions"]["torch"] == torch.__version__
    runs = {run["method"]: run for run in results["runs"]}
    assert runs["SPG AdamW, gradient"]["accuracy"] != runs["SPG AdamW, update"]["accuracy"]
    spg = runs["SPG SGD"]
    assert [len(row) for row in spg["accuracy"]] == [1, 2, 3, 4, 5] and spg["capacity"][4]["tasks"] == 5
    means = [row["mean"] for row in spg["capacity"][4]["rows"]]
    assert all(0 < mean < 1 for mean in means)
    for picture in ("accuracy.png", "capacity.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, message", [
    (("--data", "imagenet"), "invalid choice"),
    (("--data", "cifar100"), "--root"),
    (("--seeds", "0"), "1 or more"),
    (("--tasks", "3"), "do not divide"),
])
def test_bad_input_is_one_line(tmp_path, arguments, message):
    result = command(*arguments, "--out", tmp_path)
    assert result.returncode != 0 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_directory_that_takes_no_files_is_one_line_before_training():
    result = command("--out", "/proc")
    assert result.returncode != 0 and "/proc" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for the children of a process")
def test_workers_end_with_a_command_that_is_killed(tmp_path):
    command = [sys.executable, EXAMPLES / "split_images.py", "--workers", "2", "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while len(workers := [pid for pid in children.read_text().split() if is_training(pid)]) < 2:
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(map(is_training, workers)):
        assert time.monotonic() < until, "workers go on without it"
        time.sleep(0.1)


def is_training(pid: str) -> bool:
    """Whether it is a worker and got as far as other threads."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes() and len(os.listdir(f"/proc/{pid}/task")) > 1
    except FileNotFoundError:
        return False

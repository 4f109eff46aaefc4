"""The importance file: what `save` promises, and what `load` refuses."""

import ast
import errno
import json
import os
import resource
import stat
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import spg_kernels
from spg_kernels import Importance, SPGOptimizer, distributed, files

from .models import Net

METADATA = {"format": "spg_importance", "version": "1", "tasks": "3", "dtype": "float32", "names": '["weight", "bias"]'}


def importance_of(k: int = 0, dtype: torch.dtype = torch.float32) -> Importance:
    importance = Importance([("weight", nn.Parameter(torch.zeros(3, 4))), ("bias", nn.Parameter(torch.zeros(4))),
                             ("scale", nn.Parameter(torch.zeros(()))), ("empty", nn.Parameter(torch.zeros(0, 3)))], dtype)
    generator = torch.Generator().manual_seed(k)
    importance.store({name: torch.rand(importance[name].shape, generator=generator) for name in importance})
    importance.tasks = k
    return importance


def same(a: Importance, b: Importance) -> bool:
    return (list(a) == list(b) and a.tasks == b.tasks and a.dtype == b.dtype and a.active == b.active
            and all(torch.equal(a[name], b[name]) for name in a))


def write(path, gammas=None, checksum=None, **metadata):
    """An importance file whose checksum is right, whatever else is wrong with it."""
    gammas = {"weight": torch.rand(3, 4), "bias": torch.rand(4)} if gammas is None else gammas
    metadata = {key: value for key, value in {**METADATA, **metadata}.items() if value is not None}
    checksum = files._checksum(metadata, gammas) if checksum is None else checksum
    save_file(gammas, path, {**metadata, "checksum": checksum})


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_any_safetensors_reader_opens_it(tmp_path, dtype):
    importance = importance_of(2, dtype)
    importance.save(tmp_path / "a")
    stored = importance.state_dict()["gammas"]
    read = load_file(tmp_path / "a")
    assert read.keys() == stored.keys() and all(torch.equal(read[name], stored[name]) for name in stored)
    length = struct.unpack("<Q", (tmp_path / "a").read_bytes()[:8])[0]
    assert length % 8 == 0, "the data are aligned"


def test_every_flipped_bit_and_every_truncation_is_refused(tmp_path):
    path, other = tmp_path / "a", importance_of(1)
    importance_of(3).save(path)
    good = path.read_bytes()
    damaged = [good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1:] for i in range(len(good)) for bit in range(8)]
    for content in [*damaged, *(good[:length] for length in range(len(good))), good + b"\0"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            Importance.load(path)
    path.write_bytes(good)
    assert same(Importance.load(path), importance_of(3)) and same(other, importance_of(1))


@pytest.mark.parametrize("change, message", [
    ({"format": "pt"}, "expected an importance file.*'pt'"),
    ({"format": None}, "expected an importance file.*None"),
    ({"version": "2"}, "reads version 1, got 2.*newer spg_kernels"),
    ({"version": "x"}, "reads version 1, got 'x'"),
    ({"version": None}, "reads version 1"),
    ({"tasks": None}, "without tasks"),
    ({"tasks": "-1"}, "tasks.*-1"),
    ({"tasks": "many"}, "many"),
    ({"tasks": "9" * 5000}, "digits"),
    ({"dtype": "bfloat16"}, "weight.*bfloat16.*float32 or uint8.*got F32"),
    ({"dtype": "uint8"}, "weight.*uint8.*got F32"),
    ({"names": "[" * 100_000}, "a"),
    ({"names": '{"weight": 1}'}, "list of strings"),
    ({"names": '["weight", 3]'}, "list of strings"),
    ({"names": '["weight"]'}, r"\['bias'\]"),
    ({"names": '["weight", "bias", "scale"]'}, r"\['scale'\]"),
    ({"checksum": "00000000"}, "checksum"),
    ({"gammas": {"weight": torch.full((3, 4), 1.5), "bias": torch.rand(4)}}, r"weight.*\[0, 1\].*1.5"),
    ({"gammas": {"weight": torch.full((3, 4), float("nan")), "bias": torch.rand(4)}}, "weight.*finite"),
    ({"gammas": {"weight": torch.rand(3, 4).half(), "bias": torch.rand(4)}}, "weight.*F16"),
    ({"gammas": {"weight": torch.rand(3, 4), "bias": torch.ones(4, dtype=torch.int32)}}, "bias.*I32"),
])
def test_a_file_that_says_something_else_is_refused(tmp_path, change, message):
    write(tmp_path / "a", **change)
    with pytest.raises(ValueError, match=f"(?s){tmp_path}/a: .*{message}"):
        Importance.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["../weight", "a/../../weight", "/etc/weight", "~/weight", "..\\weight", "w\0", "w\ud800"])
def test_names_that_are_no_text_or_ways_out_of_a_directory_are_neither_loaded_nor_saved(tmp_path, name):
    write(tmp_path / "a", {"weight" if name == "w\ud800" else name: torch.rand(3)}, names=json.dumps([name]))
    with pytest.raises(ValueError, match="no name of a parameter"):
        Importance.load(tmp_path / "a")
    with pytest.raises(ValueError, match="no name of a parameter"):
        Importance([(name, nn.Parameter(torch.zeros(3)))]).save(tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


def test_names_with_slashes_and_the_like_are_names(tmp_path):
    names = ["conv1/kernel", "block.0.w", "...", "größe", "0.0", ""]
    importance = Importance([(name, nn.Parameter(torch.zeros(2))) for name in names])
    importance.save(tmp_path / "a")
    assert list(Importance.load(tmp_path / "a")) == names


def test_gammas_in_another_memory_layout_are_saved_by_their_indices(tmp_path):
    layouts = {"last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), "turned": torch.zeros(4, 3).t()}
    importance = Importance((name, nn.Parameter(zeros)) for name, zeros in layouts.items())
    for name, gamma in importance.items():
        importance[name] = torch.rand(gamma.shape)
    importance.save(tmp_path / "a")
    assert same(Importance.load(tmp_path / "a"), importance)


def test_a_dtype_that_this_torch_has_not_is_refused(tmp_path, monkeypatch):
    metadata = {**METADATA, "names": '["weight"]', "checksum": ""}
    tensor = {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}
    header = json.dumps({"__metadata__": metadata, "weight": tensor}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    monkeypatch.delattr(torch, "float8_e8m0fnu", raising=False)  # as torch 2.6
    with pytest.raises(ValueError, match=f"{tmp_path}/a: weight: expected a tensor of float32.*got F8_E8M0"):
        Importance.load(tmp_path / "a")


@pytest.mark.parametrize("header", [
    b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,9223372036854775807]}}',
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}',
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    b'[' * 50_000,
    b'',
], ids=["overflow", "negative", "past the end", "before the start", "overlap", "nested", "none"])
@pytest.mark.parametrize("length", [None, 1 << 62, (1 << 64) - 1],
                         ids=["", "header of 2^62 bytes", "header of 2^64 - 1 bytes"])
def test_absurd_headers_are_refused(tmp_path, header, length):
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(16))
    with pytest.raises(ValueError, match=str(path)):
        Importance.load(path)


def test_what_is_no_file_is_the_operating_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        Importance.load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        Importance.load(tmp_path)
    importance = importance_of()
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/no/such'$"):
        importance.save(tmp_path / "no" / "such")
    with pytest.raises(IsADirectoryError, match=f"'{tmp_path}'$"):
        importance.save(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="'.*file/a'$"):
        importance.save(tmp_path / "file" / "a")
    assert os.listdir(tmp_path) == ["file"]


def test_a_read_only_directory_is_an_error_that_names_the_path():
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "a")
        importance_of(1).save(path)
        path.chmod(0o644)
        os.chmod(directory, 0o555)
        try:
            if root:
                os.seteuid(65534)  # whom permissions bind
            with pytest.raises(PermissionError, match=f"'{path}'$"):
                importance_of(2).save(path)
            assert same(Importance.load(path), importance_of(1)) and os.listdir(directory) == ["a"]
        finally:
            if root:
                os.seteuid(0)
            os.chmod(directory, 0o755)


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    importance_of(1).save(tmp_path / "a")
    big, limits = Importance([("weight", nn.Parameter(torch.zeros(64, 1024)))]), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"'{tmp_path}/a'$") as error:
            big.save(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and os.listdir(tmp_path) == ["a"]
    assert same(Importance.load(tmp_path / "a"), importance_of(1))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError("no number"),
                                   KeyboardInterrupt("by hand")], ids=repr)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_whatever_stops_a_save_leaves_the_file_that_was_there(tmp_path, monkeypatch, call, error):
    importance_of(1).save(tmp_path / "a")

    def stop(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, stop)
        with pytest.raises(type(error), match=error.args[-1]):
            importance_of(2).save(tmp_path / "a")
    assert same(Importance.load(tmp_path / "a"), importance_of(1)) and os.listdir(tmp_path) == ["a"]


def test_the_file_and_then_its_directory_reach_the_disk(tmp_path, monkeypatch):
    synced, replace = [], os.replace

    def fsync(handle):
        status = os.fstat(handle)
        synced.append("directory" if stat.S_ISDIR(status.st_mode) else status.st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (synced.append("replace"), replace(*paths)))
    importance_of(1).save(tmp_path / "a")
    assert synced == [(tmp_path / "a").stat().st_size, "replace", "directory"], "all of the file, not what is buffered of it"


def test_the_mode_is_that_of_any_new_file(tmp_path):
    mask = os.umask(0o027)
    try:
        importance_of(1).save(tmp_path / "a")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    importance_of(1).save(tmp_path / "a")
    (tmp_path / "a").chmod(0o600)
    importance_of(2).save(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600 and same(Importance.load(tmp_path / "a"), importance_of(2))


def test_a_directory_need_not_be_readable(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, flags, *arguments, **options):
        if flags == os.O_RDONLY and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)  # root may read all
    importance_of(1).save(tmp_path / "a")
    assert same(Importance.load(tmp_path / "a"), importance_of(1))


def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "latest").symlink_to("runs/a")
    for k in (1, 2):
        importance_of(k).save(tmp_path / "latest")
        assert (tmp_path / "latest").is_symlink() and same(Importance.load(tmp_path / "runs/a"), importance_of(k))
    assert os.listdir(tmp_path / "runs") == ["a"]


def test_gathered_gammas_leave_the_device_one_at_a_time(tmp_path, monkeypatch):
    class OnDevice(torch.Tensor):
        def cpu(self):
            return torch.from_numpy(self.numpy().copy())

    importance, gathered = importance_of(1), []

    def gather(gamma):
        assert all(storage.expired() for storage in gathered), "an earlier one is still on the device"
        tensor = gamma.clone().as_subclass(OnDevice)
        gathered.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "whole", gather)
        importance.save(tmp_path / "a")
    assert len(gathered) == 4 and same(Importance.load(tmp_path / "a"), importance)


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127], ids=["255 characters", "127 of two bytes"])
def test_a_name_may_be_as_long_as_the_file_system_has_it(tmp_path, name):
    importance_of(1).save(tmp_path / name)
    assert same(Importance.load(tmp_path / name), importance_of(1)) and os.listdir(tmp_path) == [name]


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which root could replace
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match=f"not a regular file.*'{tmp_path}/pipe'$"):
            importance_of(1).save(tmp_path / name)
    with pytest.raises(OSError, match=f"not a regular file.*'{tmp_path}/pipe'$"):
        Importance.load(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_paths_are_strings_or_path_like_and_need_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    importance_of(1).save("a")
    importance_of(1).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() and same(Importance.load("a"), importance_of(1))


@pytest.mark.parametrize("tasks", [-1, True, "2", 1.0, None], ids=repr)
def test_a_task_count_is_an_integer_from_0(tmp_path, tasks):
    importance = importance_of(1)
    with pytest.raises(ValueError, match="tasks"):
        importance.load_state_dict({**importance_of(2).state_dict(), "tasks": tasks})
    assert same(importance, importance_of(1))
    importance.tasks = tasks
    with pytest.raises(ValueError, match="tasks"):
        importance.save(tmp_path / "a")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("state, kind, message", [
    (None, TypeError, "state_dict()"),
    ({"version": 1, "tasks": 0}, TypeError, "gammas"),
    ({"version": 1, "tasks": 0, "gammas": [1]}, TypeError, "gammas"),
    ({"version": 2, "tasks": 0, "gammas": {}}, ValueError, "reads version 1, got 2.*newer"),
    ({"tasks": 0, "gammas": {}}, ValueError, "version 1, got None"),
    ({"version": 1, "tasks": 0, "gammas": {}}, ValueError, "missing"),
    ({"version": 1, "tasks": 0, "gammas": {**importance_of().state_dict()["gammas"], "empty": "x"}}, TypeError, "empty.*str"),
    ({"version": 1, "tasks": 0, "gammas": {**importance_of().state_dict()["gammas"], "empty": torch.zeros(3, 0)}}, ValueError,
     r"empty.*\(0, 3\)"),
    ({"version": 1, "tasks": 0, "gammas": {**importance_of().state_dict()["gammas"], "scale": torch.tensor(-0.5)}}, ValueError,
     "scale.*-0.5"),
])
def test_a_state_dict_that_does_not_fit_changes_nothing(state, kind, message):
    importance = importance_of(1)
    mean = importance.mean()
    with pytest.raises(kind, match=message):
        importance.load_state_dict(state)
    assert same(importance, importance_of(1)) and importance.mean() == mean


def test_a_model_that_has_grown_new_heads_and_layers_takes_the_file(tmp_path):
    net = Net(tasks=2)
    optimizer = SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=net.heads,
                             named_parameters=net.named_parameters())
    optimizer.importance.store({name: torch.rand(optimizer.importance[name].shape) for name in optimizer.importance})
    optimizer.importance.save(tmp_path / "a")
    grown = Net(tasks=5)
    grown.trunk.append(nn.Linear(16, 16))
    taken = SPGOptimizer(torch.optim.SGD(grown.parameters(), lr=0.1), heads=grown.heads,
                         named_parameters=grown.named_parameters(), importance=Importance.load(tmp_path / "a"))
    for name in optimizer.importance:
        assert torch.equal(taken.importance[name], optimizer.importance[name])
    assert taken.importance[grown.trunk[0].weight] is not None and not taken.importance["trunk.4.weight"].any()


def test_an_importance_of_another_model_is_refused(tmp_path):
    importance_of(1).save(tmp_path / "a")
    loaded, net = Importance.load(tmp_path / "a"), Net()
    for named in (None, net.named_parameters()):
        with pytest.raises(ValueError, match="bias, empty, scale, weight.*another model"):
            SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=net.heads, named_parameters=named, importance=loaded)
        assert same(loaded, importance_of(1)), "no name of the other model came in"
    wide = nn.ParameterDict({"new": torch.zeros(2), "weight": torch.zeros(3, 5), "bias": torch.zeros(4),
                             "scale": torch.zeros(()), "empty": torch.zeros(0, 3)})
    with pytest.raises(ValueError, match=r"weight.*\(3, 4\).*\(3, 5\)"):
        SPGOptimizer(torch.optim.SGD(wide.parameters(), lr=0.1), named_parameters=wide.named_parameters(), importance=loaded)
    assert same(loaded, importance_of(1))


def test_frozen_layers_keep_their_importance(tmp_path):
    net = Net()
    before = SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=net.heads, named_parameters=net.named_parameters())
    before.importance.save(tmp_path / "a")
    loaded = Importance.load(tmp_path / "a")
    trained = [*net.trunk[2].parameters(), *net.heads.parameters()]
    SPGOptimizer(torch.optim.SGD(trained, lr=0.1), heads=net.heads, named_parameters=net.named_parameters(), importance=loaded)
    assert net.trunk[0].weight in loaded and net.heads[0].weight not in loaded and len(loaded) == 4


def test_no_file_of_the_package_unpickles():
    readers = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle"}
    for path in Path(spg_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not readers & set(modules), path
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"), path

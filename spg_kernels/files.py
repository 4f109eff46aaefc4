"""The importance file: gammas by name in safetensors, written whole or not at all, with a checksum over all it says."""

import errno
import json
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = "spg_importance"
VERSION = 1
_DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
_CODES = {torch.float32: "F32", torch.uint8: "U8"}  # safetensors'


def check_version(version: object) -> None:
    if version != VERSION:
        newer = "; it was written by a newer spg_kernels" if isinstance(version, int) and version > VERSION else ""
        raise ValueError(f"version: this spg_kernels reads version {VERSION}, got {version!r}{newer}")


def check_tasks(tasks: object) -> None:
    if type(tasks) is not int or tasks < 0:
        raise ValueError(f"tasks: expected an integer from 0, got {tasks!r}")


def check_names(names: object) -> None:
    """Parameter names are text, and none is a way out of a directory: whoever makes paths of them must be safe to."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("names: expected a list of strings")
    for name in names:
        parts = name.replace("\\", "/").split("/")
        lone_surrogate = any("\ud800" <= character <= "\udfff" for character in name)  # which no file in UTF-8 can hold
        if (name == "__metadata__" or "\0" in name or lone_surrogate or ".." in parts
                or (len(parts) > 1 and parts[0] in ("", "~"))):
            raise ValueError(f"names: {name!r} is no name of a parameter")


def write(path: str | os.PathLike, gammas: Mapping[str, Tensor], tasks: int, dtype: torch.dtype) -> None:
    """Write `gammas` (float32 or codes, as `dtype` says) and the task count.

    Raises:
        ValueError: a name or task count that `read` would refuse. OSError: names `path`; what was there before is intact.
    """
    check_tasks(tasks)
    check_names(list(gammas))
    gammas = {name: gamma.detach().cpu().contiguous() for name, gamma in gammas.items()}
    metadata = {"format": FORMAT, "version": str(VERSION), "tasks": str(tasks), "dtype": str(dtype).removeprefix("torch."),
                "names": json.dumps(list(gammas))}  # in the model's order, which safetensors' readers do not keep
    header, end = {"__metadata__": {**metadata, "checksum": _checksum(metadata, gammas)}}, 0
    for name, gamma in gammas.items():
        start, end = end, end + gamma.nbytes
        header[name] = {"dtype": _CODES[gamma.dtype], "shape": gamma.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data are aligned
    # Not by safetensors' save_file: its file is its owner's alone to read, and its errors have no errno.
    with _replacing(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for gamma in gammas.values():
            file.write(gamma.numpy())


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], int, torch.dtype]:
    """The gammas in the model's order, the task count, and the dtype. The tensors may be views of the file.

    Raises:
        ValueError: names `path`; not an importance file, another version, or damaged. OSError: it cannot be read.
    """
    _check_regular(os.fspath(path))
    open(path, "rb").close()  # or the operating system's own error
    try:
        with safe_open(path, framework="pt") as file:
            return _parse(file)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _parse(file: safe_open) -> tuple[dict[str, Tensor], int, torch.dtype]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"expected an importance file, format {FORMAT!r}, got {metadata.get('format')!r}")
    version = metadata.get("version", "")
    check_version(int(version) if version.isdecimal() else version)
    if missing := {"tasks", "dtype", "names", "checksum"} - metadata.keys():
        raise ValueError(f"damaged: metadata without {', '.join(sorted(missing))}")
    names = json.loads(metadata["names"])
    check_names(names)
    if set(names) != set(file.keys()):
        raise ValueError(f"damaged: names {sorted(set(names) ^ set(file.keys()))} without a tensor, or tensors without a name")
    dtype = _DTYPES.get(metadata["dtype"])
    for name in names:
        code = file.get_slice(name).get_dtype()  # not of the tensor: safetensors has dtypes that a torch has not
        if code != _CODES.get(dtype):
            raise ValueError(f"{name}: expected a tensor of {metadata['dtype']} (float32 or uint8), got {code}")
    gammas = {name: file.get_tensor(name) for name in names}
    if metadata.pop("checksum") != _checksum(metadata, gammas):
        raise ValueError("damaged: the checksum does not match")
    tasks = int(metadata["tasks"])
    check_tasks(tasks)
    return gammas, tasks, dtype


def _checksum(metadata: Mapping[str, str], gammas: Mapping[str, Tensor]) -> str:
    """CRC-32 of all that a file says: safetensors has none, and a flipped bit of a gamma is a gamma like any other."""
    crc = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for gamma in gammas.values():
        crc = zlib.crc32(repr((tuple(gamma.shape), gamma.dtype)).encode(), crc)
        crc = zlib.crc32(gamma.numpy(), crc)
    return f"{crc:08x}"


@contextmanager
def _replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file beside `path`, through a symbolic link as `open` goes, that takes its place once it is on the disk."""
    path = os.path.realpath(path)
    directory, name = os.path.split(path)
    # A name may take 255 bytes, and a character 4 of them.
    temporary = os.path.join(directory, f".{name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        _check_regular(path)
        try:
            with open(temporary, "xb") as file:  # not tempfile's, which only its owner could read
                with suppress(OSError):  # no such file yet, or a file system without modes
                    shutil.copymode(path, temporary)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_directory(directory)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), path) from error


def _check_regular(path: str | bytes) -> None:
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, "not a regular file", path)


def _sync_directory(directory: str) -> None:
    """Have the disk hold the new entry too: until it does, a loss of power may bring the old file back."""
    if os.name != "posix":
        return  # a directory cannot be opened
    try:
        handle = os.open(directory, os.O_RDONLY)
    except PermissionError:
        return  # one to write in, but not to read
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not sync directories
            raise
    finally:
        os.close(handle)

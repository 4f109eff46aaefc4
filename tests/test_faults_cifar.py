"""The CIFAR reader on pickles made to harm: refused, in no time and no memory."""

import resource
import struct
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from readers import DataError, read_cifar


def nested_tuple_as_a_key(depth: int) -> bytes:
    return b"\x80\x02})" + b"\x85" * depth + b"Ns."


def tuples_of_tuples_as_a_key(depth: int) -> bytes:
    """2 ** depth elements to hash, of memoized pairs."""
    return b"\x80\x02})" + b"q\x00h\x00\x86" * depth + b"Ns."


def array_of_shape(shape: bytes) -> bytes:
    state = b"(K\x01" + shape + b"cnumpy\ndtype\nU\x02u1\x85R\x89U\x00t"
    return b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n)R" + state + b"bs."


@pytest.mark.parametrize("content", [
    b"\x80\x02}r" + struct.pack("<I", (1 << 32) - 1) + b".",
    b"}p99999999999\n.",
    b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
    b"\x80\x05\x96" + struct.pack("<Q", 16 << 30) + b".",
    b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b".",
    nested_tuple_as_a_key(300_000),
    tuples_of_tuples_as_a_key(200),
    array_of_shape(b"K\x01\x85" + b"q\x00h\x00\x86" * 200 + b"\x85"),
    array_of_shape(b"(" + (b"\x8a\xfa" + b"\x7f" * 250) * 4000 + b"t"),
    b"\x80\x02cnumpy\ndtype\n}X\x04\x00\x00\x00evilK\x01sb.",
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}X\x04\x00\x00\x00evilK\x01s\x86b.",
    b"\x80\x02cnumpy\ndtype\n)\x81.",
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    b"(S'1'\nibuiltins\neval\n.",
    b"\x80\x02\x82\x01.",
    b"Pabc\n.",
], ids=["memo index", "memo index in text", "bytes", "bytearray", "frame", "nested tuple", "tuples of tuples", "nested shape",
        "shape of long numbers", "state of a class", "attribute of a class", "new object", "global", "stack global",
        "instance", "extension", "persistent id"])
def test_a_pickle_made_to_harm_is_refused(tmp_path, content):
    (tmp_path / "train").write_bytes(content)
    started, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=str(tmp_path)):
        read_cifar(tmp_path / "train")
    assert time.perf_counter() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1 << 19, "half a gigabyte"

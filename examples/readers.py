"""Readers for the two file formats image data sets come in: IDX (MNIST's) and CIFAR's pickles.

Both are read with every length checked against the file, and neither can run code: a pickle from a download is otherwise
a program.
"""

import gzip
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np

IDX_UNSIGNED_BYTE = 0x08
IDX_MOST_BYTES = 1 << 30  # twice the largest of MNIST's kind, and what a compressed megabyte can grow to
CIFAR_IMAGE = (3, 32, 32)


class DataError(ValueError):
    """A data set is missing or its file is not what it should be. The message is one line for the user."""


def read_idx(path: str | Path, dimensions: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, gzip-compressed or not (told by its first bytes, not its name).

    Args:
        path: the file.
        dimensions: how many dimensions it must have: 3 for images, 1 for labels.

    Raises:
        DataError: wrong magic number, element type or dimensions, over 1 GiB, more or fewer bytes than the header announces.
    """
    path = Path(path)
    try:
        with path.open("rb") as plain:
            compressed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else path.open("rb") as file:
            return _parse_idx(file, path, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _parse_idx(file, path: Path, dimensions: int) -> np.ndarray:
    magic = file.read(4)
    if len(magic) != 4 or magic[:2] != b"\x00\x00":
        raise DataError(f"{path}: not an IDX file (it starts with {magic.hex(' ') or 'nothing'})")
    if magic[2] != IDX_UNSIGNED_BYTE:
        raise DataError(f"{path}: IDX element type 0x{magic[2]:02x}, expected 0x{IDX_UNSIGNED_BYTE:02x} (unsigned byte)")
    if magic[3] != dimensions:
        raise DataError(f"{path}: IDX file of {magic[3]} dimensions, expected {dimensions}")
    header = file.read(4 * dimensions)
    if len(header) != 4 * dimensions:
        raise DataError(f"{path}: IDX header ends early")
    shape = struct.unpack(f">{dimensions}I", header)
    expected = math.prod(shape)
    if not 0 < expected <= IDX_MOST_BYTES:
        raise DataError(f"{path}: IDX header announces {expected} bytes of data {shape}, expected 1 to {IDX_MOST_BYTES}")
    # In pieces up to one byte past the end: a damaged header must not make us reserve a gigabyte, and what is too long
    # must show.
    content = bytearray()
    while len(content) <= expected and (piece := file.read(min(1 << 20, expected + 1 - len(content)))):
        content += piece
    if len(content) != expected:
        seen = "more" if len(content) > expected else len(content)
        raise DataError(f"{path}: IDX header announces {expected} bytes of data {shape}, the file has {seen}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_cifar(path: str | Path, label_key: str = "fine_labels") -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of one file of CIFAR's Python version.

    Args:
        path: the file (``train`` or ``test`` of CIFAR-100).
        label_key: the entry that holds the labels.

    Raises:
        DataError: the pickle names anything but a numpy array, or its entries do not have the expected form.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path}: not a CIFAR file: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected a dictionary")
    # The published files were pickled by Python 2, so their keys are bytes.
    content = {key.decode("ascii", "replace") if isinstance(key, bytes) else key: value for key, value in content.items()}
    for key in ("data", label_key):
        if key not in content:
            raise DataError(f"{path}: no entry {key!r}")
    images, labels = content["data"], content[label_key]
    images = images.array if isinstance(images, _Array) else None
    if images is None or images.shape[1] != math.prod(CIFAR_IMAGE):
        raise DataError(f"{path}: 'data' must be an array of unsigned bytes, (n, {math.prod(CIFAR_IMAGE)})")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 1 << 63 for label in labels):
        raise DataError(f"{path}: {label_key!r} must be a list of integers from 0, of 64 bits")
    if len(labels) != len(images):
        raise DataError(f"{path}: {len(images)} images and {len(labels)} labels")
    return images.reshape(-1, *CIFAR_IMAGE), np.array(labels, np.int64)


class _DType:
    """Stands for ``numpy.dtype`` while unpickling: remembers the name."""

    def __init__(self, name="", *flags):
        self.name = name.decode("ascii", "replace") if isinstance(name, bytes) else name

    def __setstate__(self, state):
        """The state of an unsigned byte says nothing more than its name."""


class _Array:
    """Stands for ``numpy.ndarray`` while unpickling: takes its state apart and checks it before numpy sees it."""

    array: np.ndarray | None = None

    def __init__(self, *arguments):
        """Of `_reconstruct`: type and shape of the empty array."""

    def __setstate__(self, state):
        _, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _DType) or dtype.name not in ("u1", "uint8"):
            raise DataError("holds an array that is not of unsigned bytes")
        # Before anything is made of it: the text of a shape of nested lists or the product of long numbers can take for ever.
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 <= n < 1 << 32 for n in shape)):
            raise DataError("holds an array that is not a matrix")
        if not isinstance(content, bytes) or len(content) != math.prod(shape):
            raise DataError(f"holds an array {shape} whose bytes do not fill it")
        self.array = np.frombuffer(bytearray(content), np.uint8).reshape(shape, order="F" if fortran_order else "C")


_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # makes the empty array that the state then fills
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
}
# What dictionaries, lists, numbers, strings and arrays take, in any protocol.
_OPCODES = """
    PROTO FRAME STOP MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE INT BININT BININT1
    BININT2 LONG LONG1 STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    GLOBAL STACK_GLOBAL REDUCE BUILD
"""


def _load_list(size: int):
    def load(unpickler):
        at = len(unpickler.stack) - size
        unpickler.stack[at:] = [unpickler.stack[at:]]

    return load


class _ArrayUnpickler(pickle._Unpickler):
    """An unpickler that knows numpy arrays of unsigned bytes and refuses every other global.

    numpy's own constructors are stood in for rather than allowed: a forged dtype state would let them take raw bytes for
    object pointers. It is the one written in Python, because in the one in C a file of ten bytes can reserve all memory
    (an index into the memo) or crash (the hash of a deeply nested tuple): here tuples are lists, which have none.
    """

    dispatch: ClassVar = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
                          for name in _OPCODES.split()}
    dispatch[pickle.TUPLE[0]] = pickle._Unpickler.load_list
    dispatch |= {code[0]: _load_list(size) for size, code in enumerate(
        (pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3))}

    def find_class(self, module, name):
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise DataError(f"refused: the pickle asks for {module}.{name}, a numpy array needs no such thing") from None

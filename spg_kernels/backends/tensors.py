"""What the tensors of a call are, and where they lie.

To ask every tensor from Python costs more than a step. One call into C++ asks them all: through the functions that DLPack has
torch offer, or, before torch 2.10 and where `csrc/` was not built, with a guard of torch's compiler and an address at a time.
"""

import contextlib
import ctypes
import functools
import itertools
from array import array
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p, py_object

import torch
from torch import Tensor

from . import library

try:  # what torch.compile checks its inputs with; not public, so its absence only costs time
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

Lists = tuple[list[Tensor], ...]
PLAIN = {Tensor, torch.nn.Parameter}  # a subclass may keep its numbers elsewhere: DTensor, FakeTensor


class _Python(ctypes.Structure):
    """`SpgPython` of csrc/spg_kernels.h."""

    _fields_ = [(name, c_void_p) for name in ("tuple_size", "tuple_item", "list_size", "list_item", "type_of", "release",
                                              "clear_error", "describe", "tensor_type", "parameter_type")]


class _Exchange(ctypes.Structure):
    """DLPackExchangeAPI, version 1, as far as it is needed."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", c_void_p), ("allocate", c_void_p),
                ("export", c_void_p), ("take", c_void_p), ("describe", c_void_p)]


def addresses_of(lists: Lists) -> array:
    """The addresses of all tensors of a call, list after list."""
    return array("Q", list(map(Tensor.data_ptr, itertools.chain(*lists))))  # a list's length is known: a sixth faster


@functools.cache
def _functions() -> tuple[ctypes.PyDLL, _Python] | None:
    """The library, called with Python's lock held, and what it needs to look into Python's tensors; None without either."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or library.load()[0] is None:
        return None
    python = ctypes.pythonapi
    python.PyCapsule_GetPointer.restype, python.PyCapsule_GetPointer.argtypes = c_void_p, [py_object, ctypes.c_char_p]
    exchange = _Exchange.from_address(python.PyCapsule_GetPointer(capsule, b"dlpack_exchange_api"))
    if exchange.major != 1 or not exchange.describe:
        return None
    names = ("PyTuple_Size", "PyTuple_GetItem", "PyList_Size", "PyList_GetItem", "PyObject_Type", "Py_DecRef", "PyErr_Clear")
    functions = [ctypes.cast(getattr(python, name), c_void_p).value for name in names]
    held = ctypes.PyDLL(str(library.LIBRARY))
    table = ctypes.POINTER(_Python)
    held.spg_describe_tensors.argtypes, held.spg_describe_tensors.restype = [table, py_object, c_void_p], c_int64
    held.spg_locate_tensors.argtypes, held.spg_locate_tensors.restype = [table, py_object, c_void_p, c_void_p], c_int32
    return held, _Python(*functions, exchange.describe, id(Tensor), id(torch.nn.Parameter))


def _by_description(lists: Lists, held: ctypes.PyDLL, python: _Python) -> Callable[[Lists], array | None]:
    words = held.spg_describe_tensors(python, lists, None)
    if words < 0:
        raise TypeError("lists: expected lists of plain tensors with memory of their own")
    description, blank = (c_int64 * words)(), array("Q", [0]) * sum(map(len, lists))
    held.spg_describe_tensors(python, lists, description)

    def locate(others: Lists) -> array | None:
        addresses = blank[:]
        return addresses if held.spg_locate_tensors(python, others, description, addresses.buffer_info()[0]) else None

    return locate


def locator(lists: Lists) -> Callable[[Lists], array | None]:
    """A function that gives the addresses of tensors of the same dtypes, devices, shapes and strides as these, in lists as
    long; None for others. It keeps no reference to a tensor. Negated views are not always told from others.
    """
    if (functions := _functions()) is not None:
        with contextlib.suppress(TypeError):
            return _by_description(lists, *functions)
    return _by_guard(lists)


def _by_guard(lists: Lists) -> Callable[[Lists], array | None]:
    flat = list(itertools.chain(*lists))
    holds, lengths = _guard(flat), list(map(len, lists))
    # Of a tensor that has elements, and none of nested ones, which a guard cannot be asked about.
    has_memory = [tensor.numel() > 0 for tensor in flat]

    def locate(others: Lists) -> array | None:
        flat = list(itertools.chain(*others))
        if list(map(len, others)) != lengths or any(getattr(tensor, "is_nested", False) for tensor in flat) or not holds(flat):
            return None
        addresses = addresses_of(others)
        return addresses if 0 not in addresses or all(map(bool, itertools.compress(addresses, has_memory))) else None

    return locate


def _guard(tensors: list[Tensor]) -> Callable[[list[Tensor]], bool]:
    """A function that says whether tensors have the types, dtypes, devices, shapes and strides of these."""
    if TensorGuards is None:
        described = describe(tensors)
        return lambda others: describe(others) == described
    # It says no to a tensor that comes twice, as the heads' one gamma does: repeats are held to the place they repeat.
    first: dict[int, int] = {}
    repeats = [(i, first[id(t)]) for i, t in enumerate(tensors) if first.setdefault(id(t), i) != i]
    kept = list(first.values())
    guards = TensorGuards(*(tensors[i] for i in kept), dynamic_dims_sizes=[list(tensors[i].shape) for i in kept],
                          dynamic_dims_strides=[list(tensors[i].stride()) for i in kept])
    if not repeats:
        return lambda others: guards.check(*others)
    return lambda others: all([others[i] is others[j] for i, j in repeats]) and guards.check(*[others[i] for i in kept])


def describe(tensors: list[Tensor]) -> list[tuple]:
    """All that there is to say of tensors besides their addresses and numbers; of what is none, its type."""
    return [(type(t), isinstance(t, Tensor) and t.layout == torch.strided and (t.dtype, t.device, t.shape, t.stride()))
            for t in tensors]

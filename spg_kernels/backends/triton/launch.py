"""What every launch needs: where it runs, tables of addresses on the device, chunk lists, workspaces, program counts.

A kernel takes a whole model through tables of int64: an address a tensor, and chunks, two words each. Tables are cached by
their content, so a step whose tensors stay where they are copies nothing to the device.
"""

import contextlib
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

# Off, so that every operation rounds as in the reference and Triton's changing default cannot change bits.
FP_FUSION = False
PROGRAMS_PER_MULTIPROCESSOR = 8
THREADS = 256  # of a program
INTERPRETER_PROGRAMS = 3
# Tables kept per device: a table is about 8 bytes a tensor, and a training loop cycles through few sets of addresses.
TABLES = 512
# Words of pinned memory for tables that are first needed during the capture of a CUDA graph.
CAPTURE_WORDS = 1 << 16
READY_USES = 64
READY_KINDS = 32  # of launches on one set of addresses

# Tests set this to run any kernel with another number of programs.
programs_override: int | None = None


class Place(NamedTuple):
    """Where a call runs: a device, the raw handle of its current stream, and whether that stream is capturing a graph."""

    device: torch.device
    stream: int
    capturing: bool


class _Table:
    """A tensor on the device, and the streams that may read it."""

    __slots__ = ("tensor", "uploaded", "streams", "kept")

    def __init__(self, tensor: Tensor, uploaded: "torch.cuda.Event | None", stream: int):
        self.tensor = tensor
        self.uploaded = uploaded
        self.streams = {stream}
        self.kept = False


_tables: dict[torch.device, OrderedDict] = {}
_kept: list[Tensor] = []  # what captured graphs read: their replays know only the address
_workspaces: dict[tuple, Tensor] = {}
_pinned: list = []  # [a pinned tensor, words handed out], made by uploads outside captures


def here(device: torch.device) -> Place:
    """The current stream of `device`; call it once a call."""
    if device.type == "cpu":
        return Place(device, 0, False)
    # As Triton asks for the stream: torch.cuda.current_stream makes an object of it first.
    return Place(device, torch._C._cuda_getCurrentRawStream(device.index), torch.cuda.is_current_stream_capturing())


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the current one: Triton launches on the current device, whatever the tensors say."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def table(place: Place, values: tuple[int, ...]) -> Tensor:
    """`values` as an int64 tensor on the device, from the cache or by one asynchronous copy."""
    return cached(place, values, lambda: torch.tensor(values, dtype=torch.int64, device="cpu"))


def cached(place: Place, key: tuple, make: Callable[[], Tensor]) -> Tensor:
    """The tensor `make` builds on the CPU, on the device; made and copied only if `key` is not in the cache.

    `key` must hold everything that the content depends on.
    """
    tables = _tables.setdefault(place.device, OrderedDict())
    found = tables.get(key)
    if found is None:
        if place.capturing:
            return _upload_in_capture(place, make())
        found = tables[key] = _upload(place, make())
        while len(tables) > TABLES:
            tables.popitem(last=False)
    else:
        try:
            tables.move_to_end(key)
        except KeyError:  # another thread needed its room meanwhile
            pass
        if place.stream not in found.streams:
            _share(found, place)
    if place.capturing and not found.kept:
        found.kept = True
        _kept.append(found.tensor)
    return found.tensor


def _upload(place: Place, values: Tensor) -> _Table:
    if place.device.type == "cpu":
        return _Table(values, None, place.stream)
    if not _pinned or _pinned[1] > CAPTURE_WORDS // 2:
        _kept.extend(_pinned[:1])
        _pinned[:] = torch.empty(CAPTURE_WORDS, dtype=torch.int64, device="cpu", pin_memory=True), 0
    with torch.cuda.device(place.device):
        # torch's allocator of pinned memory gives this block out again only when the copy is over.
        tensor = values.pin_memory().to(place.device, non_blocking=True)
        uploaded = torch.cuda.Event()
        uploaded.record()
    return _Table(tensor, uploaded, place.stream)


def _share(found: _Table, place: Place) -> None:
    """Let one more stream read a table that another one uploaded."""
    if place.capturing:
        return  # a capture may not wait for work outside it; torch.cuda.graph synchronizes the device before it begins
    stream = torch.cuda.current_stream(place.device)
    stream.wait_event(found.uploaded)
    found.tensor.record_stream(stream)
    found.streams.add(place.stream)


def _upload_in_capture(place: Place, values: Tensor) -> Tensor:
    """The copy becomes part of the graph, so its source is never used again; its target lives as the graph's memory does."""
    words = (values.nbytes + 7) // 8
    if not _pinned or _pinned[1] + words > _pinned[0].numel():
        raise RuntimeError("spg_kernels: this CUDA graph capture needs new address tables and there is no memory set aside "
                           "for them; run the step once outside the capture, on the same tensors")
    start = _pinned[1]
    _pinned[1] += words
    source = _pinned[0][start:start + words].view(values.dtype)[:values.numel()].view(values.shape)
    source.copy_(values)
    return torch.empty(values.shape, dtype=values.dtype, device=place.device).copy_(source, non_blocking=True)


def chunks(place: Place, sizes: tuple[int, ...], chunk: int, flagged: tuple[int, ...] = ()) -> tuple[Tensor, int]:
    """(table, count) of the pieces of at most `chunk` elements that tensors of these sizes fall into, in order.

    Two words a piece: its first element; then its tensor's index << 32 | its number of elements, and bit 62 set for the
    tensors in `flagged`. So bases are 64 bits wide and everything within a piece fits 32.
    """
    pieces = cached(place, ("chunks", chunk, sizes, flagged), lambda: _make_chunks(sizes, chunk, flagged))
    return pieces, pieces.shape[0]


def _make_chunks(sizes: tuple[int, ...], chunk: int, flagged: tuple[int, ...]) -> Tensor:
    size = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    pieces = (size + chunk - 1) // chunk
    index = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), pieces)
    start = (torch.arange(len(index), device="cpu") - (pieces.cumsum(0) - pieces)[index]) * chunk
    tag = torch.arange(len(sizes), device="cpu") << 32
    tag[list(flagged)] |= 1 << 62
    return torch.stack([start, tag[index] | (size[index] - start).clamp(max=chunk)], dim=1)


def workspace(place: Place, name: str, words: int) -> Tensor:
    """`words` int64 of scratch memory, zero when it is new, that launches named `name` on this stream share from then on.

    It is as the last launch left it. During a capture every call gets its own zeros: replays of two graphs cannot meet.
    """
    if place.capturing:
        return torch.zeros(words, dtype=torch.int64, device=place.device)
    key = (place.device, place.stream, name)
    found = _workspaces.get(key)
    if found is None or found.numel() < words:
        found = _workspaces[key] = torch.zeros(max(words, 1024), dtype=torch.int64, device=place.device)
    return found


@functools.cache
def warps(device: torch.device) -> int:
    """How many warps, of 32 or on some AMD devices 64 threads, make `THREADS`."""
    width = 32 if device.type == "cpu" else getattr(torch.cuda.get_device_properties(device), "warp_size", 32)
    return THREADS // width


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(place: Place, items: int) -> int:
    """How many programs to launch for `items` pieces of work."""
    if programs_override is not None:
        return min(programs_override, items)
    if place.device.type == "cpu":
        return min(INTERPRETER_PROGRAMS, items)
    return min(_multiprocessors(place.device) * PROGRAMS_PER_MULTIPROCESSOR, items)


class Arguments(NamedTuple):
    """What a launch takes: the pieces of work, the arguments before and after those that change from call to call."""

    items: int
    before: tuple
    after: tuple


class Ready(NamedTuple):
    """A kernel as Triton compiled it, and its arguments, with addresses in the place of tensors."""

    compiled: CompiledKernel
    arguments: Arguments
    kept: tuple  # the tensors
    uses: Iterator[int]


def run(kernel, place: Place, ready: dict[tuple, Ready], flags: tuple, values: tuple,
        prepare: Callable[[], Arguments]) -> None:
    """Launch `kernel` with (*before, *values, *after), and keep in `ready` what the next launch like it can use.

    In every launch Triton looks at every argument, to find the kernel that it compiled for arguments like these, then asks
    every tensor for its address, and the driver about that. It takes longer than the launch, and so do the tables that
    `prepare` looks up. Only one launch in `READY_USES` goes that way, which keeps its tables among those last used.

    Args:
        ready: of one set of addresses.
        flags: all that `prepare` depends on besides.
        values: numbers and tensors; of these Triton may expect that they begin at 16 bytes, as what torch allocates does.
    """
    key = (place.stream, id(kernel), flags, *[value.dtype if isinstance(value, Tensor) else type(value) for value in values])
    known = None if place.capturing else ready.get(key)
    if known is not None and next(known.uses) < READY_USES:
        items, before, after = known.arguments
        known.compiled[programs(place, items), 1, 1](*before, *values, *after)
        return
    items, before, after = prepare()
    compiled = kernel[programs(place, items), 1, 1](*before, *values, *after, num_warps=warps(place.device),
                                                    enable_fp_fusion=FP_FUSION)
    # The interpreter compiles nothing, and there is no end to the streams of code that makes its own.
    if isinstance(compiled, CompiledKernel) and not place.capturing and (key in ready or len(ready) < READY_KINDS):
        addresses = tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in before)
        ready[key] = Ready(compiled, Arguments(items, addresses, after), before, itertools.count())

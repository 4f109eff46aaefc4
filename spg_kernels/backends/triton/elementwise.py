"""soft_mask_ and update_mask_, one launch each for all tensors of a call, and the parts that the optimizer steps share.

A launch walks the chunks of `launch.chunks` in a static stride. Whole blocks run unmasked, so that every load and store is 16
bytes wide; one masked block ends a tensor. Arithmetic is in float32, rounded once.
"""

from array import array

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, plans

CHUNK = 16384
VECTORS = 2  # that a thread has under way at once from each tensor

ELEMENT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}


def keep_table() -> Tensor:
    """1 - gamma of the 256 codes: 2 / (1 + exp(2z)) at z = code / 28, and 0 from the code on whose gamma is 1 in float32."""
    code = torch.arange(256, dtype=torch.float64, device="cpu")
    return (2 / (1 + (code / 14).exp())).float().where(code < 253, 0.0)


def vector(*dtypes: torch.dtype) -> int:
    """Elements a thread takes at a time: 16 bytes of the widest dtype. Alike for all, or registers move between threads."""
    return 16 // max(dtype.itemsize for dtype in dtypes)


@triton.jit
def locate(chunks, item):
    """(first element, tensor, number of elements, whether gamma is one value) of a chunk."""
    start = tl.load(chunks + 2 * item)
    word = tl.load(chunks + 2 * item + 1)
    return start, (word >> 32) & 0x3FFFFFFF, (word & 0xFFFFFFFF).to(tl.int32), (word >> 62) != 0


@triton.jit
def address(table, tensor, start, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the chunk of a tensor begins. The hint must sit on the pointer itself, or loads stay one element wide."""
    pointer = tl.load(table + tensor).to(tl.pointer_type(ELEMENT)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def one_value_keep(gammas, tensor, one_value):
    """1 - gamma of a tensor whose gamma is one float32 value."""
    return 1 - tl.load(tl.load(gammas + tensor).to(tl.pointer_type(tl.float32)), mask=one_value, other=0)


@triton.jit
def load(pointer, offsets, count, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(pointer + offsets, mask=offsets < count, other=0)
    else:
        x = tl.load(pointer + offsets)
    return x.to(tl.float32)


@triton.jit
def store(pointer, offsets, x, count, MASKED: tl.constexpr):
    x = x.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + offsets, x, mask=offsets < count)
    else:
        tl.store(pointer + offsets, x)


@triton.jit
def load_keep(gamma, offsets, count, one_value, value, keeps, MASKED: tl.constexpr):
    """1 - gamma. `value` where gamma is one value: then nothing lies behind `gamma + offsets`."""
    # A predicate that is the same for the whole block keeps the load wide.
    wanted = tl.full(offsets.shape, 1, tl.int1) & (not one_value)
    if MASKED:
        wanted = wanted & (offsets < count)
    stored = tl.load(gamma + offsets, mask=wanted, other=0)
    if gamma.dtype.element_ty == tl.uint8:
        keep = tl.load(keeps + stored.to(tl.int32))
    else:
        keep = 1 - stored
    return tl.where(one_value, value, keep)


@triton.jit
def scale(x, keep):
    """keep * x, and 0 where keep = 0 whatever x is."""
    return tl.where(keep == 0, 0.0, x * keep)


@triton.jit
def blend(new, old, keep):
    """old + keep (new - old); every bit of `old` where keep = 0, of `new` where keep = 1."""
    return tl.where(keep == 0, old, tl.where(keep == 1, new, old + keep * (new - old)))


@triton.jit
def _soft_mask_block(grad, gamma, offsets, count, one_value, value, keeps, MASKED: tl.constexpr):
    g = load(grad, offsets, count, MASKED)
    keep = load_keep(gamma, offsets, count, one_value, value, keeps, MASKED)
    store(grad, offsets, scale(g, keep), count, MASKED)


@triton.jit(do_not_specialize=["items"])
def soft_mask_kernel(grads, gammas, keeps, chunks, items, GRAD: tl.constexpr, GAMMA: tl.constexpr, ALIGNED: tl.constexpr,
                     VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        start, tensor, count, one_value = locate(chunks, item)
        grad = address(grads, tensor, start, GRAD, ALIGNED)
        gamma = address(gammas, tensor, start, GAMMA, ALIGNED)
        value = one_value_keep(gammas, tensor, one_value)
        whole = count // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            _soft_mask_block(grad, gamma, first + lanes, count, one_value, value, keeps, False)
        if whole < count:
            _soft_mask_block(grad, gamma, whole + lanes, count, one_value, value, keeps, True)


@triton.jit
def _update_mask_block(param, old, gamma, offsets, count, one_value, value, keeps, MASKED: tl.constexpr):
    p = load(param, offsets, count, MASKED)
    before = load(old, offsets, count, MASKED)
    keep = load_keep(gamma, offsets, count, one_value, value, keeps, MASKED)
    store(param, offsets, blend(p, before, keep), count, MASKED)


@triton.jit(do_not_specialize=["items"])
def update_mask_kernel(parameters, old_params, gammas, keeps, chunks, items, PARAM: tl.constexpr, GAMMA: tl.constexpr,
                       ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        start, tensor, count, one_value = locate(chunks, item)
        param = address(parameters, tensor, start, PARAM, ALIGNED)
        old = address(old_params, tensor, start, PARAM, ALIGNED)
        gamma = address(gammas, tensor, start, GAMMA, ALIGNED)
        value = one_value_keep(gammas, tensor, one_value)
        whole = count // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            _update_mask_block(param, old, gamma, first + lanes, count, one_value, value, keeps, False)
        if whole < count:
            _update_mask_block(param, old, gamma, whole + lanes, count, one_value, value, keeps, True)


def launch_arguments(place: launch.Place, piece: plans.Piece, columns: tuple[plans.Words, ...], chunk: int,
                     after: tuple) -> launch.Arguments:
    """What every kernel takes for these lists of a piece, and where it finds 1 - gamma and its chunks."""
    pieces, items = launch.chunks(place, piece.sizes, chunk, piece.one_value)
    tables = [launch.table(place, column) for column in columns]
    return launch.Arguments(items, (*tables, launch.cached(place, ("keep",), keep_table), pieces, items), after)


def _mask(kernel, launches: plans.Launches, addresses: array) -> None:
    for piece in launches.pieces(addresses):
        group = piece.group
        if not any(piece.sizes):
            continue
        width = vector(group.dtype, group.gamma)
        after = (ELEMENT[group.dtype], ELEMENT[group.gamma], piece.aligned, width, launch.THREADS * width * VECTORS)
        with launch.on(group.device):
            place = launch.here(group.device)
            launch.run(kernel, place, piece.ready, (), (),
                       lambda: launch_arguments(place, piece, piece.columns, CHUNK, after))


def soft_mask_(launches: plans.Launches, addresses: array) -> None:
    _mask(soft_mask_kernel, launches, addresses)


def update_mask_(launches: plans.Launches, addresses: array) -> None:
    _mask(update_mask_kernel, launches, addresses)

"""accumulate_importance_: gamma <- max(gamma, |tanh((g - mean) / std)|) for a whole model in one launch.

Programs take work items from one in-order queue: a tile's statistics, a tile's fold into gamma, or both for a tensor of one
tile. A fold waits for statistics that stand earlier in the queue, so whoever holds them is already running, and nothing
deadlocks however few programs are resident. Items come in groups that fit the L2 cache: memory is read once for both.
"""

import functools
from array import array
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, plans
from .elementwise import ELEMENT, vector

# What a work item asks for; the host builds items as tile << 32 | tensor << 2 | kind.
STATISTICS, FOLD, BOTH = (tl.constexpr(kind) for kind in range(3))

# control[0] is the queue, control[1] counts programs out, then (tiles measured, statistics ready) for every tensor.
_HEADER = tl.constexpr(2)


@triton.jit
def _tile_moments(grad, count, STEP: tl.constexpr, LANES: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """(first element, mean - first element, M2) of a tile, sums of x - first in float64.

    Because the shift is itself an element, the cancellation in M2 is bounded by the tile's length, and a constant tile gives
    exactly 0.
    """
    lane = tl.max_contiguous(tl.arange(0, LANES), CONTIGUOUS)
    total = tl.zeros([LANES], tl.float64)
    square = tl.zeros([LANES], tl.float64)
    whole = count // STEP * STEP
    for start in range(0, whole, STEP):
        # Volatile keeps it in the loop: before it, a tile's own loads would wait a whole access to memory for this one.
        first = tl.load(grad, volatile=True).to(tl.float64)
        for part in tl.static_range(STEP // LANES):
            distance = tl.load(grad + (start + part * LANES + lane)).to(tl.float64) - first
            total += distance
            square = tl.fma(distance, distance, square)
    first = tl.load(grad, mask=count > 0, other=0.0).to(tl.float64)
    for start in range(whole, count, LANES):
        here = start + lane < count
        distance = tl.where(here, tl.load(grad + (start + lane), mask=here, other=0.0).to(tl.float64) - first, 0.0)
        total += distance
        square = tl.fma(distance, distance, square)
    sum = tl.sum(total)
    mean = sum / tl.maximum(count, 1).to(tl.float64)
    return first, mean, tl.sum(square) - sum * mean


@triton.jit
def _scale_of(magnitude):
    """The power of two, float32 and normal, that brings a float64 magnitude near 1, or as near as such a power can."""
    exponent = ((magnitude.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    exponent = tl.minimum(tl.maximum(exponent, -127), 126)
    return ((1023 - exponent) << 52).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _on_grid(x, STEP: tl.constexpr):
    """x rounded to a multiple of STEP, for |x| < 2^22 STEP: adding 1.5 * 2^23 STEP leaves no bits for anything finer."""
    return (x + 12582912.0 * STEP) - 12582912.0 * STEP


@triton.jit
def _tile_moments_float32(grad, count, TILE: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """`_tile_moments` with float32 arithmetic for every element, where float64 runs at a small fraction of its rate.

    The tile stays in registers: its largest magnitude, then its mean, then M2 around the mean, so that nothing cancels.
    Scaled values are cut at 2^-9 and 2^-20; the upper two cuts of up to 2^13 values add up exactly, in any order. So the mean
    is off by less than 2^-39 of the largest value, and by nothing if all share a binade, as where the mean hides the spread.
    """
    lane = tl.max_contiguous(tl.arange(0, TILE), CONTIGUOUS)
    here = lane < count
    if count == TILE:
        x = tl.load(grad + lane).to(tl.float32)
    else:
        x = tl.load(grad + lane, mask=here, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(x)).to(tl.float64))
    x = x * scale
    high = _on_grid(x, 2.0**-9)
    middle = _on_grid(x - high, 2.0**-20)
    sum = (tl.sum(high).to(tl.float64) + tl.sum(middle).to(tl.float64)) + tl.sum((x - high) - middle).to(tl.float64)
    first = tl.load(grad, mask=count > 0, other=0.0).to(tl.float64)
    scaled_first = first * scale.to(tl.float64)
    length = tl.maximum(count, 1).to(tl.float64)
    mean = (sum - count.to(tl.float64) * scaled_first) / length
    high, low = _split(scaled_first, mean)
    x = tl.where(here, (x - high) - low, 0.0)
    unit = 1.0 / scale.to(tl.float64)
    return first, mean * unit, tl.sum(x * x).to(tl.float64) * unit * unit


@triton.jit
def _split(shift, mean):
    """shift + mean as two float32: the nearest, and the rest, itself to float32's relative precision."""
    high = (shift + mean).to(tl.float32)
    return high, ((shift - high.to(tl.float64)) + mean).to(tl.float32)


@triton.jit
def _merged_moments(partials, tiles, numel, TILE: tl.constexpr, LANES: tl.constexpr):
    """(mean, M2) of a tensor from those of its tiles, in index order: the mean first, so that nothing cancels in M2."""
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    for start in range(0, tiles, LANES):
        tile = start + lane
        count = tl.minimum(numel - tile.to(tl.int64) * TILE, TILE).to(tl.float64)
        total += tl.where(tile < tiles, tl.load(partials + 2 * tile, mask=tile < tiles, other=0.0) * count, 0.0)
    mean = tl.sum(total) / numel.to(tl.float64)
    total = tl.zeros([LANES], tl.float64)
    for start in range(0, tiles, LANES):
        tile = start + lane
        count = tl.minimum(numel - tile.to(tl.int64) * TILE, TILE).to(tl.float64)
        distance = tl.load(partials + 2 * tile, mask=tile < tiles, other=0.0) - mean
        m2 = tl.load(partials + 2 * tile + 1, mask=tile < tiles, other=0.0)
        total += tl.where(tile < tiles, m2 + distance * distance * count, 0.0)
    return mean, tl.sum(total)


@triton.jit
def _standardization(first, mean, m2, numel, CODES: tl.constexpr):
    """(scale, high, low, factor, finite): |z| is ((g * scale - high) - low) * factor, in float32; with CODES 28 |z|.

    `scale` is a power of two that keeps every product in float32's range. `low` is at most the distance of any element from
    the mean, thus at most std, so its rounding is of no account. `factor` is 0 where nothing stands out, NaN if not finite.
    """
    finite = tl.abs(m2) < float("inf")
    std = tl.sqrt(m2 / tl.maximum(numel - 1, 1).to(tl.float64))
    scale = _scale_of(tl.maximum(tl.abs(first + mean), std))
    high, low = _split(first * scale.to(tl.float64), mean * scale.to(tl.float64))
    factor = (28.0 if CODES else 1.0) / (std * scale.to(tl.float64))
    factor = tl.where(m2 > 0, factor, tl.where(finite, 0.0, float("nan")))
    return scale, high, low, factor.to(tl.float32), finite


@triton.jit
def _tanh(x):
    """tanh for x >= 0 as x P(x^2) / Q(x^2), 2.1e-8 relative up to 9.02, where float32's tanh becomes 1. Nothing cancels."""
    x = tl.minimum(x, 9.02)
    y = x * x
    p = tl.fma(y, 1.33199094675e-8, 2.05841576983e-5)
    p = tl.fma(p, y, 0.00349407898398)
    p = tl.fma(p, y, 0.13379756538)
    p = tl.fma(p, y, 0.999999979307)
    q = tl.fma(y, 7.7623831919e-7, 0.000328316311277)
    q = tl.fma(q, y, 0.0258712458347)
    q = tl.fma(q, y, 0.467130718601)
    q = tl.fma(q, y, 1.0)
    return tl.minimum(x * p / q, 1.0)


@triton.jit
def _folded(gamma, grad, scale, high, low, factor):
    z = tl.abs(((grad.to(tl.float32) * scale - high) - low) * factor)
    if gamma.dtype == tl.uint8:
        return tl.maximum(gamma.to(tl.int32), tl.ceil(tl.minimum(z, 255.0)).to(tl.int32)).to(tl.uint8)
    else:
        return tl.maximum(gamma, _tanh(z))


@triton.jit
def _fold_tile(gamma, grad, count, scale, high, low, factor, STEP: tl.constexpr, LANES: tl.constexpr,
               CONTIGUOUS: tl.constexpr):
    # A step is one block, so that all its loads come before its stores: the compiler cannot tell that they never overlap.
    # Neither is needed again soon: the cache is for gradients that are still to be read a second time.
    whole = count // STEP * STEP
    for start in range(0, whole, STEP):
        at = start + tl.max_contiguous(tl.arange(0, STEP), CONTIGUOUS)
        g = tl.load(grad + at, eviction_policy="evict_first")
        old = tl.load(gamma + at, eviction_policy="evict_first")
        tl.store(gamma + at, _folded(old, g, scale, high, low, factor), eviction_policy="evict_first")
    for start in range(whole, count, LANES):
        at = start + tl.max_contiguous(tl.arange(0, LANES), CONTIGUOUS)
        g = tl.load(grad + at, mask=at < count, other=0.0)
        old = tl.load(gamma + at, mask=at < count, other=0)
        tl.store(gamma + at, _folded(old, g, scale, high, low, factor), mask=at < count)


@triton.jit(do_not_specialize=["n_items", "n_tensors"])
def accumulate_importance_kernel(
    items, n_items, tensors, n_tensors, grads, gammas, finites, control, partials, standardizations,
    GRAD: tl.constexpr, GAMMA: tl.constexpr, ALIGNED: tl.constexpr, FLOAT64: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, CONTIGUOUS: tl.constexpr,
    FOLD_LANES: tl.constexpr, FOLD_CONTIGUOUS: tl.constexpr,
):
    """gamma <- max(gamma, |tanh((g - mean) / std)|) for every tensor in the table.

    Args:
        items: int64, the work items in the order of the queue.
        tensors: int64, for each tensor its numel, the index of its first tile's partial, and its index in `finites`.
        grads, gammas: int64 addresses.
        finites: uint8, written for every tensor: 0 where a gradient is not finite, its gamma untouched.
        control: int32, `_HEADER + 2 n_tensors` zeros, zeros again at the end.
        partials: float64, (mean - the tensor's first element, M2) of every tile of the tensors of more than one.
        standardizations: float32, what `_standardization` returns for each tensor.
    """
    ticket = 0
    while ticket < n_items:
        ticket = tl.atomic_add(control, 1, sem="relaxed")
        if ticket < n_items:
            item = tl.load(items + ticket)
            kind = (item & 3).to(tl.int32)
            index = ((item >> 2) & 0x3FFFFFFF).to(tl.int32)
            tile = (item >> 32).to(tl.int32)
            numel = tl.load(tensors + 3 * index)
            begin = tile.to(tl.int64) * TILE
            count = tl.minimum(numel - begin, TILE).to(tl.int32)
            grad_address = tl.load(grads + index)
            gamma_address = tl.load(gammas + index)
            if ALIGNED:
                grad = tl.multiple_of(grad_address.to(tl.pointer_type(GRAD)), 16)
                gamma = tl.multiple_of(gamma_address.to(tl.pointer_type(GAMMA)), 16)
            else:
                grad = grad_address.to(tl.pointer_type(GRAD))
                gamma = gamma_address.to(tl.pointer_type(GAMMA))
            flags = control + _HEADER + 2 * index
            standardization = standardizations + 4 * index
            scale, high, low, factor = 0.0, 0.0, 0.0, 0.0

            if kind != FOLD:
                if FLOAT64:
                    shift, mean, m2 = _tile_moments(grad + begin, count, STEP, LANES, CONTIGUOUS)
                else:
                    shift, mean, m2 = _tile_moments_float32(grad + begin, count, TILE, CONTIGUOUS)
                first = tl.load(grad, mask=numel > 0, other=0.0).to(tl.float64)
                mean += shift - first
                complete = kind == BOTH
                if kind == STATISTICS:
                    tiles = ((numel + (TILE - 1)) // TILE).to(tl.int32)
                    partial = partials + 2 * tl.load(tensors + 3 * index + 1)
                    tl.store(partial + 2 * tile, mean)
                    tl.store(partial + 2 * tile + 1, m2)
                    tl.debug_barrier()
                    complete = tl.atomic_add(flags, 1, sem="acq_rel") == tiles - 1
                    if complete:
                        mean, m2 = _merged_moments(partial, tiles, numel, TILE, LANES)
                if complete:
                    scale, high, low, factor, finite = _standardization(first, mean, m2, numel, GAMMA == tl.uint8)
                    tl.store(finites + tl.load(tensors + 3 * index + 2), finite.to(tl.uint8))
                if complete & (kind == STATISTICS):
                    tl.store(standardization, scale)
                    tl.store(standardization + 1, high)
                    tl.store(standardization + 2, low)
                    tl.store(standardization + 3, factor)
                    tl.debug_barrier()
                    tl.atomic_xchg(flags + 1, 1, sem="release")

            if kind == FOLD:
                ready = 0
                while ready == 0:
                    ready = tl.atomic_add(flags + 1, 0, sem="acquire")
                scale = tl.load(standardization)
                high = tl.load(standardization + 1)
                low = tl.load(standardization + 2)
                factor = tl.load(standardization + 3)
            if (kind != STATISTICS) & (factor > 0):
                _fold_tile(gamma + begin, grad + begin, count, scale, high, low, factor, STEP, FOLD_LANES, FOLD_CONTIGUOUS)

    # Whoever is last out finds nobody waiting, and leaves the counters as the next launch, or replay, expects them.
    if tl.atomic_add(control + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        lane = tl.arange(0, LANES)
        words = 2 * n_tensors + _HEADER
        for start in range(0, words, LANES):
            tl.store(control + start + lane, 0, mask=start + lane < words)


RESIDENT = 3  # programs on a multiprocessor


class Tiling(NamedTuple):
    """How a device takes the work. `tile` and `step` count elements and are powers of two, 16 <= `step` <= `tile`.

    A `step` of fewer elements than all threads load at once, 1024 of float32 and 2048 of halves, they share: only one stores
    what several compute, and the loads of the others, of no use to anybody, race with its store.
    """

    tile: int = 16384  # at most 8192 without `float64`; long enough to outweigh an item's own waits: tickets, tables, flags
    step: int = 4096  # what an iteration of the full-block loops loads
    group_bytes: int = 10 << 20  # of gradient: two groups are in flight, and gamma streams past them through the L2 cache
    float64: bool = True  # statistics; else float32 for every element, float64 for a few values of a tile


def work_items(sizes: tuple[int, ...], itemsize: int, tiling: Tiling) -> Tensor:
    """The queue, int64: groups' statistics S and folds F in the order S0 S1 F0 S2 F1 ..., so that a fold seldom has to wait.

    Folds run backwards: of a tensor larger than the cache, what was read last is what the cache still has.
    """
    queue, folds, group, group_bytes = [], [], [], 0
    for tensor, size in enumerate(sizes):
        if group and group_bytes + size * itemsize > tiling.group_bytes:
            queue += group + folds
            folds, group, group_bytes = _folds(group), [], 0
        group.append(_statistics(tensor, size, tiling.tile))
        group_bytes += size * itemsize
    return torch.cat(queue + group + folds + _folds(group))


def _statistics(tensor: int, size: int, tile: int) -> Tensor:
    if size <= tile:
        return torch.tensor([tensor << 2 | BOTH.value], device="cpu")
    return (torch.arange(-(-size // tile), device="cpu") << 32) | (tensor << 2 | STATISTICS.value)


def _folds(group: list[Tensor]) -> list[Tensor]:
    return [tiles.flip(0) + (FOLD.value - STATISTICS.value) for tiles in reversed(group) if tiles[0] & 3 == STATISTICS.value]


def _tensor_table(sizes: tuple[int, ...], slots: tuple[int, ...], tile: int) -> Tensor:
    """numel, first partial, index of the answer, for every tensor."""
    size = torch.tensor(sizes, device="cpu")
    tiles = (size + tile - 1) // tile
    partials = tiles.where(tiles > 1, 0)
    return torch.stack([size, partials.cumsum(0) - partials, torch.tensor(slots, device="cpu")], dim=1)


@functools.cache
def tiling_of(device: torch.device) -> Tiling:
    """float64 where its arithmetic keeps up with memory: at half or a quarter of float32's rate, as in datacentre GPUs."""
    if device.type == "cpu":
        return Tiling()
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        fast = name in ("gfx906", "gfx908", "gfx90a", "gfx942", "gfx950")
    else:
        fast = torch.cuda.get_device_capability(device) in ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
    return Tiling() if fast else Tiling(tile=4096, float64=False)  # a float32 tile stays in registers


def kernel_constants(grad: torch.dtype, gamma: torch.dtype, aligned: bool, tiling: Tiling) -> dict:
    """The compile-time arguments of the kernel. A thread's vector is 16 bytes of the widest dtype that a loop touches."""
    contiguous, fold_contiguous = vector(grad), vector(grad, gamma)
    lanes, fold_lanes = (min(tiling.step, launch.THREADS * n) for n in (contiguous, fold_contiguous))
    return {
        "GRAD": ELEMENT[grad], "GAMMA": ELEMENT[gamma], "ALIGNED": aligned, "FLOAT64": tiling.float64,
        "TILE": tiling.tile, "STEP": tiling.step, "LANES": lanes, "CONTIGUOUS": contiguous,
        "FOLD_LANES": fold_lanes, "FOLD_CONTIGUOUS": fold_contiguous,
    }


def launch_options(warps: int, nvidia: bool) -> dict:
    """Left to itself ptxas spills for occupancy's sake, or takes too many registers for `RESIDENT`. HIP has no such option."""
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": launch.FP_FUSION}
    return {**options, "maxnreg": 65536 // (RESIDENT * launch.THREADS) // 8 * 8} if nvidia else options


def _programs(place: launch.Place, items: int) -> int:
    """As many as are resident at a time; any more would only find the queue empty."""
    if place.device.type == "cuda" and launch.programs_override is None:
        items = min(items, RESIDENT * torch.cuda.get_device_properties(place.device).multi_processor_count)
    return launch.programs(place, items)


def _accumulate(piece: plans.Piece, finite: Tensor) -> None:
    """One launch. `finite`, uint8, has an entry for each tensor of the call."""
    group = piece.group
    gammas, grads = piece.columns
    tiling = tiling_of(group.device)
    options = launch_options(launch.warps(group.device), group.device.type == "cuda" and not torch.version.hip)
    with launch.on(group.device):
        place = launch.here(group.device)
        items = launch.cached(place, ("importance items", piece.sizes, group.dtype.itemsize, tiling),
                              lambda: work_items(piece.sizes, group.dtype.itemsize, tiling))
        tensors = launch.cached(place, ("importance tensors", piece.sizes, piece.indices, tiling.tile),
                                lambda: _tensor_table(piece.sizes, piece.indices, tiling.tile))
        tiles = sum(-(-size // tiling.tile) for size in piece.sizes)
        accumulate_importance_kernel[(_programs(place, items.numel()),)](
            items, items.numel(), tensors, len(piece.sizes), launch.table(place, grads), launch.table(place, gammas),
            finite, launch.workspace(place, "importance", 1 + len(piece.sizes)).view(torch.int32),
            torch.empty(2 * tiles, dtype=torch.float64, device=group.device),
            torch.empty(4 * len(piece.sizes), dtype=torch.float32, device=group.device),
            **kernel_constants(group.dtype, group.gamma, piece.aligned, tiling), **options)


def accumulate_importance_(launches: plans.Launches, addresses: array) -> Tensor:
    """gamma <- max(gamma, a), in place. Returns a bool per tensor: False where a gradient is not finite, gamma untouched."""
    flags = {group.device: torch.empty(launches.count, dtype=torch.uint8, device=group.device) for group in launches.groups}
    for piece in launches.pieces(addresses):
        _accumulate(piece, flags[piece.group.device])
    finite = next(iter(flags.values())).view(torch.bool)
    for group in launches.groups:
        if group.device != finite.device:
            finite[list(group.indices)] = flags[group.device].view(torch.bool)[list(group.indices)].to(finite.device)
    return finite

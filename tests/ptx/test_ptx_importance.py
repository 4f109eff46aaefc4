"""The compiled importance kernel, run thread by thread: what it computes, and that its programs cannot meet wrongly."""

import math
import re

import pytest
import torch

from .cases import EVERYTHING  # first: it skips where there is no emulator
from spg_kernels import reference
from spg_kernels.backends.triton import importance, launch

from .. import oracle
from ..test_triton_importance_gpu import check_misaligned_views
from ..triton_cases import fold
from ..triton_importance_interpreted import BOTH_STATISTICS, DEFAULT, HARD, accumulate_both, assert_equals_the_oracle, zeros
from .emulator import PTXError

if EVERYTHING:  # what every backend is held to, with `backend` of conftest.py
    from ..test_ops import (  # noqa: F401
        test_a_non_finite_gradient_is_named_and_its_gamma_untouched,
        test_accumulation_is_a_running_maximum_and_folding_twice_changes_no_bit,
        test_eight_bit_codes_are_the_ceiling_of_28_z,
        test_importance_keeps_relative_precision_of_small_values,
    )

# As small as tiles can be with an element for every thread: in smaller ones threads share elements, and their reads of a gamma
# race with the store of the one that has it to store.
SMALL = importance.Tiling(tile=2048, step=2048, group_bytes=20_000)
SIZES = (0, 1, 2, 33, 2048, 2049, 1, 9000, 0, 5000)
GAMMAS = [torch.float32, torch.uint8]
DTYPES = oracle.DTYPES if EVERYTHING else [torch.float32, torch.bfloat16]


@pytest.fixture
def use(monkeypatch):
    """Makes the backend use a tiling, and a number of programs."""
    def use(tiling, float64=True, programs=5):
        monkeypatch.setattr(importance, "tiling_of", lambda device: tiling._replace(float64=float64))
        monkeypatch.setattr(launch, "programs_override", programs)
    return use


def gradients(dtype=torch.float32, kind="normal"):
    return [oracle.gradient(n, dtype, kind, seed) for seed, n in enumerate(SIZES)]


def control() -> torch.Tensor:
    return launch.workspace(launch.here(torch.device("cpu")), "importance", 1)


@BOTH_STATISTICS
@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_float64_oracle(driver, use, dtype, kind, float64):
    use(SMALL, float64)
    grads = gradients(dtype, kind)
    assert_equals_the_oracle(grads, *accumulate_both(grads))
    assert not control().any()


@BOTH_STATISTICS
@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__.strip("_"))
def test_hard_gradients(driver, use, make, float64):
    use(SMALL, float64)
    grads = [make(n) for n in (2, 9001)]
    assert_equals_the_oracle(grads, *accumulate_both(grads))


@pytest.mark.parametrize("tiling", [DEFAULT, importance.Tiling(tile=4096, float64=False)], ids=["float64", "float32"])
@pytest.mark.parametrize("dtype", oracle.DTYPES if EVERYTHING else [torch.float32], ids=str)
def test_tiles_as_on_a_gpu(driver, use, dtype, tiling):
    use(tiling, tiling.float64)
    grads = [oracle.gradient(n, dtype, "normal") for n in oracle.SIZES]
    assert_equals_the_oracle(grads, *accumulate_both(grads))


@BOTH_STATISTICS
def test_any_number_of_programs_in_any_order_gives_the_same_bits(driver, use, float64):
    """Of which no more than some are resident; on memory that holds what earlier launches left."""
    grads, results = gradients(), []
    for programs in (1, 2, 3, 16, 100):
        for resident in (1, 2, 3, 16):
            for seed in range(3 if EVERYTHING else 1):
                use(SMALL, float64, programs)
                driver.resident, driver.seed = resident, 1000 * seed + programs
                results.append(torch.cat([t.double() for part in accumulate_both(grads) for t in part]))
                assert not control().any()
    assert all(torch.equal(result, results[0]) for result in results)


@BOTH_STATISTICS
def test_memory_that_is_not_written_first_is_not_read(driver, use, monkeypatch, float64):
    use(SMALL, float64)
    grads = gradients()
    expected, empty = accumulate_both(grads), torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert all(torch.equal(a, b) for part, again in zip(expected, accumulate_both(grads)) for a, b in zip(part, again))


@BOTH_STATISTICS
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_non_finite_gradient_is_flagged_and_its_gamma_untouched(driver, use, bad, float64):
    use(SMALL, float64)
    places = {0: 0, 1: 0, 2: 2047, 3: 2048, 4: 4099, 6: 5}  # tensor: element
    for dtype in DTYPES:
        clean = [torch.randn(n).to(dtype) for n in (1, 4100, 2048, 4100, 4100, 130, 40, 1, 0)]
        grads = [grad.clone() for grad in clean]
        for tensor, element in places.items():
            grads[tensor][element] = bad
        gammas = [torch.full(grad.shape, 0.25) for grad in grads]
        codes = [torch.full(grad.shape, 9, dtype=torch.uint8) for grad in grads]
        assert fold(gammas + codes, grads + grads).tolist() == [i not in places for i in range(len(grads))] * 2
        assert all((gammas[i] == 0.25).all() and (codes[i] == 9).all() for i in places)
        expected = [torch.full(grad.shape, 0.25) for grad in grads]
        reference.accumulate_importance_(expected, clean)
        for i in set(range(len(grads))) - places.keys():
            assert torch.allclose(gammas[i], expected[i], rtol=0, atol=2e-6)


@BOTH_STATISTICS
@pytest.mark.parametrize("dtype, gamma_dtype", [(dtype, gamma) for dtype in oracle.DTYPES for gamma in GAMMAS] if EVERYTHING
                         else [(torch.bfloat16, torch.uint8)], ids=str)
def test_misaligned_views(driver, use, dtype, gamma_dtype, float64):
    use(SMALL, float64)
    check_misaligned_views(dtype, gamma_dtype, 5001, "cpu")


def test_more_than_two_to_the_31_elements(driver, tmp_path):
    """Zeros in a sparse file, but for the last two tiles; only these are in the queue, all others count as measured."""
    n, tile, alive = (1 << 31) + 20000, DEFAULT.tile, 20000
    grad = torch.from_file(str(tmp_path / "grad"), shared=True, size=n, dtype=torch.float16)
    gamma = torch.from_file(str(tmp_path / "gamma"), shared=True, size=n, dtype=torch.uint8)
    grad[-alive:] = torch.randn(alive).half()
    grad[-1] = 60000  # else 20000 values among so many zeros would all stand out
    tiles = -(-n // tile)
    items = torch.tensor([(t << 32) | kind.value for kind in (importance.STATISTICS, importance.FOLD)
                          for t in (tiles - 2, tiles - 1)])
    words = torch.tensor([0, 0, tiles - 2, 0], dtype=torch.int32)
    finite = torch.zeros(1, dtype=torch.uint8)
    start = (tiles - 2) * tile
    driver.watched = [(t.data_ptr() + i * t.itemsize, t.data_ptr() + j * t.itemsize, t.itemsize)
                      for t in (grad, gamma) for i, j in ((0, 1), (start, n))]
    importance.accumulate_importance_kernel[(2,)](
        items, len(items), torch.tensor([n, 0, 0]), 1, torch.tensor([grad.data_ptr()]), torch.tensor([gamma.data_ptr()]),
        finite, words, torch.zeros(2 * tiles, dtype=torch.float64), torch.empty(4),
        **importance.kernel_constants(grad.dtype, gamma.dtype, True, DEFAULT), num_warps=8, enable_fp_fusion=False)
    assert finite.item() == 1 and not words.any()
    x = grad[start:].double()
    mean = x.sum() / n
    std = (((x - mean).square().sum() + (n - len(x)) * mean.square()) / (n - 1)).sqrt()
    codes = (28 * (x - mean).abs() / std).ceil().clamp(max=255)
    assert (gamma[start:] != codes).float().mean() < 1e-3 and (gamma[start:] - codes).abs().max() <= 1


# What the emulator would find

def weaker(order: str, place: int, instead: str):
    """An edit that takes the memory order off an atomic."""
    def edit(ptx: str) -> str:
        parts = ptx.split(f".{order}.")
        return f".{order}.".join(parts[:place + 1]) + f".{instead}." + f".{order}.".join(parts[place + 1:])
    return edit


DEFECTS = [("release", 0, "relaxed"), ("acquire", 0, "relaxed"), ("acq_rel", 0, "acquire"), ("acq_rel", 0, "release"),
           ("acq_rel", 1, "acquire"), ("acq_rel", 1, "release")]


@pytest.mark.parametrize("float64", [True, False] if EVERYTHING else [True])
@pytest.mark.parametrize("order, place, instead", DEFECTS)
def test_every_memory_order_is_needed(driver, use, order, place, instead, float64):
    use(SMALL, float64)
    driver.edit = weaker(order, place, instead)
    grads = gradients()
    with pytest.raises(PTXError, match="global race.* of two programs"):
        fold(zeros(grads, torch.float32), grads)
    control().zero_()


def test_a_missing_barrier_is_found(driver, use):
    use(SMALL)
    driver.edit = lambda ptx: re.sub(r"(st\.shared(::cta)?\.b64 .*\n)(.*\n)*?.*bar\.sync.*", r"\1", ptx, count=1)
    with pytest.raises(PTXError, match="shared race.* of two warps"):
        fold(zeros(gradients(), torch.float32), gradients())
    control().zero_()


@pytest.mark.parametrize("resident", [1, 3])
def test_a_queue_in_the_wrong_order_deadlocks(driver, use, monkeypatch, resident):
    use(SMALL, programs=16)
    right = importance.work_items
    monkeypatch.setattr(importance, "work_items", lambda *args: right(*args).flip(0))
    monkeypatch.setattr(launch, "_tables", {})
    driver.resident = resident
    with pytest.raises(PTXError, match="deadlock: the programs wait for each other"):
        fold(zeros(gradients(), torch.float32), gradients())
    control().zero_()

"""The importance kernel in Triton's interpreter; `test_triton_interpreter.py` gives it a process of its own."""

import math
import os
import signal
import sys
import traceback

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from spg_kernels import reference
from spg_kernels.backends.triton import importance, launch

from . import oracle

# What every backend is held to, with `backend` below.
from .test_ops import (  # noqa: F401
    test_a_non_finite_gradient_is_named_and_its_gamma_untouched,
    test_eight_bit_codes_are_the_ceiling_of_28_z,
    test_importance_keeps_relative_precision_of_small_values,
)
from .triton_cases import fold

DEFAULT = importance.Tiling()
# Tensors of a few hundred elements then have many tiles, and a few of them make many groups.
SMALL = importance.Tiling(tile=128, step=32, group_bytes=1024)
SIZES = (0, 1, 2, 33, 128, 129, 1, 700, 0, 300)
BOTH_STATISTICS = pytest.mark.parametrize("float64", [True, False], ids=["float64", "float32"])


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture
def use(monkeypatch):
    """Makes the backend use a tiling."""
    def use(tiling, float64=True):
        monkeypatch.setattr(importance, "tiling_of", lambda device: tiling._replace(float64=float64))
    return use


def gradient(n, dtype, kind, seed=0):
    """Without bfloat16's subnormals, which the interpreter converts wrongly; a GPU shifts them into float32 exactly."""
    grad = oracle.gradient(n, dtype, kind, seed)
    return grad.where(grad.abs() >= torch.finfo(dtype).tiny, 0) if dtype == torch.bfloat16 else grad


def zeros(grads, dtype):
    return [torch.zeros(grad.shape, dtype=dtype) for grad in grads]


def assert_equals_the_oracle(grads, gammas, codes):
    for grad, gamma, code in zip(grads, gammas, codes, strict=True):
        if not grad.numel():
            continue
        exact = oracle.importance(grad)
        assert (gamma.double() - exact).abs().max() <= 2e-6, grad.numel()
        assert gamma.max() <= 1
        # tanh hides |z| where it is large; the code there is checked from the reference's z.
        z = reference.standardize(grad).abs() * 28
        assert (z.div(28).tanh() - exact).abs().max() <= 1e-6
        away_from_a_border = ((z - z.round()).abs() > 1e-4) | (z == 0) | (z > 256)
        assert torch.equal(code[away_from_a_border].double(), z.ceil().clamp(max=255)[away_from_a_border])
        assert ((code.double() - z.clamp(max=255)) < 1 + 1e-4).all() and (code.double() > z.clamp(max=255) - 1e-4).all()
        if not exact.any():
            assert not gamma.any() and not code.any()


def accumulate_both(grads):
    """(gammas, codes) of one call that takes both dtypes of gamma, so two launches."""
    gammas, codes = zeros(grads, torch.float32), zeros(grads, torch.uint8)
    finite = fold(gammas + codes, grads + grads)
    assert finite.dtype == torch.bool and finite.tolist() == [True] * (2 * len(grads))
    return gammas, codes


@BOTH_STATISTICS
@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_equals_the_float64_oracle(use, dtype, kind, float64):
    use(DEFAULT if float64 else importance.Tiling(tile=4096), float64)
    sizes = oracle.SIZES if kind == "normal" and float64 else [n for n in oracle.SIZES if n <= 16384]
    grads = [gradient(n, dtype, kind) for n in sizes]
    assert_equals_the_oracle(grads, *accumulate_both(grads))


@BOTH_STATISTICS
@pytest.mark.parametrize("kind", ("normal", "huge", "tiny", "mean >> std", "outlier first", "constant"))
def test_equals_the_float64_oracle_with_many_tiles_and_groups(use, kind, float64):
    use(SMALL, float64)
    grads = [gradient(n, torch.float32, kind, seed) for seed, n in enumerate(SIZES)]
    assert_equals_the_oracle(grads, *accumulate_both(grads))


def _ones(n):
    return torch.ones(n)


def _one_step_up_among_ones(n):
    x = torch.ones(n)
    x[n // 3] = torch.nextafter(x[0], torch.tensor(2.0))
    return x


def _largest_float32(n):
    return torch.where(torch.arange(n) % 2 == 0, 3.4e38, -3.4e38)


def _smallest_float32(n):
    return torch.arange(n).remainder(3).float() * 1e-45


def _large_first_of_equal_ones(n):
    return torch.cat([torch.full((1,), 3e38), torch.full((n - 1,), 1e-3)])


def _small_spread_beside_large_shift(n):
    return torch.cat([torch.full((1,), -1e6), 1e6 + torch.rand(n - 1)])


def _zeros_then_one_small(n):
    return torch.cat([torch.zeros(n - 1), torch.full((1,), 1e-30)])


def _from_subnormal_to_huge(n):
    return 10.0 ** torch.linspace(-44, 38, n)


HARD = (_ones, _one_step_up_among_ones, _largest_float32, _smallest_float32, _large_first_of_equal_ones,
        _small_spread_beside_large_shift, _zeros_then_one_small, _from_subnormal_to_huge)


@BOTH_STATISTICS
@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__.strip("_"))
def test_hard_gradients(use, make, float64):
    for tiling, sizes in ((SMALL, (2, 400)), (importance.Tiling(tile=4096), (4096, 9001))):
        use(tiling, float64)
        grads = [make(n) for n in sizes]
        assert_equals_the_oracle(grads, *accumulate_both(grads))


@BOTH_STATISTICS
def test_any_number_of_programs_gives_the_same_bits(use, monkeypatch, float64):
    use(SMALL, float64)
    grads = [gradient(n, torch.float32, "normal", seed) for seed, n in enumerate(SIZES)]
    results = []
    for programs in (1, 3, 500):
        monkeypatch.setattr(launch, "programs_override", programs)
        results.append(torch.cat([t.double() for part in accumulate_both(grads) for t in part]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.uint8], ids=str)
def test_a_running_maximum_and_folding_twice_changes_no_bit(use, gamma_dtype):
    use(SMALL)
    expected = gammas = [torch.zeros(n, dtype=gamma_dtype) for n in SIZES]
    for task in range(2):
        grads = [gradient(n, torch.float32, "normal", seed=100 * task) for n in SIZES]
        own = zeros(grads, gamma_dtype)
        fold(own, grads)
        expected = [torch.maximum(e, o) for e, o in zip(expected, own)]
        for _ in range(2):
            fold(gammas, grads)
            assert all(torch.equal(gamma, e) for gamma, e in zip(gammas, expected))


@BOTH_STATISTICS
@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_a_non_finite_gradient_is_flagged_and_its_gamma_untouched(use, bad, float64):
    use(SMALL, float64)
    places = {0: 0, 1: 0, 2: 127, 3: 128, 4: 299, 6: 5}  # tensor: element
    for dtype in (torch.float32, torch.bfloat16):
        clean = [torch.randn(n).to(dtype) for n in (1, 300, 128, 300, 300, 130, 40, 1, 0)]
        grads = [grad.clone() for grad in clean]
        for tensor, element in places.items():
            grads[tensor][element] = bad
        gammas = [torch.full(grad.shape, 0.25) for grad in grads]
        codes = [torch.full(grad.shape, 9, dtype=torch.uint8) for grad in grads]
        finite = fold(gammas + codes, grads + grads)
        assert finite.tolist() == [i not in places for i in range(len(grads))] * 2
        for i, (gamma, code) in enumerate(zip(gammas, codes)):
            if i in places:
                assert (gamma == 0.25).all() and (code == 9).all()
        expected = [torch.full(grad.shape, 0.25) for grad in grads]
        reference.accumulate_importance_(expected, clean)
        for i in set(range(len(grads))) - places.keys():
            assert torch.allclose(gammas[i], expected[i], rtol=0, atol=2e-6)


def test_misaligned_views_and_mixed_dtypes_in_one_call(use):
    use(SMALL)
    n = 200
    grads, gammas = [], []
    for i, dtype in enumerate(oracle.DTYPES * 2):
        for gamma_dtype in (torch.float32, torch.uint8):
            grads.append(gradient(n + i, dtype, "normal", seed=i)[i % 2:])
            gammas.append(torch.zeros(n + 8, dtype=gamma_dtype)[i % 3:][:grads[-1].numel()])
    assert any(grad.data_ptr() % 16 for grad in grads)
    assert fold(gammas, grads).all()
    for grad, gamma in zip(grads, gammas):
        own = reference.decode(gamma) if gamma.dtype == torch.uint8 else gamma
        exact = oracle.importance(grad)
        assert (own - exact).min() >= -2e-6 and (own - exact).max() <= (2e-6 if gamma.dtype == torch.float32 else 0.04)
    for gamma in gammas:  # nothing before or after the view
        whole = gamma.as_strided((n + 8,), (1,), 0)
        assert not whole[:gamma.storage_offset()].any() and not whole[gamma.storage_offset() + gamma.numel():].any()


@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.uint8], ids=str)
def test_more_than_two_to_the_31_elements(tmp_path, gamma_dtype):
    """Zeros in a sparse file, but for the last two tiles; only these are in the queue, all others count as measured."""
    n, tile, alive = (1 << 31) + 20000, DEFAULT.tile, 20000
    grad = torch.from_file(str(tmp_path / "grad"), shared=True, size=n, dtype=torch.float16)
    gamma = torch.from_file(str(tmp_path / "gamma"), shared=True, size=n, dtype=gamma_dtype)
    grad[-alive:] = torch.randn(alive).half()
    grad[-1] = 60000  # else 20000 values among so many zeros would all stand out
    tiles = -(-n // tile)
    items = torch.tensor([(t << 32) | kind.value for kind in (importance.STATISTICS, importance.FOLD)
                          for t in (tiles - 2, tiles - 1)])
    control = torch.tensor([0, 0, tiles - 2, 0], dtype=torch.int32)
    finite = torch.zeros(1, dtype=torch.uint8)
    importance.accumulate_importance_kernel[(2,)](
        items, len(items), torch.tensor([n, 0, 0]), 1,
        torch.tensor([grad.data_ptr()]), torch.tensor([gamma.data_ptr()]), finite,
        control, torch.zeros(2 * tiles, dtype=torch.float64), torch.empty(4),
        **importance.kernel_constants(grad.dtype, gamma_dtype, True, DEFAULT))
    assert finite.item() == 1 and not control.any()
    x = grad[(tiles - 2) * tile:].double()
    mean = x.sum() / n
    std = (((x - mean).square().sum() + (n - len(x)) * mean.square()) / (n - 1)).sqrt()
    z = (x - mean).abs() / std
    actual = gamma[(tiles - 2) * tile:].double()
    if gamma_dtype == torch.float32:
        assert (actual - z.tanh()).abs().max() <= 2e-6
    else:
        assert (actual == (28 * z).ceil().clamp(max=255)).float().mean() > 0.999
        assert (actual - (28 * z).ceil().clamp(max=255)).abs().max() <= 1
    for elsewhere in (0, (tiles - 2) * tile - (1 << 31), (tiles - 3) * tile):
        assert not gamma[max(0, elsewhere):][:tile].any()


def test_counters_are_zero_again_and_statistics_need_no_initial_values(use, monkeypatch):
    use(SMALL)
    grads = [gradient(n, torch.float32, "normal", seed) for seed, n in enumerate(SIZES)]
    expected = accumulate_both(grads)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert all(torch.equal(a, b) for part, again in zip(expected, accumulate_both(grads)) for a, b in zip(part, again))
    assert not launch.workspace(launch.here(torch.device("cpu")), "importance", 1).any()


@BOTH_STATISTICS
def test_processes_that_race_give_the_same_bits(float64):
    """Each process is one program of the grid, on memory that all share: the interpreter's atomics are the CPU's own.

    Other tests run programs one after another. Here folds do wait, for statistics that another program has yet to finish.
    """
    tiling, programs = SMALL._replace(float64=float64), 4
    grads = [gradient(n, torch.float32, "normal", seed) for seed, n in enumerate((400, 64, 1, 600, 0, 300, 700, 65))]
    grads[5][7] = math.nan
    sizes = tuple(grad.numel() for grad in grads)
    items = importance.work_items(sizes, 4, tiling)
    tables = [items, importance._tensor_table(sizes, tuple(range(len(grads))), tiling.tile)]

    def run(grid):
        importance.accumulate_importance_kernel[grid](
            items, len(items), tables[1], len(grads), *addresses, finite, control, partials, standardizations,
            **importance.kernel_constants(torch.float32, torch.float32, True, tiling))

    results = []
    for racing in (False, True, True):
        gammas = [torch.zeros(n).share_memory_() for n in sizes]
        finite = torch.full((len(grads),), 77, dtype=torch.uint8).share_memory_()
        control = torch.zeros(2 + 2 * len(grads), dtype=torch.int32).share_memory_()
        partials = torch.full((2 * len(items),), math.nan, dtype=torch.float64).share_memory_()
        standardizations = torch.full((4 * len(grads),), math.nan).share_memory_()
        addresses = [torch.tensor([t.data_ptr() for t in tensors]) for tensors in (grads, gammas)]
        if racing:
            _race(run, programs)
        else:
            run((1,))
        assert not control.any()
        results.append(torch.cat([*gammas, finite.float()]))
    assert results[0][-len(grads):].tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
    assert all(torch.equal(result, results[0]) for result in results)


def _race(run, programs):
    children = []
    for _ in range(programs):
        child = os.fork()
        if not child:
            _program(run, programs)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * programs


def _program(run, programs):
    """Runs one program of a grid in this forked process, and ends it."""
    status = 1
    try:
        signal.alarm(60)  # a deadlock ends the process, and so fails the test
        set_grid_dim = interpreter_builder.set_grid_dim
        interpreter_builder.set_grid_dim = lambda *_: set_grid_dim(programs, 1, 1)
        run((1,))
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    os._exit(status)

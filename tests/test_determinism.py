"""The same bits on every run: for any number of threads, any slicing and order of the lists, AVX2 and AVX-512 alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spg_kernels
from spg_kernels.backends.library import CAPS

from . import oracle

SIZES = (7, 0, 131073, 40000, 3, 1, 65537, 16384)
OPERATORS = ("accumulate_importance_", "soft_mask_", "update_mask_", "masked_sgd_", "masked_adamw_")


def lists_for(op: str, dtype: torch.dtype, gamma: str) -> tuple[list, dict]:
    """An operator's lists over SIZES, the same ones every time, and its settings."""
    generator = torch.Generator().manual_seed(0)

    def draw(uniform: bool = False) -> list[torch.Tensor]:
        make = torch.rand if uniform else torch.randn
        return [make(n, generator=generator).to(dtype) for n in SIZES]

    gammas = [torch.rand(n, generator=generator) for n in SIZES]
    if gamma == "8-bit":
        gammas = [(g * 255).to(torch.uint8) for g in gammas]
    if op == "accumulate_importance_":
        return [gammas, draw()], {}
    if op == "soft_mask_":
        return [draw(), gammas], {}
    if op == "update_mask_":
        return [draw(), draw(), gammas], {}
    if op == "masked_sgd_":
        return [draw(), draw(), gammas, draw()], {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    return ([draw(), draw(), gammas, draw(), draw(uniform=True), [], [torch.tensor(3.0) for _ in SIZES]],
            {"lr": 0.1, "eps": 1e-3})


def run(op: str, dtype: torch.dtype, gamma: str, backend: str = "native", parts: tuple[slice, ...] = (slice(None),)) -> list:
    lists, settings = lists_for(op, dtype, gamma)
    for part in parts:
        getattr(spg_kernels, op)(*(tensors[part] for tensors in lists), backend=backend, **settings)
    return [tensor for tensors in lists for tensor in tensors]


def same_bits(results: list, others: list) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("gamma", ["float32", "8-bit"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_threads_slicing_and_order_change_no_bit(op, dtype, gamma, threads):
    threads(1)
    once = run(op, dtype, gamma)
    for count in (1, 2, 3, 4):
        threads(count)
        assert same_bits(run(op, dtype, gamma), once)
    in_pieces = tuple(slice(i, i + 1) for i in range(len(SIZES)))
    for parts in ((slice(None, None, -1),), (slice(3, None), slice(3)), in_pieces):
        assert same_bits(run(op, dtype, gamma, parts=parts), once)


def test_importance_is_the_same_however_threads_group_the_list(threads):
    """A group is a MiB of gradients a thread: with another number of threads, other tensors are measured together."""
    grads = [torch.randn(n) for n in (7, 131073, 40000, 3, 700001)]
    results = []
    for count in (1, 2, 3):
        threads(count)
        gammas = [torch.zeros_like(grad) for grad in grads]
        spg_kernels.accumulate_importance_(gammas, grads, backend="native")
        results.append(gammas)
    assert same_bits(results[1], results[0]) and same_bits(results[2], results[0])


@pytest.mark.parametrize("op", OPERATORS)
def test_the_reference_is_the_same_for_any_slicing_too(op):
    assert same_bits(run(op, torch.float32, "float32", "reference"),
                     run(op, torch.float32, "float32", "reference", (slice(4, None), slice(4))))


def every_case() -> dict:
    return {(op, str(dtype), gamma): run(op, dtype, gamma)
            for op in OPERATORS for dtype in oracle.DTYPES for gamma in ("float32", "8-bit")}


def recorded(capability: str, folder: Path) -> dict:
    """What every operator gives in a process of its own with this instruction set."""
    path = folder / capability
    script = "import sys, torch, tests.test_determinism as t; torch.save(t.every_case(), sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, path], check=True, cwd=Path(__file__).parent.parent,
                   env={**os.environ, "SPG_CPU_CAPABILITY": capability})
    return torch.load(path)


def test_instruction_sets_give_the_same_bits_and_the_baseline_is_within_rounding(tmp_path):
    widest, avx512, avx2, baseline = (recorded(capability, tmp_path) for capability in CAPS)
    for case, results in widest.items():
        assert same_bits(avx512[case], results) and same_bits(avx2[case], results), case
        for a, b in zip(baseline[case], results):  # no fused multiply-add there: sums are rounded once more
            if a.dtype == torch.uint8:
                assert ((a.int() - b.int()).abs() <= 1).all(), case
            else:
                eps = torch.finfo(a.dtype).eps
                assert ((a.double() - b.double()).abs() <= 4 * eps * (b.double().abs() + 1)).all(), case

"""The compiled masks and steps, run thread by thread."""

import pytest
import torch

from .cases import EVERYTHING  # first: it skips where there is no emulator
import spg_kernels
from spg_kernels.backends.tensors import addresses_of
from spg_kernels.backends.triton import elementwise, launch, plans

from ..triton_cases import CASES, GAMMAS, compare_with_float64, copies, equal, inputs

if EVERYTHING:  # what every backend is held to, with `backend` of conftest.py
    from ..test_grad_scaler import (  # noqa: F401
        step_lists,
        test_a_scaled_step_has_the_bits_of_a_step_on_unscaled_gradients,
        test_found_inf_changes_nothing_at_all,
    )
    from ..test_ops import (  # noqa: F401
        test_a_masked_step_freezes_gamma_one_whatever_the_gradient,
        test_every_code_masks_by_its_own_factor_to_the_bit,
        test_every_half_is_converted_exactly_and_rounded_to_nearest_even,
        test_masked_adamw_without_importance_is_torch_adamw,
        test_masked_sgd_without_importance_is_torch_sgd,
        test_masked_steps_equal_the_float64_formula,
        test_masks_at_gamma_zero_and_one_keep_every_bit,
        test_soft_mask_is_within_two_ulp,
        test_update_mask_is_within_two_ulp,
    )

# (parameters, states), gammas
KINDS = [((dtype, state_dtype), gamma_kind) for dtype in (torch.float32, torch.bfloat16, torch.float16)
         for state_dtype in sorted({torch.float32, dtype}, key=str) for gamma_kind in GAMMAS]
SOME = [((torch.float32, torch.float32), "8-bit"), ((torch.bfloat16, torch.float32), "8-bit"),
        ((torch.float16, torch.float16), "float32")]
NAMES = {"ids": lambda x: x if isinstance(x, str) else ""}


def run(op: str, lists, settings: dict) -> None:
    getattr(spg_kernels, op)(*lists, **settings, backend="triton")


@pytest.mark.parametrize("dtypes, gamma_kind", KINDS if EVERYTHING else SOME, ids=str)
@pytest.mark.parametrize("op, settings", CASES, **NAMES)
def test_no_kernel_errs_more_than_twice_what_the_reference_does(driver, op, settings, dtypes, gamma_kind):
    launches = driver.launches
    compare_with_float64(op, settings, inputs(op, *dtypes, gamma_kind))
    assert driver.launches == launches + 1


@pytest.mark.parametrize("op, settings", CASES, **NAMES)
def test_any_number_of_programs_gives_the_same_bits(driver, op, settings, monkeypatch):
    results = []
    for programs, resident in ((1, 1), (3, 16), (64, 2), (64, 16)):
        monkeypatch.setattr(launch, "programs_override", programs)
        driver.resident = resident
        results.append(inputs(op, torch.float32, torch.float32, "8-bit", [(n,) for n in (3, 50000, 0, 700, 8192)]))
        run(op, results[-1], settings)
    assert all(equal(lists, results[0]) for lists in results[1:])


@pytest.mark.parametrize("dtypes, gamma_kind", KINDS if EVERYTHING else SOME[:1], ids=str)
@pytest.mark.parametrize("op, settings", CASES, **NAMES)
def test_misaligned_views_give_the_bits_of_aligned_tensors(driver, op, settings, dtypes, gamma_kind):
    lists = inputs(op, *dtypes, gamma_kind, [(n,) for n in (5, 1024, 9000, 2049)])
    shifted = tuple([torch.cat([t.new_zeros(1), t])[1:] if t.dim() and i % 2 else t.clone() for i, t in enumerate(tensors)]
                    for tensors in lists)
    assert {piece.aligned for piece in plans.PLANS.make(op, shifted)[0].launch.pieces(addresses_of(shifted))} == {True, False}
    for arguments in (lists, shifted):
        run(op, arguments, settings)
    assert equal(lists, shifted)


@pytest.mark.parametrize("amsgrad", [True, False], ids=["amsgrad", ""])
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
def test_step_counts_on_the_device_give_the_same_step(driver, monkeypatch, found, amsgrad):
    """Of more tensors than a program of the kernel that counts them takes at a time."""
    lists = inputs("masked_adamw_", torch.float32, torch.float32, "8-bit", [(40, 30)] + [(2,)] * 300)
    lists = lists if amsgrad else (*lists[:5], [], lists[6])
    before, twin = copies(lists), copies(lists)
    settings = dict(lr=0.1, found_inf=None if found is None else torch.tensor([found]))
    run("masked_adamw_", lists, settings)
    monkeypatch.setattr(plans, "on_host", lambda step: False)
    monkeypatch.setattr(plans.PLANS, "_plans", {})
    run("masked_adamw_", twin, settings)
    assert equal(lists, twin) and equal(lists, before) == bool(found)


def test_launches_kept_ready_are_right_too(driver):
    lists = inputs("masked_sgd_", torch.float32, torch.float32, "8-bit")
    twin, settings = copies(lists), dict(lr=0.1, momentum=0.9)
    for _ in range(3):
        run("masked_sgd_", lists, settings)
        plans.PLANS._plans.clear()
        run("masked_sgd_", twin, settings)
        assert equal(lists, twin)
    assert driver.launches


def test_a_chunk_past_31_bits_of_elements(driver, tmp_path):
    """Of a sparse file, two chunks before and two after the border."""
    border, count = 1 << 31, elementwise.CHUNK
    grad = torch.from_file(str(tmp_path / "grad"), shared=True, size=border + 2 * count, dtype=torch.bfloat16)
    codes = torch.from_file(str(tmp_path / "codes"), shared=True, size=border + 2 * count, dtype=torch.uint8)
    part = slice(border - 2 * count, border + 2 * count)
    grad[part], codes[part] = 1, torch.randint(0, 256, (4 * count,), dtype=torch.uint8)
    expected = [grad[part].clone()]
    run("soft_mask_", (expected, [codes[part].clone()]), {})
    driver.watched = [(t.data_ptr() + part.start * t.itemsize, t.data_ptr() + part.stop * t.itemsize, t.itemsize)
                      for t in (grad, codes)]
    chunks = torch.tensor([[part.start + k * count, count] for k in range(4)])
    elementwise.soft_mask_kernel[(2,)](torch.tensor([grad.data_ptr()]), torch.tensor([codes.data_ptr()]),
                                       elementwise.keep_table(), chunks, 4, *_constants(), num_warps=8, enable_fp_fusion=False)
    assert torch.equal(grad[part], expected[0])


def _constants() -> tuple:
    width = elementwise.vector(torch.bfloat16, torch.uint8)
    return (elementwise.ELEMENT[torch.bfloat16], elementwise.ELEMENT[torch.uint8], True, width,
            launch.THREADS * width * elementwise.VECTORS)

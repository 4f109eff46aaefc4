"""The bytes that compiled kernels move: of every number that a pass needs one load, of every one that it changes one store."""

import pytest
import torch

from .cases import EVERYTHING  # first: it skips where there is no emulator
import spg_kernels
from spg_kernels.backends.triton import importance, launch

from ..triton_cases import fold, inputs

SHAPES = [(50_000,), (3,)]
ELEMENTS = 50_003
# How often an element of a parameter or gradient, and of a state, is loaded or stored.
ACCESSES = {"soft_mask_": (2, 0), "update_mask_": (3, 0), "masked_sgd_": (3, 2), "masked_adamw_": (3, 4), "amsgrad": (3, 6)}
HALVES = [torch.bfloat16, torch.float16] if EVERYTHING else [torch.bfloat16]
DTYPES = [(torch.float32, torch.float32), *((half, half) for half in HALVES)]
if EVERYTHING:
    DTYPES += [(half, torch.float32) for half in HALVES]
CASES = [(name, *dtypes) for name, (_, state) in ACCESSES.items() for dtypes in DTYPES if state or len(set(dtypes)) == 1]


@pytest.mark.parametrize("gamma_kind, gamma_bytes", [("float32", 4), ("8-bit", 1)])
@pytest.mark.parametrize("name, dtype, state_dtype", CASES, ids=str)
def test_a_mask_or_step_moves_every_number_once(driver, name, dtype, state_dtype, gamma_kind, gamma_bytes):
    op = "masked_adamw_" if name == "amsgrad" else name
    own, state = ACCESSES[name]
    lists = inputs(op, dtype, state_dtype, gamma_kind, SHAPES)
    if name == "masked_adamw_":
        lists = (*lists[:5], [], lists[6])
    settings = {"masked_sgd_": dict(lr=0.1, momentum=0.9), "masked_adamw_": dict(lr=0.1)}.get(op, {})
    getattr(spg_kernels, op)(*lists, **settings, backend="triton")
    assert driver.moved == ELEMENTS * (own * dtype.itemsize + state * state_dtype.itemsize + gamma_bytes)


@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_importance_loads_a_gradient_twice_and_gamma_once(driver, monkeypatch, dtype, gamma_dtype):
    """And of a step's statistics every thread the tile's first element, which is one access to memory."""
    tiling = importance.Tiling()
    monkeypatch.setattr(importance, "tiling_of", lambda device: tiling)
    grads = [torch.randn(n).to(dtype) for n in (50_000, 3)]
    fold([torch.zeros(grad.shape, dtype=gamma_dtype) for grad in grads], grads)
    steps = ELEMENTS / tiling.step + 2 * 4 + 1  # and at most twice more a tile: for its last elements, and the tensor's shift
    least = ELEMENTS * (2 * dtype.itemsize + 2 * gamma_dtype.itemsize)
    assert least <= driver.moved <= least + steps * launch.THREADS * dtype.itemsize

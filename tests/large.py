"""Large models on a CPU: `pytest tests/large.py`, a minute and 12 GB of free memory. Not in the default run."""

import pytest
import torch

from bench.machine import available_bytes, peak_extra_bytes
from spg_kernels import SPGOptimizer, accumulate_importance_, masked_sgd_, soft_mask_

PAST = 2**31 + 1003  # elements: past what 32 bits count, and no whole number of vectors
MARKED = (0, 5, 2**31 - 1, 2**31, 2**31 + 1, PAST - 1)


@pytest.fixture(autouse=True)
def _memory():
    if available_bytes("cpu") < 12e9:
        pytest.skip("needs 12 GB of free memory")


def test_a_billion_parameters_need_no_memory_beside_them():
    layers = [torch.nn.Parameter(torch.full((8192, 8192), 0.5)) for _ in range(15)]  # 1,006,632,960 elements
    for i, layer in enumerate(layers):
        layer.grad = torch.randn(8192, generator=torch.Generator().manual_seed(i)).repeat(8192, 1)
    optimizer = SPGOptimizer(torch.optim.SGD(layers, lr=0.1), importance_dtype=torch.uint8, backend="native")
    for gamma in optimizer.importance.state_dict()["gammas"].values():
        gamma.fill_(0)  # touched: calloc gives pages only when they are written
    assert peak_extra_bytes("cpu", optimizer.accumulate_importance) < 64 * 2**20
    assert peak_extra_bytes("cpu", optimizer.step) < 64 * 2**20
    row = layers[3].grad[0].double()
    std = row.std(correction=0) * (8192**2 / (8192**2 - 1)) ** 0.5
    code = (28 * ((row - row.mean()) / std).abs()).ceil()
    keep = 2 / (1 + (code / 14).exp())
    expected = 0.5 - 0.1 * keep * row
    for i in (0, 8191):
        assert ((layers[3][i].double() - expected).abs() < 1e-6).float().mean() > 0.99  # a code may round the other way
        assert (layers[3][i].double() - expected).abs().max() < 0.1 * 0.08


def test_a_tensor_of_more_than_2_to_the_31_elements():
    grad = torch.zeros(PAST, dtype=torch.bfloat16)
    grad[list(MARKED)] = 1.0
    gamma = torch.zeros(PAST, dtype=torch.uint8)
    accumulate_importance_([gamma], [grad], backend="native")
    assert (gamma[list(MARKED)] == 255).all(), "each stands out by thousands of deviations"
    assert torch.count_nonzero(gamma == 255) == len(MARKED)
    assert torch.count_nonzero(gamma == 1) == PAST - len(MARKED), "the others, |z| = 5e-5, round up to the smallest code"
    grad.fill_(1.0)
    param = torch.full((PAST,), 0.5, dtype=torch.bfloat16)
    masked_sgd_([param], [grad], [gamma], lr=0.25, backend="native")
    assert (param[list(MARKED)] == 0.5).all() and torch.count_nonzero(param == 0.5) == len(MARKED)
    others = torch.tensor(0.5 - 0.25 * float(2 / (1 + torch.tensor(1 / 14).exp()))).bfloat16()
    assert torch.count_nonzero(param == others) == PAST - len(MARKED)
    soft_mask_([grad], [gamma], backend="native")
    assert not grad[list(MARKED)].any() and torch.count_nonzero(grad == 0) == len(MARKED)

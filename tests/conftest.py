import pytest
import torch

from spg_kernels import ops

from .models import Net


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """Every backend that must run on a CPU. Native is not optional here: a test run without it proves half."""
    missing = ops.why_unavailable(request.param)
    assert missing is None, f"{request.param}: {missing}"
    return request.param


@pytest.fixture(autouse=True)
def _same_numbers_every_run():
    torch.manual_seed(0)


@pytest.fixture
def net():
    return Net()

import os

import pytest
import torch
from hypothesis import settings

from spg_kernels import ops

from .models import Net

# The same cases every run; `--hypothesis-profile=long` draws others, many more of them.
SHORT = 40 if os.environ.get("TRITON_INTERPRET") == "1" else 100  # Triton's interpreter is slow
settings.register_profile("short", max_examples=SHORT, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=20_000, deadline=None, print_blob=True)
settings.load_profile("short")


# Single tests of a minute and more: first, or at the end the other processes would wait for the one that has them.
LONG = ("test_triton_interpreter.py", "test_sanitizers.py", "test_packaging.py", "test_distributed.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


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

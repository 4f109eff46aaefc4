"""Every pass over every parameter set against every peer: first equal to the reference, then timed."""

import pytest
import torch

from .buffers import Buffers
from .machine import available_bytes
from .passes import ELEMENTWISE, assert_correct
from .steps import STEPS

# Beside the buffers: what eager code and "copy, step, lerp" hold, what is expected, and the float64 reference of one tensor.
_TEMPORARY_BYTES = 32


@pytest.mark.parametrize("the_pass", ELEMENTWISE + STEPS, ids=lambda p: p.name.replace(" ", "_"))
@torch.no_grad()
def test_pass(the_pass, parameter_set, device, without, timed):
    needed = (the_pass.dtype.itemsize * len(the_pass.kinds) + 5 + _TEMPORARY_BYTES) * parameter_set.parameters
    if needed > available_bytes(device.type):
        pytest.skip(f"needs about {needed / 2**30:.0f} GiB")
    buffers = Buffers(parameter_set, the_pass.kinds, the_pass.least_bytes, device, the_pass.dtype)
    contenders = [c for c in the_pass.contenders(buffers) if c.name not in without]
    assert_correct(the_pass, buffers, contenders)
    timed(contenders, the_pass.name, parameter_set.name, parameter_set.parameters, len(parameter_set.shapes), buffers.cold)

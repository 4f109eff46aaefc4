"""What the wrapper adds to a step before any importance was measured. The masked step of 62 small tensors: test_passes.py."""

from functools import partial

import pytest
import torch
from torch.optim import SGD, AdamW

from spg_kernels import SPGOptimizer

from .buffers import Buffers
from .sets import SETS
from .timing import Contender


@pytest.mark.parametrize(("name", "make"), [("adamw", AdamW), ("sgd momentum", partial(SGD, momentum=0.9))],
                         ids=["adamw", "sgd"])
def test_wrapper_before_importance(name, make, device, timed):
    parameters = []
    for _ in range(2):
        lists = Buffers(SETS["small_62"], ("params", "grads"), 16, device).lists[0]
        parameters.append([torch.nn.Parameter(p) for p in lists["params"]])
        for parameter, grad in zip(parameters[-1], lists["grads"]):
            parameter.grad = grad
    # On a CPU torch's foreach step is shorter than its default, in which some microseconds drown, and unlike the fused one
    # it waits for no second thread.
    wrapped, bare = (make(own, lr=1e-3, foreach=True) for own in parameters)
    steps = [SPGOptimizer(wrapped).step, bare.step]
    for step in steps:
        step()
    for parameter, twin in zip(*parameters):
        assert torch.equal(parameter, twin)
    contenders = [Contender(who, [step]) for who, step in zip(("spg float32", "unmasked foreach"), steps)]
    timed(contenders, f"{name}, before importance", "small_62", SETS["small_62"].parameters, 62, False)

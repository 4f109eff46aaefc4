"""torch.compile around the masks and steps on a GPU."""

import copy

import pytest
import torch

import spg_kernels

from .test_triton_gpu import Net, capturable, give_both_the_same_gradients, protected, pytestmark  # noqa: F401


def test_a_compiled_step_does_not_recompile_from_call_to_call():
    net = Net().cuda()
    lr = torch.tensor(1e-2, device="cuda")
    opt = protected(net, lambda p: capturable(p, lr), backend="triton")
    twin = copy.deepcopy(net)
    other = protected(twin, lambda p: capturable(p, lr), backend="triton")
    step = torch.compile(opt.step)
    for turn in range(5):
        give_both_the_same_gradients((net, opt), (twin, other))
        lr.fill_(1e-2 / (turn + 1))
        # The first call makes the state, which the second one finds.
        with torch._dynamo.config.patch(error_on_recompile=turn >= 2):
            step()
        other.step()
        # Not the same bits: a compiler may sum the heads' mean gamma in another order.
        assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(net.parameters(), twin.parameters()))


def test_a_compiled_function_calls_the_operators_without_a_graph_break():
    def masked(param, grad, gamma):
        grad = grad * 2
        spg_kernels.soft_mask_([grad], [gamma], backend="triton")
        spg_kernels.masked_sgd_([param], [grad], [gamma], lr=0.1, backend="triton")
        return grad + 1

    param, grad, gamma = (torch.rand(5000, device="cuda") for _ in range(3))
    twin = param.clone()
    expected = masked(param, grad, gamma)
    actual = torch.compile(masked, fullgraph=True)(twin, grad, gamma)
    assert torch.equal(actual, expected) and torch.equal(param, twin)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch captures every operator")
def test_cuda_graphs_that_inductor_makes_leave_the_operators_out():
    """Its warm-up and capture would otherwise find the operators' tables in the graph's memory, and raise."""
    def masked(grad, gamma):
        grad = grad * 2
        spg_kernels.soft_mask_([grad], [gamma], backend="triton")
        return grad + 1

    compiled = torch.compile(masked, mode="reduce-overhead")
    gamma = torch.rand(5000, device="cuda")
    for _ in range(5):
        grad = torch.rand(5000, device="cuda")
        assert torch.equal(compiled(grad, gamma), masked(grad, gamma))

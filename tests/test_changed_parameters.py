"""Parameters that are others, or of another dtype or shape, than when the optimizer was made."""

import pytest
import torch
from torch import nn

from .models import set_gradients
from .wrapping import closure_for, equal, values, wrap


@pytest.mark.dropin(line=7)
@pytest.mark.parametrize("inner", ["SGD", "AdamW", "RMSprop"])
def test_replaced_parameters_are_an_error_until_bound(net, inner):
    optimizer = wrap(net, inner, 1.0)
    for layer in (net.trunk[0], net.trunk[2]):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    optimizer.param_groups[0]["params"] = list(net.parameters())
    set_gradients(net.parameters())
    unknown = r"param_groups\[0\]\['params'\]\[0\] of shape \(16, 10\).*bind"
    with pytest.raises(ValueError, match=unknown):
        optimizer.step()
    assert not optimizer.inner.state
    with pytest.raises(ValueError, match=unknown):
        optimizer.state_dict()  # which would save it as a head
    optimizer.importance.bind(net.named_parameters())
    before = values(net)
    optimizer.step()
    assert equal(values(net), before)


@pytest.mark.dropin(line=7)
def test_a_state_that_a_replaced_parameter_left_behind_has_no_importance(net):
    optimizer, old = wrap(net, "AdamW", 0.5), net.trunk[0].weight
    set_gradients(net.parameters())
    optimizer.step()
    net.trunk[0].weight = nn.Parameter(old.detach().clone())
    optimizer.param_groups[0]["params"] = list(net.parameters())
    optimizer.importance.bind(net.named_parameters())
    assert list(optimizer.state[old]) == ["step", "exp_avg", "exp_avg_sq"] and len(optimizer.state[old]) == 3
    assert "spg_importance" not in optimizer.state[old] and "exp_avg" in repr(optimizer.state)
    assert "spg_importance" in optimizer.state[net.trunk[2].weight]


@pytest.mark.dropin(line=19)
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch's gradients have their parameters' dtype")
def test_a_gradient_may_have_a_dtype_of_its_own(net):
    net.bfloat16()
    for parameter in net.parameters():
        parameter.grad_dtype = torch.float32
    assert all("exp_avg" in state for state in wrap(net, "AdamW").state_dict()["state"].values())


@pytest.mark.dropin(line=19)
@pytest.mark.parametrize("inner", ["SGD", "RMSprop"])
def test_a_parameter_that_took_another_shape_is_named(net, inner):
    optimizer = wrap(net, inner, 0.5)
    weight = net.trunk[2].weight
    weight.data = torch.zeros(20, 16)  # the strides stay
    set_gradients(net.parameters())
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(ValueError, match=r"trunk.2.weight: expected shape \(16, 16\), got \(20, 16\)"):
            call()


@pytest.mark.dropin(line=19)
def test_the_model_may_change_dtype_after_it_was_wrapped(net):
    optimizer = wrap(net, "AdamW", 1.0)
    net.double()
    before = values(net)
    x = torch.randn(4, 10, dtype=torch.float64)
    optimizer.step(closure_for(net, x))
    assert equal(values(net), before)

"""SPGOptimizer protects: no importance changes nothing, gamma = 1 does not move, and what lies between moves its share."""

import copy
import warnings

import pytest
import torch
from torch import nn

from spg_kernels import SPGOptimizer

from .models import set_gradients
from .wrapping import FUSABLE, INNER, equal, train, values, wrap


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("mask", ["update", "gradient"])
def test_no_importance_is_the_inner_optimizer_bit_for_bit_on_the_generic_path(net, inner, mask):
    twin = copy.deepcopy(net)
    plain = INNER[inner](twin.parameters())
    losses = train(twin, plain)
    for gamma in (None, 0.0):
        model = copy.deepcopy(net)
        optimizer = wrap(model, inner, gamma, mask=mask, backend="reference")
        assert train(model, optimizer) == losses
        assert equal(values(model), values(twin))


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("on", ["auto", "reference"])
def test_gamma_one_does_not_move(net, inner, on):
    """Under a closure, with weight decay, and with heads: their factor 1 - mean(gamma) is 0."""
    before = values(net)
    losses = train(net, wrap(net, inner, 1.0, backend=on))
    assert equal(values(net), before) and len(set(losses)) == 1


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("on", ["auto", "reference"])
def test_gamma_one_does_not_move_under_an_update_that_is_not_finite(net, inner, on):
    optimizer = wrap(net, inner, 1.0, backend=on)
    before = values(net)

    def closure():
        set_gradients(net.parameters())
        for p in net.parameters():
            p.grad.fill_(float("nan"))
        return torch.tensor(1.0)

    optimizer.step(closure)
    assert equal(values(net), before)


@pytest.mark.parametrize("inner", INNER)
def test_the_update_mask_scales_what_the_inner_step_adds(net, inner):
    """On both paths, for the trunk elementwise and for heads by one minus the mean of gamma."""
    for on in ("auto", "reference"):
        model, twin = copy.deepcopy(net), copy.deepcopy(net)
        optimizer = wrap(model, inner, backend=on)
        for name in optimizer.importance:
            optimizer.importance[name] = torch.rand(optimizer.importance[name].shape, generator=torch.Generator().manual_seed(3))
        old = values(model)
        train(twin, INNER[inner](twin.parameters()), steps=1)
        train(model, optimizer, steps=1)
        mean = float(optimizer.importance.mean())
        for (name, p), q, before in zip(model.named_parameters(), twin.parameters(), old):
            gamma = mean if name.startswith("heads.") else optimizer.importance[name] if name in optimizer.importance else 0
            expected = before + (1 - gamma) * (q - before)
            assert (p - expected).abs().max() < 1e-6, (on, name)


@pytest.mark.parametrize("inner", FUSABLE)
@pytest.mark.parametrize("mask", ["update", "gradient"])
def test_the_fused_path_is_taken_and_equals_the_generic_one(net, inner, mask, monkeypatch):
    """Parameters and torch's own state, so that the wrapper can be taken off at any time."""
    twin = copy.deepcopy(net)
    fused, generic = wrap(net, inner, 0.3, mask=mask), wrap(twin, inner, 0.3, mask=mask, backend="reference")
    train(net, fused, steps=1), train(twin, generic, steps=1)  # the step that makes the state
    monkeypatch.setattr(SPGOptimizer, "_generic_step", None)
    train(net, fused, steps=3)
    monkeypatch.undo()
    train(twin, generic, steps=3)
    for p, q in zip(net.parameters(), twin.parameters()):
        assert (p - q).abs().max() < 3e-6
        a, b = fused.state[p], generic.state[q]
        assert a.keys() == b.keys()
        for key in a:
            assert (a[key] - b[key]).abs().max() < 3e-6 and a[key].dtype == b[key].dtype


def test_a_parameter_that_joins_late_starts_its_momentum(net):
    twin = copy.deepcopy(net)
    fused, generic = wrap(net, "SGD momentum", 0.3), wrap(twin, "SGD momentum", 0.3, backend="reference")
    for model, optimizer in ((net, fused), (twin, generic)):
        for late in (True, False, False):
            set_gradients(model.parameters())
            if late:
                model.trunk[0].weight.grad = None
            optimizer.step()
    assert all((p - q).abs().max() < 1e-6 for p, q in zip(net.parameters(), twin.parameters()))


@pytest.mark.parametrize("on", ["auto", "reference"])
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("inner", ["SGD", "AdamW", "RMSprop"])
def test_a_step_leaves_the_gradients_as_they_were(net, inner, mask, on):
    optimizer = wrap(net, inner, 0.5, mask=mask, backend=on)
    set_gradients(net.parameters())
    grads = [p.grad for p in net.parameters()]
    copies = [g.clone() for g in grads]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(net.parameters(), grads)) and equal(grads, copies)


def test_the_gradient_mask_scales_the_gradient(net):
    twin = copy.deepcopy(net)
    optimizer = wrap(net, "AdamW", 0.75, mask="gradient", backend="reference")
    plain = INNER["AdamW"](twin.parameters())
    set_gradients(net.parameters()), set_gradients(twin.parameters())
    for p in twin.parameters():
        p.grad *= 0.25
    optimizer.step(), plain.step()
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(net.parameters(), twin.parameters()))


def test_the_gradient_mask_warns_where_the_inner_optimizer_undoes_it(net):
    def build(optimizer):
        return SPGOptimizer(optimizer, heads=net.heads, mask="gradient")

    with pytest.warns(UserWarning, match="AdamW.*adapts"):
        build(torch.optim.AdamW(net.parameters()))
    with pytest.warns(UserWarning, match="decays weights"):
        build(torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
        SPGOptimizer(torch.optim.AdamW(net.parameters()), heads=net.heads)


@pytest.mark.parametrize("mask", ["update", "gradient"])
def test_sparse_gradients_stay_masked(mask):
    embedding = nn.Embedding(6, 4, sparse=True)
    optimizer = SPGOptimizer(torch.optim.SGD(embedding.parameters(), lr=0.1), mask=mask)
    gamma = torch.rand(6, 4)
    gamma[1] = 1
    optimizer.importance["0.0"] = gamma
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 3, 3])).sum().backward()
    grad = embedding.weight.grad
    optimizer.step()
    assert embedding.weight.grad is grad
    expected = before - 0.1 * (1 - gamma) * grad.to_dense()
    assert torch.allclose(embedding.weight, expected, atol=1e-7) and torch.equal(embedding.weight[1], before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("inner", ["SGD momentum", "AdamW", "RMSprop"])
def test_parameters_of_any_dtype(dtype, inner):
    parameter = nn.Parameter(torch.randn(300, dtype=dtype))
    twin = nn.Parameter(parameter.detach().clone())
    optimizer = SPGOptimizer(INNER[inner]([parameter]))
    gamma = torch.linspace(0, 1, 300)
    optimizer.importance[parameter] = gamma
    plain = INNER[inner]([twin])
    old, grad = parameter.detach().clone(), torch.randn(300, dtype=dtype)
    parameter.grad, twin.grad = grad, grad.clone()
    optimizer.step(), plain.step()
    expected = old + (1 - gamma) * (twin - old)
    limit = 0.02 if dtype == torch.bfloat16 else 1e-6
    assert (parameter - expected).abs().max() <= limit and parameter[-1] == old[-1]


def test_eight_bit_importance_drives_the_same_step(net):
    coded = wrap(net, "AdamW", importance_dtype=torch.uint8)
    assert coded.importance.dtype == torch.uint8
    for name in coded.importance:
        coded.importance[name] = torch.rand(coded.importance[name].shape)
    twin = copy.deepcopy(net)
    generic = wrap(twin, "AdamW", backend="reference", importance_dtype=torch.uint8)
    generic.importance.load_state_dict(coded.importance.state_dict())
    train(net, coded), train(twin, generic)
    assert all((p - q).abs().max() < 3e-6 for p, q in zip(net.parameters(), twin.parameters()))

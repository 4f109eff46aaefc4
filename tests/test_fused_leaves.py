"""What no kernel takes goes the inner optimizer's own way, and does not keep the other parameters from their kernels."""

import logging

import pytest
import torch

from spg_kernels import BackendError, SPGOptimizer
from spg_kernels.backends import native

from .models import set_gradients
from .wrapping import equal

N, ODD = 5, 2  # parameters, and which of them no kernel takes


def _complex(parameters):
    parameters[ODD] = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))


def _double(parameters):
    parameters[ODD] = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))


def _gaps(parameters):
    parameters[ODD].grad = torch.randn(6, 8)[:, ::2]


def _sparse(parameters):
    parameters[ODD].grad = torch.sparse_coo_tensor([[1, 4, 1]], torch.randn(3, 4), (6, 4), check_invariants=True)


KINDS = [_complex, _double, _gaps, _sparse]
INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


def _optimizer(kind, inner="AdamW", **kwargs):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(N)]
    if kind in (_complex, _double):
        kind(parameters)
    optimizer = SPGOptimizer(INNER[inner](parameters), **kwargs)
    for name in optimizer.importance:
        optimizer.importance[name] = torch.rand(6, 4).round(decimals=1)  # some are 1
    return parameters, optimizer


def _backward(parameters, kind, seed):
    set_gradients(parameters, seed)
    if kind in (_gaps, _sparse):
        kind(parameters)


def _kernels_took(monkeypatch):
    """The number of parameters in every call of a native step from here on."""
    counts = []
    for op in ("masked_sgd_", "masked_adamw_"):
        def counted(launch, addresses, *args, _kernel=getattr(native, op), **kwargs):
            counts.append(launch.count)
            _kernel(launch, addresses, *args, **kwargs)
        monkeypatch.setattr(native, op, counted)
    return counts


@pytest.mark.filterwarnings("ignore:mask='gradient'")
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("kind", KINDS)
def test_one_that_no_kernel_takes_leaves_the_others_theirs(kind, inner, mask, monkeypatch, caplog):
    if kind is _sparse and "Adam" in inner:
        pytest.skip("torch's Adam takes no sparse gradients")
    if kind is _complex and "fused" in inner:
        pytest.skip("nor its fused step complex parameters")
    caplog.set_level(logging.DEBUG, "spg_kernels")
    trained = []
    for backend in ("reference", "auto"):
        parameters, optimizer = _optimizer(kind, inner, mask=mask, backend=backend)
        counts = _kernels_took(monkeypatch)
        for step in range(4):
            _backward(parameters, kind, seed=step)
            grads = [p.grad for p in parameters]
            optimizer.step()
            assert all(p.grad is grad for p, grad in zip(parameters, grads))
        trained.append(parameters)
    assert counts == [N - 1] * 4
    assert sum("1 of 5 tensors take the generic step, the first (2) because it has" in message
               for message in caplog.messages) == 1
    if kind in (_complex, _double):  # torch's own step and the reference's mask, to the last bit
        assert torch.equal(trained[0][ODD], trained[1][ODD])
    for own, other in zip(*trained, strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-6)


def test_it_is_tried_again_when_its_gradient_is_another(monkeypatch):
    parameters, optimizer = _optimizer(_gaps)
    counts = _kernels_took(monkeypatch)
    for kind in (None, _gaps, _gaps, None, None):
        _backward(parameters, kind, seed=1)
        optimizer.step()
    parameters[ODD].grad = None
    optimizer.step()
    assert counts == [N, N - 1, N - 1, N, N, N - 1]
    assert [int(optimizer.inner.state[p]["step"]) for p in parameters] == [6, 6, 5, 6, 6]


def test_a_step_that_fails_for_it_moves_none_of_the_others():
    """A state of another shape, which torch loads and finds out about in the step."""
    parameters, optimizer = _optimizer(None)
    _backward(parameters, None, seed=1)
    optimizer.step()
    optimizer.inner.state[parameters[ODD]]["exp_avg"] = torch.zeros(4, 6)
    before = [p.detach().clone() for p in parameters]
    grads = [p.grad for p in parameters]
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert equal(parameters, before) and all(p.grad is grad for p, grad in zip(parameters, grads))
    assert [int(optimizer.inner.state[p]["step"]) for i, p in enumerate(parameters) if i != ODD] == [1] * (N - 1)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_kernel_asked_for_by_name_must_take_all(kind):
    """At a gradient with gaps it need not: the mask around the optimizer's own step sees parameters alone."""
    parameters, optimizer = _optimizer(kind, backend="native")
    _backward(parameters, kind, seed=1)
    before = [p.detach().clone() for p in parameters]
    if kind is _gaps:
        optimizer.step()
        assert not any(map(torch.equal, parameters, before))
    else:
        with pytest.raises(BackendError, match="has params of torch"):
            optimizer.step()
        assert equal(parameters, before) and not any(state["step"] for state in optimizer.inner.state.values())


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_what_a_scaler_says_holds_for_both_parts(found_inf):
    """With `fused=True` a GradScaler leaves unscaling and skipping to the step."""
    trained = []
    for scale in (1.0, 8.0):
        parameters, optimizer = _optimizer(_gaps, "AdamW fused")
        _backward(parameters, _gaps, seed=1)
        before = [p.detach().clone() for p in parameters]
        for parameter in parameters:
            parameter.grad.mul_(scale)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found_inf)
        optimizer.step()
        assert float(optimizer.grad_scale) == scale and float(optimizer.found_inf) == found_inf
        assert equal(parameters, before) == bool(found_inf)
        trained.append(parameters)
    assert equal(*trained)

"""Inner optimizers that are built in other ways than torch's own."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F

from spg_kernels import SPGOptimizer, cross_head_losses

from .models import tasks
from .wrapping import equal, train, values, wrap


class _Wrapper(torch.optim.Optimizer):
    """Another wrapper, that has no tables of its own: as trainers', and as this package's."""

    def __init__(self, inner):
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)


class _Older(torch.optim.SGD):
    """`zero_grad` as it was before torch 1.7."""

    def zero_grad(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = torch.zeros_like(parameter)


BUILDS = {"wrapper": lambda p: _Wrapper(torch.optim.SGD(p, lr=0.1)), "older": lambda p: _Older(p, lr=0.1)}


@pytest.mark.parametrize("build", BUILDS.values(), ids=list(BUILDS))
def test_it_is_masked_measured_and_heard_as_any_other(net, build):
    optimizer = SPGOptimizer(build(net.parameters()), heads=net.heads)
    heard = []
    optimizer.register_step_post_hook(lambda *_: heard.append(True))
    optimizer.measure_importance(tasks()[0], cross_head_losses(net, 1, F.cross_entropy), progress=False)
    assert optimizer.importance.tasks == 1 and all(p.grad is None for p in net.parameters())
    for name in optimizer.importance:
        optimizer.importance[name] = torch.ones_like(optimizer.importance[name])
    before = values(net)
    train(net, optimizer, steps=2)
    optimizer.zero_grad()
    assert equal(values(net), before) and len(heard) == 2


def test_gradients_are_set_to_zero_where_that_is_asked_for(net):
    optimizer = wrap(net, "SGD", gamma=0.5)
    train(net, optimizer, steps=1)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_a_group_whose_warning_is_an_error_is_not_added(net):
    optimizer = wrap(net, "SGD", mask="gradient")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="decays weights"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "weight_decay": 0.1})
    assert len(optimizer.param_groups) == 1 and len(optimizer.importance) == 4


def test_heads_may_be_a_generator_which_gives_its_parameters_once(net):
    optimizer = SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=net.heads.parameters())
    assert list(optimizer.importance) == ["0.0", "0.1", "0.2", "0.3"]
    train(net, optimizer, steps=1)
    optimizer.accumulate_importance()
    assert len(optimizer.importance) == 4 and optimizer.importance.mean() > 0


def test_a_head_that_holds_its_optimizer_is_saved_and_loaded(net):
    net.heads[0].optimizer = wrap(net, "AdamW", gamma=0.5)
    train(net, net.heads[0].optimizer, steps=1)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    for model in (net, twin):
        train(model, model.heads[0].optimizer, steps=2)
    assert equal(values(net), values(twin))

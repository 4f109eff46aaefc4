"""Optimizers from outside torch as the inner one."""

import copy
import warnings

import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes")
prodigyopt = pytest.importorskip("prodigyopt")
others = pytest.importorskip("pytorch_optimizer")
schedulefree = pytest.importorskip("schedulefree")

from spg_kernels import SPGOptimizer

from ..models import Net, set_gradients
from ..wrapping import closure_for, equal, values

pytestmark = [pytest.mark.dropin(line=20), pytest.mark.filterwarnings("ignore")]

PYTORCH_OPTIMIZER = {
    "Lion": lambda p: others.Lion(p, lr=0.01, weight_decay=0.1),
    "Lamb": lambda p: others.Lamb(p, lr=0.01, weight_decay=0.1),
    "Adan": lambda p: others.Adan(p, lr=0.01, weight_decay=0.1),
    "AdaBelief": lambda p: others.AdaBelief(p, lr=0.01, weight_decay=0.1),
    "ADOPT": lambda p: others.ADOPT(p, lr=0.01, weight_decay=0.1),
    "SOAP": lambda p: others.SOAP(p, lr=0.01, weight_decay=0.1),
    "Shampoo": lambda p: others.Shampoo(p, lr=0.01, weight_decay=0.1),
    "Ranger21": lambda p: others.Ranger21(p, num_iterations=20, lr=0.01),
}
PRODIGY = {"Prodigy": lambda p: prodigyopt.Prodigy(p, weight_decay=0.1)}
BITSANDBYTES = {
    "AdamW8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=0.01, min_8bit_size=1),
    "Lion8bit": lambda p: bitsandbytes.optim.Lion8bit(p, lr=0.01, min_8bit_size=1),
}
SCHEDULE_FREE = {
    "SGDScheduleFree": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1),
    "AdamWScheduleFree": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01),
}


def wrapped(net, make, gamma=None, **settings):
    optimizer = SPGOptimizer(make(net.parameters()), heads=net.heads, named_parameters=net.named_parameters(), **settings)
    for name in optimizer.importance if gamma is not None else ():
        optimizer.importance[name] = torch.full(optimizer.importance[name].shape, gamma)
    return optimizer


def train(net, optimizer, steps=3):
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.step(closure_for(net, x))


def check(make):
    """Frozen at gamma = 1; the inner optimizer bit for bit without importance; a part of the update between; resumed alike."""
    net = Net()
    before = values(net)
    train(net, wrapped(net, make, 1.0))
    assert equal(values(net), before)

    ours, plain = copy.deepcopy(net), copy.deepcopy(net)
    train(ours, wrapped(ours, make, 0.0, backend="reference")), train(plain, make(plain.parameters()))
    assert equal(values(ours), values(plain)) and not equal(values(ours), before)

    ours, plain = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = wrapped(ours, make, 0.75)
    train(ours, optimizer, steps=1), train(plain, make(plain.parameters()), steps=1)
    assert all((p - old.lerp(q, 0.25)).abs().max() < 1e-6 for p, q, old in zip(values(ours), values(plain), before))

    state = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(ours)
    resumed = wrapped(twin, make)
    resumed.load_state_dict(state)
    train(ours, optimizer), train(twin, resumed)
    assert equal(values(ours), values(twin))


@pytest.mark.compatibility("Lion, LAMB, Adan, AdaBelief, ADOPT, SOAP, Shampoo, Ranger21", "pytorch_optimizer", "works")
@pytest.mark.parametrize("name", PYTORCH_OPTIMIZER)
def test_pytorch_optimizer(name):
    check(PYTORCH_OPTIMIZER[name])


@pytest.mark.compatibility("Prodigy", "prodigyopt", "works", "its step size follows the distance that masked parameters went")
@pytest.mark.parametrize("name", PRODIGY)
def test_prodigy(name):
    check(PRODIGY[name])


@pytest.mark.compatibility("8-bit AdamW and Lion, on the CPU", "bitsandbytes", "works")
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes(name):
    check(BITSANDBYTES[name])


@pytest.mark.dropin(line=9)
@pytest.mark.compatibility("schedule-free SGD and AdamW, `mask=\"update\"`", "schedulefree", "refused with an error",
                           "parameters move in `train()` and `eval()` too")
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_updates_cannot_be_masked(name):
    net = Net()
    with pytest.raises(ValueError, match=f"{name} moves the parameters in train.*use mask='gradient'"):
        wrapped(net, SCHEDULE_FREE[name])


@pytest.mark.dropin(line=9)
@pytest.mark.compatibility("schedule-free SGD, `mask=\"gradient\"`", "schedulefree", "works with a note",
                           "`opt.train()` and `opt.eval()` reach it; AdamW's is masked likewise, and undoes it as Adam does "
                           "(warned)")
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_gradients_are_masked(name):
    net = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = wrapped(net, SCHEDULE_FREE[name], 1.0, mask="gradient")
    assert any("will move all the same" in str(warning.message) for warning in caught)
    before = values(net)
    for _ in range(3):
        optimizer.train()
        set_gradients(net.parameters())
        optimizer.step()
        optimizer.eval()
        assert equal(values(net), before)
    twin, plain = copy.deepcopy(net), SCHEDULE_FREE[name](net.parameters())
    ours = wrapped(twin, SCHEDULE_FREE[name], 0.75, mask="gradient")
    for model, opt in ((net, plain), (twin, ours)):
        opt.train()
        set_gradients(model.parameters())
        for p in model.parameters() if opt is plain else ():
            p.grad *= 0.25
        opt.step()
        opt.eval()
    assert all((p - q).abs().max() < 1e-6 for p, q in zip(values(net), values(twin))) and not equal(values(net), before)


@pytest.mark.compatibility("Lookahead around the wrapper", "pytorch_optimizer", "works")
def test_lookahead_around_the_wrapper():
    net = Net()
    before = values(net)
    optimizer = others.Lookahead(wrapped(net, torch.optim.AdamW, 1.0), k=2)
    train(net, optimizer, steps=4)
    assert equal(values(net), before)


@pytest.mark.compatibility("Lookahead inside the wrapper", "pytorch_optimizer", "works with a note",
                           "`state_dict()` is refused with an error: its own has no `state`; save the importance beside it")
def test_lookahead_inside_the_wrapper():
    net = Net()
    before = values(net)
    optimizer = wrapped(net, lambda p: others.Lookahead(torch.optim.AdamW(p), k=2), 1.0)
    train(net, optimizer, steps=4)
    assert equal(values(net), before)
    with pytest.raises(TypeError, match=r"Lookahead.state_dict\(\) has .*no 'state'.*side by side"):
        optimizer.state_dict()


@pytest.mark.compatibility("schedule-free's own wrapper, inside", "schedulefree", "refused with an error",
                           "it is no torch optimizer")
def test_a_wrapper_that_is_no_optimizer_is_refused():
    net = Net()
    with pytest.raises(TypeError, match="expected a torch.optim.Optimizer to wrap, got ScheduleFreeWrapper"):
        wrapped(net, lambda p: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1), momentum=0.9))

"""An importance beyond its own methods: tensors written where they were handed out, copies, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn

from spg_kernels import Importance, SPGOptimizer

from .models import set_gradients
from .wrapping import INNER, closure_for, equal, train, values, wrap


def _through_the_state(optimizer):
    for state in optimizer.state.values():
        state["spg_importance"].fill_(1)


def _through_the_state_dict(optimizer):
    for state in optimizer.state_dict()["state"].values():
        state["spg_importance"].fill_(1)


def _through_the_importance(optimizer):
    for gamma in optimizer.importance.state_dict()["gammas"].values():
        gamma.fill_(1)


@pytest.mark.parametrize("known", ["before", "after"])
@pytest.mark.parametrize("inner", ["AdamW", "RMSprop"])
@pytest.mark.parametrize("write", [_through_the_state, _through_the_state_dict, _through_the_importance])
def test_what_is_written_into_a_gamma_counts(net, write, inner, known):
    """As a broadcast of an optimizer's state does, or a checkpoint that is loaded in place."""
    optimizer = wrap(net, inner)
    train(net, optimizer, steps=1)
    if known == "before":
        assert not optimizer.importance.mean() and not optimizer.importance.active
    write(optimizer)
    before = values(net)
    set_gradients(net.parameters())
    optimizer.step()
    assert equal(values(net), before), "gamma = 1 does not move, nor do heads at a mean of 1"
    assert optimizer.importance.mean() == 1 and optimizer.importance.summary().head_factor == 0


@pytest.mark.parametrize("inner", ["AdamW", "RMSprop"])
def test_the_heads_follow_what_is_written_later(net, inner):
    optimizer = wrap(net, inner, gamma=0.5)
    train(net, optimizer, steps=1)
    _through_the_importance(optimizer)
    before = values(net)
    train(net, optimizer, steps=1)
    assert equal(values(net), before)


def test_the_heads_follow_a_trunk_that_grows():
    known, new, head = (nn.Parameter(torch.ones(4)) for _ in range(3))
    optimizer = SPGOptimizer(torch.optim.SGD([known, head], lr=1.0), heads=[head])
    optimizer.importance[known] = torch.ones(4)
    head.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(head, torch.ones(4)) and optimizer.importance.mean() == 1
    optimizer.add_param_group({"params": [new]})
    assert optimizer.importance.mean() == 0.5
    optimizer.step()
    assert torch.equal(head, torch.full((4,), 0.5))


@pytest.mark.parametrize("inner", ["SGD", "RMSprop"])
def test_the_gamma_of_a_parameter_with_gaps_is_made_once(inner):
    parameter = nn.Parameter(torch.randn(4, 8)[:, ::2])
    optimizer = SPGOptimizer(INNER[inner]([parameter]))
    optimizer.importance[parameter] = torch.rand(4, 4)
    layout = optimizer.importance.layout
    set_gradients([parameter])
    for _ in range(3):
        optimizer.step()
    assert optimizer.importance.layout == layout


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda importance: pickle.loads(pickle.dumps(importance))],
                         ids=["copy", "deepcopy", "pickle"])
def test_a_copy_is_one_of_its_own(net, copied):
    optimizer = wrap(net, "SGD")
    twin = copied(optimizer.importance)
    assert not twin.active
    set_gradients(net.parameters())
    optimizer.accumulate_importance()
    assert optimizer.importance.active and not twin.active and not twin.mean()
    twin = copied(optimizer.importance)
    assert twin.active and equal(twin.values(), optimizer.importance.values()) and twin.mean() == optimizer.importance.mean()
    for gamma in twin.state_dict()["gammas"].values():
        gamma.zero_()
    assert not twin.mean() and optimizer.importance.mean()


def test_what_was_written_in_place_counts_after_the_parameter_was_replaced(net):
    importance = Importance(net.trunk.named_parameters())
    importance.state_dict()["gammas"]["0.bias"].fill_(0.5)
    importance.bind([("0.bias", torch.nn.Parameter(torch.zeros(16, dtype=torch.float64)))])
    assert importance.active and (importance["0.bias"] == 0.5).all()


def test_nothing_is_unprotected_by_being_copied(net):
    optimizer = wrap(net, "SGD", gamma=1.0)
    again = SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=net.heads,
                         importance=copy.copy(optimizer.importance))
    before = values(net)
    again.step(closure_for(net, torch.ones(2, 10)))
    assert equal(values(net), before)


def test_load_is_none_of_an_importances_own_methods(tmp_path):
    importance = Importance([("a", nn.Parameter(torch.zeros(3)))])
    importance.save(tmp_path / "file")
    with pytest.raises(AttributeError, match="load makes a new Importance"):
        importance.load(tmp_path / "file")
    assert list(Importance.load(tmp_path / "file")) == ["a"]


def test_one_parameter_has_one_name():
    a, b, other = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    importance = Importance([("a", a), ("b", b)])
    for refused in (lambda: importance.bind([("a", other), ("b", other)]),
                    lambda: SPGOptimizer(torch.optim.SGD([other], lr=0.1), named_parameters=[("a", other), ("b", other)],
                                         importance=importance)):
        with pytest.raises(ValueError, match="also called"):
            refused()
        assert importance.parameter("a") is a and importance.parameter("b") is b
    for refused in (importance.bind, Importance):
        with pytest.raises(ValueError, match="a: two parameters are called so"):
            refused([("a", a), ("a", other)])


@pytest.mark.parametrize("value, seen", [
    (torch.zeros(3).to_sparse(), "sparse"),
    (torch.zeros(3, device="meta"), "meta"),
    (torch.zeros(3).to(torch.float8_e4m3fn), "float8"),
], ids=["sparse", "meta", "float8"])
def test_what_has_no_numbers_to_take_is_no_importance(value, seen):
    importance = Importance([("a", nn.Parameter(torch.zeros(3)))])
    with pytest.raises(TypeError, match=f"a: expected .*{seen}"):
        importance["a"] = value


def test_the_capacity_table_is_the_same_text_everywhere(monkeypatch):
    importance = Importance([("a", nn.Parameter(torch.zeros(3)))])
    plain = str(importance.summary())
    for name, value in {"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)
        assert str(importance.summary()) == plain and "\x1b" not in plain

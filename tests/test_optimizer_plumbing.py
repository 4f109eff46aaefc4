"""SPGOptimizer is a torch optimizer: schedulers, checkpoints, copies, groups, errors."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.optim import Optimizer

import spg_kernels
from spg_kernels import Importance, NonFiniteGradientError, SPGOptimizer

from .models import Net, set_gradients
from .wrapping import INNER, equal, train, values, wrap


@pytest.mark.dropin(line=10)
def test_it_is_an_optimizer_with_live_properties(net):
    optimizer = wrap(net, "AdamW", 0.5)
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is optimizer.inner.param_groups and optimizer.state.keys() == optimizer.inner.state.keys()
    assert optimizer.defaults is optimizer.inner.defaults
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    set_gradients(net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert not optimizer._step_supports_amp_scaling and not hasattr(optimizer, "grad_scale")


@pytest.mark.dropin(line=10)
def test_a_scheduler_on_the_inner_optimizer_sees_its_steps(net):
    inner = INNER["AdamW"](net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(inner, step_size=1)
    optimizer = SPGOptimizer(inner, heads=net.heads)
    set_gradients(net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()


@pytest.mark.dropin(line=15)
def test_state_dict_hooks_fire_once(net):
    optimizer = wrap(net, "AdamW")
    calls = []
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: calls.append("spg_importance" in state["state"][0]))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", True, "load pre", "load post"]


@pytest.mark.dropin(line=12)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("steps", [0, 2])
def test_checkpoints_load_with_and_without_the_wrapper(net, inner, steps):
    optimizer = wrap(net, inner, 0.0)
    train(net, optimizer, steps=steps)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all("spg_importance" in state["state"][i] for group in state["param_groups"] for i in group["params"])

    continued = []
    for wrapped in (False, True):
        model = copy.deepcopy(net)
        resumed = wrap(model, inner) if wrapped else INNER[inner](model.parameters())
        resumed.load_state_dict(copy.deepcopy(state))  # torch takes the tensors themselves
        train(model, resumed, steps=2)
        continued.append(values(model))
    train(net, optimizer, steps=2)
    for other in continued:
        assert all((p - q).abs().max() < 1e-5 for p, q in zip(values(net), other))

    plain = INNER[inner](net.parameters())
    train(net, plain, steps=steps)
    wrapper = wrap(net, inner, 0.25)
    wrapper.load_state_dict(plain.state_dict())
    train(net, wrapper)
    assert (wrapper.importance["trunk.0.weight"] == 0.25).all(), "a plain checkpoint says nothing of importance"


@pytest.mark.dropin(line=13)
@pytest.mark.parametrize("inner", ["SGD", "SGD momentum", "AdamW"])
def test_torch_distributed_checkpoint_saves_and_loads_by_name(net, inner, tmp_path):
    optimizer = wrap(net, inner)
    set_gradients(net.parameters())
    optimizer.accumulate_importance()
    optimizer.step()
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=tmp_path)
    twin = copy.deepcopy(net)
    resumed = wrap(twin, inner)
    state = get_optimizer_state_dict(twin, resumed)
    assert equal(values(twin), values(net)), "no hidden step moves a parameter"
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, resumed, optim_state_dict=state)
    for model, opt in ((net, optimizer), (twin, resumed)):
        set_gradients(model.parameters(), seed=7)
        opt.step()
    assert equal(values(twin), values(net))


@pytest.mark.dropin(line=15)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_train_alike_and_apart(net, copier):
    optimizer = wrap(net, "AdamW", 0.3)
    train(net, optimizer)
    twin_net, twin = copier((net, optimizer))
    before = values(net)
    train(twin_net, twin)
    assert equal(values(net), before) and not equal(values(twin_net), before)
    train(net, optimizer)
    assert equal(values(net), values(twin_net))


@pytest.mark.dropin(line=8)
def test_a_fresh_optimizer_takes_over_the_importance(net):
    first = SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=net.heads)
    set_gradients(net.parameters())
    first.accumulate_importance()
    groups = [{"params": [p]} for p in net.parameters()]
    second = SPGOptimizer(torch.optim.Adam(groups), heads=net.heads, importance=first.importance)
    assert second.importance is first.importance and len(second.importance) == 4, "known parameters keep their names"


@pytest.mark.parametrize("named", [True, False])
def test_an_importance_that_knows_none_of_the_parameters_is_an_error(net, named):
    """As when a model is reloaded or copied, and once its parameters have names and once not: it would train unprotected."""
    def wrapped(model, named, **kwargs):
        return SPGOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), heads=model.heads,
                            named_parameters=model.named_parameters() if named else None, **kwargs)

    first = wrapped(net, named)
    set_gradients(net.parameters())
    first.accumulate_importance()
    reloaded = copy.deepcopy(net)
    for importance in (first.importance, copy.deepcopy(first.importance)):
        with pytest.raises(ValueError, match=f"no parameter is called {'trunk.0.bias' if named else '0.0'}.*another model"):
            wrapped(reloaded, not named, importance=importance)
        assert len(importance) == 4
        assert len(wrapped(reloaded, named, importance=importance).importance) == 4
    heads = SPGOptimizer(torch.optim.SGD(net.heads.parameters(), lr=0.1), heads=net.heads, importance=first.importance)
    assert len(heads.importance) == 4, "an optimizer of the heads alone"


def test_an_importance_from_before_a_layer_was_renamed_or_removed_is_refused(net):
    """Also one that is still in use: what its names stood for may be what was renamed."""
    first = wrap(net, "SGD", 0.5)
    renamed = Net()
    renamed.trunk = nn.Sequential(OrderedDict(zip(("0", "1", "last"), renamed.trunk)))
    removed = Net()
    del removed.trunk[2]
    for model in (renamed, removed):
        with pytest.raises(ValueError, match="no parameter is called trunk.2.bias, trunk.2.weight:.*names were others"):
            wrap(model, "SGD", importance=first.importance)
        if model is renamed:  # of a part of the model, the inner optimizer's names do not tell that anything was removed
            with pytest.raises(ValueError, match="no parameter is called trunk.2.bias, trunk.2.weight:.*names were others"):
                SPGOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), heads=model.heads, importance=first.importance)
        assert len(first.importance) == 4 and first.importance.parameter("trunk.0.bias") is net.trunk[0].bias


@pytest.mark.parametrize("sizes", [(3, 3), (3, 4)])
def test_a_name_is_of_one_parameter(sizes):
    layers = [nn.Linear(2, size) for size in sizes]
    pairs = [pair for layer in layers for pair in layer.named_parameters()]
    with pytest.raises(ValueError, match="weight: two parameters are called so"):
        SPGOptimizer(torch.optim.SGD([p for _, p in pairs], lr=0.1), named_parameters=pairs)
    inner = torch.optim.SGD([{"params": layer.named_parameters()} for layer in layers], lr=0.1)
    with pytest.raises(ValueError, match="weight: two parameters are called so"):
        SPGOptimizer(inner)
    assert len(SPGOptimizer(inner, named_parameters=nn.ModuleList(layers).named_parameters()).importance) == 4


def test_heads_hold_no_importance(net):
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="heads: heads.0.weight, heads.0.bias.* have an importance"):
        SPGOptimizer(inner, heads=net.heads, importance=Importance(net.named_parameters()))
    with pytest.raises(ValueError, match="heads: heads.0.weight, heads.0.bias.* have an importance"):
        wrap(net, importance=Importance(Net().named_parameters()))  # of another model's parameters, of the same names
    optimizer = SPGOptimizer(inner, heads=net.heads)
    head = nn.Linear(16, 3)
    optimizer.add_param_group({"params": head.parameters()})
    net.heads.append(head)
    set_gradients(net.parameters())
    with pytest.raises(ValueError, match="heads: 1.0, 1.1 have an importance.*before.*add_param_group"):
        optimizer.accumulate_importance()


def test_a_group_that_is_refused_is_not_added(net):
    optimizer = wrap(net)
    optimizer.importance.add("1.0", nn.Parameter(torch.zeros(7)))
    with pytest.raises(ValueError, match="1.0.*shape"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_parameters_that_share_memory_are_refused_before_anything_changed(inner):
    """Tied through `.data`: two importances cannot both mask the same numbers."""
    first = nn.Parameter(torch.ones(4))
    second = nn.Parameter(first.data)
    optimizer = SPGOptimizer(inner([first, second], lr=0.1))
    optimizer.importance["0.0"] = torch.ones(4)
    set_gradients([first, second])
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory"):
        optimizer.step()
    assert torch.equal(first, torch.ones(4))
    assert not optimizer.inner.state


@pytest.mark.dropin(line=19)
def test_a_new_head_a_task(net):
    optimizer = wrap(net, "SGD", 1.0)
    net.heads.append(nn.Linear(16, 3))
    optimizer.add_param_group({"params": net.heads[-1].parameters(), "lr": 0.5})
    assert len(optimizer.importance) == 4 and len(optimizer.param_groups) == 2
    set_gradients(net.parameters())
    before = net.heads[-1].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.heads[-1].weight, before)
    extra = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [extra]})
    assert extra in optimizer.importance and optimizer.importance.name_of(extra) == "2.0"


@pytest.mark.parametrize("new_head", [lambda: nn.Linear(16, 3), lambda: nn.Parameter(torch.randn(3, 16))])
def test_a_list_of_heads_may_grow(net, new_head):
    """README: append a new head to `heads` before add_param_group. In a list too: as trunk it would move unscaled."""
    heads, head = [net.heads], new_head()
    optimizer = SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=heads)
    heads.append("head")
    with pytest.raises(TypeError, match=r"heads\[1\]: expected a module or a parameter, got str"):
        optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)]})
    heads[1] = head
    optimizer.add_param_group({"params": [head] if isinstance(head, nn.Parameter) else head.parameters()})
    assert list(optimizer.importance) == ["0.0", "0.1", "0.2", "0.3"] and len(optimizer.param_groups) == 2


def test_a_group_added_to_a_fresh_optimizer_takes_nobody_elses_name():
    first, second, third = (torch.nn.Parameter(torch.randn(3)) for _ in range(3))
    optimizer = SPGOptimizer(torch.optim.SGD([first], lr=0.1))
    optimizer.add_param_group({"params": [second]})
    optimizer.importance[second] = torch.full((3,), 0.5)
    fresh = SPGOptimizer(torch.optim.SGD([first, second], lr=0.1), importance=optimizer.importance)
    fresh.add_param_group({"params": [third]})  # slot 1.0, as second was
    assert torch.equal(fresh.importance[second], torch.full((3,), 0.5)) and not fresh.importance[third].any()
    assert list(fresh.importance) == ["0.0", "1.0", "2.0"]


def test_a_new_parameter_in_the_slot_of_a_known_one_takes_another_name():
    new, known, last = (torch.nn.Parameter(torch.randn(3)) for _ in range(3))
    importance = SPGOptimizer(torch.optim.SGD([known], lr=0.1)).importance
    importance[known] = torch.full((3,), 0.5)
    fresh = SPGOptimizer(torch.optim.SGD([{"params": [new, known]}, {"params": [last]}], lr=0.1), importance=importance)
    assert torch.equal(fresh.importance[known], torch.full((3,), 0.5))
    assert not fresh.importance[new].any() and not fresh.importance[last].any()
    assert list(fresh.importance) == ["0.0", "1.0", "2.0"]


@pytest.mark.dropin(line=19)
@pytest.mark.parametrize("copier", [lambda pair: pair, copy.deepcopy])
def test_a_group_added_later_has_the_names_that_were_given(net, copier):
    """The trunk is unfrozen from its top down; the next task's optimizer, and a file, know parameters by the same names."""
    parameters = [*net.trunk[2].parameters(), *net.heads.parameters()]
    net, optimizer = copier((net, SPGOptimizer(torch.optim.SGD(parameters, lr=0.1), heads=net.heads,
                                               named_parameters=net.named_parameters())))
    optimizer.add_param_group({"params": net.trunk[0].parameters()})
    names = ["trunk.2.weight", "trunk.2.bias", "trunk.0.weight", "trunk.0.bias"]
    assert list(optimizer.importance) == names
    assert list(wrap(net, "SGD", importance=optimizer.importance).importance) == names


def test_another_default_device_is_nobody_elses_business(net):
    optimizer = wrap(net, "AdamW", importance_dtype=torch.uint8)
    train(net, optimizer, steps=1)  # older torches make AdamW's own step count on the default device
    with torch.device("meta"):
        for p in net.parameters():
            p.grad = torch.ones(p.shape, device="cpu").cumsum(0)
        optimizer.accumulate_importance()
        optimizer.step()
        optimizer.importance.summary()
    assert optimizer.importance.mean() > 0


def test_a_failing_step_leaves_parameters_as_they_were(net):
    before = values(net)
    for inner in ("AdamW", "RMSprop", "LBFGS"):
        for mask in ("update", "gradient"):
            optimizer = wrap(net, inner, 0.5, mask=mask)
            set_gradients(net.parameters())
            grads = [p.grad for p in net.parameters()]

            def closure():
                raise RuntimeError("no batch")

            with pytest.raises(RuntimeError, match="no batch"):
                optimizer.step(closure)
            assert equal(values(net), before) and all(p.grad is g for p, g in zip(net.parameters(), grads))


def test_a_backend_that_refuses_does_so_before_anything_changed(net):
    optimizer = wrap(net.double(), "RMSprop", 0.5, backend="native")
    set_gradients(net.parameters())
    before = values(net)
    with pytest.raises(spg_kernels.BackendError, match="float64"):
        optimizer.step()
    assert equal(values(net), before) and not optimizer.state


@pytest.mark.dropin(line=19)
def test_a_head_that_came_through_the_inner_optimizer_is_a_head(net):
    optimizer = wrap(net, "SGD", 0.5)
    net.heads.append(torch.nn.Linear(16, 3))
    optimizer.inner.add_param_group({"params": net.heads[-1].parameters()})
    set_gradients(net.parameters())
    optimizer.accumulate_importance()
    optimizer.step()
    assert len(optimizer.importance) == 4 and net.heads[-1].weight not in optimizer.importance


def test_a_non_finite_gradient_names_its_parameter(net):
    optimizer = wrap(net, "SGD")
    set_gradients(net.parameters())
    net.trunk[2].bias.grad[0] = float("inf")
    net.heads[0].weight.grad[0] = float("inf")
    with pytest.raises(NonFiniteGradientError, match="trunk.2.bias") as error:
        optimizer.accumulate_importance()
    assert error.value.names == ["trunk.2.bias"] and not optimizer.importance["trunk.2.bias"].any()


def test_names_come_from_the_inner_optimizer_if_it_has_them(net):
    named = SPGOptimizer(torch.optim.SGD(net.named_parameters(), lr=0.1), heads=net.heads)
    assert list(named.importance) == ["trunk.0.weight", "trunk.0.bias", "trunk.2.weight", "trunk.2.bias"]
    assert list(SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1),
                             heads=list(net.heads)).importance) == ["0.0", "0.1", "0.2", "0.3"]
    parameters = [p for head in net.heads for p in head.parameters()]
    assert len(SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=parameters).importance) == 4


@pytest.mark.dropin(line=9)
def test_arguments_are_checked(net):
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer.*list"):
        SPGOptimizer(list(net.parameters()))
    with pytest.raises(TypeError, match="SPGOptimizer"):
        SPGOptimizer(SPGOptimizer(inner))
    with pytest.raises(ValueError, match="mask.*'both'"):
        SPGOptimizer(inner, mask="both")
    with pytest.raises(ValueError, match="backend.*'cuda'"):
        SPGOptimizer(inner, backend="cuda")
    with pytest.raises(spg_kernels.BackendError, match="triton"):
        SPGOptimizer(inner, backend="triton")
    with pytest.raises(TypeError, match="importance.*dict"):
        SPGOptimizer(inner, importance={})
    with pytest.raises(ValueError, match="dtype"):
        SPGOptimizer(inner, importance_dtype=torch.float16)
    with pytest.raises(TypeError, match=r"heads\[0\]"):
        SPGOptimizer(inner, heads=["head"])
    with pytest.raises(TypeError, match="heads.*NoneType"):
        SPGOptimizer(inner, heads=None)
    with pytest.raises(TypeError, match=r"named_parameters\[0\].*\(name, parameter\).*Parameter"):
        SPGOptimizer(inner, named_parameters=net.parameters())
    with pytest.raises(ValueError, match=r"named_parameters: param_groups\[0\]\['params'\]\[0\]"):
        SPGOptimizer(inner, heads=net.heads, named_parameters=net.heads.named_parameters())
    with pytest.raises(TypeError, match="PostLocalSGDOptimizer has no `defaults`.*around the optimizer inside it"):
        SPGOptimizer(PostLocalSGDOptimizer(inner, averager=None))
    other = Importance([("trunk.0.weight", torch.zeros(4))])
    with pytest.raises(ValueError, match=r"trunk.0.weight.*\(4,\)"):
        SPGOptimizer(inner, heads=net.heads, named_parameters=net.named_parameters(), importance=other)
    modes = {mode: lambda self, mode=mode: mode for mode in ("train", "eval", "test")}
    hidden = type("ScheduleFree", (torch.optim.SGD,), modes)
    with pytest.raises(ValueError, match="ScheduleFree.*mask='gradient'"):
        SPGOptimizer(hidden(net.parameters(), lr=0.1))
    hides = SPGOptimizer(hidden(net.parameters(), lr=0.1), mask="gradient")
    with pytest.raises(ValueError, match="ScheduleFree.*mask='gradient'"):
        hides.mask = "update"
    with pytest.raises(ValueError, match="mask.*'both'"):
        hides.mask = "both"
    assert hides.mask == "gradient"
    assert hides.train() == "train" and hides.eval() == "eval"
    assert not hasattr(hides, "test"), "nothing else goes past the mask"

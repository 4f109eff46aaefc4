"""Checkpoints beyond a wrapper's own: flattened, moved between plain and wrapped optimizers, and `state` as torch walks it."""

import copy
import warnings
from collections import defaultdict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from spg_kernels import SPGOptimizer

from .models import set_gradients
from .wrapping import INNER, equal, train, values, wrap

KEY = "spg_importance"


@pytest.mark.dropin(line=13)
@pytest.mark.parametrize("inner", [name for name in INNER if not name.endswith(("foreach", "LBFGS", "Muon"))])
@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True},
                                     {"full_state_dict": True, "cpu_offload": True}], ids=str)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.compatibility("torch.distributed.checkpoint: get, set, flattened, full", "torch", "works")
def test_torch_distributed_checkpoint_resumes_the_trajectory(net, inner, options, tmp_path):
    """Into an optimizer that asked for its own state first, and into one that did not."""
    options = StateDictOptions(**options)
    optimizer = wrap(net, inner)
    train(net, optimizer, steps=2)
    set_gradients(net.parameters())
    optimizer.accumulate_importance()
    optimizer.step()
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer, options=options)}, checkpoint_id=tmp_path)
    twins = [copy.deepcopy(net) for _ in range(2)]
    for twin in twins:
        twin.zero_grad()
    resumed = [wrap(twin, inner) for twin in twins]
    state = get_optimizer_state_dict(twins[0], resumed[0], options=options)
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
    for twin, optimizer_of_twin in zip(twins, resumed):
        set_optimizer_state_dict(twin, optimizer_of_twin, optim_state_dict=copy.deepcopy(state), options=options)
        assert equal(values(twin), values(net)), "no hidden step moves a parameter"
        assert all(torch.equal(optimizer_of_twin.importance[name], optimizer.importance[name])
                   for name in optimizer.importance)
    for model, opt in zip((net, *twins), (optimizer, *resumed)):
        set_gradients(model.parameters(), seed=7)
        opt.step()
    assert all(equal(values(twin), values(net)) for twin in twins)


@pytest.mark.dropin(line=10)
def test_state_is_the_inner_state_written_through(net):
    optimizer = wrap(net, "AdamW", 0.25)
    state, weight, head = optimizer.state, net.trunk[0].weight, net.heads[0].weight
    assert not state and weight not in state and state.get(weight) is None and not optimizer.inner.state
    train(net, optimizer, steps=1)
    assert list(state) == list(optimizer.inner.state) and len(state) == len(list(net.parameters()))
    assert list(state[weight]) == ["step", "exp_avg", "exp_avg_sq", KEY] and len(state[weight]) == 4
    assert state[weight]["exp_avg"] is optimizer.inner.state[weight]["exp_avg"]
    assert (state[weight][KEY] == 0.25).all() and state[head][KEY].shape == ()
    optimizer.state[weight]["mine"] = 1
    assert optimizer.inner.state[weight].pop("mine") == 1
    del state[head]
    assert head not in optimizer.inner.state


@pytest.mark.dropin(line=11)
def test_no_way_of_writing_state_puts_the_importance_into_the_inner_state(net):
    optimizer = wrap(net, "AdamW", 0.25)
    weight, head = net.trunk[0].weight, net.heads[0].weight
    optimizer.state[weight][KEY] = torch.full_like(weight, 0.5)  # before Adam's own state is there
    optimizer.state[head][KEY] = torch.zeros(())
    assert (optimizer.importance[weight] == 0.5).all()
    train(net, optimizer, steps=1)
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():  # as frameworks move state between devices
            entry[key] = value.clone()
        optimizer.state[parameter] = entry
    before = optimizer.inner.state
    optimizer.state = optimizer.state
    assert optimizer.inner.state is before, "restoring what was read restores it, and wraps nothing twice"
    optimizer.state = defaultdict(dict, {p: dict(entry) for p, entry in optimizer.state.items()})
    assert all(KEY not in entry for entry in optimizer.inner.state.values())
    train(net, optimizer, steps=1)
    assert float(optimizer.state[weight]["step"]) == 2


@pytest.mark.dropin(line=10)
def test_loading_replaces_the_inner_state_and_groups_and_the_properties_follow(net):
    optimizer = wrap(net, "SGD momentum", 0.5)
    train(net, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.125
    groups = optimizer.param_groups
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups is not groups and optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.state.inner is optimizer.inner.state and optimizer.defaults["lr"] == 0.1


@pytest.mark.dropin(line=5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("importance_dtype", [torch.float32, torch.uint8], ids=str)
def test_the_importance_survives_a_plain_optimizer_in_between(net, dtype, importance_dtype):
    """torch casts every state to its parameter's dtype; 8-bit codes come back as the whole numbers they are."""
    net.to(dtype)
    optimizer = wrap(net, "AdamW", importance_dtype=importance_dtype)
    set_gradients(net.parameters())
    net.trunk[0].bias.grad = None  # a code of 0 is one as well
    optimizer.accumulate_importance()
    plain = INNER["AdamW"](net.parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert plain.state[net.trunk[0].weight][KEY].dtype == dtype
    resumed = wrap(net, "AdamW", importance_dtype=importance_dtype)
    resumed.load_state_dict(plain.state_dict())
    for name in optimizer.importance:
        limit = 0 if importance_dtype == torch.uint8 else torch.finfo(dtype).eps
        assert (resumed.importance[name] - optimizer.importance[name]).abs().max() <= limit


@pytest.mark.dropin(line=6)
@pytest.mark.parametrize("values_of", [(2.5, 1.0), (300.0, 1.0), (-1.0, 2.0), (2.0, 0.5), (float("nan"), 2.0)], ids=str)
def test_floats_above_one_that_are_no_codes_are_refused(net, values_of):
    optimizer = wrap(net, "SGD", 0.0)
    state = copy.deepcopy(optimizer.state_dict())
    for i, value in enumerate(values_of):
        state["state"][i][KEY].fill_(value)
    with pytest.raises(ValueError, match=r"trunk.*finite values in \[0, 1\]"):
        optimizer.load_state_dict(state)
    assert not any(optimizer.importance[name].any() for name in optimizer.importance)


@pytest.mark.dropin(line=12)
def test_gammas_of_zero_and_one_are_gammas(net):
    optimizer = wrap(net, "SGD", 1.0)
    resumed = wrap(net, "SGD", importance_dtype=torch.uint8)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all((resumed.importance[name] == 1).all() for name in resumed.importance)


@pytest.mark.dropin(line=12)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.compatibility("checkpoints of a plain optimizer, both ways, `weights_only=True`", "torch", "works with a note",
                           "a plain SparseAdam, or another without `_init_group`, may fail at a parameter not stepped before "
                           "saving")
def test_the_migration_of_the_readme_both_ways(net, inner, tmp_path):
    """plain -> wrapped: nothing is protected yet, the trajectory is the plain one; wrapped -> plain: it goes on as it was."""
    plain = INNER[inner](net.parameters())
    train(net, plain, steps=2)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    model = copy.deepcopy(net)
    wrapped = SPGOptimizer(INNER[inner](model.parameters()), heads=model.heads, backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True))
    assert train(model, wrapped) == train(net, plain) and equal(values(model), values(net))
    torch.save(wrapped.state_dict(), tmp_path / "wrapped.pt")
    back = INNER[inner](model.parameters())
    back.load_state_dict(torch.load(tmp_path / "wrapped.pt", weights_only=True))
    assert train(model, back) == train(net, plain) and equal(values(model), values(net))


@pytest.mark.dropin(line=11)
def test_the_inner_optimizer_loads_what_it_has_saved_and_no_more(net):
    """No importance and no tasks, nor the empty state that is left of SGD's: others may ask whether a parameter has one."""
    optimizer, loaded = wrap(net, "SGD", 0.5), []
    optimizer.inner.register_load_state_dict_pre_hook(lambda _, state: loaded.append(dict(state)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert loaded == [optimizer.inner.state_dict()] and not loaded[0]["state"] and not optimizer.inner.state


@pytest.mark.dropin(line=12)
@pytest.mark.parametrize("inner", [name for name in INNER if name != "SGD fused"])  # torch's cannot start a momentum late
def test_a_plain_optimizer_trains_what_was_frozen_when_the_wrapper_saved_it(net, inner):
    expected = copy.deepcopy(net)
    plain = INNER[inner](expected.parameters())
    frozen = [[*model.trunk[0].parameters()] for model in (net, expected)]
    for parameter in sum(frozen, []):
        parameter.requires_grad_(False)
    wrapped = wrap(net, inner, backend="reference")
    train(net, wrapped, steps=2), train(expected, plain, steps=2)
    resumed = INNER[inner](net.parameters())
    resumed.load_state_dict(wrapped.state_dict())
    for parameter in sum(frozen, []):
        parameter.requires_grad_(True)
    assert train(net, resumed) == train(expected, plain) and equal(values(net), values(expected))


@pytest.mark.dropin(line=13)
def test_the_number_of_tasks_travels_with_the_state_dict(net):
    optimizer, fresh = wrap(net, "AdamW", 0.25), wrap(net, "AdamW")
    optimizer.importance.tasks = 3
    plain = INNER["AdamW"](net.parameters())
    plain.load_state_dict(optimizer.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.importance.tasks == 3
    fresh.load_state_dict(plain.state_dict())
    assert fresh.importance.tasks == 3, "a plain optimizer's state says nothing of tasks"
    before = values(net)
    for wrong in (-1, "3", None, 1.0):
        with pytest.raises(ValueError, match="tasks"):
            fresh.load_state_dict({**optimizer.state_dict(), "spg_tasks": wrong})
    assert fresh.importance.tasks == 3 and equal(values(net), before)


def test_an_importance_for_only_some_parameters_is_loaded_with_a_warning(net):
    optimizer, fresh = wrap(net, "SGD", 0.25), wrap(net, "SGD")
    state = optimizer.state_dict()
    del state["state"][1]
    with pytest.warns(UserWarning, match="none for trunk.0.bias; theirs stays") as warned:
        fresh.load_state_dict(state)
    assert warned[0].filename == __file__
    assert (fresh.importance["trunk.0.weight"] == 0.25).all() and not fresh.importance["trunk.0.bias"].any()
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")
        optimizer.load_state_dict({**state, "spg_tasks": 7})
    assert optimizer.importance.tasks == 0, "an error changes nothing"


@pytest.mark.dropin(line=5)
def test_the_importance_survives_a_checkpoint_exactly(net):
    optimizer = wrap(net.bfloat16(), "AdamW")
    for name in optimizer.importance:
        optimizer.importance[name] = torch.rand(optimizer.importance[name].shape)
    other = wrap(copy.deepcopy(net), "AdamW")
    other.load_state_dict(optimizer.state_dict())
    assert other.importance.active
    for name in optimizer.importance:
        assert torch.equal(other.importance[name], optimizer.importance[name])


@pytest.mark.dropin(line=12)
def test_the_keys_of_a_checkpoint_are_constant_from_the_start(net):
    optimizer = wrap(net, "AdamW")
    before = {i: sorted(state) for i, state in optimizer.state_dict()["state"].items()}
    set_gradients(net.parameters())
    optimizer.accumulate_importance()
    optimizer.step()
    assert {i: sorted(state) for i, state in optimizer.state_dict()["state"].items()} == before
    assert all("spg_importance" not in state for state in optimizer.inner.state.values())


@pytest.mark.dropin(line=6)
def test_a_checkpoint_that_does_not_fit_changes_nothing(net):
    optimizer = wrap(net, "AdamW", 0.5)
    train(net, optimizer)
    good = copy.deepcopy(optimizer.state_dict())
    for damage, message in ((torch.full((16, 10), 2.0), "trunk.0.weight.*2.0"), (torch.rand(4), r"trunk.0.weight.*\(4,\)")):
        bad = copy.deepcopy(good)
        bad["state"][0]["spg_importance"] = damage
        bad["state"][0]["exp_avg"].zero_()
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
    other = SPGOptimizer(INNER["AdamW"](net.parameters()), heads=[*net.heads, net.trunk[2]])
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[2\].*a head here"):
        other.load_state_dict(good)
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][i][key], good["state"][i][key]) for i in good["state"] for key in good["state"][i])


def test_the_importance_of_a_checkpoint_goes_by_name(net):
    """torch loads moments by position whatever the names; those of another parameter heal, an importance would not."""
    named = list(net.named_parameters())
    optimizer = SPGOptimizer(torch.optim.AdamW(named), heads=net.heads)
    for k, name in enumerate(optimizer.importance):
        optimizer.importance[name] = torch.full(optimizer.importance[name].shape, 0.25 * k)
    turned = SPGOptimizer(torch.optim.AdamW(named[::-1]), heads=net.heads)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for index in group["params"]:
            state["state"][index] = {KEY: state["state"][index][KEY]}  # torch would load moments of other shapes
    for _ in range(2):  # torch's own load takes over the checkpoint's names
        with pytest.warns(UserWarning, match="another order") as warned:
            turned.load_state_dict(state)
        assert warned[0].filename == __file__
    again = SPGOptimizer(torch.optim.AdamW(named[::-1]), heads=net.heads)
    again.load_state_dict(turned.state_dict())
    for loaded in (turned, again):
        assert all(torch.equal(loaded.importance[name], optimizer.importance[name]) for name in optimizer.importance)


def test_a_head_of_a_checkpoint_is_no_trunk(net):
    state = wrap(net, "AdamW", 0.5).state_dict()
    forgotten = SPGOptimizer(torch.optim.AdamW(net.parameters()), named_parameters=net.named_parameters())
    with pytest.raises(ValueError, match="heads.0.weight: is a head in this checkpoint.*`heads`"):
        forgotten.load_state_dict(state)
    forgotten.importance.tasks = "one"
    with pytest.raises(ValueError, match="tasks: expected an integer"):
        forgotten.state_dict()


@pytest.mark.parametrize("through", ["asked for", "loaded"])
@pytest.mark.parametrize("inner", [torch.optim.Rprop, torch.optim.ASGD])
def test_a_checkpoint_keeps_no_learning_rate_for_a_parameter_that_was_not_stepped(net, inner, through):
    """Both keep one in a parameter's state, from its first step on: in a warm-up, or with a layer frozen, an early one."""
    trained = []
    for is_wrapped in (False, True):
        twin = copy.deepcopy(net)
        optimizer = inner(twin.parameters(), lr=0.1)
        if is_wrapped:
            optimizer = SPGOptimizer(optimizer, heads=twin.heads)
        for seed, lr in enumerate((0.1, 0.001)):
            for group in optimizer.param_groups:
                group["lr"] = lr
            set_gradients(twin.parameters() if seed else twin.heads.parameters(), seed)
            optimizer.step()
            state = optimizer.state_dict()
            if through == "loaded":
                optimizer.load_state_dict(state)
        trained.append(values(twin))
    assert equal(*trained)


@pytest.mark.parametrize("through", ["loaded", "wrapped anew"])
@pytest.mark.parametrize("inner", [torch.optim.Rprop, torch.optim.ASGD])
def test_nor_does_a_checkpoint_loaded_between_steps_or_a_wrapper_taken_off(net, inner, through):
    optimizer = SPGOptimizer(inner(net.parameters(), lr=0.1), heads=net.heads)
    state = copy.deepcopy(optimizer.state_dict())
    if through == "loaded":
        set_gradients(net.heads.parameters())
        optimizer.step()
        optimizer.load_state_dict(state)
    else:
        optimizer = SPGOptimizer(optimizer.inner, heads=net.heads)
    optimizer.param_groups[0]["lr"] = 0.001
    before = values(net.trunk)
    set_gradients(net.parameters())
    optimizer.step()
    twin = [torch.nn.Parameter(value) for value in before]
    for parameter, stepped in zip(twin, net.trunk.parameters()):
        parameter.grad = stepped.grad.clone()
    inner(twin, lr=0.001).step()
    assert equal(values(net.trunk), twin)

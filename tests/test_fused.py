"""The fused step keeps what it found from step to step: whatever is changed in between, the next step must see."""

import copy

import pytest
import torch

from spg_kernels import BackendError, Importance, SPGOptimizer
from spg_kernels.backends import native

from .models import Net, set_gradients
from .wrapping import FUSABLE, equal, values, wrap


def _other_states(optimizer, net):
    for parameter, state in optimizer.inner.state.items():
        optimizer.inner.state[parameter] = {k: v + 0.5 if torch.is_tensor(v) and v.dim() else v for k, v in state.items()}


def _other_tensors_in_the_states(optimizer, net):
    for state in optimizer.inner.state.values():
        state.update({k: v + 0.5 for k, v in state.items() if torch.is_tensor(v) and v.dim()})


def _emptied_states(optimizer, net):
    for state in list(optimizer.inner.state.values())[::2]:
        state.clear()


def _no_momentum_yet(optimizer, net):
    for state in list(optimizer.inner.state.values())[::2]:
        if "momentum_buffer" in state:
            state["momentum_buffer"] = None


def _other_memory(optimizer, net):
    for state in optimizer.inner.state.values():
        for value in state.values():
            if torch.is_tensor(value) and value.dim():
                value.data = value.data * 2
    for parameter in net.parameters():
        parameter.data = parameter.data * 2


def _fewer_gradients(optimizer, net):
    for parameter in list(net.parameters())[::2]:
        parameter.grad = None


def _no_gradient_then_all(optimizer, net):
    net.zero_grad()
    optimizer.step()
    set_gradients(net.parameters(), seed=4)


def _settings(optimizer, net):
    for group in optimizer.param_groups:
        group.update({key: value for key, value in dict(lr=0.03, weight_decay=0.2, maximize=True, momentum=0.3, amsgrad=True,
                                                        betas=(0.5, 0.6)).items() if key in group})
        for parameter in group["params"] if "amsgrad" in group else ():
            optimizer.inner.state[parameter].setdefault("max_exp_avg_sq", torch.ones_like(parameter))


def _loaded_checkpoint(optimizer, net):
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(state)


def _other_importance(optimizer, net):
    named = [(name, p) for name, p in net.named_parameters() if name.startswith("trunk")]
    optimizer.importance = Importance(named)
    for name in optimizer.importance:
        optimizer.importance[name] = torch.full(optimizer.importance[name].shape, 0.25)


def _other_gammas(optimizer, net):
    for name in optimizer.importance:
        optimizer.importance[name] = 1 - optimizer.importance[name]


def _other_parameters(optimizer, net):
    fresh = torch.nn.Linear(16, 16)
    net.trunk[2].load_state_dict(fresh.state_dict())
    old, net.trunk[2].weight = net.trunk[2].weight, torch.nn.Parameter(net.trunk[2].weight.detach().clone())
    net.trunk[2].weight.grad = old.grad
    for group in optimizer.param_groups:
        group["params"] = [net.trunk[2].weight if p is old else p for p in group["params"]]
    optimizer.importance.bind(net.named_parameters())


def _another_group(optimizer, net):
    net.heads.append(torch.nn.Linear(16, 3))
    with torch.no_grad():
        for parameter in net.heads[-1].parameters():
            parameter.fill_(0.1)
    optimizer.add_param_group({"params": list(net.heads[-1].parameters()), "lr": 0.05})
    set_gradients(net.parameters(), seed=5)


def _another_inner_optimizer(optimizer, net):
    optimizer.inner = type(optimizer.inner)(net.parameters(), lr=0.02)


CHANGES = [_other_states, _other_tensors_in_the_states, _emptied_states, _no_momentum_yet, _other_memory, _fewer_gradients,
           _no_gradient_then_all, _settings, _loaded_checkpoint, _other_importance, _other_gammas,
           _other_parameters, _another_group, _another_inner_optimizer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
# Without "SGD fused", which in torch itself raises where only some parameters have a momentum.
@pytest.mark.parametrize("inner", [inner for inner in FUSABLE if inner != "SGD fused"])
def test_the_next_step_sees_what_was_changed(inner, change, monkeypatch):
    trained = []
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        net = Net()
        optimizer = wrap(net, inner, backend=backend)
        for name in optimizer.importance:
            optimizer.importance[name] = torch.rand(optimizer.importance[name].shape)
        if backend == "native":  # the fused step must serve all of it
            monkeypatch.setattr(optimizer, "_generic_step", None)
        for step in range(4):
            set_gradients(net.parameters(), seed=step)
            if step == 2:
                change(optimizer, net)
            optimizer.step()
        trained.append(values(net))
    for fused, generic in zip(*trained, strict=True):
        assert torch.allclose(fused, generic, rtol=1e-5, atol=1e-6)


def test_nothing_is_looked_up_again_while_nothing_changes(net, monkeypatch):
    optimizer = wrap(net, "AdamW", gamma=0.5)
    set_gradients(net.parameters())
    optimizer.step()
    monkeypatch.setattr(optimizer.inner, "_init_group", None)
    monkeypatch.setattr(optimizer, "_gamma", None)
    monkeypatch.setattr(native.PLANS, "make", None)  # three heads share one gamma
    set_gradients(net.parameters(), seed=1)
    optimizer.step()


def test_kernels_are_not_kept_for_another_backend(net):
    optimizer = wrap(net, "AdamW", gamma=0.5, backend="native")
    set_gradients(net.parameters())
    for _ in range(2):
        optimizer.step()
    before = values(net)
    optimizer.backend = "triton"
    with pytest.raises(BackendError):
        optimizer.step()
    assert equal(values(net), before)


@pytest.mark.parametrize("inner", ["Adam", "AdamW"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_is_decoupled_where_torchs_own_step_decouples_it(inner, decoupled):
    """A group has the setting for itself; torch 2.6 has it from a later torch's checkpoint at most, and does not read it."""
    trained = []
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        net = Net()
        optimizer = wrap(net, inner, gamma=0.5, backend=backend)
        optimizer.param_groups[0]["decoupled_weight_decay"] = decoupled
        set_gradients(net.parameters())
        optimizer.step()
        trained.append(values(net))
    for fused, generic in zip(*trained, strict=True):
        assert torch.allclose(fused, generic, rtol=1e-5, atol=1e-6)


def test_sgd_without_momentum_leaves_no_state(net):
    optimizer = wrap(net, "SGD", gamma=0.5)
    set_gradients(net.parameters())
    optimizer.step()
    assert not optimizer.inner.state


def test_what_is_kept_does_not_grow_with_the_steps():
    """Another number of parameters with other shapes in every step, as where experts take turns."""
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in range(1, 101)]
    optimizer = SPGOptimizer(torch.optim.SGD(parameters, lr=0.1))
    optimizer.importance["0.0"] = torch.ones(1)
    for step in range(99):
        set_gradients(parameters[step:])
        optimizer.step()
        optimizer.zero_grad()
    assert len(native.PLANS._plans) <= 32 and all(len(plans) <= 16 for plans in native.PLANS._plans.values())
    assert torch.equal(parameters[0], torch.ones(1)) and not torch.equal(parameters[98], torch.ones(99))


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_model_that_changes_its_memory_format_is_stepped_by_the_kernels_again(steps_before, monkeypatch):
    model = torch.nn.Conv2d(4, 8, 3)
    optimizer = SPGOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), backend="native")
    optimizer.importance[model.weight] = torch.rand(model.weight.shape)
    gamma, before = optimizer.importance[model.weight], model.weight.detach().clone()
    for step in range(steps_before + 2):
        if step == steps_before:
            model.to(memory_format=torch.channels_last)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if step == steps_before + 1:
            monkeypatch.setattr(optimizer, "_generic_step", None)
        optimizer.step()
    assert torch.equal(optimizer.importance[model.weight], gamma)
    assert torch.allclose(model.weight, before - 0.1 * (steps_before + 2) * (1 - gamma), atol=1e-6)


# torch's own fused steps do not look at shapes; SGD without momentum has no state.
@pytest.mark.parametrize("inner", [inner for inner in FUSABLE if inner != "SGD" and not inner.endswith("fused")])
def test_a_state_of_another_shape_is_torchs_error_and_moves_nothing(net, inner):
    """torch loads a state whatever its shape, as from a model whose layers have another order, and finds out in the step."""
    optimizer = wrap(net, inner, gamma=0.5)
    set_gradients(net.parameters())
    optimizer.step()
    state = optimizer.state[net.trunk[0].weight]
    for name, value in state.items():
        if name != "spg_importance" and value.dim():
            state[name] = value.t().contiguous()
    before = values(net)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert equal(values(net), before)

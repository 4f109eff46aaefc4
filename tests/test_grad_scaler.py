"""A GradScaler's scale and inf check inside a masked step: every backend's operators, and SPGOptimizer under a real scaler."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import spg_kernels
from spg_kernels import SPGOptimizer

from .models import Net, set_gradients
from .triton_cases import GAMMAS, SETTINGS, copies, equal, inputs
from .wrapping import INNER, values, wrap
from .wrapping import equal as same_values

# Operators

STEPS = [(op, {key: value for key, value in settings.items() if key not in ("grad_scale", "found_inf")})
         for op in ("masked_sgd_", "masked_adamw_") for settings in SETTINGS[op]]
SHAPES = [(n,) for n in (0, 3, 1025)] + [(40, 30)]


@pytest.fixture(params=[True, False], ids=["amsgrad", ""])
def step_lists(request):
    def make(op, gamma_kind="float32"):
        lists = inputs(op, torch.float32, torch.float32, gamma_kind, SHAPES)
        return lists if request.param or op == "masked_sgd_" else (*lists[:5], [], lists[6])

    return make


def reciprocal(scale: float) -> torch.Tensor:
    """As GradScaler.unscale_ rounds it."""
    return torch.tensor(scale).double().reciprocal().float()


@pytest.mark.parametrize("scale", [65536.0, 3000.7, 0.3])
@pytest.mark.parametrize("gamma_kind", GAMMAS)
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("op, settings", STEPS)
def test_a_scaled_step_has_the_bits_of_a_step_on_unscaled_gradients(step_lists, backend, op, settings, mask, gamma_kind,
                                                                     scale):
    scaled, plain = step_lists(op, gamma_kind), step_lists(op, gamma_kind)
    torch._foreach_mul_(plain[1], reciprocal(scale))
    grads = [grad.clone() for grad in scaled[1]]
    settings = {**settings, "mask": mask, "backend": backend}
    for value in (torch.tensor(scale), torch.tensor([scale])):
        getattr(spg_kernels, op)(*scaled, **settings, grad_scale=value, found_inf=torch.zeros(()))
        getattr(spg_kernels, op)(*plain, **settings)
        assert equal([grads], [scaled[1]]), "gradients stay as they were"
        assert equal(scaled[:1] + scaled[2:], plain[:1] + plain[2:])


@pytest.mark.parametrize("found", [1.0, 2.0, float("inf")])  # a sum over devices may be more than 1
@pytest.mark.parametrize("op, settings", STEPS)
def test_found_inf_changes_nothing_at_all(backend, op, settings, found, step_lists):
    lists = step_lists(op)
    lists[1][2][:] = float("inf")
    before = copies(lists)
    for grad_scale in (None, torch.tensor(1024.0)):
        getattr(spg_kernels, op)(*lists, **settings, grad_scale=grad_scale, found_inf=torch.tensor([found]), backend=backend)
    assert equal(lists, before)


@pytest.mark.parametrize("op", ["masked_sgd_", "masked_adamw_"])
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_values_that_are_not_one_float32_are_refused(backend, op, name):
    lists = inputs(op, torch.float32, torch.float32, "float32", SHAPES)
    before = copies(lists)
    for kind, message, value in ((TypeError, f"{name}.*float64", torch.ones((), dtype=torch.float64)),
                                 (TypeError, f"{name}.*float", 1.0), (ValueError, rf"{name}.*\(2,\)", torch.ones(2))):
        with pytest.raises(kind, match=message):
            getattr(spg_kernels, op)(*lists, lr=0.1, backend=backend, **{name: value})
    assert equal(lists, before)


@pytest.mark.parametrize("op, name", [("masked_sgd_", "momentum"), ("masked_adamw_", "beta1"), ("masked_adamw_", "eps"),
                                      ("masked_sgd_", "lr"), ("masked_adamw_", "lr")])
def test_settings_that_are_no_numbers_are_refused(backend, op, name):
    """The reference had counted the step and moved the moments by the time that it met them."""
    lists = inputs(op, torch.float32, torch.float32, "float32", SHAPES)
    before = copies(lists)
    cases = [(TypeError, f"^{name}: expected a number, got {type(bad).__name__}", bad) for bad in (None, "0.1", [0.1])]
    if name == "lr":
        cases.append((ValueError, r"^lr: expected one value, got shape \(2,\)", torch.ones(2)))
    for kind, message, value in cases:
        with pytest.raises(kind, match=message):
            getattr(spg_kernels, op)(*lists, backend=backend, **{"lr": 0.1, name: value})
    assert equal(lists, before)


def test_a_compiled_function_scales_and_skips_without_a_graph_break(backend):
    def step(param, grad, gamma, grad_scale, found_inf):
        scaler = {"grad_scale": grad_scale, "found_inf": found_inf}
        spg_kernels.masked_sgd_([param], [grad * 2], [gamma], lr=0.1, **scaler, backend=backend)

    param, grad, gamma = torch.randn(50), torch.randn(50), torch.rand(50)
    twin, counter = param.clone(), CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for scale, found in ((8.0, 0.0), (3.7, 1.0), (3.7, 0.0)):
        for function, p in ((step, param), (compiled, twin)):
            function(p, grad, gamma, torch.tensor(scale), torch.tensor(found))
        assert torch.equal(param, twin)
    assert counter.frame_count == 1


# SPGOptimizer under a GradScaler

FUSED = ["SGD fused", "Adam fused", "AdamW fused"]
BAD_STEPS = (0, 3)  # the first, which makes the state, and a later one


class Classical(SPGOptimizer):
    """Gradients are unscaled before the step, and the host decides about it."""

    _step_supports_amp_scaling = False


def scaled_training(net, optimizer, scaler, steps=range(8), bad=BAD_STEPS):
    """Steps under the scaler, with a gradient that is not finite in the bad ones; the scales, one after each step."""
    scales = []
    for i in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 10, generator=torch.Generator().manual_seed(i))
        scaler.scale(sum(net(x, t).square().mean() for t in range(3))).backward()
        if i in bad:
            net.trunk[0].weight.grad[1, 2] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def grad_scaler() -> torch.amp.GradScaler:
    """Of scales that are no powers of two, and grow again soon."""
    return torch.amp.GradScaler("cpu", init_scale=3000.7, growth_interval=2, backoff_factor=0.3)


def same_state(a, b) -> bool:
    """Bit for bit. Adam's state may be there before its first step, as torch makes it: zeros."""
    def entry(state, p, key, like):
        return state.get(p, {}).get(key, torch.zeros_like(like))

    pairs = list(zip(*([p for group in opt.param_groups for p in group["params"]] for opt in (a, b))))
    return all(torch.equal(entry(a.state, p, key, like), entry(b.state, q, key, like))
               for p, q in pairs for key, like in {**a.state.get(p, {}), **b.state.get(q, {})}.items())


@pytest.mark.dropin(line=14)
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("inner", FUSED)
@pytest.mark.parametrize("gamma", [0.5, None], ids=["masked", "unmasked"])
@pytest.mark.filterwarnings("ignore:mask='gradient'")
def test_a_step_takes_the_scalers_values_to_the_bits_of_the_classical_path(net, inner, mask, gamma):
    trained = []
    for kind in (SPGOptimizer, Classical):
        model = copy.deepcopy(net)
        optimizer = wrap(model, inner, gamma, mask=mask)
        optimizer.__class__ = kind
        scaler = grad_scaler()
        scales = scaled_training(model, optimizer, scaler)
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer.inner, "found_inf")
        # The wrapper off: the inner optimizer goes on with what it finds.
        scaled_training(model, optimizer.inner, scaler, steps=range(8, 11), bad=(9,))
        trained.append((model, optimizer, scales))
    (ours, optimizer, scales), (theirs, classical, expected) = trained
    assert scales == expected and scales[0] < 3000 and scales[2] > scales[1]
    assert optimizer._step_supports_amp_scaling
    if gamma is None:  # torch's own step divides by the scale; the classical one multiplies by its reciprocal
        assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(values(ours), values(theirs)))
    else:
        assert max((p - q).abs().max() for p, q in zip(values(ours), values(theirs))) == 0
        assert same_state(optimizer.inner, classical.inner)


@pytest.mark.dropin(line=3)
@pytest.mark.parametrize("inner", FUSED)
def test_gradients_stay_scaled_and_skipped_steps_leave_every_bit(net, inner):
    optimizer, scaler = wrap(net, inner, 0.5), grad_scaler()
    scaled_training(net, optimizer, scaler, range(2), bad=())
    for bad in (False, True):
        optimizer.zero_grad()
        scaler.scale(net(torch.randn(8, 10), 0).square().mean()).backward()
        if bad:
            net.trunk[0].weight.grad[1, 2] = float("nan")
        grads = {p: (p.grad, p.grad.clone()) for p in net.parameters() if p.grad is not None}
        before, state = values(net), copy.deepcopy(optimizer.inner.state_dict()["state"])
        scaler.step(optimizer)
        assert all(p.grad is grad and torch.equal(grad.nan_to_num(), kept.nan_to_num()) for p, (grad, kept) in grads.items())
        assert same_values(values(net), before) is bad
        now = optimizer.inner.state_dict()["state"]
        assert all(torch.equal(now[i][key], state[i][key]) for i in state for key in state[i]) is bad
        scaler.update()


@pytest.mark.parametrize("gamma", [0.5, None], ids=["masked", "unmasked"])
def test_a_first_momentum_step_that_is_skipped_leaves_no_buffer(net, gamma):
    """torch's fused SGD leaves uninitialized memory as the momentum that its next step goes on with."""
    optimizer = wrap(net, "SGD fused", gamma)
    scaled_training(net, optimizer, grad_scaler(), range(1))
    assert not any("momentum_buffer" in state for state in optimizer.inner.state.values())
    set_gradients(net.parameters())
    optimizer.step()
    assert all(torch.equal(optimizer.inner.state[p]["momentum_buffer"], p.grad) for p in net.parameters())


def test_values_set_by_hand_reach_the_step_of_an_optimizer_with_any_settings(net):
    """Another inner optimizer than a fused one, a closure, and a value of None."""
    twin = copy.deepcopy(net)
    ours, plain = wrap(net, "SGD momentum", 0.5), wrap(twin, "SGD momentum", 0.5)

    def closure(model, factor, seed):
        def run():
            set_gradients(model.parameters(), seed)
            torch._foreach_mul_([p.grad for p in model.parameters()], factor)
            return torch.tensor(7.0)

        return run

    for seed, scale, found in ((0, 4.0, 1.0), (1, 4.0, None), (2, None, 0.0), (3, 8.0, 2.0), (4, 8.0, 0.0)):
        for name, value in (("grad_scale", scale), ("found_inf", found)):
            setattr(ours, name, None if value is None else torch.tensor(value))
        assert ours.step(closure(net, scale or 1.0, seed)) == 7
        if not found:
            plain.step(closure(twin, 1.0, seed))
        assert same_values(values(net), values(twin))
    ours.grad_scale, ours.found_inf = torch.ones(2), None
    with pytest.raises(ValueError, match=r"grad_scale.*\(2,\)"):
        ours.step()
    assert same_values(values(net), values(twin))


@pytest.mark.dropin(line=14)
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.filterwarnings("ignore:mask='gradient'")
def test_gradients_that_no_kernel_takes_are_unscaled_for_the_step_around(mask):
    """Strided ones: only the step itself finds out."""
    parameter = nn.Parameter(torch.randn(4, 6))
    twin, without = nn.Parameter(parameter.detach().clone()), nn.Parameter(torch.ones(3))
    ours, plain = (SPGOptimizer(torch.optim.AdamW([p, nn.Parameter(torch.ones(3))], lr=0.1, fused=True), mask=mask,
                                backend=backend) for p, backend in ((parameter, "auto"), (twin, "reference")))
    ours.importance["0.0"] = plain.importance["0.0"] = torch.rand(4, 6)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (False, True, False):
        scale = scaler.scale(torch.ones(())).item()
        kept, grad = torch.randn(4, 12), torch.randn(4, 12)
        kept[:, ::2] = scale * grad[:, ::2]
        parameter.grad, twin.grad = kept[:, ::2], grad[:, ::2].clone()
        kept[0, 0] = float("inf") if bad else kept[0, 0]
        given, before = parameter.grad, kept.clone()
        assert ours._step_supports_amp_scaling
        scaler.step(ours)
        assert parameter.grad is given and torch.equal(kept, before)
        assert not hasattr(ours.inner, "grad_scale")
        scaler.update()
        if not bad:
            plain.step()
        assert (parameter - twin).abs().max() < 1e-6
    assert without.grad is None


@pytest.mark.dropin(line=14)
def test_a_scaler_is_told_what_the_step_can_do(net):
    """What the inner optimizer says, as far as kernels will take its masked step."""
    def says(inner, gamma=0.5, model=net, **settings):
        return wrap(model, inner, gamma, **settings)._step_supports_amp_scaling

    for inner in INNER:  # trainers that see it refuse to clip: not where the inner optimizer alone would not say so
        assert says(inner) == says(inner, backend="native") == (inner in FUSED)
        assert says(inner, None) == (inner in FUSED)
        assert not says(inner, backend="reference")
    partly = Net()
    partly.heads[0].double()
    assert not says("AdamW fused", model=Net().double()) and not says("AdamW fused", model=partly)
    set_gradients(net.parameters())
    optimizer = wrap(net, "SGD fused")
    assert not optimizer._step_supports_amp_scaling, "torch's fused SGD is not to begin with what it may have to skip"
    optimizer.step()
    assert optimizer._step_supports_amp_scaling
    patched = wrap(net, "AdamW fused", 0.5)
    patched.inner.step = lambda closure=None: None
    assert not patched._step_supports_amp_scaling


def test_a_step_without_any_gradient_does_nothing(net):
    optimizer, scaler = wrap(net, "AdamW fused", 0.5), grad_scaler()
    before = values(net)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert same_values(values(net), before)


@pytest.mark.dropin(line=17)
@pytest.mark.parametrize("inner", ["SGD", "SGD momentum", "AdamW", "AdamW tensor lr"])
def test_a_compiled_step_takes_the_scalers_values_and_is_compiled_once(net, inner):
    torch._dynamo.reset()
    twin = copy.deepcopy(net)
    compiled, eager = wrap(net, inner, 0.3), wrap(twin, inner, 0.3)
    counter, frames = CompileCounter(), []
    step = torch.compile(compiled.step, backend=counter)
    for i in range(7):
        for model, optimizer, one_step in ((net, compiled, step), (twin, eager, eager.step)):
            set_gradients(model.parameters(), seed=i)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0 + i), torch.tensor(float(i in BAD_STEPS))
            one_step()
            del optimizer.grad_scale, optimizer.found_inf
        frames.append(counter.frame_count)
        assert all((p - q).abs().max() < 3e-6 for p, q in zip(values(net), values(twin)))
    assert frames[0] > 0 and len(set(frames[3:])) == 1, frames

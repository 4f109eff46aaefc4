"""SPGOptimizer protects: no importance changes nothing, gamma = 1 does not move, and what lies between moves its share."""

import copy
import warnings

import pytest
import torch
from torch import nn

from spg_kernels import SPGOptimizer

from .models import set_gradients
from .wrapping import FUSABLE, INNER, closure_for, equal, train, values, wrap


@pytest.mark.dropin(line=2)
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


@pytest.mark.dropin(line=1)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("on", ["auto", "reference"])
def test_gamma_one_does_not_move(net, inner, on):
    """Under a closure, with weight decay, and with heads: their factor 1 - mean(gamma) is 0."""
    before = values(net)
    losses = train(net, wrap(net, inner, 1.0, backend=on))
    assert equal(values(net), before) and len(set(losses)) == 1


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("on", ["auto", "reference"])
def test_a_frozen_parameter_that_still_has_a_gradient_is_masked(net, inner, on):
    """The inner optimizer moves it: it looks at gradients, not at requires_grad."""
    optimizer = wrap(net, inner, 1.0, backend=on)
    train(net, optimizer, steps=1)
    net.requires_grad_(False)
    before = values(net)

    def thaw():
        net.requires_grad_(True)
        return closure_for(net, torch.ones(8, 10))()

    if inner != "LBFGS":  # takes no step without a closure
        optimizer.step()
    optimizer.step(thaw)
    net.requires_grad_(False)
    net.zero_grad()  # and has none any more, until the closure
    optimizer.step(thaw)
    assert equal(values(net), before)


@pytest.mark.dropin(line=1)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("inner", ["SGD", "RMSprop"])
def test_a_frozen_parameter_without_arithmetic_is_no_hindrance_to_a_closure(net, inner, dtype):
    frozen = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    optimizer = SPGOptimizer(INNER[inner]([*net.parameters(), frozen]), heads=[net.heads, frozen])
    optimizer.importance["0.0"] = torch.ones(16, 10)
    before = values(net)
    optimizer.step(closure_for(net, torch.ones(8, 10)))
    assert torch.equal(net.trunk[0].weight, before[0]) and not torch.equal(net.trunk[2].weight, before[2])
    assert torch.equal(frozen.float(), torch.ones(3))


@pytest.mark.dropin(line=4)
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


@pytest.mark.dropin(line=2)
@pytest.mark.parametrize("inner", INNER)
def test_the_update_mask_scales_what_the_inner_step_adds(net, inner):
    """On both paths, for the trunk elementwise and for heads by one minus the mean of gamma."""
    for on in ("auto", "reference"):
        model, twin = copy.deepcopy(net), copy.deepcopy(net)
        optimizer = wrap(model, inner, backend=on)
        for name in optimizer.importance:
            optimizer.importance[name] = torch.rand(optimizer.importance[name].shape,
                                                    generator=torch.Generator().manual_seed(3))
        old = values(model)
        train(twin, INNER[inner](twin.parameters()), steps=1)
        train(model, optimizer, steps=1)
        mean = float(optimizer.importance.mean())
        for (name, p), q, before in zip(model.named_parameters(), twin.parameters(), old):
            gamma = mean if name.startswith("heads.") else optimizer.importance.get(name, 0)
            expected = before + (1 - gamma) * (q - before)
            assert (p - expected).abs().max() < 1e-6, (on, name)


@pytest.mark.dropin(line=2)
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


@pytest.mark.dropin(line=16)
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


@pytest.mark.dropin(line=3)
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
        plain = build(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
        plain.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        SPGOptimizer(torch.optim.AdamW(net.parameters()), heads=net.heads)
    changed = SPGOptimizer(torch.optim.AdamW(net.parameters()), heads=net.heads)
    with pytest.warns(UserWarning, match="AdamW.*adapts") as warned:
        changed.mask = "gradient"
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match="LBFGS, .* may diverge"):
        SPGOptimizer(torch.optim.LBFGS(net.parameters()), heads=net.heads)
    for added in (1, 0):  # once
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plain.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "weight_decay": 0.1})
        assert len(caught) == added and all("decays weights" in str(w.message) and w.filename == __file__ for w in caught)


@pytest.mark.dropin(line=16)
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


@pytest.mark.dropin(line=16)
@pytest.mark.parametrize("mask", ["update", "gradient"])
def test_the_sparse_gradient_of_a_head_is_scaled_by_the_mean(mask):
    trunk, head = nn.Parameter(torch.zeros(4)), nn.Embedding(6, 4, sparse=True)
    optimizer = SPGOptimizer(torch.optim.SGD([trunk, head.weight], lr=0.1), heads=head, mask=mask)
    optimizer.importance[trunk] = torch.tensor([0.0, 0.5, 1.0, 1.0])
    before = head.weight.detach().clone()
    head(torch.tensor([1, 3, 3])).sum().backward()
    optimizer.step()
    expected = before - 0.1 * (1 - 0.625) * head.weight.grad.to_dense()
    assert torch.allclose(head.weight, expected, atol=1e-7)


@pytest.mark.dropin(line=16)
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


@pytest.mark.dropin(line=2)
@pytest.mark.compatibility("every optimizer in `torch.optim`, foreach and fused too, `mask=\"update\"`", "torch",
                           "works with a note",
                           "LBFGS, whose step is one of all parameters together, may diverge, as a warning says")
def test_the_list_of_inner_optimizers_is_all_of_torch(net):
    """SparseAdam alone takes nothing but sparse gradients: the test below."""
    classes = {cls for cls in vars(torch.optim).values() if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)}
    tested = {type(make(net.parameters())) for make in INNER.values()}
    assert classes - tested == {torch.optim.Optimizer, torch.optim.SparseAdam}


@pytest.mark.dropin(line=16)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_sparse_adam(gamma):
    embedding = nn.Embedding(6, 4, sparse=True)
    twin = copy.deepcopy(embedding)
    optimizer, plain = SPGOptimizer(torch.optim.SparseAdam(embedding.parameters())), torch.optim.SparseAdam(twin.parameters())
    optimizer.importance["0.0"] = torch.full((6, 4), gamma)
    before = embedding.weight.detach().clone()
    for layer, opt in ((embedding, optimizer), (twin, plain)):
        layer(torch.tensor([1, 3, 3])).sum().backward()
        opt.step()
    expected = before.lerp(twin.weight, 1 - gamma)
    assert (torch.equal(embedding.weight, expected) if gamma in (0.0, 1.0)
            else torch.allclose(embedding.weight, expected, atol=1e-7))
    assert not torch.equal(before, twin.weight)


@pytest.mark.dropin(line=1)
@pytest.mark.parametrize("inner", ["SGD", "LBFGS"])
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("on", ["auto", "reference"])
def test_the_gradient_that_a_closure_makes_is_the_one_that_is_masked(net, inner, mask, on):
    """Not the one that was there before it ran. The loss comes back; gradients are the closure's."""
    optimizer = wrap(net, inner, 1.0, mask=mask, backend=on)
    before = values(net)
    net.zero_grad()
    assert len(set(train(net, optimizer, steps=2))) == 1 and equal(values(net), before)
    assert all(p.grad.abs().max() > 0 for p in net.parameters())
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3


@pytest.mark.dropin(line=4)
@pytest.mark.parametrize("on", ["auto", "reference"])
def test_gamma_one_masks_a_gradient_that_is_not_finite(net, on):
    optimizer = wrap(net, "SGD", 1.0, mask="gradient", backend=on)
    before = values(net)
    for value in (float("inf"), float("nan")):
        for p in net.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.step()
        assert equal(values(net), before)


@pytest.mark.dropin(line=5)
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("on", ["auto", "reference"])
def test_a_gamma_that_bfloat16_would_round_to_one_still_moves(mask, on):
    parameter = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    optimizer = SPGOptimizer(torch.optim.SGD([parameter], lr=1.0), mask=mask, backend=on)
    optimizer.importance["0.0"] = torch.full((64,), 0.9990234375)
    assert optimizer.importance["0.0"].bfloat16()[0] == 1
    parameter.grad = torch.full((64,), -1024.0, dtype=torch.bfloat16)
    optimizer.step()
    assert (parameter == 1).all()


@pytest.mark.dropin(line=8)
@pytest.mark.parametrize("inner", [name for name in INNER if name not in ("SGD", "LBFGS")])
def test_momentum_from_before_does_not_move_what_is_important_now(net, inner):
    """The inner optimizer goes on into the next task with the moments of the last."""
    optimizer = wrap(net, inner)
    train(net, optimizer)
    for name in optimizer.importance:
        optimizer.importance[name] = torch.ones_like(optimizer.importance[name])
    before = values(net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert equal(values(net), before)


@pytest.mark.dropin(line=2)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.compatibility("the same, `mask=\"gradient\"`", "torch", "works with a note",
                           "weight decay and adaptive steps undo it, as a warning says")
def test_the_gradient_mask_warns_for_every_optimizer_that_undoes_it(net, inner):
    """Measured: at gamma = 1 weight decay still moves parameters, at 0.9 a step that adapts its scale hardly shrinks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = SPGOptimizer(INNER[inner](net.parameters()), heads=net.heads, mask="gradient", backend="reference")
    decays = any(group.get("weight_decay") for group in optimizer.param_groups)
    assert bool(caught) == (inner not in ("SGD", "SGD fused"))
    expected = "further than it should" if inner == "LBFGS" else "mask='update' protects"
    assert not caught or expected in str(caught[0].message)
    for name in optimizer.importance:
        optimizer.importance[name] = torch.ones_like(optimizer.importance[name])
    before = values(net)
    train(net, optimizer)
    assert equal(values(net), before) != decays


@pytest.mark.dropin(line=21)
@pytest.mark.parametrize("on", ["auto", "reference"])
def test_under_sgd_both_masks_are_the_rule_of_the_paper(net, on):
    """p <- p - lr (1 - gamma) g in a plain loop, heads by 1 - mean(gamma), in float64."""
    nets = [copy.deepcopy(net).double() for _ in range(3)]
    wrapped = [wrap(model, "SGD", mask=mask, backend=on) for model, mask in zip(nets[1:], ("update", "gradient"))]
    gammas = {}
    for task in range(3):
        for model in nets:
            set_gradients(model.parameters(), seed=task)
        for optimizer in wrapped:
            optimizer.accumulate_importance()
        for name, p in nets[0].trunk.named_parameters():
            a = ((p.grad - p.grad.mean()) / p.grad.std()).tanh().abs()
            gammas[name] = torch.maximum(gammas.get(name, torch.zeros_like(a)), a)
        mean = torch.cat([gamma.flatten() for gamma in gammas.values()]).mean()
        for step in range(20):
            for model in nets:
                set_gradients(model.parameters(), seed=100 * task + step)
            with torch.no_grad():
                for name, p in nets[0].trunk.named_parameters():
                    p -= 0.1 * (1 - gammas[name]) * p.grad
                for p in nets[0].heads.parameters():
                    p -= 0.1 * (1 - mean) * p.grad
            for optimizer in wrapped:
                optimizer.step()
    for model in nets[1:]:
        assert all((p - q).abs().max() < 3e-6 for p, q in zip(values(model), values(nets[0])))

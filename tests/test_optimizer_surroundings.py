"""What torch puts around optimizers: schedulers, scalers, clipping, backward hooks, torch.compile, autograd, meta devices."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import lr_scheduler, swa_utils
from torch.utils._python_dispatch import TorchDispatchMode

from spg_kernels import BackendError, Importance, SPGOptimizer

from .models import Net, set_gradients
from .wrapping import FUSABLE, INNER, closure_for, equal, train, values, wrap

SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 6),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)], [2]),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "SWALR": lambda opt: swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=3),
}


@pytest.mark.dropin(line=10)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("error:Detected call of")
@pytest.mark.compatibility("learning-rate schedulers, SWA", "torch", "works")
def test_every_scheduler_reaches_the_inner_optimizer(net, name):
    def schedule(optimizer):
        scheduler = SCHEDULERS[name](optimizer)
        for _ in range(6):
            set_gradients(net.parameters())
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            yield [(group["lr"], group["momentum"]) for group in optimizer.param_groups]

    ours, plain = wrap(net, "SGD momentum", 0.5), INNER["SGD momentum"](net.parameters())
    settings = [ours.inner.param_groups[0][key] for _ in schedule(ours) for key in ("lr", "momentum")]
    assert settings == [x for groups in schedule(plain) for pair in groups for x in pair]
    assert len(set(settings[::2])) > 1


@pytest.mark.parametrize("inner", ["SGD momentum", "AdamW", "RMSprop"])
def test_two_optimizers_with_one_importance_are_as_one(net, inner):
    """Muon takes matrices alone, SparseAdam sparse gradients alone: something else steps the rest."""
    twin = copy.deepcopy(net)
    one = wrap(twin, inner)
    matrices, rest = ([p for p in net.parameters() if (p.dim() == 2) == two] for two in (True, False))
    known = Importance()
    first, second = (SPGOptimizer(INNER[inner](own), heads=net.heads, named_parameters=net.named_parameters(),
                                  importance=known) for own in (matrices, rest))
    for seed in range(4):
        for model, optimizers in ((twin, [one]), (net, [first, second])):
            set_gradients(model.parameters(), seed)
            for optimizer in optimizers:
                optimizer.step()
            if seed == 1:
                for optimizer in optimizers:
                    optimizer.accumulate_importance()
    assert equal(values(net), values(twin)) and float(known.mean()) == float(one.importance.mean()) > 0


@pytest.mark.dropin(line=14)
@pytest.mark.parametrize("inner", ["SGD fused", "AdamW fused", "RMSprop"])
@pytest.mark.parametrize("on", ["auto", "reference"])
@pytest.mark.compatibility("GradScaler and clipping", "torch", "works",
                           "around an optimizer with `fused=True` the host never waits for the device, "
                           "and `.grad` stays scaled")
def test_scaled_and_clipped_gradients_are_masked_as_unscaled_ones(net, inner, on):
    """A fused optimizer unscales in its own step; clipping makes the scaler unscale before."""
    x = torch.randn(8, 10)
    for clip in (False, True):
        model, twin = copy.deepcopy(net), copy.deepcopy(net)
        ours, plain = wrap(model, inner, 0.5, backend=on), wrap(twin, inner, 0.5, backend=on)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(2):
            for m, opt in ((model, ours), (twin, plain)):
                opt.zero_grad()
                loss = m(x, 0).square().mean()
                (scaler.scale(loss) if opt is ours else loss).backward()
            if clip:
                scaler.unscale_(ours)
                norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, twin)]
                assert abs(norms[0] - norms[1]) < 1e-6
            scaler.step(ours)
            scaler.update()
            plain.step()
        assert all((p - q).abs().max() < 1e-6 for p, q in zip(values(model), values(twin)))
        assert not hasattr(ours, "grad_scale") and not hasattr(ours.inner, "grad_scale")


@pytest.mark.dropin(line=14)
def test_importance_under_a_scaler_is_that_of_the_unscaled_gradients(net):
    plain, scaled = wrap(net, "SGD"), wrap(net, "SGD")
    set_gradients(net.parameters())
    plain.accumulate_importance()
    for p in net.parameters():
        p.grad *= 65536.0
    scaled.accumulate_importance()
    assert all(torch.equal(scaled.importance[name], plain.importance[name]) for name in plain.importance)
    assert plain.importance.mean() > 0.3


@pytest.mark.dropin(line=15)
@pytest.mark.parametrize("inner", ["SGD", "AdamW", "RMSprop"])
def test_pre_hooks_may_change_the_gradient(net, inner):
    """As clipping and gradient centralization do: the inner step sees what the hook left."""
    optimizer = wrap(net, inner, 0.0)

    def clear(*_):
        for parameter in net.parameters():
            parameter.grad.zero_()

    optimizer.register_step_pre_hook(clear)
    set_gradients(net.parameters())
    before = values(net)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    assert equal(values(net), before)


def _parameter(layout):
    value = torch.randn(4, 6, 5, 3)
    if layout == "channels_last":
        return nn.Parameter(value.contiguous(memory_format=torch.channels_last))
    return nn.Parameter(value.transpose(0, 3) if layout == "transposed" else value)


@pytest.mark.dropin(line=16)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("kind", ["like the parameter", "contiguous", "expanded", "strided"])
@pytest.mark.parametrize("inner", ["SGD momentum", "AdamW", "RMSprop"])
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.filterwarnings("ignore:mask='gradient'")
def test_memory_layouts_change_no_number(layout, kind, inner, mask):
    parameter = _parameter(layout)
    twin = nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format))
    grad = {"like the parameter": torch.randn_like(parameter), "contiguous": torch.randn(parameter.shape),
            "expanded": torch.randn(parameter.shape[-1]).expand(parameter.shape),
            "strided": torch.randn(*parameter.shape[:-1], 2 * parameter.shape[-1])[..., ::2]}[kind]
    ours, plain = (SPGOptimizer(INNER[inner]([parameter]), mask=mask),
                   SPGOptimizer(INNER[inner]([twin]), mask=mask, backend="reference"))
    gamma = 0.9 * torch.rand(parameter.shape)
    ours.importance["0.0"] = plain.importance["0.0"] = gamma
    parameter.grad, twin.grad = grad, grad.contiguous()
    for _ in range(3):
        ours.step(), plain.step()
        assert parameter.grad is grad
    assert (parameter - twin).abs().max() < 3e-6
    ours.accumulate_importance(), plain.accumulate_importance()
    assert (ours.importance["0.0"] - plain.importance["0.0"]).abs().max() < 2e-6


@pytest.mark.dropin(line=16)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("on", ["auto", "reference"])
def test_a_parameter_without_gradient_is_left_alone(net, inner, on):
    optimizer = wrap(net, inner, 0.3, backend=on)
    before = values(net)
    optimizer.step(lambda: (set_gradients(net.trunk.parameters()), torch.tensor(1.0))[1])
    for parameter, old in zip(net.parameters(), before):
        if parameter.grad is None:
            assert torch.equal(parameter, old)
            if inner != "LBFGS":  # which keeps one state for all
                assert not optimizer.inner.state.get(parameter) or inner.startswith(("Adagrad", "RAdam", "ASGD"))


@pytest.mark.dropin(line=16)
def test_tied_parameters_are_one_parameter(net):
    net.trunk[2].weight = nn.Parameter(torch.randn(16, 16))
    net.trunk.append(nn.Linear(16, 16, bias=False))
    net.trunk[-1].weight = net.trunk[2].weight
    optimizer = wrap(net, "AdamW", 1.0)
    assert list(optimizer.importance) == ["trunk.0.weight", "trunk.0.bias", "trunk.2.weight", "trunk.2.bias"]
    before = values(net)
    train(net, optimizer)
    assert equal(values(net), before)
    with pytest.raises(ValueError, match=r"trunk.4.weight: this parameter is already known as trunk.2.weight"):
        optimizer.importance.add("trunk.4.weight", net.trunk[-1].weight)
    by_every_name = SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=net.heads,
                                 named_parameters=net.named_parameters(remove_duplicate=False))
    assert (list(wrap(net, importance=by_every_name.importance).importance)
            == list(optimizer.importance)), "it has its first name"


@pytest.mark.dropin(line=16)
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, torch.optim.RMSprop])
@pytest.mark.filterwarnings("ignore:mask='gradient'", "ignore:The .grad attribute")
@pytest.mark.compatibility("`differentiable=True`", "torch", "works with a note",
                           "through the reference; a kernel asked for by name is refused")
def test_autograd_sees_through_a_differentiable_step(inner, mask):
    gamma = torch.tensor([0.0, 0.25, 0.75, 1.0])

    def stepped(value, grad):
        parameter = value.clone()
        parameter.grad = grad
        optimizer = SPGOptimizer(inner([parameter], lr=0.1, differentiable=True), mask=mask)
        optimizer.importance["0.0"] = gamma
        optimizer.step()
        return parameter

    value, grad = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(stepped, (value, grad))
    if inner is torch.optim.SGD:
        passes = torch.autograd.grad(stepped(value, grad).sum(), grad)[0]
        assert torch.allclose(passes, -0.1 * (1 - gamma.double()))
    with pytest.raises(BackendError, match="native.*differentiable"):
        optimizer = SPGOptimizer(inner([value.clone()], lr=0.1, differentiable=True), mask=mask, backend="native")
        optimizer.importance["0.0"] = gamma
        optimizer.step()


class _Syncs(TorchDispatchMode):
    """Counts the operators that make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def _reads(step, monkeypatch):
    """How often the host reads a tensor in `step`, in the package's operators too, which a dispatch mode does not see into."""
    reads = []

    def noted(read):
        return lambda tensor, *args, **kwargs: (reads.append(read), read(tensor, *args, **kwargs))[1]

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
        step()
    return len(reads)


@pytest.mark.dropin(line=17)
@pytest.mark.parametrize("inner", ["SGD", "SGD momentum", "AdamW foreach", "RMSprop", "Adadelta"])
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("on", ["auto", "reference"])
def test_a_masked_step_waits_for_nothing_the_inner_step_does_not(net, inner, mask, on, monkeypatch):
    twin = copy.deepcopy(net)
    counts = []
    for model, optimizer in ((twin, INNER[inner](twin.parameters())), (net, wrap(net, inner, 0.5, mask=mask, backend=on))):
        set_gradients(model.parameters())
        optimizer.step()
        with _Syncs() as syncs:
            optimizer.step()
        counts.append(syncs.count + _reads(optimizer.step, monkeypatch))
    if on == "auto" and inner in FUSABLE:
        assert counts[1] == 0
    elif not inner.startswith("AdamW"):
        assert counts[1] <= counts[0]


@pytest.mark.dropin(line=17)
@pytest.mark.parametrize("inner", ["SGD momentum", "AdamW", "AdamW tensor lr", "RMSprop"])
@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("on", ["auto", "reference"])
@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@pytest.mark.compatibility("`torch.compile(opt.step)`", "torch", "works with a note",
                           "a learning rate that changes must be a tensor, or torch compiles again")
def test_a_compiled_step_equals_eager_and_is_compiled_once(net, inner, mask, on, closure):
    torch._dynamo.reset()
    twin = copy.deepcopy(net)
    compiled, eager = wrap(net, inner, 0.3, mask=mask, backend=on), wrap(twin, inner, 0.3, mask=mask, backend=on)
    counter = CompileCounter()
    step = torch.compile(compiled.step, backend=counter)
    frames = []
    for i in range(5):
        x = torch.randn(4, 10)
        for model, one_step in ((net, step), (twin, eager.step)):
            set_gradients(model.parameters(), seed=i)
            one_step(*([closure_for(model, x)] if closure else []))
        if inner == "AdamW tensor lr":  # a learning rate that changes every step
            for optimizer in (compiled, eager):
                optimizer.param_groups[0]["lr"].mul_(0.5)
        frames.append(counter.frame_count)
    assert frames[0] > 0 and len(set(frames[2:])) == 1, frames
    assert all((p - q).abs().max() < 3e-6 for p, q in zip(values(net), values(twin)))


@pytest.mark.dropin(line=17)
@pytest.mark.parametrize("inner", ["SGD momentum", "AdamW", "RMSprop"])
@pytest.mark.parametrize("before", [None, 0.3], ids=["unmasked", "masked"])
def test_a_compiled_step_masks_by_what_was_written_to_a_state_dict(net, inner, before):
    """torch.distributed.checkpoint loads in place."""
    torch._dynamo.reset()
    twin = copy.deepcopy(net)
    compiled, eager = wrap(net, inner, before), wrap(twin, inner, before)
    counter = CompileCounter()
    step = torch.compile(compiled.step, backend=counter)
    frames = []
    for gamma in (None, 0.9, 0.5, 0.9):
        for model, optimizer, one_step in ((net, compiled, step), (twin, eager, eager.step)):
            if gamma is not None:
                for state in optimizer.state_dict()["state"].values():
                    state["spg_importance"].fill_(gamma)
            for i in range(2):
                set_gradients(model.parameters(), seed=i)
                one_step()
        frames.append(counter.frame_count)
    assert all((p - q).abs().max() < 3e-6 for p, q in zip(values(net), values(twin)))
    assert frames[-1] == frames[-2], frames


@pytest.mark.dropin(line=18)
@pytest.mark.compatibility("an optimizer a parameter, stepping inside backward", "torch", "works with a note",
                           "remove the hooks before `measure_importance`: they would train, and leave no gradient to measure")
def test_an_optimizer_a_parameter_steps_inside_backward(net):
    """Heads move by the mean over the importance their own optimizer was given: all of it."""
    twin = copy.deepcopy(net)
    together = wrap(twin, "AdamW", 0.5)
    importance = wrap(net, "AdamW", 0.5).importance
    optimizers = {p: SPGOptimizer(INNER["AdamW"]([p]), heads=net.heads, importance=importance) for p in net.parameters()}

    def step_and_clear(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step_and_clear)
    x = torch.randn(8, 10)
    for _ in range(3):
        net(x, 0).square().mean().backward()
        together.zero_grad()
        twin(x, 0).square().mean().backward()
        together.step()
    assert all(p.grad is None for p in net.parameters())
    assert all((p - q).abs().max() < 1e-6 for p, q in zip(values(net), values(twin)))


@pytest.mark.dropin(line=19)
@pytest.mark.parametrize("inner", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.compatibility("meta device, `to_empty`", "torch", "works",
                           "after `opt.importance.bind(model.named_parameters())`")
def test_a_model_that_began_on_the_meta_device(inner):
    with torch.device("meta"):
        net = Net()
    optimizer = wrap(net, inner)
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    optimizer.param_groups[0]["params"] = list(net.parameters())
    optimizer.importance.bind(net.named_parameters())
    set_gradients(net.parameters())
    optimizer.accumulate_importance()
    assert all(optimizer.importance[name].max() > 0.5 for name in optimizer.importance)
    for name in optimizer.importance:
        optimizer.importance[name] = torch.ones_like(optimizer.importance[name])
    before = values(net)
    train(net, optimizer)
    assert equal(values(net), before)


@pytest.mark.parametrize("on", ["auto", "reference"])
def test_what_was_made_in_inference_mode_is_as_good_as_any(net, on):
    """Where trainers validate, look at the capacity, and save."""
    twin = copy.deepcopy(net)
    for model in (net, twin):
        with torch.inference_mode(model is twin):
            optimizer = wrap(model, "AdamW", 0.5, backend=on)
            optimizer.importance.mean()
            optimizer.state_dict()
        for name in optimizer.importance:
            optimizer.importance[name] = optimizer.importance[name] / 2
        train(model, optimizer)
    assert equal(values(net), values(twin))


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.dropin(line=5)
@pytest.mark.parametrize("inner", ["SGD momentum", "AdamW", "RMSprop"])
def test_gammas_are_float32_whatever_the_default_dtype(default_dtype, inner):
    net = Net()
    plain, before = copy.deepcopy(net), values(net.heads)
    for model, optimizer in ((net, wrap(net, inner, 0.999)), (plain, INNER[inner](plain.parameters()))):
        set_gradients(model.parameters())
        optimizer.step()
        if model is net:
            assert optimizer.importance.mean().dtype == torch.float32
    if default_dtype == torch.float64:  # bfloat16 parameters are too coarse for a thousandth of a step
        for ours, free, old in zip(values(net.heads), values(plain.heads), before):
            torch.testing.assert_close(ours, old + (1 - 0.999) * (free - old), rtol=0, atol=1e-7)

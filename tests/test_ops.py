"""Every backend against the float64 oracle; argument checks; torch.library's own checks."""

import math
import pickle

import pytest
import torch

import spg_kernels
from spg_kernels import NonFiniteGradientError, ops, reference
from spg_kernels.backends import native

from . import oracle


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_importance_equals_the_float64_oracle(backend, dtype, kind):
    for n in oracle.SIZES:
        grad = oracle.gradient(n, dtype, kind)
        actual = spg_kernels.importance(grad, backend=backend)
        assert actual.dtype == torch.float32 and actual.shape == grad.shape
        error = (actual.double() - oracle.importance(grad)).abs().max().item() if n else 0
        assert error <= 2e-6, (n, error)
        if kind in ("constant", "zero") or n < 2:
            assert not actual.any()


def test_importance_keeps_relative_precision_of_small_values(backend):
    grad = torch.cat([torch.linspace(-1e-3, 1e-3, 1001), torch.tensor([30.0, -30.0])])
    expected = oracle.importance(grad)
    actual = spg_kernels.importance(grad, backend=backend).double()
    nonzero = expected > 1e-9
    assert ((actual - expected).abs() / expected)[nonzero].max() < 1e-6


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_eight_bit_codes_are_the_ceiling_of_28_z(backend, dtype):
    for n in (2, 17, 1000, 16385):
        grad = oracle.gradient(n, dtype, "normal")
        codes = torch.zeros(n, dtype=torch.uint8)
        spg_kernels.accumulate_importance_([codes], [grad], backend=backend)
        z = 28 * oracle.importance(grad).atanh().abs()
        away_from_a_border = (z - z.round()).abs() > 1e-4
        assert torch.equal(codes[away_from_a_border].double(), z.ceil().clamp(max=255)[away_from_a_border])
        gamma, keep = reference.code_table()
        exact = 1 - oracle.importance(grad)
        assert (keep[codes.long()].double() <= exact * (1 + 1e-6)).all(), "rounding up never under-protects"
        assert (keep[codes.long()].double() >= exact * 0.93 - 1e-8).all(), "at most 7 % off in 1 - gamma"


def test_saturated_codes_mean_frozen_as_their_float32_gamma_does():
    gamma, keep = reference.code_table()
    assert torch.equal(gamma == 1, keep == 0)
    assert (gamma[:253] < 1).all() and (gamma[253:] == 1).all()
    assert torch.equal(reference.decode(reference.encode_gamma(gamma)), gamma)
    values = torch.rand(10000)
    assert (reference.decode(reference.encode_gamma(values)) >= values).all()


def test_every_code_masks_by_its_own_factor_to_the_bit(backend):
    grad, codes = torch.ones(4, 256), torch.arange(256, dtype=torch.uint8).expand(4, 256).contiguous()
    spg_kernels.soft_mask_([grad], [codes], backend=backend)
    assert torch.equal(grad, reference.code_table()[1].expand(4, 256))


@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.uint8], ids=str)
def test_accumulation_is_a_running_maximum_and_folding_twice_changes_no_bit(backend, gamma_dtype):
    sizes = (1, 5, 4097, 40000)
    gammas = [torch.zeros(n, dtype=gamma_dtype) for n in sizes]
    expected = [torch.zeros(n, dtype=torch.float64) for n in sizes]
    for task in range(3):
        grads = [oracle.gradient(n, torch.float32, "normal", seed=100 * task) for n in sizes]
        spg_kernels.accumulate_importance_(gammas, grads, backend=backend)
        before = [gamma.clone() for gamma in gammas]
        spg_kernels.accumulate_importance_(gammas, grads, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(before, gammas))
        expected = [torch.maximum(e, oracle.importance(g)) for e, g in zip(expected, grads)]
    for gamma, exact in zip(gammas, expected):
        if gamma_dtype == torch.float32:
            assert (gamma - exact).abs().max() <= 2e-6
        else:
            assert (reference.decode(gamma) >= exact - 2e-6).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 7, 16390])
@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.uint8], ids=str)
def test_a_non_finite_gradient_is_named_and_its_gamma_untouched(backend, bad, place, gamma_dtype):
    grads = [torch.randn(20000) for _ in range(4)]
    grads[1][place] = bad
    grads[3] = torch.tensor([bad])
    gammas = [torch.full(g.shape, 1, dtype=gamma_dtype) * 0 + 3 if gamma_dtype == torch.uint8
              else torch.full(g.shape, 0.1) for g in grads]
    before = [gamma.clone() for gamma in gammas]
    with pytest.raises(NonFiniteGradientError) as error:
        spg_kernels.accumulate_importance_(gammas, grads, backend=backend)
    assert error.value.names == ["grads[1]", "grads[3]"]
    assert isinstance(error.value, FloatingPointError) and isinstance(error.value, spg_kernels.SPGError)
    assert pickle.loads(pickle.dumps(error.value)).names == error.value.names, "as from a worker process"
    assert torch.equal(gammas[1], before[1]) and torch.equal(gammas[3], before[3])
    with pytest.raises(NonFiniteGradientError):
        spg_kernels.importance(grads[1], backend=backend)


@pytest.mark.parametrize("gamma_kind", ["float32", "8-bit", "one value"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_soft_mask_is_within_two_ulp(backend, dtype, gamma_kind):
    for n in oracle.SIZES:
        grad = oracle.gradient(n, dtype, "normal")
        gamma = {"float32": torch.rand(n), "8-bit": torch.randint(0, 256, (n,), dtype=torch.uint8),
                 "one value": torch.tensor(0.37)}[gamma_kind]
        expected = grad.double() * oracle.keep(gamma)
        spg_kernels.soft_mask_([grad], [gamma], backend=backend)
        assert not n or oracle.ulps(grad, expected).max() <= 2, n


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.3, 1 - 2**-9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_converted_exactly_and_rounded_to_nearest_even(backend, dtype, gamma):
    every = torch.arange(-2**15, 2**15, dtype=torch.int16).view(dtype)
    gammas, written = torch.full(every.shape, gamma), every.clone()
    spg_kernels.soft_mask_([written], [gammas], backend=backend)
    expected, is_nan = ((1 - gammas) * every.float()).to(dtype), every.isnan()
    assert torch.equal(written.isnan(), is_nan)
    assert torch.equal(written.view(torch.int16)[~is_nan], expected.view(torch.int16)[~is_nan])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_masks_at_gamma_zero_and_one_keep_every_bit(backend, dtype):
    values = torch.tensor([1.0, -2.5, math.inf, -math.inf, math.nan, 0.0, -0.0] * 5).to(dtype)
    zero, one = torch.zeros(values.shape), torch.ones(values.shape)
    codes = torch.full(values.shape, 255, dtype=torch.uint8)

    def bits(tensor):
        tensor = torch.where(tensor.isnan(), torch.tensor(math.nan, dtype=dtype), tensor)  # nobody promises a NaN's payload
        return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)

    def after(function, gamma, *others):
        written = values.clone()
        function([written], *others, [gamma], backend=backend)
        return written

    assert torch.equal(bits(after(spg_kernels.soft_mask_, zero)), bits(values))
    old = torch.randn(values.shape).to(dtype)
    assert torch.equal(bits(after(spg_kernels.update_mask_, zero, [old])), bits(values))
    for frozen in (one, codes, torch.tensor(1.0)):
        assert torch.equal(after(spg_kernels.soft_mask_, frozen), torch.zeros(values.shape, dtype=dtype))
        assert torch.equal(bits(after(spg_kernels.update_mask_, frozen, [old])), bits(old))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_update_mask_is_within_two_ulp(backend, dtype):
    for n in (1, 17, 40000):
        old, new = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
        gamma = torch.rand(n)
        expected = old.double() + (1 - gamma.double()) * (new.double() - old.double())
        spg_kernels.update_mask_([new], [old], [gamma], backend=backend)
        # Near zero the sum cancels: two units of the larger term.
        scale = torch.maximum(expected.abs(), old.double().abs())
        assert ((new.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * scale + 1e-40).all()


def assert_within_two_ulp(actual, expected, old, lr):
    """Two units of the parameter: of the larger of what it was, what it became, and the length of the step."""
    scale = torch.maximum(expected.abs(), old.abs()).clamp(min=4 * lr).double()
    error = (actual.double() - expected.double()).abs() / (torch.finfo(actual.dtype).eps * scale)
    assert error.max() <= 2


def one_step_at_a_time(dtype, make_torch, state_keys, our_step, steps=4):
    """Steps of ours and of torch's plain optimizer in float32, each from the same point, so that errors do not add up.

    (torch 2.13's own fused SGD leaves bfloat16 and float16 parameters where they are, so it is no judge of those.)
    """
    params = [torch.randn(n).to(dtype) for n in (5000, 33)]
    plain = [p.float().clone().requires_grad_() for p in params]
    states = {key: [torch.zeros_like(p) for p in params] for key in state_keys}
    optimizer = make_torch(plain)
    for step in range(steps):
        grads = [torch.randn(p.shape).to(dtype) for p in params]
        old = [p.detach().clone() for p in plain]
        for q, g in zip(plain, grads):
            q.grad = g.float()
        optimizer.step()
        our_step(params, grads, states, step)
        for i, (p, q) in enumerate(zip(params, plain)):
            assert_within_two_ulp(p, q.detach(), old[i], optimizer.param_groups[0]["lr"])
            p.copy_(q.detach())
            q.data.copy_(p)  # both go on from the value that `dtype` can hold
            for key in state_keys:
                ours, theirs = states[key][i], optimizer.state[q][key]
                assert torch.allclose(ours.float(), theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
                ours.copy_(theirs)
                theirs.copy_(ours)


SGD_SETTINGS = [dict(), dict(weight_decay=0.1), dict(momentum=0.9), dict(momentum=0.9, dampening=0.3, weight_decay=0.1),
                dict(momentum=0.9, nesterov=True, maximize=True)]
ADAM_SETTINGS = [dict(), dict(weight_decay=0.1), dict(weight_decay=0.1, decoupled=False), dict(amsgrad=True, maximize=True)]


@pytest.mark.parametrize("settings", SGD_SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["update", "gradient"])
def test_masked_sgd_without_importance_is_torch_sgd(backend, settings, dtype, mask):
    keys = ["momentum_buffer"] if "momentum" in settings else []

    def ours(params, grads, states, step):
        zeros = [torch.zeros(p.shape) for p in params]
        spg_kernels.masked_sgd_(params, grads, zeros, *states.values(), lr=0.05, is_first_step=step == 0, mask=mask,
                                backend=backend, **settings)

    one_step_at_a_time(dtype, lambda plain: torch.optim.SGD(plain, lr=0.05, **settings), keys, ours)


@pytest.mark.parametrize("settings", ADAM_SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["update", "gradient"])
def test_masked_adamw_without_importance_is_torch_adamw(backend, settings, dtype, mask):
    settings = {"weight_decay": 0.0, "decoupled": True, "amsgrad": False, **settings}
    amsgrad, decoupled = settings.pop("amsgrad"), settings.pop("decoupled")
    keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    steps = [torch.zeros(()) for _ in range(2)]
    # float16 squares of gradients need an eps that float16 can hold
    eps = 1e-8 if dtype == torch.float32 else 1e-3

    def ours(params, grads, states, step):
        zeros = [torch.zeros(p.shape) for p in params]
        spg_kernels.masked_adamw_(params, grads, zeros, states["exp_avg"], states["exp_avg_sq"],
                                  states.get("max_exp_avg_sq", []), steps, lr=0.01, eps=eps, decoupled=decoupled, mask=mask,
                                  backend=backend, **settings)
        assert [s.item() for s in steps] == [step + 1] * 2

    make = torch.optim.AdamW if decoupled else torch.optim.Adam
    one_step_at_a_time(dtype, lambda plain: make(plain, lr=0.01, eps=eps, amsgrad=amsgrad, **settings), keys, ours)


@pytest.mark.parametrize("gamma_kind", ["float32", "8-bit", "one value"])
@pytest.mark.parametrize("op", ["sgd", "adamw"])
@pytest.mark.parametrize("mask", ["update", "gradient"])
def test_masked_steps_equal_the_float64_formula(backend, op, mask, gamma_kind):
    n = 5000
    p, g, m, v = (torch.randn(n) for _ in range(4))
    v = v.square()
    gamma = {"float32": torch.rand(n), "8-bit": torch.randint(0, 256, (n,), dtype=torch.uint8),
             "one value": torch.tensor(0.37)}[gamma_kind]
    keep = oracle.keep(gamma)
    old, grad, lr = p.double(), g.double() * (keep if mask == "gradient" else 1), 0.1
    if op == "sgd":
        buffer = 0.9 * m.double() + 0.8 * (grad + 0.01 * old)
        new, states = old - lr * (grad + 0.01 * old + 0.9 * buffer), [(m, buffer)]
        spg_kernels.masked_sgd_([p], [g], [gamma], [m], lr=lr, momentum=0.9, dampening=0.2, weight_decay=0.01, nesterov=True,
                                mask=mask, backend=backend)
    else:
        exp_avg, exp_avg_sq = 0.9 * m.double() + 0.1 * grad, 0.99 * v.double() + 0.01 * grad**2
        denominator = exp_avg_sq.sqrt() / (1 - 0.99**8) ** 0.5 + 1e-8
        new = old * (1 - lr * 0.01) - lr / (1 - 0.9**8) * exp_avg / denominator
        states = [(m, exp_avg), (v, exp_avg_sq)]
        step = torch.tensor(7.0)
        spg_kernels.masked_adamw_([p], [g], [gamma], [m], [v], [], [step], lr=lr, beta1=0.9, beta2=0.99, weight_decay=0.01,
                                  mask=mask, backend=backend)
        assert step == 8
    expected = old + keep * (new - old) if mask == "update" else new
    size = old.abs() + (new - old).abs() + lr
    assert ((p.double() - expected).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()
    for actual, exact in states:
        assert (actual.double() - exact).abs().max() < 2e-6
    if mask == "update":
        frozen = (keep == 0).expand(n)
        assert torch.equal(p[frozen].double(), old[frozen])


def test_a_masked_step_freezes_gamma_one_whatever_the_gradient(backend):
    p = torch.randn(64)
    before, grad = p.clone(), torch.full((64,), math.nan)
    spg_kernels.masked_sgd_([p], [grad], [torch.ones(64)], [], lr=1.0, weight_decay=0.5, backend=backend)
    assert torch.equal(p, before)
    m, v, step = torch.zeros(64), torch.zeros(64), torch.tensor(0.0)
    spg_kernels.masked_adamw_([p], [grad], [torch.ones(64)], [m], [v], [], [step], lr=1.0, backend=backend)
    assert torch.equal(p, before)


def test_lists_that_do_not_match_change_nothing(backend):
    good, gamma = torch.randn(4, 4), torch.rand(4, 4)
    before = good.clone()
    cases = [
        (ValueError, r"gammas\[1\].*\(4, 4\).*\(4,\)", ([good, good.clone()], [gamma, torch.rand(4)])),
        (ValueError, "gammas: expected 1 tensors", ([good], [])),
        (TypeError, r"gammas\[0\].*float64", ([good], [gamma.double()])),
        (TypeError, r"grads\[0\].*int64", ([torch.ones(4, 4, dtype=torch.int64)], [gamma])),
        (TypeError, r"grads\[1\].*NoneType", ([good, None], [gamma, gamma])),
        (TypeError, r"grads\[0\].*NoneType", ([None], [gamma])),
        (TypeError, r"gammas\[0\].*NoneType", ([good], [None])),
        (TypeError, "grads: .*list.*Tensor", (good, gamma)),
        (TypeError, "gammas: .*list.*generator", ([good], (g for g in [gamma]))),
        (ValueError, r"gammas\[0\].*device", ([good], [gamma.to("meta")])),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            spg_kernels.soft_mask_(*arguments, backend=backend)
    for bad, seen in ((None, "NoneType"), ([good], "list"), (good.long(), "torch.int64")):
        with pytest.raises(TypeError, match=f"^grad: expected a floating point tensor, got {seen}"):
            spg_kernels.importance(bad, backend=backend)
    with pytest.raises(ValueError, match="mask"):
        spg_kernels.masked_sgd_([good], [good], [gamma], [], lr=1.0, mask="both", backend=backend)
    with pytest.raises(ValueError, match="momentum_buffers"):
        spg_kernels.masked_sgd_([good], [good], [gamma], [], lr=1.0, momentum=0.9, backend=backend)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\]"):
        spg_kernels.masked_adamw_([good], [good], [gamma], [torch.rand(4)], [gamma], [], [torch.tensor(0.0)], lr=1.0,
                                  backend=backend)
    with pytest.raises(ValueError, match="backend"):
        spg_kernels.soft_mask_([good], [gamma], backend="cuda")
    assert torch.equal(good, before)


def test_a_backend_asked_for_by_name_is_used_or_refused():
    with pytest.raises(spg_kernels.BackendError, match="triton"):
        spg_kernels.soft_mask_([torch.ones(3)], [torch.ones(3)], backend="triton")
    with pytest.raises(spg_kernels.BackendError, match="float64"):
        spg_kernels.soft_mask_([torch.ones(3, dtype=torch.float64)], [torch.ones(3)], backend="native")


def test_auto_takes_the_reference_for_what_native_refuses(caplog):
    plain, wide = torch.randn(1000), torch.randn(1000, dtype=torch.float64)
    expanded = torch.randn(10, 1).expand(10, 100)
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    grads = [plain, wide, expanded, channels_last]
    gammas = [torch.zeros(g.shape) for g in grads]
    with caplog.at_level("DEBUG", "spg_kernels"):
        spg_kernels.accumulate_importance_(gammas, grads)
    assert "3 of 4 tensors take the reference" in caplog.text
    for gamma, grad in zip(gammas, grads):
        assert (gamma.double() - oracle.importance(grad)).abs().max() < 2e-6


def test_what_native_refuses_is_looked_at_once(monkeypatch):
    def call():
        grads, gammas = ([torch.ones(7), torch.ones(7, dtype=torch.float64), torch.ones(5)],
                         [torch.full((n,), 0.5) for n in (7, 7, 5)])
        spg_kernels.soft_mask_(grads, gammas)
        assert all((grad == 0.5).all() for grad in grads)

    call()
    monkeypatch.setattr(native.PLANS, "make", None)
    call()
    with pytest.raises(spg_kernels.BackendError, match="tensor 1 of 3 has grads of torch.float64"):
        spg_kernels.soft_mask_([torch.ones(7), torch.ones(7, dtype=torch.float64), torch.ones(5)],
                               [torch.ones(n) for n in (7, 7, 5)], backend="native")


@pytest.mark.parametrize("device, reason", [("cpu", "no library"), ("mps", "no backend has kernels there")])
def test_auto_says_why_there_are_no_kernels(device, reason, caplog, monkeypatch):
    monkeypatch.setattr(ops, "why_unavailable", lambda name: "no library")
    with caplog.at_level("DEBUG", "spg_kernels"):
        assert ops.resolve.__wrapped__("auto", device) is reference
    assert f"tensors on {device} take the reference: {reason}" in caplog.text


def test_native_walks_any_dense_layout_that_all_tensors_share():
    grad = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    gamma = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    expected = grad * (1 - gamma)
    spg_kernels.soft_mask_([grad], [gamma], backend="native")
    assert torch.equal(grad, expected)
    transposed, gamma = torch.randn(6, 5).t(), torch.rand(6, 5).t()
    expected = transposed * (1 - gamma)
    spg_kernels.soft_mask_([transposed], [gamma], backend="native")
    assert torch.equal(transposed, expected)


OPERATORS = {
    "importance": lambda: ((torch.randn(5, 3),), {}),
    "accumulate_importance_": lambda: (([torch.zeros(5), torch.zeros(2, 2)], [torch.randn(5), torch.randn(2, 2)]), {}),
    "soft_mask_": lambda: (([torch.randn(5)], [torch.rand(5)]), {}),
    "update_mask_": lambda: (([torch.randn(5)], [torch.randn(5)], [torch.rand(5)]), {}),
    "masked_sgd_": lambda: (([torch.randn(5)], [torch.randn(5)], [torch.rand(5)], [torch.randn(5)]),
                            dict(lr=0.1, momentum=0.9)),
    "masked_sgd_.tensor_lr": lambda: (([torch.randn(5)], [torch.randn(5)], [torch.rand(5)], []),
                                      dict(lr=torch.tensor(0.1), grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0))),
    "masked_adamw_": lambda: (([torch.randn(5)], [torch.randn(5)], [torch.rand(5)], [torch.zeros(5)], [torch.zeros(5)], [],
                               [torch.tensor(0.0)]), dict(lr=0.1)),
    "masked_adamw_.tensor_lr": lambda: (([torch.randn(5)], [torch.randn(5)], [torch.rand(5)], [torch.zeros(5)],
                                         [torch.zeros(5)], [torch.zeros(5)], [torch.tensor(0.0)]),
                                        dict(lr=torch.tensor(0.1), grad_scale=torch.tensor([2.0]),
                                             found_inf=torch.tensor(1.0))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(backend, name):
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.spg_kernels, packet), overload or "default")
    lists, settings = OPERATORS[name]()
    torch.library.opcheck(operator, lists, {**settings, "backend": backend})


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch captures every operator")
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_stay_out_of_the_cuda_graphs_that_inductor_makes(name):
    packet, _, overload = name.partition(".")
    assert torch.Tag.cudagraph_unsafe in getattr(getattr(torch.ops.spg_kernels, packet), overload or "default").tags


def test_every_operator_is_checked():
    assert set(OPERATORS) == set(ops._SCHEMAS)


def test_kernels_tell_autograd_what_they_wrote(backend):
    x = torch.randn(5, requires_grad=True)
    y = x * 1.0
    loss = (y * y).sum()
    spg_kernels.soft_mask_([y], [torch.rand(5)], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_module_calls_the_operators(backend, strict):
    class Masked(torch.nn.Module):
        def forward(self, grad, gamma):
            grad = grad.clone()
            spg_kernels.soft_mask_([grad], [gamma], backend=backend)
            return grad, spg_kernels.importance(grad, backend=backend)

    inputs = torch.randn(5), torch.rand(5)
    exported = torch.export.export(Masked(), inputs, strict=strict)
    operators = {str(node.target) for node in exported.graph.nodes if "spg_kernels" in str(node.target)}
    assert operators == {"spg_kernels.soft_mask_.default", "spg_kernels.importance.default"}
    for actual, expected in zip(exported.module()(*inputs), Masked()(*inputs), strict=True):
        assert torch.equal(actual, expected)


def test_a_compiled_function_calls_the_operators_without_a_graph_break(backend):
    def masked(param, grad, gamma):
        grad = grad * 2
        spg_kernels.soft_mask_([grad], [gamma], backend=backend)
        spg_kernels.masked_sgd_([param], [grad], [gamma], lr=0.1, backend=backend)
        return grad + 1

    param, grad, gamma = torch.randn(50), torch.randn(50), torch.rand(50)
    twin = param.clone()
    expected = masked(param, grad, gamma)
    actual = torch.compile(masked, fullgraph=True, backend="aot_eager")(twin, grad, gamma)
    assert torch.equal(actual, expected) and torch.equal(param, twin)

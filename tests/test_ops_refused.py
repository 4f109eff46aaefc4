"""What operators refuse, they refuse before anything changes, whichever backend; and what they take means the same to each."""

import math
from fractions import Fraction

import pytest
import torch

import spg_kernels
from spg_kernels.backends import tensors

OPS = torch.ops.spg_kernels
BACKENDS = pytest.mark.parametrize("backend", ["auto", "native", "reference"])
LISTS = {
    "soft_mask_": ("grads", "gammas"),
    "update_mask_": ("params", "old_params", "gammas"),
    "masked_sgd_": ("params", "grads", "gammas", "momentum_buffers"),
    "masked_adamw_": ("params", "grads", "gammas", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
}
NUMBERS = {"masked_sgd_": ("lr", "momentum", "dampening", "weight_decay"),
           "masked_adamw_": ("lr", "beta1", "beta2", "eps", "weight_decay")}
SETTINGS = {"masked_sgd_": {"lr": 0.1, "momentum": 0.9}, "masked_adamw_": {"lr": 0.1}}


def _arguments(op, dtype=torch.float32):
    lists = {name: [torch.full((4,), 0.5, dtype=torch.float32 if name == "gammas" else dtype) for _ in range(2)]
             for name in LISTS[op]}
    if op == "masked_adamw_":
        lists["state_steps"] = [torch.tensor(1.0), torch.tensor(1.0)]
    return lists


def _numbers(lists):
    return [t.to_dense().double().clone() for tensors in lists.values() for t in tensors]


@BACKENDS
@pytest.mark.parametrize("columns", [slice(None, None, 2), slice(1, 3)], ids=str)
def test_no_kernel_runs_over_what_lies_between_the_elements(backend, columns):
    """Where all tensors have the same gaps, too: a kernel would take as many elements as there are, one after another."""
    whole, gammas = torch.randn(4, 6), torch.rand(4, 6)
    expected = whole.clone()
    expected[:, columns] *= 1 - gammas[:, columns]
    lists = [whole[:, columns]], [gammas[:, columns]]
    if backend == "native":
        with pytest.raises(spg_kernels.BackendError, match="another memory layout"):
            spg_kernels.soft_mask_(*lists, backend=backend)
    else:
        spg_kernels.soft_mask_(*lists, backend=backend)
        assert torch.equal(whole, expected)


@BACKENDS
@pytest.mark.parametrize("kind", ["sparse", "csr", "float8", "nested"])
@pytest.mark.parametrize("op, name", [(op, name) for op, names in LISTS.items() for name in names])
def test_a_tensor_of_another_kind_is_named_before_anything_changes(op, name, kind, backend):
    make = {"sparse": torch.Tensor.to_sparse, "csr": lambda t: t.reshape(2, 2).to_sparse_csr(),
            "float8": lambda t: t.to(torch.float8_e4m3fn),
            "nested": lambda t: torch.nested.nested_tensor([t[:1], t[1:]])}[kind]
    lists = _arguments(op)
    if kind == "csr":
        lists = {key: [t.reshape(2, 2) if t.dim() else t for t in tensors] for key, tensors in lists.items()}
    lists[name][1] = make(lists[name][1])
    kept = {key: [t for t in tensors if t.layout == torch.strided and not t.is_nested] for key, tensors in lists.items()}
    before = _numbers(kept)
    with pytest.raises(TypeError, match=rf"{name}\[1\]: expected"):
        getattr(spg_kernels, op)(*lists.values(), backend=backend, **SETTINGS.get(op, {}))
    assert all(map(torch.equal, _numbers(kept), before))


@BACKENDS
@pytest.mark.parametrize("op, name, value", [
    *((op, name, value) for op, names in NUMBERS.items() for name in names
      for value in (None, "0.1", 1j, torch.ones(2), torch.ones(2, 2))),
    *((op, "lr", torch.tensor([0.1]).to_sparse()) for op in NUMBERS),
    # A beta of 1 never forgets, and its correction is a division by 0.
    ("masked_adamw_", "beta1", 1.0), ("masked_adamw_", "beta2", 1.0),
], ids=lambda part: "sparse" if torch.is_tensor(part) and part.is_sparse else str(part))
def test_a_setting_that_is_no_number_is_named_before_anything_changes(op, name, value, backend):
    lists = _arguments(op)
    before = _numbers(lists)
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
        getattr(spg_kernels, op)(*lists.values(), backend=backend, **SETTINGS[op] | {name: value})
    assert all(map(torch.equal, _numbers(lists), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [Fraction, lambda x: torch.tensor(x, dtype=torch.float64), lambda x: torch.tensor([x]),
                                  lambda x: torch.tensor([[x]], dtype=torch.float64)],
                         ids=["Fraction", "0-d", "[1]", "[1, 1] float64"])
@pytest.mark.parametrize("op", SETTINGS)
def test_any_one_number_is_a_setting(op, make, dtype):
    """float64 takes the reference: a learning rate with a shape would give the update one, and its dtype."""
    results = []
    for settings in (SETTINGS[op], {name: make(value) for name, value in SETTINGS[op].items()}):
        lists = _arguments(op, dtype)
        lists["params"][1] = lists["params"][1].sum(dim=0)  # 0-d
        for name in lists.keys() - {"params", "state_steps"}:
            lists[name][1] = lists[name][1].sum(dim=0) / 4
        getattr(spg_kernels, op)(*lists.values(), **settings)
        results.append(_numbers(lists))
    assert all(torch.allclose(one, other, rtol=1e-6) for one, other in zip(*results, strict=True))


def test_an_operator_called_by_hand_checks_its_settings():
    def lists(count=1):
        return [[torch.ones(4)] for _ in range(3)] + [[torch.ones(4)] * count]

    with pytest.raises(ValueError, match="mask: expected"):
        OPS.masked_sgd_(*lists(0), lr=0.1, mask="both")
    with pytest.raises(ValueError, match="momentum_buffers: expected 1"):
        OPS.masked_sgd_(*lists(0), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="lr: expected one value"):
        OPS.masked_sgd_.tensor_lr(*lists(0), lr=torch.ones(4))


@pytest.mark.parametrize("call", [
    lambda: spg_kernels.accumulate_importance_([torch.zeros(3)], None),
    lambda: spg_kernels.masked_sgd_([torch.ones(3)], [torch.ones(3)], [torch.ones(3)], None, lr=0.1, momentum=0.9),
    lambda: spg_kernels.soft_mask_(None, [torch.ones(3)]),
], ids=["grads", "momentum_buffers", "soft_mask_"])
def test_none_is_no_list(call):
    with pytest.raises(TypeError, match="(grads|momentum_buffers): expected a list of tensors, got NoneType"):
        call()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_torch_jit_trace_records_the_mask():
    def masked(x):
        y = x * 2
        spg_kernels.soft_mask_([y], [torch.full((4,), 0.75)])
        return y, spg_kernels.importance(x)

    traced = torch.jit.trace(masked, (torch.arange(4.0),), check_trace=False)
    x = torch.tensor([9.0, 0.0, 1.0, 0.0])
    assert all(map(torch.equal, traced(x), masked(x)))


def test_who_traces_with_fake_tensors_needs_no_numbers():
    with torch._subclasses.FakeTensorMode():
        assert spg_kernels.importance(torch.ones(3)).shape == (3,)
    assert spg_kernels.importance(torch.ones(3, device="meta")).is_meta


@BACKENDS
def test_a_beta1_of_0_makes_the_average_the_gradient(backend):
    """However small that is beside the average."""
    lists = {name: [torch.ones(4)] for name in ("params", "grads")} | {
        "gammas": [torch.zeros(4)], "exp_avgs": [torch.full((4,), 1e8)], "exp_avg_sqs": [torch.ones(4)],
        "max_exp_avg_sqs": [], "state_steps": [torch.tensor(5.0)]}
    spg_kernels.masked_adamw_(*lists.values(), lr=0.1, beta1=0.0, backend=backend)
    assert (lists["exp_avgs"][0] == 1).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("square, kept", [(1.0, math.nan), (math.nan, 2.0), (math.nan, math.nan)])
def test_a_nan_in_the_bound_of_amsgrad_stays_one(square, kept, backend):
    """As torch.maximum has it."""
    bounds = [torch.full((40,), kept)]
    spg_kernels.masked_adamw_([torch.ones(40)], [torch.ones(40)], [torch.zeros(40)], [torch.ones(40)],
                              [torch.full((40,), square)], bounds, [torch.tensor(1.0)], lr=0.1, backend=backend)
    assert bounds[0].isnan().all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_decay_of_0_leaves_an_infinite_parameter_to_itself(backend):
    exp_avgs = [torch.zeros(2)]
    spg_kernels.masked_adamw_([torch.full((2,), math.inf)], [torch.ones(2)], [torch.zeros(2)], exp_avgs, [torch.zeros(2)], [],
                              [torch.tensor(0.0)], lr=0.1, weight_decay=0.0, decoupled=False, backend=backend)
    assert torch.allclose(exp_avgs[0], torch.tensor(0.1))


def test_one_part_of_a_complex_number_does_not_spoil_the_other():
    value = torch.tensor([complex(2, math.inf), complex(math.nan, 2), complex(2, 2)])
    for gamma, expected in ((0.0, [2, math.inf, math.nan, 2, 2, 2]), (0.5, [1, math.inf, math.nan, 1, 1, 1]), (1.0, [0] * 6)):
        grad, param = value.clone(), value.clone()
        spg_kernels.soft_mask_([grad], [torch.full((3,), gamma)])
        assert torch.equal(torch.view_as_real(grad).flatten().nan_to_num(7), torch.tensor(expected).nan_to_num(7).float())
        spg_kernels.update_mask_([param], [torch.zeros_like(param)], [torch.full((3,), gamma)])
        assert torch.equal(torch.view_as_real(param).flatten().nan_to_num(7), torch.tensor(expected).nan_to_num(7).float())


@pytest.mark.parametrize("asked", ["lists", "tuples", "guards"])
def test_a_tensor_that_lost_its_memory_is_no_kernels(asked, monkeypatch):
    """A table that was made for tensors like it would send a kernel to address 0."""
    if asked == "guards":  # as before torch 2.10
        monkeypatch.setattr(tensors, "_functions", lambda: None)
    form = tuple if asked == "tuples" else list
    spg_kernels.soft_mask_(form([torch.ones(503)]), form([torch.ones(503)]), backend="native")
    freed = torch.ones(503)
    freed.untyped_storage().resize_(0)
    with pytest.raises((spg_kernels.BackendError, RuntimeError)):
        spg_kernels.soft_mask_(form([freed]), form([torch.full((503,), 0.5)]), backend="native")
    nested = torch.nested.nested_tensor([torch.ones(200), torch.ones(303)])
    with pytest.raises(TypeError, match=r"grads\[0\]: expected a strided tensor, got nested"):
        spg_kernels.soft_mask_(form([nested]), form([torch.ones(503)]), backend="native")


@BACKENDS
def test_a_gamma_of_one_value_is_nothing_to_fold_into(backend):
    gamma = torch.tensor(0.0)
    with pytest.raises(ValueError, match=r"gammas\[0\]: expected shape \(3,\) of grads\[0\], got \(\)"):
        spg_kernels.accumulate_importance_([gamma], [torch.tensor([0.0, 1.0, 2.0])], backend=backend)
    assert gamma == 0


@BACKENDS
def test_whole_numbers_are_no_parameters(backend):
    lists = [[torch.tensor([1, 2])], [torch.tensor([3, 4])], [torch.full((2,), 0.5)]]
    with pytest.raises(TypeError, match=r"params\[0\]: expected a floating point tensor, got torch.int64"):
        spg_kernels.update_mask_(*lists, backend=backend)
    assert lists[0][0].tolist() == [1, 2]


def test_a_complex_gradient_has_the_importance_of_its_larger_part():
    parts = torch.randn(7, 2, dtype=torch.float64)
    expected = ((parts - parts.mean()) / parts.std()).tanh().abs().amax(-1)
    assert (spg_kernels.importance(torch.view_as_complex(parts)) - expected).abs().max() < 1e-6

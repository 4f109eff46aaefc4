"""The masks and steps in Triton's interpreter, on the CPU; `test_triton_interpreter.py` gives them a process of their own."""

import itertools
import logging
import math
from collections import OrderedDict

import pytest
import torch

import spg_kernels
from spg_kernels import ops, reference
from spg_kernels.backends import plans as backend_plans
from spg_kernels.backends.tensors import addresses_of
from spg_kernels.backends.triton import elementwise, launch, plans, steps

# What every backend is held to, with `backend` below.
from .test_grad_scaler import (  # noqa: F401
    step_lists,
    test_a_compiled_function_scales_and_skips_without_a_graph_break,
    test_a_scaled_step_has_the_bits_of_a_step_on_unscaled_gradients,
    test_found_inf_changes_nothing_at_all,
    test_values_that_are_not_one_float32_are_refused,
)
from .test_ops import (  # noqa: F401
    test_a_compiled_function_calls_the_operators_without_a_graph_break,
    test_a_masked_step_freezes_gamma_one_whatever_the_gradient,
    test_kernels_tell_autograd_what_they_wrote,
    test_masked_adamw_without_importance_is_torch_adamw,
    test_masked_sgd_without_importance_is_torch_sgd,
    test_masked_steps_equal_the_float64_formula,
    test_masks_at_gamma_zero_and_one_keep_every_bit,
    test_soft_mask_is_within_two_ulp,
    test_update_mask_is_within_two_ulp,
)
from .triton_cases import CASES, GAMMAS, SETTINGS, compare_with_float64, copies, equal, inputs


@pytest.fixture
def backend():
    return "triton"


@pytest.mark.parametrize("gamma_kind", GAMMAS)
@pytest.mark.parametrize("dtype, state_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                                (torch.float16, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("op, settings", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_no_kernel_errs_more_than_twice_what_the_reference_does(op, settings, dtype, state_dtype, gamma_kind):
    # The interpreter truncates to bfloat16 where a GPU rounds: one unit more.
    spare = 1 if torch.bfloat16 in (dtype, state_dtype) else 0
    compare_with_float64(op, settings, inputs(op, dtype, state_dtype, gamma_kind), spare)


@pytest.mark.parametrize("op, settings", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_any_number_of_programs_gives_the_same_bits(op, settings, monkeypatch):
    results = []
    for programs in (1, 3, 64):
        monkeypatch.setattr(launch, "programs_override", programs)
        results.append(inputs(op, torch.float32, torch.float32, "8-bit", [(n,) for n in (3, 17000, 0, 700, 8192)]))
        getattr(spg_kernels, op)(*results[-1], **settings, backend="triton")
    for lists in results[1:]:
        assert equal(lists, results[0])


@pytest.mark.parametrize("op, settings", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_misaligned_views_share_a_call_with_aligned_tensors(op, settings):
    shapes = [(n,) for n in (5, 1024, 9000, 2049)]
    lists = inputs(op, torch.float32, torch.float32, "float32", shapes)
    aligned = copies(lists)

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:] if t.dim() else t

    lists = tuple([shifted(t) if i % 2 else t for i, t in enumerate(tensors)] for tensors in lists)
    pieces = plans.PLANS.make(op, lists)[0].launch.pieces(addresses_of(lists))
    assert [(piece.aligned, len(piece.sizes)) for piece in pieces] == [(True, 2), (False, 2)]
    for arguments in (lists, aligned):
        getattr(spg_kernels, op)(*arguments, **settings, backend="triton")
    assert equal(lists, aligned)


def launches(monkeypatch, module, name: str) -> list:
    """The launches of a kernel from now on."""
    kernel, seen = getattr(module, name), []

    class Counted:
        def __getitem__(self, grid):
            seen.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, name, Counted())
    return seen


@pytest.mark.parametrize("gamma_kind", GAMMAS)
def test_a_model_with_heads_is_one_launch(monkeypatch, gamma_kind):
    for op in SETTINGS:
        seen = launches(monkeypatch, elementwise if op in ("soft_mask_", "update_mask_") else steps, f"{op}kernel")
        lists = inputs(op, torch.float32, torch.float32, gamma_kind, [(40, 30), (7,), (3, 5), (2000,)])
        getattr(spg_kernels, op)(*lists, **SETTINGS[op][0], backend="triton")
        assert len(seen) == 1


def test_any_dense_layout_that_all_tensors_share_is_taken(monkeypatch):
    shape = (3, 8, 5, 5)
    for change in (lambda t: t.to(memory_format=torch.channels_last), lambda t: t.transpose(0, 3) if t.dim() else t):
        lists = inputs("masked_adamw_", torch.float32, torch.float32, "float32", [shape, shape])
        lists = tuple([change(t) if t.dim() else t for t in tensors] for tensors in lists)
        twin = copies(lists)
        assert not plans.PLANS.make("masked_adamw_", lists)[0].refused
        spg_kernels.masked_adamw_(*lists, lr=0.1, backend="triton")
        reference.masked_adamw_(*twin, lr=0.1)
        assert all(torch.allclose(a, b, atol=1e-6) for ours, theirs in zip(lists, twin) for a, b in zip(ours, theirs))


def test_what_no_kernel_takes_is_refused_with_a_reason():
    p = torch.randn(6, 6)
    cases = {
        "float64": ([p.double()], [torch.rand(6, 6)]),
        "layout": ([p], [torch.rand(6, 6).t()]),
        "dense": ([torch.randn(6, 1).expand(6, 6)], [torch.rand(6, 6)]),
        "type": ([torch.nn.Buffer(p).as_subclass(type("Other", (torch.Tensor,), {}))], [torch.rand(6, 6)]),
        "meta": ([p.to("meta")], [torch.rand(6, 6)]),
    }
    for word, lists in cases.items():
        (reason,) = plans.PLANS.make("soft_mask_", lists)[0].refused.values()
        assert word in reason, reason
    with pytest.raises(spg_kernels.BackendError, match="float64"):
        spg_kernels.soft_mask_(*cases["float64"], backend="triton")
    refused = plans.PLANS.make("masked_sgd_", ([p, p], [p, p.bfloat16()], [torch.rand(6, 6)] * 2, [p, p]))[0].refused
    assert list(refused) == [1] and "bfloat16" in refused[1]


def test_changed_tensors_of_the_same_lists_are_looked_at_again():
    grads, gammas = [torch.randn(64)], [torch.rand(64)]
    spg_kernels.soft_mask_(grads, gammas, backend="triton")
    gammas[0].data = torch.randint(0, 256, (64,), dtype=torch.uint8)
    expected = reference.scale(grads[0], gammas[0])
    spg_kernels.soft_mask_(grads, gammas, backend="triton")
    assert torch.equal(grads[0], expected)
    grads[0].data, gammas[0].data = torch.randn(3000), torch.rand(3000)
    expected = reference.scale(grads[0], gammas[0])
    spg_kernels.soft_mask_(grads, gammas, backend="triton")
    assert torch.equal(grads[0], expected)


def test_steady_state_makes_no_new_table(monkeypatch):
    lists = inputs("masked_adamw_", torch.float32, torch.float32, "8-bit", [(40, 30), (7,), (3, 5)])
    spg_kernels.masked_adamw_(*lists, lr=0.1, backend="triton")
    monkeypatch.setattr(launch, "_upload", lambda *_: pytest.fail("a table was made"))
    monkeypatch.setattr(backend_plans, "Plan", lambda *_: pytest.fail("tensors were looked at"))
    for lr in (0.1, 0.2):
        spg_kernels.masked_adamw_(*lists, lr=lr, backend="triton")


def test_tables_are_bounded_and_the_last_used_stay():
    place = launch.here(torch.device("cpu"))
    first = launch.table(place, (1, 2, 3))
    for i in range(launch.TABLES - 1):
        launch.table(place, (i, -1))
        assert launch.table(place, (1, 2, 3)) is first
    launch.table(place, (0, 0, 0, 0))
    assert len(launch._tables[place.device]) == launch.TABLES and launch.table(place, (1, 2, 3)) is first


def test_a_table_that_another_thread_drops_while_it_is_looked_up_serves_all_the_same(monkeypatch):
    class DropsMeanwhile(OrderedDict):
        def get(self, key):
            return self.pop(key, None)

    place = launch.here(torch.device("cpu"))
    monkeypatch.setitem(launch._tables, place.device, DropsMeanwhile())
    first = launch.table(place, (1, 2, 3))
    assert launch.table(place, (1, 2, 3)) is first


def test_tables_first_needed_in_a_capture_are_copied_from_memory_that_is_never_used_again(monkeypatch):
    place = launch.Place(torch.device("cpu"), 0, capturing=True)
    known = launch.table(place._replace(capturing=False), (4, 5, 6))
    monkeypatch.setattr(launch, "_kept", [])
    monkeypatch.setattr(launch, "_pinned", [])
    assert launch.table(place, (4, 5, 6)) is known and launch._kept[0] is known
    with pytest.raises(RuntimeError, match="outside the capture"):
        launch.table(place, (7, 8, 9, 10))
    launch._pinned.extend([torch.zeros(20, dtype=torch.int64), 0])
    assert launch.table(place, (7, 8, 9, 10)).tolist() == [7, 8, 9, 10]
    pieces, count = launch.chunks(place, (77, 5), 64)
    assert pieces.tolist() == [[0, 64], [64, 13], [0, 1 << 32 | 5]] and count == 3
    floats = launch.cached(place, ("floats",), lambda: torch.tensor([0.5, 1.5, 2.5]))
    assert floats.tolist() == [0.5, 1.5, 2.5]
    assert launch._pinned[0][:10].tolist() == [7, 8, 9, 10, 0, 64, 64, 13, 0, 1 << 32 | 5] and launch._pinned[1] == 12
    assert launch.table(place, (7, 8, 9, 10)) is not launch.table(place, (7, 8, 9, 10)), "not for use outside the graph"
    with pytest.raises(RuntimeError, match="outside the capture"):
        launch.table(place, (1,))


def test_chunks_cover_every_element_once_past_32_bits():
    sizes = (0, 5, 3 * 2**31 + 1, 8192, 8193)
    chunk = 2**29
    table, count = launch.chunks(launch.here(torch.device("cpu")), sizes, chunk, flagged=(1, 3))
    rows = [(start, word >> 32 & 0x3FFFFFFF, word & 0xFFFFFFFF, word >> 62) for start, word in table.tolist()]
    assert len(rows) == count
    for i, size in enumerate(sizes):
        own = [(start, n) for start, tensor, n, _ in rows if tensor == i]
        assert [start for start, _ in own] == list(itertools.accumulate((n for _, n in own[:-1]), initial=0))[:len(own)]
        assert sum(n for _, n in own) == size and all(0 < n <= chunk for _, n in own)
    assert {tensor for _, tensor, _, flag in rows if flag} == {1, 3}


def test_decoding_is_the_reference_bit_for_bit():
    assert torch.equal(elementwise.keep_table(), reference.code_table()[1])


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.999999])
def test_bias_corrections_keep_float32_precision(monkeypatch, beta):
    """exp_avg = 1, exp_avg_sq = 1 with beta2 = 0: the parameter moves by lr / (1 - beta1^step)."""
    for count in (0.0, 1.0, 9.0, 999.0, 123456.0, 2.0**24 - 1):
        p, one = torch.zeros(4), torch.ones(4)
        step = torch.tensor(count)
        spg_kernels.masked_adamw_([p], [one.clone()], [torch.zeros(4)], [one.clone()], [one.clone()], [], [step], lr=1.0,
                                  beta1=beta, beta2=0.0, eps=0.0, weight_decay=0.0, backend="triton")
        exact = -1 / -math.expm1((count + 1) * math.log(beta)) if beta else -1.0
        assert abs(p[0].item() - exact) <= 4e-7 * abs(exact), (count, p[0].item(), exact)


@pytest.mark.parametrize("found", [None, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("count", [0.0, 7.0])
def test_step_counts_on_the_device_give_the_same_step(monkeypatch, count, found):
    lists = inputs("masked_adamw_", torch.float32, torch.float32, "8-bit", [(40, 30), (7,), (3, 5)])
    lists[6][:] = [torch.tensor(count + i) for i in range(3)]
    before, twin = copies(lists), copies(lists)
    settings = dict(lr=0.1, found_inf=None if found is None else torch.tensor([found]), backend="triton")
    spg_kernels.masked_adamw_(*lists, **settings)
    monkeypatch.setattr(plans, "on_host", lambda step: False)
    monkeypatch.setattr(plans.PLANS, "_plans", {})
    spg_kernels.masked_adamw_(*twin, **settings)
    assert equal(lists, twin) and equal(lists, before) == bool(found)
    assert [s.item() for s in twin[6]] == [count + i + (not found) for i in range(3)]


@pytest.mark.parametrize("shapes", [[(40, 30)] + [(2,)] * 300, [(0,)] * 3, [(20000,), (0,), (5,)]],
                         ids=["many", "empty", "mixed"])
def test_every_count_on_the_device_is_taken_one_further(monkeypatch, shapes):
    lists = inputs("masked_adamw_", torch.float32, torch.float32, "float32", shapes)
    monkeypatch.setattr(plans, "on_host", lambda step: False)
    monkeypatch.setattr(plans.PLANS, "_plans", {})
    seen = launches(monkeypatch, steps, "increment_kernel")
    for call, programs in enumerate((None, 1, 7), start=1):
        monkeypatch.setattr(launch, "programs_override", programs)
        spg_kernels.masked_adamw_(*lists, lr=0.1, backend="triton")
        assert [s.item() for s in lists[6]] == [i % 4 + call for i in range(len(shapes))]
    assert len(seen) == 3


def test_auto_leaves_cpu_tensors_to_the_cpu_backends():
    assert ops.resolve("auto", "cpu").__name__ != "spg_kernels.backends.triton"
    assert ops.why_unavailable("triton") is None


@pytest.mark.parametrize("mask, kernel", [("update", "update_mask_kernel"), ("gradient", "soft_mask_kernel")])
@pytest.mark.filterwarnings("ignore:mask='gradient'")
def test_the_mask_around_any_optimizer_is_one_launch(monkeypatch, mask, kernel):
    params = [torch.randn(n, requires_grad=True) for n in (40, 7, 300)]
    optimizer = spg_kernels.SPGOptimizer(torch.optim.RMSprop(params), heads=params[1], mask=mask, backend="triton")
    for name in optimizer.importance:
        optimizer.importance[name] = torch.ones_like(optimizer.importance[name])
    for p in params:
        p.grad = torch.randn_like(p)
    before, seen = [p.detach().clone() for p in params], launches(monkeypatch, elementwise, kernel)
    optimizer.step()
    assert len(seen) == 1 and all(torch.equal(p, q) for p, q in zip(params, before))


def test_an_optimizer_steps_through_the_kernels_and_logs_no_fallback(caplog, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 9, 4))
    twin = [p.detach().clone().requires_grad_() for p in model.parameters()]
    seen = launches(monkeypatch, steps, "masked_adamw_kernel")
    ours = spg_kernels.SPGOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), heads=model[2], backend="triton")
    theirs = spg_kernels.SPGOptimizer(torch.optim.AdamW(twin, lr=1e-2), heads=twin[2:], backend="reference")
    with caplog.at_level(logging.DEBUG, "spg_kernels"):
        for step in range(4):
            for p, q in zip(model.parameters(), twin):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            if step == 0:
                for name, other in zip(ours.importance, theirs.importance):
                    ours.importance[name] = theirs.importance[other] = torch.rand(ours.importance[name].shape)
            ours.step()
            theirs.step()
    assert len(seen) == 4 and "generic" not in caplog.text
    for p, q in zip(model.parameters(), twin):
        assert torch.allclose(p, q, atol=1e-6)

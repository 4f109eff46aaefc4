"""Every operator on drawn lists of tensors, on every backend, against float64 formulas with a bound from their own terms.

The long run: `python -m pytest tests/test_properties_operators.py --hypothesis-profile=long`.
"""

import os

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import spg_kernels
from spg_kernels import BackendError, NonFiniteGradientError

from . import oracle
from .recipes import ANY_SHAPE, DENSE, LAYOUTS, Placed, Values, gammas, unchanged, values

# With TRITON_INTERPRET=1 Triton's kernels too, in its interpreter.
BACKENDS = ("reference", "native", "auto") + (("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ())
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = torch.finfo(torch.float32).eps
TINY = 1e-44  # some float32 subnormals, where an intermediate result may have lost its digits


def lists_of(element: st.SearchStrategy, largest: int = 4) -> st.SearchStrategy[list]:
    return st.lists(element, min_size=0, max_size=largest)


def call(operator, lists: list[list[Placed]], backend: str, **settings) -> bool:
    """Run the operator. False where a backend refuses by name, which must leave every bit."""
    if backend == "triton" and any(placed.tensor.dtype == torch.bfloat16 for placeds in lists for placed in placeds):
        return False  # its interpreter truncates to bfloat16, and takes subnormal ones for other numbers
    try:
        operator(*([placed.tensor for placed in placeds] for placeds in lists), backend=backend, **settings)
    except BackendError:
        assert backend in ("native", "triton") and unchanged(*lists)
        event(f"{backend} refuses")
        return False
    finally:
        assert all(placed.canaries_live() for placeds in lists for placed in placeds), "wrote outside a tensor"
    event(f"{backend} runs")
    return True


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """|actual - expected| <= bound and the rounding to actual's dtype, where expected is finite; else the same inf or NaN.

    A value beyond the dtype's largest may be that or inf.
    """
    info = torch.finfo(actual.dtype)
    got = actual.double()
    rounding = info.eps * expected.abs() + info.smallest_normal * info.eps
    close = (got - expected).abs() <= bound + rounding
    same = (got == expected) | (got.isnan() & expected.isnan())
    overflow = (expected.abs() + bound >= info.max * (1 - info.eps)) & (got.abs() >= info.max * (1 - 4 * info.eps))
    right = torch.where(expected.isfinite(), close | overflow, same)
    assert right.all(), f"{int((~right).sum())} wrong, first {got[~right][0]} instead of {expected[~right][0]}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, -0 apart from 0, all NaNs alike."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and torch.equal(
        a.signbit() | a.isnan(), b.signbit() | b.isnan())


# accumulate_importance_

FOLDS = lists_of(st.tuples(ANY_SHAPE, st.sampled_from(FLOATS), values(37), gammas(one_value=False), LAYOUTS,
                           st.one_of(st.none(), LAYOUTS)))


@given(FOLDS)
def test_a_fold_is_the_running_maximum_of_the_float64_importance(recipes):
    made = [v.make(shape, dtype) for shape, dtype, v, *_ in recipes]
    exact = [oracle.z(grad) if grad.isfinite().all() else None for grad in made]
    for backend in BACKENDS:
        grads = [Placed(grad, layout) for grad, (*_, layout, _) in zip(made, recipes)]
        folded = [Placed(g.make(shape), other or layout) for shape, _, _, g, layout, other in recipes]
        bad = [f"grads[{i}]" for i, z in enumerate(exact) if z is None]
        try:
            if not call(spg_kernels.accumulate_importance_, [folded, grads], backend):
                continue
            assert not bad
        except NonFiniteGradientError as error:
            assert error.names == bad
        assert unchanged(grads)
        for gamma, z in zip(folded, exact):
            if z is None:
                assert gamma.unchanged()
            elif gamma.tensor.dtype == torch.float32:
                assert ((gamma.tensor - torch.maximum(gamma.before().double(), z.tanh())).abs() <= 2e-6).all()
            else:
                assert_codes(gamma.tensor, gamma.before(), 28 * z)


def assert_codes(codes: torch.Tensor, before: torch.Tensor, exact: torch.Tensor) -> None:
    """max(before, ceil(28 |z|)), saturating; next to an integer the last digits of the float64 sums decide which."""
    low, high = ((exact + side * (1e-6 * exact + 1e-9)).ceil().clamp(0, 255) for side in (-1, 1))
    assert (codes >= torch.maximum(low, before.double())).all() and (codes <= torch.maximum(high, before.double())).all()


@given(ANY_SHAPE, st.sampled_from(FLOATS), values(37, special=False), st.integers(0, 3))
def test_importance_is_the_fold_into_zeros_and_no_slicing_of_a_list_changes_a_bit(shape, dtype, recipe, copies):
    grad = recipe.make(shape, dtype)
    for backend in BACKENDS if dtype != torch.float64 else ("reference", "auto"):
        alone = spg_kernels.importance(grad, backend=backend)
        together = [torch.zeros(shape) for _ in range(copies + 1)]
        spg_kernels.accumulate_importance_(together, [grad] * len(together), backend=backend)
        assert all(torch.equal(alone, gamma) for gamma in together)
        assert ((alone >= 0) & (alone <= 1)).all()


# soft_mask_ and update_mask_

@given(lists_of(st.tuples(ANY_SHAPE, st.sampled_from(FLOATS), values(37), gammas(), LAYOUTS, st.one_of(st.none(), LAYOUTS))))
def test_soft_mask_is_within_two_ulp(recipes):
    for backend in BACKENDS:
        grads = [Placed(v.make(shape, dtype), layout) for shape, dtype, v, _, layout, _ in recipes]
        masks = [Placed(g.make(shape), DENSE if g.kind == "one value" else other or layout)
                 for shape, _, _, g, layout, other in recipes]
        if not call(spg_kernels.soft_mask_, [grads, masks], backend):
            continue
        assert unchanged(masks)
        for grad, mask in zip(grads, masks):
            keep, before = oracle.keep(mask.tensor).expand(grad.tensor.shape), grad.before()
            expected = torch.where(keep == 0, 0.0, before.double() * keep)
            assert_within(grad.tensor, expected, rounding_of(mask.tensor, before.dtype) * expected.abs())
            assert same_bits(grad.tensor[keep == 1], before[keep == 1])
            assert same_bits(grad.tensor[keep == 0], torch.zeros_like(before[keep == 0]))


# Two float32 values that are more than its largest apart have no difference: parameters stay below 1e38.
@given(lists_of(st.tuples(ANY_SHAPE, st.sampled_from(FLOATS), values(30), values(30), gammas(), LAYOUTS,
                          st.one_of(st.none(), LAYOUTS))))
def test_update_mask_is_within_two_ulp_of_its_larger_term(recipes):
    for backend in BACKENDS:
        params = [Placed(v.make(shape, dtype), layout) for shape, dtype, v, _, _, layout, _ in recipes]
        olds = [Placed(v.make(shape, dtype), other or layout) for shape, dtype, _, v, _, layout, other in recipes]
        masks = [Placed(g.make(shape), DENSE if g.kind == "one value" else layout) for shape, _, _, _, g, layout, _ in recipes]
        if not call(spg_kernels.update_mask_, [params, olds, masks], backend):
            continue
        assert unchanged(masks, olds)
        for param, old, mask in zip(params, olds, masks):
            keep = oracle.keep(mask.tensor).expand(old.tensor.shape)
            assert_blended(param.tensor, param.before(), old.tensor, keep, rounding_of(mask.tensor, param.tensor.dtype))


def rounding_of(gamma: torch.Tensor, dtype: torch.dtype) -> float:
    """One more unit of `dtype`; 8-bit codes decode to float32 even for float64."""
    return max(torch.finfo(dtype).eps, EPS if gamma.dtype == torch.uint8 else 0)


def assert_blended(actual, new, old, keep, rounding):
    between = old.double() + keep * (new.double() - old.double())
    expected = torch.where(keep == 0, old.double(), torch.where(keep == 1, new.double(), between))
    scale = torch.maximum(old.double().abs(), new.double().abs())
    assert_within(actual, expected, 2 * rounding * scale.nan_to_num())
    assert same_bits(actual[keep == 0], old[keep == 0])
    assert same_bits(actual[keep == 1], new[keep == 1])


@given(st.lists(st.tuples(ANY_SHAPE, values(30, special=False), values(30, special=False), gammas()), min_size=1, max_size=3),
       st.sampled_from([torch.complex64, torch.complex128]))
def test_complex_tensors_are_masked_as_their_two_parts(recipes, dtype):
    real = torch.float32 if dtype == torch.complex64 else torch.float64
    for shape, one, other, gamma in recipes:
        mask = gamma.make(shape)
        keep = oracle.keep(mask).expand(shape)[..., None]
        parts, old = (torch.stack([v.make(shape, real), v.make(shape, real)], -1) for v in (one, other))
        masked = torch.view_as_complex(parts.clone())
        spg_kernels.soft_mask_([masked], [mask])
        expected = parts.double() * keep
        assert_within(torch.view_as_real(masked), expected, rounding_of(mask, real) * expected.abs())
        moved = torch.view_as_complex(parts.clone()).conj()  # a lazily conjugated view
        spg_kernels.update_mask_([moved], [torch.view_as_complex(old).conj()], [mask])
        moved = torch.view_as_real(moved.conj().resolve_conj())
        assert_blended(moved, parts, old, keep.expand(parts.shape), rounding_of(mask, real))


# The masked steps

STEPS = st.lists(st.tuples(ANY_SHAPE, st.sampled_from(FLOATS), st.booleans(), gammas(), LAYOUTS, st.one_of(st.none(), LAYOUTS),
                           values(3, special=False), values(3), st.integers(0, 1 << 16)), max_size=3)
RATES = st.sampled_from([0.0, 1e-3, 0.1, 1.0])
DECAYS = st.sampled_from([0.0, 0.01, 0.5])
SWITCH = st.booleans()
# What a GradScaler hands a step: (grad_scale, found_inf).
SCALERS = st.tuples(st.sampled_from([None, 65536.0, 3000.7, 0.3]), st.sampled_from([None, 0.0, 0.0, 1.0, 2.0]))


def place_step(recipes, states: int):
    """params, grads, gammas, and for each state (momentum, ...) a list of tensors that are not negative."""
    params, grads, masks, kept = [], [], [], [[] for _ in range(states)]
    for shape, dtype, wide_state, gamma, layout, other, param, grad, seed in recipes:
        params.append(Placed(param.make(shape, dtype), layout))
        grads.append(Placed(grad.make(shape, dtype), other or layout))
        masks.append(Placed(gamma.make(shape), DENSE if gamma.kind == "one value" else layout))
        state_dtype = torch.float32 if wide_state and dtype != torch.float64 else dtype
        for k, state in enumerate(kept):
            state.append(Placed(Values(seed=seed + k).make(shape, torch.float64).abs().to(state_dtype), layout))
    return params, grads, masks, kept


def scaler_settings(scaler) -> dict[str, torch.Tensor | None]:
    return {name: None if value is None else torch.tensor(value) for name, value in zip(("grad_scale", "found_inf"), scaler)}


def unscaled(grad: torch.Tensor, scaler) -> torch.Tensor:
    """In float64, by the reciprocal in float32 that GradScaler.unscale_ multiplies by."""
    return (grad.double() if scaler[0] is None
            else grad.double() * torch.tensor(scaler[0]).double().reciprocal().float().double())


def assert_near(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """`assert_within` where it is finite. Elsewhere not finite: whether inf or NaN depends on the order of operations."""
    finite = expected.isfinite()
    assert_within(actual[finite], expected[finite], bound[finite])
    assert not actual[~finite].isfinite().any()


def assert_moved(param: Placed, keep, new, bound, mask: str) -> None:
    old = param.before()
    if mask == "update":
        between = old.double() + keep * (new - old.double())
        expected = torch.where(keep == 0, old.double(), torch.where(keep == 1, new, between))
        assert_near(param.tensor, expected, bound.where(keep != 0, 0.0))
        assert same_bits(param.tensor[keep == 0], old[keep == 0])
    else:
        assert_near(param.tensor, new, bound)


@given(STEPS, RATES, st.sampled_from([0.0, 0.9]), st.sampled_from([0.0, 0.3]), DECAYS, SWITCH, SWITCH, SWITCH,
       st.sampled_from(["update", "gradient"]), SCALERS)
def test_masked_sgd_equals_its_float64_formula(recipes, lr, momentum, dampening, decay, nesterov, maximize, first, mask,
                                               scaler):
    for backend in BACKENDS:
        params, grads, masks, (buffers,) = place_step(recipes, 1)
        settings = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": decay, "nesterov": nesterov,
                    "maximize": maximize, "is_first_step": first, "mask": mask, **scaler_settings(scaler)}
        if not call(spg_kernels.masked_sgd_, [params, grads, masks, buffers], backend, **settings):
            continue
        assert unchanged(masks, grads)
        if scaler[1]:
            assert unchanged(params, buffers)
            continue
        for param, grad, gamma, buffer in zip(params, grads, masks, buffers):
            keep, old = oracle.keep(gamma.tensor).expand(param.tensor.shape), param.before().double()
            d = unscaled(grad.tensor, scaler) * (-1 if maximize else 1)
            d = torch.where(keep == 0, 0.0, d * keep) if mask == "gradient" else d
            size = d.abs() + decay * old.abs()  # of all terms, where d is their sum
            d = d + decay * old
            if momentum:
                was = buffer.before().double()
                b = d if first else momentum * was + (1 - dampening) * d
                b_size = size if first else momentum * was.abs() + (1 - dampening) * size
                assert_near(buffer.tensor, b, 4 * EPS * b_size)
                d, size = (d + momentum * b, size + momentum * b_size) if nesterov else (b, b_size)
            else:
                assert buffer.unchanged()
            assert_moved(param, keep, old - lr * d, 8 * EPS * (old.abs() + lr * size) + TINY, mask)


@given(STEPS, RATES, st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.999]), st.sampled_from([1e-8, 1e-3]), DECAYS,
       SWITCH, SWITCH, SWITCH, st.sampled_from([0.0, 1.0, 1000.0]), st.sampled_from(["update", "gradient"]), SCALERS)
def test_masked_adamw_equals_its_float64_formula(recipes, lr, beta1, beta2, eps, decay, decoupled, amsgrad, maximize, step,
                                                 mask, scaler):
    for backend in BACKENDS:
        params, grads, masks, (averages, squares, largest) = place_step(recipes, 3)
        steps = [Placed(torch.tensor(step)) for _ in params]
        lists = [params, grads, masks, averages, squares, largest if amsgrad else [], steps]
        settings = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay, "decoupled": decoupled,
                    "maximize": maximize, "mask": mask, **scaler_settings(scaler)}
        if not call(spg_kernels.masked_adamw_, lists, backend, **settings):
            continue
        assert unchanged(masks, grads)
        if scaler[1]:
            assert unchanged(*lists)
            continue
        assert all(count.tensor == step + 1 for count in steps)
        c1, c2 = 1 - beta1 ** (step + 1), (1 - beta2 ** (step + 1)) ** 0.5
        for param, grad, gamma, average, square, bound in zip(params, grads, masks, averages, squares, largest):
            keep, old = oracle.keep(gamma.tensor).expand(param.tensor.shape), param.before().double()
            d = unscaled(grad.tensor, scaler) * (-1 if maximize else 1)
            d = torch.where(keep == 0, 0.0, d * keep) if mask == "gradient" else d
            coupled = 0 if decoupled else decay
            size = d.abs() + coupled * old.abs()
            d = d + coupled * old
            m_old, v_old = average.before().double(), square.before().double()
            m, m_size = beta1 * m_old + (1 - beta1) * d, m_old.abs() + size
            v, v_size = beta2 * v_old + (1 - beta2) * d**2, beta2 * v_old + (1 - beta2) * size**2
            assert_near(average.tensor, m, 4 * EPS * m_size)
            assert_near(square.tensor, v, 8 * EPS * v_size + TINY)
            if amsgrad:
                v = torch.maximum(v, bound.before().double())
                assert_near(bound.tensor, v, 8 * EPS * v_size + TINY)
            else:
                assert bound.unchanged()
            denominator = v.sqrt() / c2 + eps
            wrong_by = 4 * EPS * (denominator + (1 - beta2) ** 0.5 / c2 * size)
            shrink = lr * decay if decoupled else 0
            new = old * (1 - shrink) - lr / c1 * m / denominator
            error = 8 * EPS * (old.abs() + lr / c1 * m_size / denominator) + lr / c1 * m.abs() * wrong_by / denominator**2
            assert_moved(param, keep, new, error + TINY, mask)


# What has no right answer is refused, and nothing has changed

@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=4),
       st.lists(st.tuples(st.integers(0, 60), st.integers(0, 4), st.integers(0, 6)), min_size=0, max_size=4),
       st.integers(0, 3))
def test_memory_that_is_written_is_shared_with_nothing(written, read, repeated):
    """Views (begin, stride, count) of one buffer: refused if and only if an element is written and used once more."""
    memory = torch.rand(100)
    before = memory.clone()

    def view(recipe):
        begin, stride, count = recipe
        return memory.as_strided((count,), (stride,), begin), [begin + stride * k for k in range(count)]

    grads = [view(recipe) for recipe in written]
    masks = [view(read[i]) if i < len(read) and read[i][2] == recipe[2] else (torch.full((recipe[2],), 0.5), [])
             for i, recipe in enumerate(written)]
    if repeated < len(grads):
        grads.append(grads[repeated])
        masks.append(masks[repeated])
    elements = [element for _, view in grads for element in view]
    clash = len(elements) != len(set(elements)) or not set(elements).isdisjoint(e for _, view in masks for e in view)
    arguments = [tensor for tensor, _ in grads], [tensor for tensor, _ in masks]
    if clash:
        with pytest.raises(ValueError, match="share memory|more than once"):
            spg_kernels.soft_mask_(*arguments)
        assert torch.equal(memory, before)
    else:
        expected = [tensor * (1 - mask) for tensor, mask in zip(*arguments)]
        spg_kernels.soft_mask_(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(arguments[0], expected))


@given(st.sampled_from(["accumulate_importance_", "soft_mask_", "update_mask_", "masked_sgd_", "masked_adamw_"]),
       st.sampled_from(["short list", "long list", "shape", "integer", "wide gamma", "sparse", "expanded", "itself"]),
       st.integers(0, 6), st.sampled_from(BACKENDS))
def test_a_wrong_argument_is_an_error_that_changes_nothing(op, mistake, which, backend):
    count = {"accumulate_importance_": 2, "soft_mask_": 2, "update_mask_": 3, "masked_sgd_": 4, "masked_adamw_": 7}[op]
    gammas_at = {"accumulate_importance_": 0, "soft_mask_": 1}.get(op, 2)
    lists = [[torch.rand(6, 4) for _ in range(3)] for _ in range(count)]
    if op == "masked_adamw_":
        lists[6] = [torch.tensor(1.0) for _ in range(3)]
    kept = [[t.clone() for t in tensors] for tensors in lists]
    which %= count
    tensors = lists[which]
    is_written = which not in {"accumulate_importance_": (1,), "soft_mask_": (1,), "update_mask_": (1, 2)}.get(op, (1, 2))
    if mistake == "short list":
        lists[which] = tensors[:2]
    elif mistake == "long list":
        lists[which] = [*tensors, torch.rand(6, 4)]
    elif mistake == "shape":
        tensors[1] = torch.rand(4, 6)
    elif mistake == "integer":
        tensors[1] = torch.ones(tensors[1].shape, dtype=torch.int32)
    elif mistake == "wide gamma":
        lists[gammas_at][1] = lists[gammas_at][1].double()
    elif mistake in ("sparse", "expanded") and is_written:
        tensors[1] = torch.rand(6, 4).to_sparse() if mistake == "sparse" else torch.rand(6, 1).expand(6, 4)
    elif mistake == "itself" and is_written:
        tensors[1] = tensors[0]
    else:
        return
    settings = {"lr": 0.1} if op == "masked_adamw_" else {"lr": 0.1, "momentum": 0.9} if op == "masked_sgd_" else {}
    with pytest.raises((ValueError, TypeError)):
        getattr(spg_kernels, op)(*lists, backend=backend, **settings)
    for now, then in zip(lists, kept):
        assert torch.equal(now[0], then[0]) and torch.equal(now[-1] if len(now) == 3 else then[-1], then[-1])

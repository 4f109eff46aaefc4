"""The machine code of the masks and steps for sm_80, sm_90 and gfx942: wide accesses, no spills, no shared memory."""

import os
import re

import pytest

tl = pytest.importorskip("triton.language", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from spg_kernels.backends.triton import elementwise, steps

from .triton_aot import GFX942, SM80, SM90, THREADS, amd_accesses, compiled, nvidia_accesses, nvidia_resources

F32, BF16, F16, CODE = tl.float32, tl.bfloat16, tl.float16, tl.uint8
BYTES = {F32: 4, BF16: 2, F16: 2, CODE: 1}
FLOATS = ("lr", "ahead", "momentum", "undamped", "weight_decay", "sign", "log_beta1", "log_beta2", "beta2", "rest1", "rest2",
          "eps")
SCALARS = (("items", "i32"), ("tensors", "i32"), ("keeps", "*fp32"), ("grad_scale", "*fp32"), ("found_inf", "*fp32"),
           *((name, "fp32") for name in FLOATS))
UNSCALED = dict(grad_scale=None, found_inf=None)

# kernel: (accesses of a full block by what they are, other constants)
KERNELS = {
    "soft mask": (elementwise.soft_mask_kernel, ("p",), ("p",), elementwise.VECTORS, {}),
    "update mask": (elementwise.update_mask_kernel, ("p", "p"), ("p",), elementwise.VECTORS, {}),
    "sgd": (steps.masked_sgd_kernel, ("p", "p", "s"), ("p", "s"), 1,
            dict(LR_ON_DEVICE=False, FIRST_STEP=False, NESTEROV=True, GRADIENT_MASK=False, MOMENTUM=True, **UNSCALED)),
    "adamw": (steps.masked_adamw_kernel, ("p", "p", "s", "s"), ("p", "s", "s"), 1,
              dict(LR_ON_DEVICE=False, STEPS_ON_HOST=True, DECOUPLED=True, AMSGRAD=False, GRADIENT_MASK=False, **UNSCALED)),
    "adam": (steps.masked_adamw_kernel, ("p", "p", "s", "s", "s"), ("p", "s", "s", "s"), 1,
             dict(LR_ON_DEVICE=True, STEPS_ON_HOST=False, DECOUPLED=False, AMSGRAD=True, GRADIENT_MASK=True, **UNSCALED)),
}
for name in ("sgd", "adamw", "adam"):  # and with a GradScaler's values
    *kernel, constants = KERNELS[name]
    KERNELS[f"scaled {name}"] = (*kernel, {key: value for key, value in constants.items() if key not in UNSCALED})
# parameter, gamma, state
ALL_FLOAT, MIXED_CODES, HALF, HALF_WIDE_STATE, HALF_WIDE_GAMMA = (
    (F32, F32, F32), (F32, CODE, F32), (BF16, CODE, BF16), (BF16, CODE, F32), (F16, F32, F16))
CASES = [(name, dtypes, SM90) for name in ("soft mask", "sgd", "adamw")
         for dtypes in (ALL_FLOAT, MIXED_CODES, HALF, HALF_WIDE_STATE, HALF_WIDE_GAMMA)
         if (name, dtypes) != ("soft mask", HALF_WIDE_STATE)]
CASES += [("update mask", MIXED_CODES, SM90), ("adam", MIXED_CODES, SM90), ("update mask", HALF, SM80)]
CASES += [(name, MIXED_CODES, target) for name in ("soft mask", "sgd", "adamw") for target in (SM80, GFX942)]
CASES += [(name, HALF_WIDE_STATE, GFX942) for name in ("sgd", "adam")]
CASES += [(f"scaled {name}", MIXED_CODES, target) for name in ("sgd", "adamw", "adam") for target in (SM80, SM90, GFX942)]


def compile_case(name, dtypes, target, aligned=True):
    kernel, _, _, vectors, constants = KERNELS[name]
    values = {"GRAD": dtypes[0], "PARAM": dtypes[0], "GAMMA": dtypes[1], "STATE": dtypes[2]}
    constants = {**constants, **{key: value for key, value in values.items() if key in kernel.arg_names}}
    width = 16 // max(BYTES[constants[key]] for key in values if key in constants)
    scalars = [(key, kind) for key, kind in SCALARS if key in kernel.arg_names and key not in constants]
    if constants.get("LR_ON_DEVICE"):
        scalars.append(("lr", "*fp32"))
    if constants.get("STEPS_ON_HOST"):
        scalars.append(("steps", "*fp32"))
    block = THREADS * width * vectors
    return compiled(kernel, target, tuple(scalars), ALIGNED=aligned, VECTOR=width, BLOCK=block, **constants), width


def wide_accesses(name, dtypes, width) -> dict:
    """What the loop over full blocks must have: (op, bytes) -> how many, at least."""
    _, loads, stores, vectors, _ = KERNELS[name]
    size = {"p": BYTES[dtypes[0]] * width, "s": BYTES[dtypes[2]] * width, "g": BYTES[dtypes[1]] * width}
    expected: dict[tuple, int] = {}
    for op, lists in (("ld", (*loads, "g")), ("st", stores)):
        for kind in lists:
            expected[op, size[kind]] = expected.get((op, size[kind]), 0) + vectors
    return expected


def _id(value) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(getattr(value, "arch", value))


@pytest.mark.parametrize("name, dtypes, target", CASES, ids=_id)
def test_full_blocks_move_16_bytes_at_a_time_and_nothing_spills(name, dtypes, target, tmp_path):
    compilation, width = compile_case(name, dtypes, target)
    assert "convert_layout" not in compilation.asm["ttgir"], "registers move between threads"
    assert compilation.metadata.shared == 0
    if target is GFX942:
        text, found = compilation.asm["amdgcn"], amd_accesses(compilation)
        assert "irr.guard" not in text and "vgpr_spill_count: 0" in text and "sgpr_spill_count: 0" in text
        assert "private_segment_fixed_size: 0" in text
    else:
        found = nvidia_accesses(compilation)
        used = nvidia_resources(compilation, tmp_path)
        assert used["STACK"] == used["LOCAL"] == used["SHARED"] == 0, used
        # At least 768 threads fit a multiprocessor's 65,536 registers, which is more loads in flight than memory answers.
        assert used["REG"] <= 80, used
    for access, count in wide_accesses(name, dtypes, width).items():
        assert found[access] >= count, (access, count, found)


@pytest.mark.parametrize("target", [SM90, SM80], ids=_id)
@pytest.mark.parametrize("name", ["soft mask", "update mask", "sgd", "adamw", "adam"])
def test_all_arithmetic_but_exp_is_rounded_correctly_and_keeps_subnormals(name, target):
    """In the interpreter it always is; on a GPU plain / and sqrt are approximations, and .ftz would lose subnormals."""
    ptx = compile_case(name, ALL_FLOAT, target)[0].asm["ptx"]
    inexact = set(re.findall(r"\S*\.(?:approx|full|ftz)\S*", ptx))
    assert inexact <= {"ex2.approx.f32"} and "fma" not in ptx


def test_misaligned_tensors_take_no_wide_access():
    compilation, _ = compile_case("adamw", ALL_FLOAT, SM90, aligned=False)
    assert max(size for _, size in nvidia_accesses(compilation)) <= 8  # 8: the tables


def test_what_changes_from_step_to_step_is_a_plain_argument():
    """No learning rate, no number of chunks and no place of a GradScaler's values is compiled in."""
    for kernel in (steps.masked_sgd_kernel, steps.masked_adamw_kernel):
        assert {"lr", "items", "grad_scale", "found_inf"} <= set(kernel.do_not_specialize)
    assert {"tensors", "found_inf"} <= set(steps.increment_kernel.do_not_specialize)


@pytest.mark.parametrize("target", [SM90, SM80, GFX942], ids=_id)
@pytest.mark.parametrize("constants", [{}, {"found_inf": None}], ids=["scaled", ""])
def test_the_step_counts_kernel_compiles(target, constants):
    scalars = tuple((key, kind) for key, kind in SCALARS if key in ("tensors", "found_inf") and key not in constants)
    assert compiled(steps.increment_kernel, target, scalars, LANES=THREADS, **constants).metadata.shared == 0

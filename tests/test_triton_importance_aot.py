"""The importance kernel's machine code for GPUs that are not here: vector widths, spills, waiting, layouts."""

import functools
import re
import subprocess
from collections import Counter
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spg_kernels.backends.triton import importance, launch

SM90, SM80, SM89 = (GPUTarget("cuda", arch, 32) for arch in (90, 80, 89))
GFX942 = GPUTarget("hip", "gfx942", 64)
FLOAT32 = importance.Tiling(tile=4096, float64=False)
TYPES = {"n_items": "i32", "n_tensors": "i32", "finites": "*u8", "control": "*i32", "partials": "*fp64",
         "standardizations": "*fp32"}


class Case(NamedTuple):
    target: GPUTarget
    grad: torch.dtype
    gamma: torch.dtype
    tiling: importance.Tiling = importance.Tiling()

    def __str__(self):
        names = (str(part).removeprefix("torch.") for part in (self.target.arch, self.grad, self.gamma))
        return "-".join([*names, "float64" if self.tiling.float64 else "float32"])


GRADS, GAMMAS = (torch.float32, torch.bfloat16, torch.float16), (torch.float32, torch.uint8)
NVIDIA = [*(Case(SM90, grad, gamma) for grad in GRADS for gamma in GAMMAS),
          *(Case(SM80, grad, gamma) for grad in GRADS[:2] for gamma in GAMMAS),
          Case(SM89, torch.float32, torch.float32, FLOAT32), Case(SM89, torch.bfloat16, torch.uint8, FLOAT32)]
AMD = [Case(GFX942, grad, gamma) for grad in GRADS[:2] for gamma in GAMMAS]
# For Triton 3.7, which spills it once a program, before all loops.
ONE_REGISTER_TOO_FEW = Case(SM80, torch.bfloat16, torch.uint8)
on_nvidia = pytest.mark.parametrize("case", NVIDIA, ids=str)
on_amd = pytest.mark.parametrize("case", AMD, ids=str)


@functools.cache
def compiled(case: Case, aligned: bool = True):
    """The kernel as a launch on that GPU would compile it."""
    kernel = importance.accumulate_importance_kernel
    constants = importance.kernel_constants(case.grad, case.gamma, aligned, case.tiling)
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*i64") for name in kernel.arg_names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, divisible)
    nvidia = case.target.backend == "cuda"
    return triton.compile(source, target=case.target,
                          options=importance.launch_options(launch.THREADS // case.target.warp_size, nvidia))


def cuobjdump(case: Case, tmp_path, *options: str) -> str:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled(case).asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, *options, str(path)], check=True, capture_output=True, text=True).stdout


def unpredicated(case: Case) -> list[tuple[str, int, bool]]:
    """("ld" or "st", bytes, whether it is to leave the cache first) of what no predicate guards: not of partial blocks."""
    found = []
    for op, modifiers, lanes, bits in re.findall(r"^\s*(ld|st)\.global((?:\.[\w:]+)*?)(?:\.v(\d))?\.b(\d+) ",
                                                 compiled(case).asm["ptx"], re.M):
        found.append((op, int(lanes or 1) * int(bits) // 8, "evict_first" in modifiers))
    return found


def innermost_loops(case: Case) -> list[str]:
    """What lies between a label and the jump back to it, with no other label between them."""
    ptx = compiled(case).asm["ptx"]
    return [body for _, body in re.findall(r"^(\$L__BB\d+_\d+):((?:(?!^\$L__BB).)*?)bra(?:\.uni)? *\t*\1;", ptx, re.M | re.S)]


@on_nvidia
def test_full_blocks_move_sixteen_bytes_at_a_time(case):
    accesses = unpredicated(case)
    vector = 16 // max(case.grad.itemsize, case.gamma.itemsize)
    grad_bytes, gamma_bytes = vector * case.grad.itemsize, vector * case.gamma.itemsize
    assert 16 in (grad_bytes, gamma_bytes)
    parts = case.tiling.step // launch.THREADS // vector
    folding = sorted((op, size) for op, size, leaves_first in accesses if leaves_first)
    assert folding == sorted([("ld", grad_bytes), ("ld", gamma_bytes), ("st", gamma_bytes)] * parts)
    measuring = [size for op, size, leaves_first in accesses if op == "ld" and not leaves_first and size > 8]
    elements = case.tiling.step if case.tiling.float64 else case.tiling.tile
    assert measuring == [16] * (elements * case.grad.itemsize // 16 // launch.THREADS)


@pytest.mark.parametrize("case", [case for case in NVIDIA if case.tiling.float64], ids=str)
def test_the_first_element_is_loaded_with_the_others_and_not_before_them(case):
    measuring = [body for body in innermost_loops(case) if "cvt.f64" in body and re.search(r"ld\.global\.v4", body)]
    assert [body.count("ld.volatile.global") for body in measuring] == [1]


@on_nvidia
def test_no_register_spills_and_as_many_programs_resident_as_planned(case, tmp_path):
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/ +([^;]*);", cuobjdump(case, tmp_path, "-sass"), re.M)
    jumps = [(int(target[1], 16), int(at, 16)) for at, line in code if (target := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", line))]
    loops = [(start, end) for start, end in jumps if start <= end]
    loads, spills = ([int(at, 16) for at, line in code if re.search(names, line)]
                     for names in (r"\bLDG\b", r"\b(?:LDL|STL)\b"))
    assert any(start <= at <= end for at in loads for start, end in loops)
    if triton.__version__.startswith("3.7.") and case == ONE_REGISTER_TOO_FEW:
        assert len(spills) <= 3 and not any(start <= at <= end for at in spills for start, end in loops)
    else:
        assert not spills
    registers = int(re.search(r"REG:(\d+)", cuobjdump(case, tmp_path, "-res-usage"))[1])
    assert registers * launch.THREADS * importance.RESIDENT <= 65536


@on_nvidia
def test_waiting_for_statistics_acquires_in_every_round(case):
    assert sum(bool(re.search(r"(ld|atom)\.global\S*\.acquire", body)) for body in innermost_loops(case)) == 1


@on_nvidia
def test_statistics_are_released_after_they_are_written(case):
    ptx = compiled(case).asm["ptx"]
    # The flag of a tensor's statistics, and before it the four numbers, with a barrier between.
    before = ptx[:re.search(r"(atom|st|red)\.global\S*\.release", ptx).start()]
    assert re.search(r"st\.global(?:(?!st\.global).)*bar\.sync(?:(?!st\.global).)*$", before, re.S)
    assert len(re.findall(r"atom\.global\S*\.acq_rel\.", ptx)) == 2  # a tile measured; a program out
    assert len(re.findall(r"atom\.global\S*\.relaxed\.", ptx)) == 1  # the queue


@pytest.mark.parametrize("case", NVIDIA + AMD, ids=str)
def test_no_layout_conversion_through_shared_memory(case):
    compilation = compiled(case)
    assert "convert_layout" not in compilation.asm["ttgir"]
    # What reductions and broadcast tickets need: a value a warp.
    assert compilation.metadata.shared <= 128


def loops(assembly: str) -> list[str]:
    """What lies between a label and a jump back to it, the shortest first."""
    starts = {match[1]: match.end() for match in re.finditer(r"^(\.LBB\d+_\d+):", assembly, re.M)}
    jumps = re.finditer(r"^\s+s_c?branch\S*\s+(\.LBB\d+_\d+)", assembly, re.M)
    return sorted((assembly[starts[jump[1]]:jump.start()] for jump in jumps if starts[jump[1]] < jump.start()), key=len)


def accesses(assembly: str) -> Counter:
    names = re.findall(r"^\s+(?:global|buffer)_(load|store)_(dword(?:x[234])?|ushort|ubyte|short|byte)\b", assembly, re.M)
    words = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
    return Counter((op, words[name]) for op, name in names)


@on_amd
def test_amd_full_blocks_move_sixteen_bytes_at_a_time(case):
    found = [accesses(body) for body in loops(compiled(case).asm["amdgcn"])]
    measuring = case.tiling.step * case.grad.itemsize // 16 // launch.THREADS
    wide = Counter({("load", 16): measuring})  # and the tile's first element, which Triton 3.6 loads before the loop
    assert wide in found or wide + Counter({("load", case.grad.itemsize): 1}) in found
    vector = 16 // max(case.grad.itemsize, case.gamma.itemsize)
    parts = case.tiling.step // launch.THREADS // vector
    folding = Counter({("store", vector * case.gamma.itemsize): parts})
    for dtype in (case.grad, case.gamma):
        folding["load", vector * dtype.itemsize] += parts
    assert folding in found


@on_amd
def test_amd_no_register_spills_and_no_irreducible_control_flow(case):
    compilation = compiled(case)
    code = compilation.asm["amdgcn"]
    assert "irr.guard" not in code and "irr.guard" not in compilation.asm["llir"]
    assert re.search(r"\.vgpr_spill_count: *0\b", code) and re.search(r"\.sgpr_spill_count: *0\b", code)
    assert re.search(r"\.private_segment_fixed_size: *0\b", code)


@on_amd
def test_amd_waiting_for_statistics_acquires_in_every_round(case):
    waiting = next(body for body in loops(compiled(case).asm["amdgcn"]) if "buffer_inv sc1" in body)
    # A tensor's second flag, behind the header of two words.
    assert re.search(r"global_(?:atomic_or|atomic_add|load_dword) [^\n]*offset:12 sc", waiting)
    assert not accesses(waiting) - Counter({("load", 4): 1}) and "s_barrier" in waiting


def test_subnormal_values_are_not_flushed():
    for case in NVIDIA:
        flushing = set(re.findall(r"\S+\.ftz\S*", compiled(case).asm["ptx"]))
        assert flushing <= {"cvt.rpi.ftz.f32.f32"}  # the ceiling of 28 |z|, which is 0 or far from subnormal
    for case in AMD:
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", compiled(case).asm["amdgcn"])


def test_misaligned_tensors_are_read_element_by_element():
    ptx = compiled(Case(SM90, torch.float32, torch.float32), aligned=False).asm["ptx"]
    assert not re.search(r"(ld|st)\.global\S*\.v4", ptx)

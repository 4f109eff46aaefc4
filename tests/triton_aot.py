"""Compiles kernels ahead of time, as their launches on a GPU would, and reads the machine code. No GPU is needed."""

import functools
import re
import subprocess
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM90, SM80, GFX942 = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)
THREADS = 256
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@functools.cache
def compiled(kernel, target: GPUTarget, scalars: tuple[tuple[str, str], ...] = (), **constants):
    """`kernel` for `target`: constants by name, the types of `scalars`, and every other argument a table of int64."""
    types = dict(scalars)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*i64") for name in names}
    # What a launch finds out: tables and workspaces are aligned.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if signature[name][0] == "*" and name not in kernel.do_not_specialize}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def nvidia_accesses(compilation) -> Counter:
    """How many loads and stores of global memory of each width, in bytes, the PTX has: Counter({("ld", 16): 2, ...})."""
    accesses = re.findall(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)\s", compilation.asm["ptx"])
    return Counter((op, int(lanes or 1) * int(bits) // 8) for op, lanes, bits in accesses)


def nvidia_resources(compilation, directory: Path) -> dict[str, int]:
    """Registers a thread, and bytes of stack, shared and local memory, of the machine code."""
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compilation.asm["cubin"])
    text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def amd_accesses(compilation) -> Counter:
    text = compilation.asm["amdgcn"]
    accesses = re.findall(r"(?:global|buffer|flat)_(load|store)_(dwordx4|dwordx2|dword|u?short|[us]byte)\b", text)
    widths = {"dwordx4": 16, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "sbyte": 1}
    return Counter(("ld" if op == "load" else "st", widths[kind]) for op, kind in accesses)

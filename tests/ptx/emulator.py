"""Runs a kernel's PTX on the CPU: every thread on its own, and who goes on is drawn at every barrier, shuffle and atomic."""

import ctypes
import functools
import hashlib
import re
import subprocess
import tempfile
from ctypes import c_char_p, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

import triton

from .translate import Kernel, translate

HERE = Path(__file__).parent
_HEADERS = ("instructions.h", "machine.h")
_MACHINE = ("machine.cpp", "memory.cpp", "memory.h")

Region = tuple[int, int, int]  # of memory: first address, the address after the last, bytes of an element


class PTXError(Exception):
    """What went wrong while a kernel ran."""


class _Launch(ctypes.Structure):
    _fields_ = [("kernel", c_void_p), ("params", c_void_p), ("programs", c_uint32), ("threads", c_uint32),
                ("shared", c_uint32), ("resident", c_uint32), ("seed", c_uint64)]


class _Region(ctypes.Structure):
    _fields_ = [("start", c_uint64), ("end", c_uint64), ("cell", c_uint32), ("loaded", c_uint64), ("stored", c_uint64)]


class _Loaded(NamedTuple):
    ptx: list[str]
    kernel: Kernel
    library: ctypes.CDLL


def _compiled(sources: dict[str, str], options: tuple[str, ...]) -> Path:
    """A shared library of these files, built once."""
    texts = {name: (HERE / name).read_text() for name in _HEADERS} | sources
    digest = hashlib.sha256("\0".join([*options, *texts, *texts.values()]).encode()).hexdigest()[:24]
    directory = Path(triton.knobs.cache.dir) / "spg_kernels_emulator"  # beside what Triton made of the same kernels
    library = directory / f"{digest}.so"
    if not library.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            for name, text in texts.items():
                (Path(scratch) / name).write_text(text)
            command = ["g++", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", *options,
                       "-o", "out.so"]
            done = subprocess.run([*command, *(name for name in sources if name.endswith(".cpp"))], cwd=scratch,
                                  capture_output=True, text=True)
            if done.returncode:
                raise NotImplementedError(f"the kernel does not compile:\n{done.stderr[:3000]}")
            (Path(scratch) / "out.so").replace(library)
    return library


@functools.cache
def _machine() -> ctypes.CDLL:
    path = _compiled({name: (HERE / name).read_text() for name in _MACHINE}, ("-O2",))
    machine = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # kernels call back into it
    machine.ptx_run.restype = c_char_p
    machine.ptx_run.argtypes = [ctypes.POINTER(_Launch), ctypes.POINTER(_Region), c_size_t]
    return machine


@functools.cache
def _load(ptx: str) -> _Loaded:
    _machine()
    kernel = translate(ptx)
    library = _compiled({"kernel.cpp": kernel.code}, ("-O0",))  # most kernels run for less time than -O1 takes
    return _Loaded(ptx.splitlines(), kernel, ctypes.CDLL(str(library)))


def _merged(regions: list[Region]) -> list[Region]:
    """Regions that overlap as one, in cells of the smaller size."""
    merged: list[Region] = []
    for start, end, cell in sorted(regions):
        if merged and start < merged[-1][1]:
            first, last, other = merged.pop()
            start, end, cell = first, max(last, end), min(cell, other)
        if end > start:
            merged.append((start, end, cell))
    return merged


def execute(ptx: str, programs: int, parameters: list[int], regions: list[Region], shared: int = 0, resident: int = 16,
            seed: int = 0) -> list[tuple[int, int]]:
    """Run all programs of a launch.

    Args:
        parameters: the bits of each; of those left out, 0.
        regions: the global memory that there is.
        shared: bytes of shared memory that a program has.
        resident: how many programs run at a time.

    Returns:
        Where each run of memory begins, and how many bytes all threads loaded from it and stored to it.

    Raises:
        PTXError: when it reads or writes elsewhere, races or waits for ever.
    """
    loaded = _load(ptx)
    words = (c_uint64 * loaded.kernel.parameters)(*parameters)
    merged = _merged(regions)
    kept = (_Region * len(merged))(*[_Region(*region) for region in merged])
    request = _Launch(ctypes.cast(loaded.library.ptx_kernel, c_void_p), ctypes.addressof(words), programs,
                      loaded.kernel.threads, shared, resident, seed)
    wrong = _machine().ptx_run(request, kept, len(kept)).decode()
    if wrong:
        raise PTXError(_explained(wrong, loaded.ptx))
    return [(region.start, region.loaded + region.stored) for region in kept]


def _explained(wrong: str, ptx: list[str]) -> str:
    """With the instructions of the lines that it mentions."""
    lines = sorted({int(number) for number in re.findall(r"\bline (\d+)", wrong)})
    return wrong + "\n".join(f"{number}: {ptx[number - 1].strip()}" for number in lines)

"""What the numbers were measured on: caches, memory, and the stamp every recorded row carries."""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from spg_kernels import ops
from spg_kernels.backends import library, native

ROOT = Path(__file__).resolve().parent.parent
_CACHES = Path("/sys/devices/system/cpu")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@functools.cache
def cache_bytes(device_type: str) -> int:
    """The last-level cache: L2 of a GPU; of a CPU, all instances of the highest level."""
    if device_type == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    instances = {}
    for cache in _CACHES.glob("cpu[0-9]*/cache/index*"):
        size = (cache / "size").read_text().strip()
        key = (int((cache / "level").read_text()), (cache / "shared_cpu_list").read_text())
        instances[key] = int(size[:-1]) * _UNITS[size[-1]] if size[-1] in _UNITS else int(size)
    if not instances:  # no Linux; more than the caches of most machines without one
        return 64 * 2**20
    last = max(level for level, _ in instances)
    return sum(size for (level, _), size in instances.items() if level == last)


def available_bytes(device_type: str) -> int:
    """Memory that can still be allocated."""
    if device_type == "cuda":
        torch.cuda.empty_cache()  # what torch's allocator kept of the pass before counts as taken otherwise
        return torch.cuda.mem_get_info()[0]
    match = re.search(r"MemAvailable:\s+(\d+)", _read(Path("/proc/meminfo")))
    return int(match[1]) * 1024 if match else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def peak_extra_bytes(device_type: str, call) -> int | None:
    """What `call` holds at its worst beyond what was held before; None where it cannot be told.

    On a CPU the resident set's high-water mark, which Linux lets a process reset: it counts torch, C++ and Python alike.
    Freed heap is given back first, because memory that `call` could reuse would not raise the mark.
    """
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", _read(Path("/proc/self/status")))[1]) * 1024


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _processor() -> str:
    match = re.search(r"model name\s*:\s*(.+)", _read(Path("/proc/cpuinfo")))
    return match[1].strip() if match else platform.processor() or platform.machine()


def _isa() -> str:
    return native.describe().split(",")[0] if native.unavailable() is None else "no native kernels"


def _torch_isa() -> str:
    return torch.backends.cpu.get_cpu_capability().lower()


def unequal_isas() -> str | None:
    """The instruction sets of our CPU kernels and of torch's where one uses AVX that the other does not."""
    ours, torchs = _isa(), _torch_isa()
    if native.unavailable() is not None or ours.removesuffix("vbmi") == torchs or "avx" not in ours + torchs:
        return None
    return f"{ours} in spg_kernels, {torchs} in torch"


def _compiler(device_type: str) -> str:
    """What compiled the kernels: the compiler that signed the shared library, or the CUDA that torch was built with."""
    if device_type == "cuda":
        return f"CUDA {torch.version.cuda}"
    built = library.LIBRARY.read_bytes() if library.LIBRARY.exists() else b""
    signature = re.search(rb"(GCC: \([^)]*\)|clang version) [\d.]+", built)
    return signature[0].decode() if signature else "unknown"


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@functools.cache
def sources_digest(device_type: str) -> str:
    """Of everything that runs on this device. Tells rows of an older commit even in a shallow clone, where git cannot."""
    package = [path for path in (ROOT / "spg_kernels").rglob("*.py")
               if path.name != "native.py" and "triton" not in path.parts[-2:]]
    if device_type == "cpu":
        own = [ROOT / "spg_kernels/backends/native.py", *(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc").glob("*.h")]
    else:
        own = [*(ROOT / "spg_kernels/backends/triton").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(package + own):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def why_no_kernels(device_type: str) -> str | None:
    """What the kernels for this device lack here: "auto" would fall back to the reference, under the device's name."""
    return ops.why_unavailable("triton" if device_type == "cuda" else "native")


def library_is_stale() -> bool:
    """Whether csrc/ was changed after the shared library was built: its timings would carry the wrong stamp."""
    return library.LIBRARY.exists() and any(path.stat().st_mtime > library.LIBRARY.stat().st_mtime
                                            for path in (ROOT / "csrc").iterdir())


def device_name(device_type: str) -> str:
    """The name of the results file."""
    parts = [_processor(), f"{torch.get_num_threads()} threads", _isa()]
    if device_type == "cuda":
        parts = [torch.cuda.get_device_name()]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def stamp(device_type: str) -> dict[str, str]:
    """Machine, versions, commit and date of a measurement."""
    changed = "+changes" if _git("status", "--porcelain", "spg_kernels", "csrc") else ""
    if device_type == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{_processor()}, {os.cpu_count()} cores, {cache_bytes('cpu') // 2**20} MiB last-level cache"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "device": device_type, "machine": machine, "isa": _isa() if device_type == "cpu" else "",
        "threads": str(torch.get_num_threads()), "triton": triton, "compiler": _compiler(device_type),
        "torch": torch.__version__ + (f" ({_torch_isa()})" if device_type == "cpu" else ""),
        "commit": (_git("rev-parse", "--short", "HEAD") or "unknown") + changed, "sources": sources_digest(device_type),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }

"""csrc/ under the sanitizers, over random inputs of the fuzz target in sanitize/. Longer: `SPG_FUZZ_INPUTS=100000`.

AddressSanitizer and UndefinedBehaviorSanitizer run the library as it is; ThreadSanitizer runs the same compiled parallel
regions over sanitize/openmp_over_threads.cpp, because it cannot follow libgomp.
"""

import os
import subprocess
from pathlib import Path

import pytest

from spg_kernels.backends.library import CAPS

ROOT = Path(__file__).parent.parent
SANITIZE = ROOT / "tests" / "sanitize"
FLAGS = ["-std=c++17", "-O1", "-g", "-fopenmp", "-ffp-contract=off", "-DSPG_STANDALONE", f"-I{ROOT / 'csrc'}"]
ADDRESS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread"]
INPUTS = int(os.environ.get("SPG_FUZZ_INPUTS", "1000"))


def build(folder: Path, flags: list[str], sources: list[Path], libraries: list[str]) -> Path:
    """A program of `sources` and csrc/. Skips where GCC is missing or makes no programs that run with these flags."""
    probe = folder / "probe"
    probe.with_suffix(".cpp").write_text("int main() {}")
    works = f"g++ {' '.join(flags)} {probe}.cpp -o {probe} && {probe}"
    if subprocess.run(works, shell=True, capture_output=True, check=False).returncode:
        pytest.skip(f"no g++ here that makes programs that run with {' '.join(flags)}")
    sources = [*sorted((ROOT / "csrc").glob("*.cpp")), *sources]
    objects = [folder / f"{source.stem}.o" for source in sources]
    jobs = [subprocess.Popen(["g++", *FLAGS, *flags, "-c", source, "-o", target]) for source, target in zip(sources, objects)]
    statuses = [job.wait() for job in jobs]
    assert not any(statuses)
    program = folder / "fuzz"
    subprocess.run(["g++", *flags, *objects, "-o", program, *libraries], check=True)
    return program


def run(program: Path, capability: str, seed: int) -> None:
    result = subprocess.run([program, str(seed), str(INPUTS)], env={**os.environ, "SPG_CPU_CAPABILITY": capability},
                            capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.startswith(f"{INPUTS} inputs"), result.stderr


def test_no_byte_is_touched_outside_and_nothing_is_undefined(tmp_path):
    program = build(tmp_path, ADDRESS, [SANITIZE / "fuzz_c_interface.cpp"], ["-fopenmp"])
    for seed, capability in enumerate(CAPS):
        run(program, capability, seed)


def test_threads_do_not_race(tmp_path):
    program = build(tmp_path, THREAD, [SANITIZE / "fuzz_c_interface.cpp", SANITIZE / "openmp_over_threads.cpp"], ["-lpthread"])
    run(program, CAPS[0], seed=4)

"""The wheel, by way of the source distribution: one for every Python and torch, and still whole without a compiler."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, built from a copy of the sources."""
    directory = tmp_path_factory.mktemp("sdist")
    sources = directory / "sources"
    sources.mkdir()
    names = ("spg_kernels", "csrc", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
    subprocess.run(["cp", "-r", *(ROOT / name for name in names), sources], check=True)
    build = f"import setuptools.build_meta as backend; backend.build_sdist({str(directory)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=sources, check=True, capture_output=True)
    return next(directory.glob("*.tar.gz"))


def build_wheel(sdist: Path, directory: Path, **environment: str) -> tuple[Path | None, str]:
    """The wheel built from the source distribution, and what the build printed."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", directory, sdist]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    return (wheels[0] if wheels else None), result.stdout + result.stderr


def test_a_source_distribution_is_the_sources_alone(sdist):
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"csrc/dispatch.cpp", "csrc/dispatch.h", "LICENSE", "spg_kernels/py.typed"} <= set(names)
    assert not any(name.startswith("tests") or name.endswith(".so") for name in names), (
        "tests without their helpers, or a build")


def test_one_wheel_serves_every_python_and_torch(sdist, tmp_path):
    wheel, output = build_wheel(sdist, tmp_path, SPG_REQUIRE_NATIVE="1")
    assert wheel, output
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "spg_kernels/backends/libspg_kernels.so" in names and "spg_kernels/backends/triton/__init__.py" in names
    assert "spg_kernels/py.typed" in names, "or type checkers look past every annotation"
    assert any(name.endswith("LICENSE") for name in names) and not any(name.startswith("tests") for name in names)
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "installed"], check=True)
    library = tmp_path / "installed/spg_kernels/backends/libspg_kernels.so"
    linked = subprocess.run(["ldd", library], capture_output=True, text=True).stdout
    assert "libstdc++" in linked and "torch" not in linked and "libpython" not in linked
    assert b"_GLOBAL__sub_I" not in library.read_bytes(), (
        "nothing is to run at load time: GCC 12 on aarch64 left a table empty")


def test_without_a_compiler_the_install_succeeds_with_one_warning_and_the_reference_serves(sdist, tmp_path):
    wheel, output = build_wheel(sdist, tmp_path, CC="false", CXX="false", SPG_REQUIRE_NATIVE="")
    assert wheel, output
    assert output.count("csrc/ did not compile") == 1, output
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "installed"], check=True)
    check = ("import torch, spg_kernels; from spg_kernels import ops; print(ops.resolve('auto', 'cpu').__name__, "
             "spg_kernels.importance(torch.randn(9)).shape, ops.why_unavailable('native'))")
    result = subprocess.run([sys.executable, "-c", check], env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
                            capture_output=True, text=True, cwd=tmp_path)
    assert "spg_kernels.reference torch.Size([9])" in result.stdout, result.stderr
    assert f"was not built in {tmp_path}/installed/" in result.stdout, "who has it installed elsewhere must see which is meant"


def test_a_compiler_that_fails_is_an_error_where_native_is_required(sdist, tmp_path):
    wheel, output = build_wheel(sdist, tmp_path, CC="false", CXX="false", SPG_REQUIRE_NATIVE="1")
    assert wheel is None and "error" in output


@pytest.mark.parametrize("package", ["triton", "matplotlib", "sklearn"])
def test_importing_the_package_imports_no_extra(package):
    check = f"import sys, spg_kernels; assert {package!r} not in sys.modules; print('fine')"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT).stdout == "fine\n"


def test_setup_is_short_and_csrc_knows_neither_torch_nor_python():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 80
    for file in (ROOT / "csrc").iterdir():
        text = file.read_text()
        assert "torch/" not in text and "ATen" not in text and "Python.h" not in text, file

"""Triton's kernels in its interpreter, in processes of their own: it reads TRITON_INTERPRET when kernels are defined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spg_kernels.backends import triton as backend


@pytest.mark.parametrize("file", ["triton_interpreted.py", "triton_importance_interpreted.py",
                                  "test_properties_operators.py"])
def test_every_kernel_in_the_interpreter(file):
    pytest.importorskip("triton", reason="triton is not installed")
    if reason := backend.interpreter_unavailable():
        pytest.skip(reason)
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", f"tests/{file}"],
                          cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-5000:]}"
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("triton, numpy, runs", [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False),
                                                 ("3.6.0", "2.10.0", False), ("3.7.0", "2.4.6", True),
                                                 ("3.10.0+rocm", "2.4.6", True)])
def test_an_interpreter_that_numpy_has_left_behind_is_not_started(monkeypatch, triton, numpy, runs):
    monkeypatch.setattr(pytest.importorskip("triton", reason="triton is not installed"), "__version__", triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    reason = backend.interpreter_unavailable()
    assert (reason is None) == runs
    assert runs or (triton in reason and numpy in reason)

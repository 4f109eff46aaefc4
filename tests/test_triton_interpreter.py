"""Triton's kernels in its interpreter, in processes of their own: it reads TRITON_INTERPRET when kernels are defined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("file", ["triton_interpreted.py", "triton_importance_interpreted.py",
                                  "test_properties_operators.py"])
def test_every_kernel_in_the_interpreter(file):
    pytest.importorskip("triton", reason="triton is not installed")
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}"],
                          cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-5000:]}"
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]

"""Runs `triton_importance_interpreted.py` in a process of its own: Triton reads TRITON_INTERPRET when kernels are defined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_accumulate_importance_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_importance_interpreted.py"]
    done = subprocess.run(command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-5000:]}"
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]

"""`python -m spg_kernels`: what runs here, and why not what does not."""

import os
import subprocess
import sys

import spg_kernels
from spg_kernels import __main__


def started(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "spg_kernels"]
    environment = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def run(**environment: str) -> str:
    return started(**environment).stdout


def row(output: str, backend: str) -> str:
    return next(line for line in output.splitlines() if backend in line)


def test_every_backend_is_named_with_whether_it_runs_and_why_not():
    output = run()
    assert spg_kernels.__version__ in output
    assert " yes " in row(output, "native") and "threads" in row(output, "native")
    assert " yes " in row(output, "reference") and "any device with float64" in row(output, "reference")
    reason = spg_kernels.ops.why_unavailable("triton")
    assert ((" no " in row(output, "triton") and reason[:30] in row(output, "triton")) if reason
            else " yes " in row(output, "triton"))


def test_the_instruction_set_can_be_capped():
    capped = started(SPG_CPU_CAPABILITY="baseline")
    assert "baseline" in row(capped.stdout, "native") and not capped.stderr


def test_a_cap_that_does_not_exist_is_warned_of():
    """torch's own name for its baseline is "default"."""
    assert ("SPG_CPU_CAPABILITY: expected one of avx512vbmi, avx512, avx2, baseline, got 'default'"
            in started(SPG_CPU_CAPABILITY="default").stderr)


def test_a_path_longer_than_a_line_is_folded_not_cut(monkeypatch, capsys):
    monkeypatch.setattr(spg_kernels.ops, "why_unavailable", lambda name: f"it is not in {'/directory' * 20}")
    monkeypatch.setenv("COLUMNS", "80")
    __main__.main()
    output = capsys.readouterr().out
    assert "directory" in output and "…" not in output

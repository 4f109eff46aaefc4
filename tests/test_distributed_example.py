"""`examples/parallel.py` under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "parallel.py"


def printed(launcher: tuple[str, ...], parallel: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, EXAMPLE, "--epochs", "1", "--parallel", parallel]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def one_process():
    return printed((), "none")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_print_the_table_of_one(one_process, parallel):
    assert "SPG AdamW" in one_process
    assert printed(("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), parallel) == one_process

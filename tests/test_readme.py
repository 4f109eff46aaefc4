"""The README's code runs as it stands there, block after block, given what its text says is given."""

import re
from pathlib import Path

import torch

from .models import Net, tasks

BLOCKS = re.findall(r"^```python\n(.*?)^```$", (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8"),
                    re.M | re.S)


def test_the_first_block_needs_a_model_and_tasks_and_protects():
    given = {"model": Net(), "tasks": [(batches, batches) for batches in tasks()]}
    exec(BLOCKS[0], given)
    opt = given["opt"]
    assert opt.importance.tasks == 3 and 0 < float(opt.importance.mean()) < 1


def test_every_block_runs_after_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"model": Net(), "tasks": [(batches, batches) for batches in tasks()]}
    torch.save(torch.optim.AdamW(given["model"].parameters()).state_dict(), "plain.pt")
    for block in BLOCKS:
        exec(block, given)
    assert {"checkpoint.pt", "importance.safetensors"} <= {path.name for path in tmp_path.iterdir()}

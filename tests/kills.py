"""A process killed (SIGKILL) at random moments: what is on the disk is always the whole previous or the whole next state.

    python -m tests.kills save --kills 200        Importance.save in a loop
    python -m tests.kills training --kills 200    steps, measuring, Importance.save, and the README's checkpoint, resumed
                                                  after every kill: all the bits of a run that nobody killed

The process forks its victims, so it uses neither OpenMP threads nor autograd itself. A victim is a generator of the phases
it enters, which it says through a pipe, a byte each.
"""

import argparse
import collections
import itertools
import json
import os
import random
import signal
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from spg_kernels import Importance, SPGOptimizer, cross_head_losses

from .models import Net, tasks

PHASES = ("step", "measure_importance", "save", "checkpoint", "done")
SAVED = [("weight", torch.nn.Parameter(torch.zeros(512, 512))), ("bias", torch.nn.Parameter(torch.zeros(512)))]


def gammas(k: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(k)
    return {name: torch.rand(parameter.shape, generator=generator) for name, parameter in SAVED}


def save(directory: Path) -> Iterator[str]:
    path = directory / "importance"
    for k in itertools.count(Importance.load(path).tasks + 1 if path.exists() else 1):
        importance = Importance(SAVED)
        importance.load_state_dict({"version": 1, "tasks": k, "gammas": gammas(k)})
        yield "save"
        importance.save(path)
        yield "done"


def saved(directory: Path) -> tuple[int, int]:
    """How many saves the disk has seen, and whether it has the last one's bits."""
    if not (directory / "importance").exists():
        return 0, True
    importance = Importance.load(directory / "importance")
    return importance.tasks, all(torch.equal(importance[n], gamma) for n, gamma in gammas(importance.tasks).items())


def checkpoint(state: dict, path: Path) -> None:
    with open(f"{path}.new", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


def resume(directory: Path) -> tuple[Net, SPGOptimizer, int]:
    """The run as the disk has it: model, optimizer, finished rounds."""
    torch.manual_seed(0)
    net = Net(hidden=128)
    optimizer = SPGOptimizer(torch.optim.AdamW(net.parameters(), lr=0.01), heads=net.heads)
    if not (directory / "checkpoint").exists():
        return net, optimizer, 0
    state = torch.load(directory / "checkpoint", weights_only=True)
    net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return net, optimizer, state["round"]


def training(directory: Path) -> Iterator[str]:
    net, optimizer, before = resume(directory)
    stream = tasks()
    for k in itertools.count(before + 1):
        batches = stream[k % 3]
        yield "step"
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x, k % 3), y).backward()
            optimizer.step()
        yield "measure_importance"
        optimizer.measure_importance(batches, cross_head_losses(net, k % 3, F.cross_entropy), progress=False)
        optimizer.importance.tasks = k
        yield "save"
        optimizer.importance.save(directory / "importance")
        yield "checkpoint"
        checkpoint({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "round": k}, directory / "checkpoint")
        yield "done"


def trained(directory: Path) -> tuple[int, int]:
    """How many rounds the disk has seen, and a digest of parameters, moments and gammas."""
    net, optimizer, rounds = resume(directory)
    state = optimizer.state_dict()["state"]
    digest = 0
    for tensor in [*net.parameters(), *(state[i][key] for i in sorted(state) for key in sorted(state[i]))]:
        digest = zlib.crc32(tensor.detach().contiguous().numpy(), digest)
    if (directory / "importance").exists():
        importance = Importance.load(directory / "importance")
        assert importance.tasks in (rounds, rounds + 1), f"importance of round {importance.tasks}, checkpoint of {rounds}"
        if importance.tasks == rounds:
            assert all(torch.equal(importance[name], optimizer.importance[name]) for name in importance)
    return rounds, digest


def fork(victim: Callable[[int], None]) -> tuple[int, int]:
    """Run `victim` on the writing end of a pipe in a forked process: its id, and the reading end."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(reading)
            victim(writing)
        finally:
            os._exit(0)
    os.close(writing)
    return process, reading


def say_phases(phases: Iterator[str], pipe: int) -> None:
    for phase in phases:
        os.write(pipe, bytes([PHASES.index(phase)]))


def everything(pipe: int) -> bytes:
    with open(pipe, "rb") as file:
        return file.read()


def first_round(work: Callable) -> float:
    """The seconds that a victim takes from its first phase to "done"."""
    with tempfile.TemporaryDirectory() as scratch:
        phases = work(Path(scratch))
        next(phases)
        started = time.perf_counter()
        while next(phases) != "done":
            pass
        return time.perf_counter() - started


def undisturbed(rounds: int) -> list[int]:
    """The digests after 0, 1, ... rounds of a run that nobody kills."""
    with tempfile.TemporaryDirectory() as scratch:
        dones = (phase for phase in training(Path(scratch)) if phase == "done")
        return [trained(Path(scratch))[1], *(trained(Path(scratch))[1] for _ in itertools.islice(dones, rounds))]


def in_child(function: Callable):
    process, pipe = fork(lambda writing: os.write(writing, json.dumps(function()).encode()))
    answer = everything(pipe)
    os.waitpid(process, 0)
    return json.loads(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("save", "training"))
    parser.add_argument("--kills", type=int, default=200)
    arguments = parser.parse_args()
    work, on_disk = {"save": (save, saved), "training": (training, trained)}[arguments.work]
    torch.set_num_threads(1)
    on_disk(Path("nowhere"))  # what torch imports for an optimizer, every victim would import
    duration = statistics.median(in_child(lambda: first_round(work)) for _ in range(5))
    killed_in, seen, left_behind = collections.Counter(), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        directory, before = Path(scratch), 0
        for _ in range(arguments.kills):
            process, pipe = fork(lambda writing: say_phases(work(directory), writing))
            first = os.read(pipe, 1)
            time.sleep(random.uniform(0, 2 * duration))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            phases = [PHASES[byte] for byte in first + everything(pipe)]
            killed_in[phases[-1]] += 1
            after, bits = on_disk(directory)
            returned = before + phases.count("done")
            assert returned <= after <= returned + 1, f"{after} on the disk, {returned} had returned"
            seen.append((after, bits))
            before = after
            for path in directory.iterdir():
                if path.name not in ("importance", "checkpoint"):
                    assert path.name == "checkpoint.new" or path.match(".importance.*.tmp"), path
                    path.unlink()
                    left_behind += 1
    if work is training:
        expected = in_child(lambda: undisturbed(before))
        assert all(bits == expected[rounds] for rounds, bits in seen), "not the bits of a run that nobody killed"
    else:
        assert all(bits for _, bits in seen), "not the bits that were saved"
    print(f"{arguments.kills} kills survived in {before} rounds of {1e3 * duration:.1f} ms, in " +
          ", ".join(f"{phase} {count}" for phase, count in killed_in.most_common()) + f"; {left_behind} unfinished files")


if __name__ == "__main__":
    main()

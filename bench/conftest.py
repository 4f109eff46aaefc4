"""Options, devices and the summary of `pytest bench/`."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from . import machine, peers, results, sets, targets
from .tables import terminal_tables
from .timing import measure

_ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--full", action="store_true", help="all parameter sets, eight times as long")
    group.addoption("--record", nargs="?", const=results.FOLDER, type=Path, metavar="FOLDER",
                    help="write the rows to FOLDER/<device>.csv, by default bench/results")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                    help="cpu or cuda; default: cuda if there is one")


def pytest_configure(config):
    config.stash[_ROWS] = []
    # pytest-benchmark's table would give the time of a round, the sum over all contenders.
    config.option.benchmark_quiet = True
    if config.getoption("--record") and (missing := machine.why_no_kernels(config.getoption("--device"))):
        raise pytest.UsageError(f"--record: plain PyTorch would be timed in the kernels' place: {missing}")
    if config.getoption("--record") and machine.library_is_stale():
        raise pytest.UsageError("--record: csrc/ is newer than the shared library; build it first: "
                                "python setup.py build_ext --inplace")
    unequal = machine.unequal_isas()
    if unequal and config.getoption("--record") and config.getoption("--device") == "cpu":
        raise pytest.UsageError(f"--record: {unequal}; cap both, as in SPG_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2")


def pytest_report_header(config):
    device = config.getoption("--device")
    header = f"bench: {machine.device_name(device)}, {machine.cache_bytes(device) / 2**20:.0f} MiB last-level cache"
    unequal = machine.unequal_isas()
    return f"{header}; {unequal}" if unequal and device == "cpu" else header


def pytest_generate_tests(metafunc):
    if "parameter_set" in metafunc.fixturenames:
        names = list(sets.SETS) if metafunc.config.getoption("--full") else sets.SMALL
        metafunc.parametrize("parameter_set", [sets.SETS[name] for name in names], ids=lambda s: s.name)


@pytest.fixture(scope="session")
def device(request):
    name = request.config.getoption("--device")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


@pytest.fixture
def without(device):
    """The names of contenders that do not run here."""
    return {"compile"} if peers.why_not_compiled(device) else set()


@pytest.fixture
def timed(benchmark, device, request):
    """measure() with this session's device, seconds and record."""
    def run(contenders, pass_name, set_name, parameters, tensors, cold):
        if benchmark.disabled:
            pytest.skip("checked, not timed: benchmarks are disabled")
        seconds = 8 if request.config.getoption("--full") else 1
        rows = measure(benchmark, contenders, device, seconds, pass_name, set_name, parameters, tensors, cold)
        benchmark.extra_info["rows"] = [vars(row) for row in rows]
        request.config.stash[_ROWS] += rows
        if request.config.getoption("--record"):
            results.record(rows, device.type, request.config.getoption("--record"))
        return rows

    return run


def pytest_terminal_summary(terminalreporter, config):
    rows = [vars(row) for row in config.stash[_ROWS]]
    if not rows:
        return
    console = Console(file=terminalreporter._tw._file, width=150)
    for table in terminal_tables(rows):
        console.print(table)
    if missing := peers.why_not_compiled(torch.device(config.getoption("--device"))):
        console.print(f"torch.compile does not run here: {missing}")
    console.print(targets.rich_table(targets.verdicts(rows, config.getoption("--device"))))

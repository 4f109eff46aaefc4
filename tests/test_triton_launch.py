"""Every launch as on a GPU, up to the CUDA driver: argument binding, specialization, compilation, what the launcher is given.

The interpreter and ahead-of-time compilation both go around Triton's own launch code. Here the driver alone is a stand-in,
for an H100, and the tensors are on the CPU because nothing reads them.
"""

import os
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

import spg_kernels
from spg_kernels import ops
from spg_kernels.backends.tensors import addresses_of
from spg_kernels.backends.triton import elementwise, launch, plans

from .triton_aot import SM90
from .triton_cases import CASES, fold, inputs

_NO_DEVICE = 1 << 20  # Triton keeps what it compiled for each device: none that exists is to get kernels without code


class Driver:
    """Triton's driver with nothing behind it. `launched` has the kernel's name, its grid and its arguments, each time."""

    launched: list[tuple] = []  # of all drivers: Triton keeps a kernel with the launcher that it was compiled under

    def __init__(self):
        self.launched.clear()
        self.utils = SimpleNamespace(load_binary=lambda *_: (0, 0, 32, 0, 1024), unload_module=lambda *_: None,
                                     get_device_properties=lambda _: {"max_shared_mem": 232448})

    def launcher_cls(self, source, metadata):
        def launch(*arguments):
            self.launched.append((source.fn.__name__, arguments[:3], arguments[9:]))
        return launch

    def get_current_device(self):
        return _NO_DEVICE

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return SM90


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(plans.PLANS, "device_type", "cpu")
    monkeypatch.setattr(ops.backend_module("triton"), "unavailable", lambda: None)
    ops.resolve.cache_clear()
    yield driver
    ops.resolve.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled since it was last cleared."""
    compiled: list = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **what: compiled.append(what["repr"]) and False)
    return compiled


@pytest.mark.parametrize("op, settings", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_call_is_one_launch_and_other_values_compile_nothing(op, settings, driver, compiled):
    lists = inputs(op, torch.float32, torch.float32, "8-bit", [(1000 * i + 16,) for i in range(1, 40)])
    run = getattr(spg_kernels, op)
    run(*lists, **settings, backend="triton")
    ((name, grid, arguments),) = driver.launched
    assert name == f"{op}kernel" and grid == (3, 1, 1)
    assert all(argument.dtype in (torch.int64, torch.float32) for argument in arguments if isinstance(argument, torch.Tensor))
    compiled.clear()
    for count, lr, decay in ((39, 1, 0), (1, 1e-3, 1), (16, 0.0, 0.5), (3, 16, 16)):
        part = tuple(tensors[:count] for tensors in lists)
        if "lr" in settings:
            # A learning rate on the device is read there, wherever it lies.
            lr = torch.tensor([0.0, lr])[count % 2] if isinstance(settings["lr"], torch.Tensor) else lr
            settings = {**settings, "lr": lr, "weight_decay": decay}
        run(*part, **settings, backend="triton")
    assert len(driver.launched) == 5 and not compiled


@pytest.mark.parametrize("op, settings", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_launch_kept_ready_has_the_arguments_of_one_that_triton_looks_at(op, settings, driver):
    """Also right after a call of another kind, with tensors where there were numbers and none where there were some."""
    lists = inputs(op, torch.float32, torch.float32, "8-bit", [(1000 * i + 16,) for i in range(1, 40)])
    others = {"lr": torch.tensor(0.5), "grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0), "mask": "gradient"}
    kinds = [settings, {**settings, **others}] if "lr" in settings else [settings]
    run = getattr(spg_kernels, op)
    for count in range(3):
        for kind in kinds:
            if op == "masked_adamw_":
                torch._foreach_zero_(lists[6])
            run(*lists, **kind, backend="triton")
    first, ready = driver.launched[:len(kinds)], driver.launched[2 * len(kinds):]
    for (name, grid, arguments), (ready_name, ready_grid, ready_arguments) in zip(first, ready, strict=True):
        assert (name, grid) == (ready_name, ready_grid) and len(arguments) == len(ready_arguments)
        assert any(isinstance(argument, torch.Tensor) for argument in arguments[:2])
        assert all(isinstance(argument, int) for argument in ready_arguments[:2]), "addresses of tables"
        for ours, expected in zip(ready_arguments, arguments):
            assert ours is expected or ours == (expected.data_ptr() if isinstance(expected, torch.Tensor) else expected)


def test_tables_of_launches_kept_ready_stay_among_the_last_used(driver):
    """Where the capture of a CUDA graph looks for them, which copies no large table itself."""
    lists = inputs("soft_mask_", torch.float32, torch.float32, "8-bit", [(100,), (2000,)])
    place = launch.here(torch.device("cpu"))
    for i in range(40 * launch.READY_USES):
        spg_kernels.soft_mask_(*lists, backend="triton")
        launch.table(place, (i, -5))
    monitored = [key for key in launch._tables[place.device] if key[:1] == ("chunks",) and key[2] == (100, 2000)]
    assert len(monitored) == 1


def test_a_launch_that_is_compiled_in_the_background_is_not_kept(driver, monkeypatch):
    lists = inputs("soft_mask_", torch.float32, torch.float32, "8-bit", [(100,), (2000,)])

    class Future:
        def __getitem__(self, grid):
            return lambda *arguments, **options: object()

    monkeypatch.setattr(elementwise, "soft_mask_kernel", Future())
    for _ in range(3):
        spg_kernels.soft_mask_(*lists, backend="triton")
    (piece,) = plans.PLANS.known("soft_mask_", lists)[0].launch.pieces(addresses_of(lists))
    assert not piece.ready


def test_importance_is_one_launch_and_other_tensors_compile_nothing(driver, compiled):
    grads = [torch.randn(n) for n in (300, 9000, 1, 0, 20000)]
    fold([torch.zeros_like(grad) for grad in grads], grads)
    ((name, grid, _),) = driver.launched
    assert name == "accumulate_importance_kernel" and grid == (3, 1, 1)
    compiled.clear()
    for part in (grads[:1], grads[3:4], 16 * grads, [torch.randn(16385)]):
        fold([torch.zeros_like(grad) for grad in part], part)
    assert len(driver.launched) == 5 and not compiled

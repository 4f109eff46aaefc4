import pytest

from spg_kernels import ops


def pytest_generate_tests(metafunc):
    if "driver" in metafunc.fixturenames:
        from .cases import ARCHITECTURES

        metafunc.parametrize("driver", ARCHITECTURES, ids=lambda arch: f"sm_{arch}", indirect=True)


@pytest.fixture
def driver(request, monkeypatch):
    """Makes CPU tensors run through the Triton backend, for this kind of GPU, and the emulator."""
    import triton  # in here: without it the tests are skipped

    from spg_kernels.backends.triton import plans

    from .driver import DRIVERS, Watched

    driver = DRIVERS[request.param]
    driver.reset()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(plans.PLANS, "device_type", "cpu")
    monkeypatch.setattr(plans.PLANS, "build", Watched)
    monkeypatch.setattr(plans.PLANS, "_plans", {})
    monkeypatch.setattr(ops.backend_module("triton"), "unavailable", lambda: None)
    ops.resolve.cache_clear()
    triton.knobs.runtime.kernel_load_start_hook.add(driver.about_to_load)
    yield driver
    triton.knobs.runtime.kernel_load_start_hook.remove(driver.about_to_load)
    ops.resolve.cache_clear()


@pytest.fixture
def backend(driver):
    """For tests that every backend is held to."""
    return "triton"

"""Accelerate: prepare, backward, clipping, bf16, save_state and load_state."""

import pytest

accelerate = pytest.importorskip("accelerate")

from . import training

pytestmark = [pytest.mark.dropin(line=20), pytest.mark.filterwarnings("ignore"),
              pytest.mark.parametrize("inner", training.INNERS)]


@pytest.fixture(autouse=True)
def _a_process_of_its_own():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def run(net, optimizer, epochs, precision="no", clip=None, state=None, accumulate=1):
    accumulation = accelerate.utils.GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_plugin=accumulation)
    scheduler = training.schedule(optimizer)
    net, outer, loader, scheduler = accelerator.prepare(net, optimizer, training.loader(), scheduler)
    if state is not None:
        accelerator.load_state(state)
    for _ in range(epochs):
        for batch in loader:
            for _ in range(accumulate):
                with accelerator.accumulate(net), accelerator.autocast():
                    accelerator.backward(training.loss_of(net, batch))
                    if clip is not None and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(net.parameters(), clip)
                    outer.step()
                    scheduler.step()
                    outer.zero_grad()
    return accelerator


@pytest.mark.compatibility("Accelerate: schedule, clipping, bf16, gradient accumulation", "accelerate", "works")
@pytest.mark.parametrize("precision, clip, accumulate", [("no", None, 1), ("bf16", 0.1, 1), ("no", 0.1, 2)])
def test_a_run(inner, precision, clip, accumulate):
    net = training.network()
    optimizer = training.wrapped(net, inner, 0.5)
    run(net, optimizer, 2, precision, clip, accumulate=accumulate)
    training.check(net, optimizer, training.plain_run(inner, 0.5, bf16=precision == "bf16", clip=clip))
    frozen = training.network()
    run(frozen, training.wrapped(frozen, inner, 1.0), 2, precision, clip, accumulate=accumulate)
    training.check_frozen(frozen)


@pytest.mark.compatibility("Accelerate, save_state and load_state", "accelerate", "works",
                           "the importance is in the checkpoint")
def test_a_resumed_run(inner, tmp_path):
    net = training.network()
    run(net, training.wrapped(net, inner, 0.5), 1).save_state(tmp_path)
    net = training.network()
    optimizer = training.wrapped(net, inner, None)
    run(net, optimizer, 1, state=tmp_path)
    training.check(net, optimizer, training.plain_run(inner, 0.5))

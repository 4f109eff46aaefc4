"""A GradScaler around masked steps on a GPU: its values are read there, by graphs too, and the host waits for none of them."""

import copy

import pytest
import torch

import spg_kernels

from .test_grad_scaler import Classical
from .test_triton_gpu import Net, launch, on_gpu, protected, pytestmark, run, triton  # noqa: F401  (its marks are ours)
from .triton_cases import copies, equal, inputs

FUSED = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "SGD plain": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True, capturable=True),
}


def give_gradients(net, scaler, seed: int, bad: bool) -> None:
    """Of float32 numbers times the scale, as a backward pass of the scaled loss leaves them."""
    generator = torch.Generator().manual_seed(seed)
    scale = scaler.scale(torch.ones((), device="cuda"))
    for p in net.parameters():
        grad = torch.randn(p.shape, generator=generator).to("cuda") * scale
        p.grad = grad if p.grad is None else p.grad.copy_(grad)  # where the last one was
    if bad:
        net.trunk[0].weight.grad[1, 2] = float("inf")


@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.filterwarnings("ignore:mask='gradient'")
def test_a_scaled_step_has_the_bits_of_the_classical_path(name, mask, caplog):
    torch.manual_seed(0)
    net = Net().cuda()
    twin = copy.deepcopy(net)
    ours, theirs = (protected(model, FUSED[name], mask=mask, backend="triton") for model in (net, twin))
    theirs.__class__ = Classical
    assert ours._step_supports_amp_scaling
    scalers = [torch.amp.GradScaler("cuda", init_scale=3000.7, growth_interval=2, backoff_factor=0.3) for _ in range(2)]
    with caplog.at_level("DEBUG", "spg_kernels"):
        for i in range(8):
            for model, optimizer, scaler in ((net, ours, scalers[0]), (twin, theirs, scalers[1])):
                give_gradients(model, scaler, i, bad=i in (0, 3))
                grads = [p.grad.clone() for p in model.parameters()]
                scaler.step(optimizer)
                scaler.update()
                if optimizer is ours:
                    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads))
            assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters()))
            assert scalers[0].get_scale() == scalers[1].get_scale()
    assert "generic" not in caplog.text and "reference" not in caplog.text
    for p, q in zip(net.parameters(), twin.parameters()):
        for key, value in theirs.inner.state[q].items():
            assert torch.equal(ours.inner.state[p][key], value), key


@pytest.mark.parametrize("name", FUSED)
def test_scaled_and_skipped_steps_neither_synchronize_nor_copy(name, monkeypatch):
    net = Net().cuda()
    optimizer = protected(net, FUSED[name], backend="triton")
    scaler = torch.amp.GradScaler("cuda")
    for i in range(5):
        give_gradients(net, scaler, i, bad=i > 2)
        if i > 1:
            monkeypatch.setattr(launch, "_upload", lambda *_: pytest.fail("a table was copied to the device"))
            torch.cuda.set_sync_debug_mode("error")
        try:
            scaler.step(optimizer)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert scaler.get_scale() == 65536.0 / 4


def test_a_captured_step_follows_the_scalers_values():
    torch.manual_seed(0)
    net = Net().cuda()
    twin = copy.deepcopy(net)
    ours = protected(net, FUSED["AdamW"], backend="triton")
    theirs = protected(twin, FUSED["AdamW"], backend="reference")
    scale, found = torch.tensor(1024.0, device="cuda"), torch.tensor(0.0, device="cuda")
    for p in net.parameters():
        p.grad = torch.zeros_like(p)

    def step():
        ours.grad_scale, ours.found_inf = scale, found
        ours.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found.fill_(1.0)
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters()))
    for i, (value, skips) in enumerate([(1024.0, 0.0), (3000.7, 0.0), (3000.7, 1.0), (2.0, 2.0), (2.0, 0.0)]):
        scale.fill_(value), found.fill_(skips)
        for p, q in zip(net.parameters(), twin.parameters()):
            q.grad = torch.randn_like(p)
            p.grad.copy_(q.grad * value)
        graph.replay()
        if not skips:
            theirs.step()
        assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-5) for p, q in zip(net.parameters(), twin.parameters())), i
    assert all(ours.inner.state[p]["step"].item() == 3 for p in net.parameters())


@pytest.mark.parametrize("op", ["masked_sgd_", "masked_adamw_"])
def test_no_value_and_no_address_of_it_compiles_anew(op, monkeypatch):
    lists = on_gpu(inputs(op, torch.float32, torch.float32, "8-bit", [(1000,), (16,)]), steps_too=True)
    values = torch.tensor([1024.0, 0.0, 3000.7, 1.0], device="cuda")
    run(op, lists, dict(lr=0.1, grad_scale=values[0], found_inf=values[1]))
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **what: compiled.append(what) and False)
    run(op, lists, dict(lr=0.1, grad_scale=values[2], found_inf=values[3]))
    run(op, lists, dict(lr=0.1, grad_scale=values[2].clone(), found_inf=values[3].clone()))
    assert not compiled


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_step_counts_on_the_host_advance_with_the_step(found):
    """At the price of waiting for the device: no optimizer with such counts tells a scaler that it needs none."""
    lists = on_gpu(inputs("masked_adamw_", torch.float32, torch.float32, "float32", [(1000,), (16,)]))
    before = copies(lists)
    run("masked_adamw_", lists, dict(lr=0.1, found_inf=torch.tensor(found, device="cuda")))
    assert equal(lists, before) == bool(found)
    assert [int(a - b) for a, b in zip(lists[6], before[6])] == [int(not found)] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_values_reach_the_tensors_of_another_device():
    lists = on_gpu(inputs("masked_adamw_", torch.float32, torch.float32, "float32", [(1000,), (16,)]), steps_too=True)
    twin = tuple([t.clone().to("cuda:1") for t in tensors] for tensors in lists)
    for arguments in (lists, twin):
        for found in (1.0, 0.0):
            values = dict(grad_scale=torch.tensor(3.0, device="cuda:0"), found_inf=torch.tensor(found, device="cuda:0"))
            spg_kernels.masked_adamw_(*arguments, lr=0.1, **values, backend="triton")
    assert equal(lists, tuple([t.to("cuda:0") for t in tensors] for tensors in twin))

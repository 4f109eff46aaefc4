"""The masks and steps on a GPU: what neither the interpreter nor the machine code can show."""

import copy

import pytest
import torch
from torch import nn

import spg_kernels
from spg_kernels import SPGOptimizer, ops, reference

from .triton_cases import CASES, GAMMAS, SETTINGS, compare_with_float64, copies, equal, inputs

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(ops.why_unavailable("triton") is not None or not torch.cuda.is_available(),
                                                  reason=f"Triton has no GPU here: {ops.why_unavailable('triton')}")]

from spg_kernels.backends.tensors import addresses_of
from spg_kernels.backends.triton import elementwise, launch, plans, steps

NAMES = {"ids": lambda x: x if isinstance(x, str) else ""}


def on_gpu(lists, steps_too: bool = False, device: str = "cuda"):
    """The lists of a call on the GPU; AdamW's step counts stay on the CPU, where torch keeps them, unless `steps_too`."""
    return tuple([t if k == 6 and not steps_too else t.to(device) for t in tensors] for k, tensors in enumerate(lists))


def settings_on_gpu(settings: dict) -> dict:
    return {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in settings.items()}


def run(op: str, lists, settings: dict) -> None:
    getattr(spg_kernels, op)(*lists, **settings, backend="triton")


def random_shapes(seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(int(torch.randint(1, 200_000, (), generator=generator)),) for _ in range(12)]
    return shapes + [(64, 3, 7, 7), (128,), (1,), (0,), (256, 257), (1 << 20,)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("gamma_kind", GAMMAS)
@pytest.mark.parametrize("dtype, state_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                                (torch.bfloat16, torch.float32), (torch.float16, torch.float16),
                                                (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("op, settings", CASES, **NAMES)
def test_fresh_random_models_equal_the_reference(op, settings, dtype, state_dtype, gamma_kind, seed):
    lists = inputs(op, dtype, state_dtype, gamma_kind, random_shapes(seed), seed)
    compare_with_float64(op, settings_on_gpu(settings), on_gpu(lists, steps_too=seed == 1))


@pytest.mark.parametrize("op, settings", CASES, **NAMES)
def test_a_thousand_launches_give_the_same_bits(op, settings):
    start = on_gpu(inputs(op, torch.float32, torch.float32, "8-bit", random_shapes(7)), steps_too=True)
    settings, work = settings_on_gpu(settings), copies(start)
    run(op, work, settings)
    first = copies(work)
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        for tensors, originals in zip(work, start):
            torch._foreach_copy_(tensors, originals)
        run(op, work, settings)
        for k in ops._MUTATED[op]:
            for ours, expected in zip(work[k], first[k]):
                differs |= (ours != expected).any()
    assert not differs


@pytest.mark.parametrize("op, settings", CASES, **NAMES)
def test_programs_far_beyond_residency_and_one_program_give_the_same_bits(op, settings, monkeypatch):
    start = on_gpu(inputs(op, torch.float32, torch.float32, "8-bit", [(1 << 24,), (12345,), (3,), (1 << 23,)]))
    results = []
    for programs in (None, 1 << 20, 1000, 33):
        monkeypatch.setattr(launch, "programs_override", programs)
        results.append(copies(start))
        run(op, results[-1], settings_on_gpu(settings))
    assert all(equal(lists, results[0]) for lists in results[1:])


@pytest.mark.sanitizer
@pytest.mark.parametrize("op, settings", CASES, **NAMES)
def test_misaligned_views_give_the_bits_of_aligned_tensors(op, settings):
    lists = on_gpu(inputs(op, torch.float32, torch.float32, "8-bit", [(n,) for n in (5, 1024, 90000, 2049, 4096)]))
    shifted = tuple([torch.cat([t.new_zeros(1), t])[1:] if t.dim() and i % 2 else t.clone() for i, t in enumerate(tensors)]
                    for tensors in lists)
    assert {piece.aligned for piece in plans.PLANS.make(op, shifted)[0].launch.pieces(addresses_of(shifted))} == {True, False}
    for arguments in (lists, shifted):
        run(op, arguments, settings_on_gpu(settings))
    assert equal(lists, shifted)


@pytest.mark.sanitizer
def test_channels_last_parameters_are_taken():
    lists = on_gpu(inputs("masked_adamw_", torch.float32, torch.float32, "float32", [(64, 32, 3, 3)] * 2))
    lists = tuple([t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors] for tensors in lists)
    compare_with_float64("masked_adamw_", SETTINGS["masked_adamw_"][0], lists)


def test_a_tensor_past_31_bits_of_elements():
    n = 2**31 + 5000
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 4 * n:
        pytest.skip("needs 9 GB of GPU memory")
    grad = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    codes = torch.zeros(n, dtype=torch.uint8, device="cuda")
    codes[-3:] = 255
    codes[::2**20] = 255
    spg_kernels.soft_mask_([grad], [codes], backend="triton")
    for start in range(0, n, 2**28):
        assert torch.equal(grad[start:start + 2**28] == 0, codes[start:start + 2**28] == 255)


def test_nothing_is_compiled_anew_when_settings_and_the_number_of_tensors_change(monkeypatch):
    shapes = [(1000 * i + 16,) for i in range(1, 40)]
    everything = on_gpu(inputs("masked_adamw_", torch.float32, torch.float32, "8-bit", shapes))
    run("masked_adamw_", everything, dict(lr=0.1))
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **what: compiled.append(what) and False)
    for count, lr, weight_decay, beta1 in ((39, 1, 0, 0.0), (1, 1e-3, 1, 0.9), (16, 0.0, 0.5, 0.5), (3, 16, 16, 0.99)):
        lists = tuple(tensors[:count] for tensors in everything)
        run("masked_adamw_", lists, dict(lr=lr, weight_decay=weight_decay, beta1=beta1, eps=1e-6))
    assert not compiled


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 64), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(64, 5) for _ in range(2))

    def forward(self, x):
        return sum(head(self.trunk(x)).square().mean() for head in self.heads)


def protected(net: nn.Module, make, importance_dtype=torch.float32, **arguments) -> SPGOptimizer:
    opt = SPGOptimizer(make(net.parameters()), heads=net.heads, importance_dtype=importance_dtype,
                       named_parameters=net.named_parameters(), **arguments)
    generator = torch.Generator().manual_seed(3)
    for name in opt.importance:
        opt.importance[name] = torch.rand(opt.importance[name].shape, generator=generator).to("cuda")
    return opt


def give_both_the_same_gradients(*pairs) -> None:
    """A backward pass of each (network, optimizer) on one batch; the second network gets the first one's gradients."""
    x = torch.randn(8, 3, 8, 8, device="cuda")
    for model, opt in pairs:
        opt.zero_grad()
        model(x).backward()
    for p, q in zip(*(model.parameters() for model, _ in pairs)):
        q.grad.copy_(p.grad)


def capturable(p, lr):
    return torch.optim.AdamW(p, lr=lr, weight_decay=0.1, capturable=True)


MAKERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW capturable": lambda p: capturable(p, 1e-2),
    "AdamW tensor lr": lambda p: capturable(p, torch.tensor(1e-2, device="cuda")),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("importance_dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("ignore:mask='gradient'")
def test_an_optimizer_steps_as_the_reference_without_a_fallback(name, importance_dtype, mask, caplog):
    torch.manual_seed(0)
    net = Net().cuda()
    twin = copy.deepcopy(net)
    ours = protected(net, MAKERS[name], importance_dtype, mask=mask, backend="triton")
    theirs = protected(twin, MAKERS[name], importance_dtype, mask=mask, backend="reference")
    with caplog.at_level("DEBUG", "spg_kernels"):
        for _ in range(5):
            give_both_the_same_gradients((net, ours), (twin, theirs))
            ours.step()
            theirs.step()
    assert "generic" not in caplog.text and "reference" not in caplog.text
    for p, q in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-5)


def test_a_steady_state_step_neither_synchronizes_nor_copies(monkeypatch):
    net = Net().cuda()
    opt = protected(net, lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True))
    net(torch.randn(8, 3, 8, 8, device="cuda")).backward()
    for _ in range(2):
        opt.step()
    monkeypatch.setattr(launch, "_upload", lambda *_: pytest.fail("a table was copied to the device"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_new_gradient_addresses_are_followed_without_a_synchronization():
    net = Net().cuda()
    twin = copy.deepcopy(net)
    ours, theirs = (protected(model, lambda p: torch.optim.SGD(p, lr=0.1), backend=backend)
                    for model, backend in ((net, "triton"), (twin, "reference")))
    hold = []
    for _ in range(20):
        for p, q in zip(net.parameters(), twin.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        hold.append([p.grad for p in net.parameters()])  # so that no address comes back
        if len(hold) > 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        theirs.step()
    for p, q in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep_gradients", [True, False])
def test_a_captured_training_step_follows_the_learning_rate(keep_gradients):
    """With `keep_gradients` the addresses are those of the warm-up; without, the capture makes new ones."""
    torch.manual_seed(0)
    net = Net().cuda()
    twin = copy.deepcopy(net)
    lr = torch.tensor(1e-2, device="cuda")
    ours = protected(net, lambda p: capturable(p, lr), backend="triton")
    theirs = protected(twin, lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), backend="reference")
    x = torch.randn(8, 3, 8, 8, device="cuda")

    def train():
        ours.zero_grad(set_to_none=not keep_gradients)
        net(x).backward()
        ours.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    state = copy.deepcopy([ours.inner.state[p] for p in net.parameters()])
    before = [p.detach().clone() for p in net.parameters()]
    graph = torch.cuda.CUDAGraph()
    ours.zero_grad(set_to_none=not keep_gradients)
    with torch.cuda.graph(graph):
        train()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before)), "a capture runs nothing"
    # The twin goes on from the same place.
    for p, q, own in zip(net.parameters(), twin.parameters(), state):
        q.data.copy_(p)
        theirs.inner.state[q] = {key: value.cpu() if key == "step" else value for key, value in own.items()}
    for rate in (1e-2, 1e-3, 0.1, 0.0):
        x.copy_(torch.randn_like(x))
        lr.fill_(rate)
        graph.replay()
        theirs.inner.param_groups[0]["lr"] = rate
        theirs.zero_grad()
        twin(x).backward()
        for p, q in zip(net.parameters(), twin.parameters()):
            q.grad.copy_(p.grad)
        theirs.step()
        for p, q in zip(net.parameters(), twin.parameters()):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-5)
            q.data.copy_(p)
    assert all(ours.inner.state[p]["step"].item() == 7 for p in net.parameters())


def test_a_captured_step_follows_what_is_measured_after_the_capture():
    """By the trunk's gammas and by their mean, which masks the heads."""
    torch.manual_seed(0)
    net = Net().cuda()
    twin = copy.deepcopy(net)
    ours, theirs = (protected(model, lambda p: torch.optim.SGD(p, lr=0.1), backend=backend)
                    for model, backend in ((net, "triton"), (twin, "reference")))
    give_both_the_same_gradients((net, ours), (twin, theirs))
    for _ in range(2):
        ours.step()
        theirs.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    ours.accumulate_importance()
    theirs.accumulate_importance()
    graph.replay()
    theirs.step()
    for p, q in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_tables_of_a_graph_outlive_the_cache():
    grads, gammas = [torch.randn(5000, device="cuda")], [torch.rand(5000, device="cuda")]
    twin = grads[0].clone()
    spg_kernels.soft_mask_([twin], gammas, backend="triton")
    expected = twin.clone()
    spg_kernels.soft_mask_([grads[0].clone()], gammas, backend="triton")
    start = grads[0].clone()
    spg_kernels.soft_mask_(grads, gammas, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        spg_kernels.soft_mask_(grads, gammas, backend="triton")
    place = launch.here(torch.device("cuda", torch.cuda.current_device()))
    for i in range(2 * launch.TABLES):
        launch.table(place, (i, 1 << 40))
    torch.cuda.empty_cache()
    grads[0].copy_(start)
    graph.replay()
    assert torch.equal(grads[0], expected)


def test_memory_for_tables_of_captures_does_not_run_out(monkeypatch):
    monkeypatch.setattr(launch, "CAPTURE_WORDS", 16)
    monkeypatch.setattr(launch, "_pinned", [])
    gammas = [torch.rand(100, device="cuda") for _ in range(8)]
    start = [torch.randn(100, device="cuda") for _ in range(8)]
    expected, captured = [g.clone() for g in start], []
    spg_kernels.soft_mask_(expected, gammas, backend="triton")
    for _ in range(6):
        grads, warm_up = [g.clone() for g in start], [g.clone() for g in start]  # kept, so that no address comes back
        spg_kernels.soft_mask_(warm_up, gammas, backend="triton")
        captured.append((torch.cuda.CUDAGraph(), grads, warm_up))
        with torch.cuda.graph(captured[-1][0]):
            spg_kernels.soft_mask_(grads, gammas, backend="triton")
    for graph, grads, _ in captured:
        graph.replay()
        assert all(torch.equal(g, e) for g, e in zip(grads, expected))


def test_step_counts_on_the_cpu_are_refused_in_a_capture():
    net = Net().cuda()
    opt = protected(net, lambda p: torch.optim.AdamW(p, lr=1e-2), backend="triton")
    net(torch.randn(8, 3, 8, 8, device="cuda")).backward()
    opt.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="capturable"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            opt.step()
    assert all(opt.inner.state[p]["step"].item() == 1 for p in net.parameters())


def test_several_streams_share_tables_and_do_not_meet():
    op, settings = "masked_adamw_", SETTINGS["masked_adamw_"][0]
    calls = [on_gpu(inputs(op, torch.float32, torch.float32, "8-bit", random_shapes(i), i), steps_too=True) for i in range(4)]
    alone = [copies(lists) for lists in calls]
    for lists in alone:
        for _ in range(6):
            run(op, lists, settings)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    for turn in range(6):
        for i, lists in enumerate(calls):
            stream, last = streams[(i + turn) % 4], streams[(i + turn - 1) % 4]
            stream.wait_stream(last)  # the same tensors on another stream in every turn
            with torch.cuda.stream(stream):
                run(op, lists, settings)
    torch.cuda.synchronize()
    assert all(equal(ours, theirs) for ours, theirs in zip(calls, alone))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_several_devices_in_one_call():
    first, second = (inputs("masked_sgd_", torch.float32, torch.float32, "8-bit", random_shapes(2)) for _ in range(2))
    together = tuple(a + b for a, b in zip(on_gpu(first, device="cuda:0"), on_gpu(second, device="cuda:1")))
    run("masked_sgd_", together, SETTINGS["masked_sgd_"][0])
    n = len(first[0])
    for k in ops._MUTATED["masked_sgd_"]:
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(together[k][:n], together[k][n:]))


@pytest.mark.sanitizer
def test_decoding_on_the_device_is_the_reference_bit_for_bit():
    grad = torch.ones(256, device="cuda")
    spg_kernels.soft_mask_([grad], [torch.arange(256, dtype=torch.uint8, device="cuda")], backend="triton")
    assert torch.equal(grad.cpu(), reference.code_table()[1]) and torch.equal(elementwise.keep_table(), grad.cpu())


def test_a_step_is_one_launch(monkeypatch):
    net = Net().cuda()
    opt = protected(net, MAKERS["AdamW fused"], torch.uint8, backend="triton")
    net(torch.randn(8, 3, 8, 8, device="cuda")).backward()
    kernel, grids = steps.masked_adamw_kernel, []

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(steps, "masked_adamw_kernel", Counted())
    opt.step()
    assert len(grids) == 1

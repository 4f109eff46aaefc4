"""The importance kernel on a GPU: right, the same bits every time, and alone on no stream."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from spg_kernels import NonFiniteGradientError, accumulate_importance_, reference
from spg_kernels.backends.triton import importance, launch

from . import oracle
from .triton_cases import fold
from .triton_importance_interpreted import HARD, assert_equals_the_oracle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA or ROCm device")]

BOTH_STATISTICS = pytest.mark.parametrize("float64", [True, False], ids=["float64", "float32"])
SHAPES = [(64, 3, 7, 7), (64,), (1,), (0,), (2048, 1000), (1000,), (512, 512, 3, 3), (16384,), (16385,),
          (768, 3, 16, 16), (5,), (3_000_001,)]


@pytest.fixture
def use(monkeypatch):
    """Makes the backend compute statistics in either way, whatever this GPU would choose, on tiles of a size."""
    def use(float64, **tiling):
        chosen = importance.Tiling(float64=float64, **({"tile": 4096} if not float64 else {}) | tiling)
        monkeypatch.setattr(importance, "tiling_of", lambda device: chosen)
    return use


def model(dtype=torch.float32, seed=0):
    """Gradients of many shapes and scales."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return [(torch.randn(shape, device="cuda", generator=generator) * 10.0 ** (i % 7 - 3) + i % 3).to(dtype)
            for i, shape in enumerate(SHAPES)]


class Gammas:
    """Importances of a model's shapes as 16-byte aligned views of one buffer, so that one comparison covers all of them."""

    def __init__(self, grads, dtype=torch.float32):
        ends = torch.tensor([-(-grad.numel() // 16) * 16 for grad in grads]).cumsum(0).tolist()
        self.flat = torch.zeros(ends[-1], dtype=dtype, device="cuda")
        self.views = [self.flat[start:start + grad.numel()].view(grad.shape) for start, grad in zip([0, *ends], grads)]


def codes_differ_only_at_borders(codes, grad):
    """Whether codes are ceil(28 |z|), but for a |z| within 1e-4 of a border."""
    z = reference.standardize(grad).abs() * 28
    differs = codes != z.ceil().clamp(max=255)
    return not (differs & ((z - z.round()).abs() > 1e-4)).any()


@BOTH_STATISTICS
@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_equals_the_reference_on_random_models(use, dtype, gamma_dtype, float64):
    use(float64)
    for seed in range(5):
        grads = model(dtype, seed)
        actual, expected = Gammas(grads, gamma_dtype), Gammas(grads, gamma_dtype)
        assert fold(actual.views, grads).all()
        assert reference.accumulate_importance_(expected.views, grads).all()
        if gamma_dtype == torch.float32:
            assert (actual.flat - expected.flat).abs().max() <= 2e-6
            assert actual.flat.max() <= 1
        else:
            for codes, grad in zip(actual.views, grads):
                assert grad.numel() < 2 or codes_differ_only_at_borders(codes, grad)


@BOTH_STATISTICS
@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_equals_the_float64_oracle(use, dtype, kind, float64):
    use(float64)
    grads = [oracle.gradient(n, dtype, kind) for n in oracle.SIZES]
    check_against_the_oracle(grads)


@pytest.mark.sanitizer
@BOTH_STATISTICS
@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__.strip("_"))
def test_hard_gradients(use, make, float64):
    use(float64)
    check_against_the_oracle([make(n) for n in (2, 100, 16384, 16385, 100_000)])


def check_against_the_oracle(grads):
    gammas = [torch.zeros(grad.shape, device="cuda") for grad in grads]
    codes = [torch.zeros(grad.shape, device="cuda", dtype=torch.uint8) for grad in grads]
    on_gpu = [grad.cuda() for grad in grads]
    assert fold(gammas + codes, on_gpu + on_gpu).all()
    assert_equals_the_oracle(grads, [gamma.cpu() for gamma in gammas], [code.cpu() for code in codes])


def test_relative_precision_of_small_values():
    grad = torch.cat([torch.linspace(-1e-3, 1e-3, 1001), torch.tensor([30.0, -30.0])])
    gamma = torch.zeros(grad.shape, device="cuda")
    fold([gamma], [grad.cuda()])
    exact = oracle.importance(grad)
    large_enough = exact > 1e-9
    assert ((gamma.cpu().double() - exact).abs() / exact)[large_enough].max() < 1e-6


@pytest.mark.sanitizer
def test_the_operator_takes_this_backend_and_names_what_is_not_finite():
    grads = model()
    gammas = Gammas(grads)
    grads[4].view(-1)[1_500_000] = math.nan
    grads[5][-1] = -math.inf
    with pytest.raises(NonFiniteGradientError) as error:
        accumulate_importance_(gammas.views, grads, backend="triton")
    assert error.value.names == ["grads[4]", "grads[5]"]
    assert not gammas.views[4].any() and not gammas.views[5].any() and gammas.views[6].any()


def check_misaligned_views(dtype, gamma_dtype, n, device):
    """Of `n` elements but for the first, or the first two or three; nothing around them is written."""
    whole = torch.randn(n, device=device).to(dtype)
    for skip in (1, 2, 3):
        memory = torch.zeros(n + 9, dtype=gamma_dtype, device=device)
        grad, gamma = whole[skip:], memory[skip:n]
        expected = torch.zeros_like(grad, dtype=gamma_dtype)
        fold([gamma], [grad])
        fold([expected], [grad.clone()])
        if gamma_dtype == torch.float32:
            assert (gamma - expected).abs().max() <= 1e-6
        else:
            assert codes_differ_only_at_borders(gamma, grad)
        assert not memory[:skip].any() and not memory[n:].any()


@pytest.mark.sanitizer
@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.uint8], ids=str)
def test_misaligned_views(gamma_dtype):
    for dtype in oracle.DTYPES:
        check_misaligned_views(dtype, gamma_dtype, 100_001, "cuda")


def test_twenty_thousand_small_tensors():
    grads = list(torch.randn(20_000, 96, device="cuda").unbind())
    grads[777][5] = math.nan
    gammas = torch.zeros(20_000, 96, device="cuda")
    finite = fold(list(gammas.unbind()), grads)
    assert finite.logical_not().nonzero().flatten().tolist() == [777]
    x = torch.stack(grads).double()
    exact = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)).abs().tanh()
    assert (gammas - exact).abs()[finite].max() <= 2e-6 and not gammas[777].any()


@BOTH_STATISTICS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_launches_give_the_same_bits(use, dtype, float64):
    use(float64)
    grads = model(dtype)
    gammas, first = Gammas(grads), None
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        gammas.flat.zero_()
        finite = fold(gammas.views, grads)
        first = gammas.flat.clone() if first is None else first
        wrong += (gammas.flat != first).sum() + finite.logical_not().sum()
    assert wrong.item() == 0 and first.any()


@BOTH_STATISTICS
def test_grids_far_beyond_residency_give_the_same_bits(use, monkeypatch, float64):
    use(float64, tile=512, step=512)
    grads = model()
    results = []
    for programs in (None, 1, 7, 10_000_000):  # never more than items, of which there are about 30000
        monkeypatch.setattr(launch, "programs_override", programs)
        for _ in range(1 if programs == 1 else 20):
            gammas = Gammas(grads)
            assert fold(gammas.views, grads).all()
            results.append(gammas.flat)
    assert all(torch.equal(result, results[0]) for result in results)


def test_one_launch_without_a_copy_or_a_synchronization():
    grads = model()
    gammas = Gammas(grads)
    for _ in range(2):
        fold(gammas.views, grads)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            fold(gammas.views, grads)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in on_device if "Sync" not in name] == ["accumulate_importance_kernel"]


def test_graph_capture_and_replay():
    grads = model()
    gammas = Gammas(grads)
    fold(gammas.views, grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        finite = fold(gammas.views, grads)
    for seed in range(20):
        for grad, new in zip(grads, model(seed=seed)):
            grad.copy_(new)
        bad = seed % 3 == 1
        if bad:
            grads[6].view(-1)[-1] = math.inf
        gammas.flat.zero_()
        graph.replay()
        eager = Gammas(grads)
        assert torch.equal(fold(eager.views, grads), finite)
        assert torch.equal(gammas.flat, eager.flat) and finite.all().item() != bad


def test_two_streams_at_a_time():
    streams = [torch.cuda.Stream() for _ in range(2)]
    grads = [model(seed=1), model(torch.bfloat16, seed=2)]
    expected = [Gammas(part) for part in grads]
    for part, gammas in zip(grads, expected):
        fold(gammas.views, part)
    actual = [[Gammas(part) for _ in range(50)] for part in grads]
    torch.cuda.synchronize()
    finite = [[], []]
    for i in range(50):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                finite[k].append(fold(actual[k][i].views, grads[k]))
    torch.cuda.synchronize()
    for k in range(2):
        assert all(f.all() for f in finite[k])
        assert all(torch.equal(gammas.flat, expected[k].flat) for gammas in actual[k])


def test_two_graphs_replayed_at_a_time():
    grads = [model(seed=1), model(seed=2)]
    gammas = [Gammas(part) for part in grads]
    graphs = []
    for part, own in zip(grads, gammas):
        fold(own.views, part)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            own.flat.zero_()
            fold(own.views, part)
        graphs.append(graph)
    expected = []
    for part in grads:
        expected.append(Gammas(part))
        fold(expected[-1].views, part)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(100):
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(own.flat, e.flat) for own, e in zip(gammas, expected))


def test_more_than_two_to_the_31_elements():
    n = (1 << 31) + 12_345
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of GPU memory")
    grad = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    count, mean, pieces = 0, torch.zeros((), dtype=torch.float64, device="cuda"), grad.split(1 << 26)
    for i, piece in enumerate(pieces):
        piece.normal_(mean=3.0 + i % 2)
        mean += piece.double().sum() / n
    m2 = sum((piece.double() - mean).square().sum() for piece in pieces)
    std = (m2 / (n - 1)).sqrt()
    codes = torch.zeros(n, dtype=torch.uint8, device="cuda")
    assert fold([codes], [grad]).all()
    for piece, code in zip(pieces, codes.split(1 << 26)):
        z = (piece.double() - mean).abs() / std * 28
        differs = code != z.ceil().clamp(max=255)
        assert not (differs & ((z - z.round()).abs() > 1e-4)).any()
        count += len(piece)
    assert count == n


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_devices_in_one_call():
    grads = [torch.randn(100_000, device=f"cuda:{i % 2}") for i in range(6)]
    grads[3][9] = math.nan
    gammas = [torch.zeros_like(grad) for grad in grads]
    finite = fold(gammas, grads)
    assert finite.tolist() == [True, True, True, False, True, True] and finite.device == grads[0].device
    for grad, gamma in zip(grads, gammas):
        alone = torch.zeros_like(gamma)
        fold([alone], [grad])
        assert torch.equal(gamma, alone)

"""METHOD.md in float64, written for clarity and independently of the package, and the inputs every backend is held to."""

import math

import torch


def importance(grad: torch.Tensor) -> torch.Tensor:
    """|tanh((g - mean) / std)| in float64."""
    return z(grad).tanh()


def z(grad: torch.Tensor) -> torch.Tensor:
    """|g - mean| / std in float64, the sums taken exactly (math.fsum)."""
    values = grad.double().flatten().tolist()
    n = len(values)
    if n < 2 or min(values) == max(values):
        return torch.zeros(grad.shape, dtype=torch.float64)
    mean = math.fsum(values) / n
    scale = max(abs(v - mean) for v in values)
    std = scale * math.sqrt(math.fsum(((v - mean) / scale) ** 2 for v in values) / (n - 1))
    return torch.tensor([abs((v - mean) / std) for v in values], dtype=torch.float64).reshape(grad.shape)


def keep(gamma: torch.Tensor) -> torch.Tensor:
    """1 - gamma in float64, of float gammas or of 8-bit codes, which from 253 on mean gamma = 1."""
    if gamma.dtype == torch.uint8:
        return (2 / (1 + (gamma.double() / 14).exp())).where(gamma < 253, 0.0)
    return 1 - gamma.double()


def gradient(n: int, dtype: torch.dtype, kind: str, seed: int = 0) -> torch.Tensor:
    """A gradient of METHOD.md's edge-case table."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed + n), dtype=torch.float64)
    half = dtype in (torch.float16, torch.bfloat16)
    if kind == "huge":
        x = x * (1e4 if dtype == torch.float16 else 2e37)
    elif kind == "tiny":
        x = x * (1e-6 if dtype == torch.float16 else 1e-38)
    elif kind == "mean >> std":
        x = 1000 + x * (8 if half else 1e-2)
    elif kind == "outlier first":
        x[:1] = 1e4
    elif kind == "constant":
        x = torch.full_like(x, 0.3)
    elif kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "two values":
        x = (x > 0).double() * 0.1
    else:
        assert kind == "normal"
    return x.to(dtype)


KINDS = ("normal", "huge", "tiny", "mean >> std", "outlier first", "constant", "zero", "two values")
SIZES = (0, 1, 2, 3, 15, 16, 17, 255, 1000, 16384, 32767, 32768, 32769, 131073)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ulps(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|actual - expected| in units in the last place of `actual`'s dtype at `expected` (float64)."""
    info = torch.finfo(actual.dtype)
    magnitude = expected.abs().clamp(min=info.smallest_normal)
    spacing = info.eps * 2.0 ** magnitude.log2().floor()
    return (actual.double() - expected).abs() / spacing

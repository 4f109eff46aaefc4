"""Tensors for the property tests: drawn as recipes, which shrink, and built from a seed, which is fast.

Every tensor lies in a buffer of its own with canaries around and between its elements, so that a write past it is seen.
"""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

CANARY = 0x5A
KINDS = ("normal", "constant", "zeros", "ties", "mean >> std", "one outlier", "subnormal", "mixed magnitudes")
SPECIAL = (math.inf, -math.inf, math.nan)
SHAPES = st.one_of(
    st.sampled_from([(), (0,), (1,), (2,), (3, 0, 2), (1, 1), (1, 5, 1)]),
    st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 191, 192, 193, 255, 512, 1025]).map(lambda n: (n,)),
)
LONG = st.sampled_from([(32769,), (33000,)])  # chunks, and more than one thread
# Few of them: what is wrong in a long tensor mostly is in a short one, at a fraction of the time.
ANY_SHAPE = st.integers(0, 40).flatmap(lambda k: LONG if k == 23 else SHAPES)


@dataclass(frozen=True)
class Layout:
    """Where a tensor's elements lie: the order of its dimensions, gaps between elements, and elements before the first."""

    order: int = 0  # rotates the dimensions: 1 is "channels last"
    gap: int = 1
    before: int = 0


DENSE = Layout()
LAYOUTS = st.one_of(st.just(DENSE), st.builds(Layout, st.integers(0, 2), st.sampled_from([1, 1, 1, 2]), st.integers(0, 5)))


class Placed:
    """A tensor in a buffer of canaries."""

    def __init__(self, values: torch.Tensor, layout: Layout = DENSE):
        shape = values.shape
        rotation = layout.order % max(1, len(shape))
        order = [*range(rotation, len(shape)), *range(rotation)]  # outermost first
        strides, reach = [0] * len(shape), layout.gap
        for dim in reversed(order):
            strides[dim] = reach
            reach *= max(1, shape[dim])
        size = values.element_size()
        self.buffer = torch.full((size * (layout.before + reach + 16),), CANARY, dtype=torch.uint8)
        self.tensor = self.buffer.view(values.dtype).as_strided(shape, strides, layout.before)
        self.tensor.copy_(values)
        self._kept = self.buffer.clone()
        inside = torch.zeros(self.buffer.shape, dtype=torch.bool)
        if values.numel():
            offsets = torch.arange(self.buffer.numel()).as_strided((*shape, size), (*(size * s for s in strides), 1),
                                                                   layout.before * size)
            inside[offsets.flatten()] = True
        self._outside = ~inside

    def canaries_live(self) -> bool:
        return torch.equal(self.buffer[self._outside], self._kept[self._outside])

    def unchanged(self) -> bool:
        """Not one bit of the tensor or around it."""
        return torch.equal(self.buffer, self._kept)

    def before(self) -> torch.Tensor:
        """The tensor as it was made."""
        return self._kept.view(self.tensor.dtype).as_strided(self.tensor.shape, self.tensor.stride(),
                                                             self.tensor.storage_offset())


def unchanged(*lists: list[Placed]) -> bool:
    return all(placed.unchanged() for placeds in lists for placed in placeds)


@dataclass(frozen=True)
class Values:
    """What a tensor holds: a kind of distribution at a power of ten, with some elements replaced by special values."""

    kind: str = "normal"
    exponent: int = 0
    special: tuple[float, ...] = ()
    seed: int = 0

    def make(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        flat = x.flatten()
        if self.kind == "constant":
            x = torch.full_like(x, 0.3)
        elif self.kind == "zeros":
            x = torch.zeros_like(x) * x.sign()
        elif self.kind == "ties":
            x = x.round()
        elif self.kind == "mean >> std":
            x = 1000 + x
        elif self.kind == "one outlier" and flat.numel():
            flat[self.seed % flat.numel()] = 1000.0
            x = flat.reshape(shape)
        elif self.kind == "subnormal":
            x = x * (4 * torch.finfo(dtype).smallest_normal)
        elif self.kind == "mixed magnitudes":
            x = x * 10.0 ** torch.randint(-6, 7, shape, generator=generator)
        if self.kind != "subnormal":
            x = x * 10.0**self.exponent
        largest = torch.finfo(dtype).max
        flat = x.clamp(-largest, largest).flatten()
        for k, value in enumerate(self.special):
            if flat.numel():
                flat[(self.seed + 7 * k) % flat.numel()] = value
        return flat.reshape(shape).to(dtype)


def values(largest_exponent: int = 30, special: bool = True) -> st.SearchStrategy[Values]:
    specials = st.lists(st.sampled_from(SPECIAL), max_size=2).map(tuple) if special else st.just(())
    exponents = st.sampled_from([0, 0, 0, -3, 3, -largest_exponent, largest_exponent])
    return st.builds(Values, st.sampled_from(KINDS), exponents, st.one_of(st.just(()), specials), st.integers(0, 1 << 16))


@dataclass(frozen=True)
class Gamma:
    """float32 importances, 8-bit codes, or one value for the whole tensor; random, exact 0 and 1 among them, or all one."""

    kind: str = "float32"  # "8-bit", "one value"
    fill: float | None = None
    seed: int = 0

    def make(self, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape = () if self.kind == "one value" else shape
        gamma = torch.rand(shape, generator=generator) if self.fill is None else torch.full(shape, self.fill)
        if self.fill is None and gamma.dim():
            spread = torch.randint(0, 8, shape, generator=generator)
            gamma = torch.where(spread == 0, 0.0,
                                torch.where(spread == 1, 1.0, torch.where(spread == 2, 1 - gamma * 1e-6, gamma)))
        return (gamma * 255).round().to(torch.uint8) if self.kind == "8-bit" else gamma.float()


def gammas(one_value: bool = True) -> st.SearchStrategy[Gamma]:
    kinds = ["float32", "8-bit"] + ["one value"] * one_value
    return st.builds(Gamma, st.sampled_from(kinds), st.sampled_from([None, None, None, 0.0, 1.0]), st.integers(0, 1 << 16))

"""The parameter sets: the shapes of real networks, written down, so that no model zoo is needed."""

from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParameterSet:
    """The shapes of a model's parameters, and what they are published to add up to."""

    name: str
    shapes: tuple[Shape, ...]
    parameters: int

    @property
    def numels(self) -> list[int]:
        return [prod(shape) for shape in self.shapes]


def _convolution(out: int, into: int, kernel: int) -> list[Shape]:
    """A convolution without bias, and its batch norm."""
    return [(out, into, kernel, kernel), (out,), (out,)]


def _resnet(blocks: tuple[int, ...], kernels: tuple[int, ...], expansion: int) -> tuple[Shape, ...]:
    """He et al. 2016, as in torchvision: `kernels` of one block's convolutions, a projection where the shape changes."""
    shapes, into = _convolution(64, 3, 7), 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            block_into = into
            for i, kernel in enumerate(kernels):
                out = width * expansion if i == len(kernels) - 1 else width
                shapes += _convolution(out, into, kernel)
                into = out
            if block == 0 and block_into != into:
                shapes += _convolution(into, block_into, 1)
    return tuple(shapes + [(1000, into), (1000,)])


def _vit_b_16() -> tuple[Shape, ...]:
    """Dosovitskiy et al. 2021, as in torchvision: 224 pixels, patches of 16, 12 layers of 768."""
    layer = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,),
             (3072, 768), (3072,), (768, 3072), (768,)]
    return ((1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768), *layer * 12, (768,), (768,), (1000, 768), (1000,))


def _gpt2_xl() -> tuple[Shape, ...]:
    """Radford et al. 2019: 48 layers of 1600, tied embedding."""
    layer = [(1600,), (1600,), (1600, 4800), (4800,), (1600, 1600), (1600,), (1600,), (1600,),
             (1600, 6400), (6400,), (6400, 1600), (1600,)]
    return ((50257, 1600), (1024, 1600), *layer * 48, (1600,), (1600,))


SETS = {s.name: s for s in (
    ParameterSet("small_62", ((16, 16),) * 62, 15_872),
    ParameterSet("tiny_1000", ((64,),) * 1000, 64_000),
    ParameterSet("resnet18", _resnet((2, 2, 2, 2), (3, 3), 1), 11_689_512),
    ParameterSet("resnet50", _resnet((3, 4, 6, 3), (1, 3, 1), 4), 25_557_032),
    ParameterSet("tensor_64m", ((8192, 8192),), 67_108_864),
    ParameterSet("vit_b_16", _vit_b_16(), 86_567_656),
    ParameterSet("gpt2_xl", _gpt2_xl(), 1_557_611_200),
)}
SMALL = ("small_62", "tiny_1000", "resnet18")  # what runs without --full

"""The shapes are those of the networks they are named after, and torch.compile can take them all."""

import pytest
import torch

from . import peers
from .sets import SETS

TENSORS = {"small_62": 62, "tiny_1000": 1000, "resnet18": 62, "resnet50": 161, "tensor_64m": 1, "vit_b_16": 152,
           "gpt2_xl": 580}


@pytest.mark.parametrize("name", SETS)
def test_parameters_as_published(name):
    assert sum(SETS[name].numels) == SETS[name].parameters
    assert len(SETS[name].shapes) == TENSORS[name]


@pytest.mark.parametrize("name", SETS)
def test_every_part_of_a_long_list_is_compiled(name, monkeypatch):
    """Shapes divided by 128; inductor is left out."""
    tensors = [torch.ones([-(-n // 128) for n in shape]) for shape in SETS[name].shapes]
    graphs, compile = [], torch.compile

    def backend(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend=backend, **how))
    peers._compiled.cache_clear()
    peers.compiled_over(lambda x: x.mul_(0), [tensors])()
    peers._compiled.cache_clear()
    size = len(tensors) if len(tensors) <= peers._LARGEST_GRAPH else peers._PART
    sizes = [t.numel() for t in tensors]
    assert len(graphs) == len({tuple(sizes[i:i + size]) for i in range(0, len(tensors), size)})

"""The shapes are those of the networks they are named after."""

import pytest

from .sets import SETS

TENSORS = {"small_62": 62, "tiny_1000": 1000, "resnet18": 62, "resnet50": 161, "tensor_64m": 1, "vit_b_16": 152,
           "gpt2_xl": 580}


@pytest.mark.parametrize("name", SETS)
def test_parameters_as_published(name):
    assert sum(SETS[name].numels) == SETS[name].parameters
    assert len(SETS[name].shapes) == TENSORS[name]

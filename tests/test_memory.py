"""What is written shares memory with nothing else of the call."""

import time

import pytest
import torch

import spg_kernels
from spg_kernels.memory import check_disjoint

MEMORY = torch.arange(24.0)
MATRIX = MEMORY.view(4, 6)


@pytest.mark.parametrize("written, read, message", [
    ([MEMORY, MEMORY], [], r"x\[0\] and x\[1\] share memory"),
    ([MEMORY[:5], MEMORY[4:]], [], "share memory"),
    ([MEMORY[:5]], [MEMORY[9:], MEMORY[4:]], r"x\[0\] and y\[1\] share memory, and x\[0\] is written"),
    ([MATRIX[:, 1], MATRIX[1:3, 1]], [], "share memory"),
    ([MEMORY[0]], [MATRIX[:, 0]], "share memory"),
    ([torch.zeros(3, 1).expand(3, 4)], [], r"x\[0\]: cannot be written"),
    ([MEMORY.as_strided((3, 3), (1, 2))], [], r"x\[0\]: cannot be written"),
    ([MEMORY.view(torch.int16)[1:3]], [MEMORY[:1]], "share memory"),
])
def test_shared_elements_are_found_and_named(written, read, message):
    with pytest.raises(ValueError, match=message):
        check_disjoint({"x": written}, {"y": read})


@pytest.mark.parametrize("written, read", [
    ([MEMORY[:5], MEMORY[5:]], []),
    ([MATRIX[:, 0], MATRIX[:, 1]], [MATRIX[:, 2:]]),
    ([MEMORY[:4]], [MEMORY[4:], MEMORY[4:], MEMORY[5:7]]),
    ([MEMORY[:0], MEMORY[:0], MEMORY], [MEMORY[3:3]]),
    ([MEMORY.as_strided((3, 2), (2, 3))], []),
    ([torch.zeros(2, device="meta")], [torch.zeros(2, device="meta")]),
    ([torch.zeros(2, 2)], [torch.eye(2).to_sparse()]),
])
def test_what_is_apart_or_only_read_passes(written, read):
    check_disjoint({"x": written}, {"y": read})


def test_columns_of_a_matrix_are_looked_at_in_the_time_of_a_copy():
    matrix = torch.zeros(2048, 2048)
    columns = [matrix[:, :1024], matrix[:, 1024:]]
    begin = time.perf_counter()
    with torch.device("meta"):  # whatever the default device
        check_disjoint({"x": columns}, {})
        with pytest.raises(ValueError, match="share memory"):
            check_disjoint({"x": [*columns, matrix[:, 1023:1025]]}, {})
    assert time.perf_counter() - begin < 5, "sorting all offsets took 14 s"


def test_every_operator_checks_every_list_it_writes():
    def fresh():
        return [torch.rand(3) for _ in range(2)]

    def refuses(function, *lists, **settings):
        with pytest.raises(ValueError, match="share memory"):
            function(*lists, **settings)

    twice = [MEMORY[:3]] * 2
    refuses(spg_kernels.accumulate_importance_, twice, fresh())
    refuses(spg_kernels.soft_mask_, twice, fresh())
    refuses(spg_kernels.update_mask_, twice, fresh(), fresh())
    refuses(spg_kernels.masked_sgd_, twice, fresh(), fresh(), fresh(), lr=0.1, momentum=0.9)
    refuses(spg_kernels.masked_sgd_, fresh(), fresh(), fresh(), twice, lr=0.1, momentum=0.9)
    for written in (0, 3, 4, 5, 6):
        lists = [fresh() for _ in range(6)] + [[torch.tensor(0.0), torch.tensor(0.0)]]
        lists[written] = [lists[written][0]] * 2
        refuses(spg_kernels.masked_adamw_, *lists, lr=0.1)

"""What a rank computes of its own shards, in one process."""

import torch

from spg_kernels import distributed

from . import oracle


def test_a_shard_in_another_memory_order_is_folded_in_by_its_indices():
    grad = torch.randn(4, 6)
    for gamma in (torch.zeros(6, 4).t(), torch.zeros(4, 6), torch.zeros(4, 12)[:, ::2]):
        distributed._fold_shard(gamma, grad, *distributed._describe_shard(grad).tolist())
        assert (gamma - oracle.importance(grad)).abs().max() < 2e-6


def test_an_empty_part_says_nothing_wherever_it_stands():
    """Its origin least of all: about 0, a mean far from it would take the digits of the deviations."""
    values = 1e9 + torch.randn(100, dtype=torch.float64) * 1e-4
    empty, part = map(distributed._describe_shard, (values[:0], values))
    for parts in ([empty, part], [part, empty], [empty, empty, part]):
        assert torch.equal(distributed._merge(torch.stack(parts).unsqueeze(1))[0], part)


def test_a_lazily_conjugated_shard_is_described_as_its_numbers():
    shard = torch.randn(5, dtype=torch.complex64).conj()
    assert torch.equal(distributed._describe_shard(shard), distributed._describe_shard(shard.resolve_conj()))

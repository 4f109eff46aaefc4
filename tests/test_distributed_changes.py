"""Past one device: errors on some ranks or all, and parameters that change their sharding. gloo on the CPU."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from spg_kernels import (
    Importance,
    NonFiniteGradientError,
    SharedTrunkLosses,
    SPGOptimizer,
    cross_head_losses,
    distributed,
)

from . import ranks
from .models import Net, set_gradients, tasks
from .test_distributed import CLOSE, difference, small_net
from .wrapping import equal, wrap


def non_finite_gradients_raise_the_same_everywhere(directory):
    net = fully_shard(small_net())
    plain = nn.Parameter(torch.zeros(4))
    optimizer = SPGOptimizer(torch.optim.SGD([*net.named_parameters(), ("plain", plain)], lr=0.1), heads=net.heads)
    set_gradients([plain])
    for p in net.parameters():
        p.grad = distribute_tensor(torch.randn(p.shape), p.device_mesh, p.placements)
    weight = net.trunk[0].weight
    if dist.get_rank() == 1:
        weight.grad.to_local()[0, 0] = torch.nan
        plain.grad[0] = torch.inf
    found = ["trunk.0.weight", "plain"] if dist.get_rank() == 1 else ["trunk.0.weight"]
    with pytest.raises(NonFiniteGradientError) as error:
        optimizer.accumulate_importance()
    assert error.value.names == found
    assert not distributed.some(optimizer.importance[weight])
    assert distributed.some(optimizer.importance["trunk.2.weight"]), "the finite ones are folded in"

    net = small_net()
    parallel = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = wrap(net)
    parallel(torch.full((2, 10), torch.nan if dist.get_rank() == 1 else 1.0), 0).sum().backward()
    with pytest.raises(NonFiniteGradientError) as error:
        optimizer.accumulate_importance()
    assert error.value.names == ["trunk.0.weight", "trunk.0.bias", "trunk.2.weight", "trunk.2.bias"]


def a_pass_whose_gradients_nobody_reduced_is_refused(directory):
    net = fully_shard(small_net())
    optimizer = wrap(net)
    net.set_requires_gradient_sync(False)
    with pytest.raises(ValueError, match="got none from any.*set_requires_gradient_sync"):
        optimizer.measure_importance(tasks(1)[0], cross_head_losses(net, 0, F.cross_entropy), progress=False)
    assert optimizer.importance.tasks == 0


def a_trunk_that_runs_past_its_reducer_is_refused(directory):
    """Each rank would measure its own share of the batches, and mask by that."""
    rank, world, batches = dist.get_rank(), dist.get_world_size(), [(x.repeat(3, 1), y.repeat(3)) for x, y in tasks(1)[0]]
    shares = [(x[rank::world], y[rank::world]) for x, y in batches]
    net, alone = small_net(), small_net()
    DistributedDataParallel(net, find_unused_parameters=True)
    optimizer, expected = wrap(net), wrap(alone)
    with pytest.raises(ValueError, match="trunk: .*cross_head_losses"):
        optimizer.measure_importance(shares, SharedTrunkLosses(net.trunk, net.heads, 0, F.cross_entropy), progress=False)
    assert not optimizer.importance.active
    net = small_net()
    trunk, optimizer = DistributedDataParallel(net.trunk), wrap(net)
    optimizer.measure_importance(shares, SharedTrunkLosses(trunk, net.heads, 0, F.cross_entropy), progress=False)
    expected.measure_importance(batches, cross_head_losses(alone, 0, F.cross_entropy), progress=False)
    assert difference(optimizer.importance.values(), expected.importance.values()) <= CLOSE


def an_interrupted_pass_begins_anew_after_a_write_to_shards(directory):
    """So torch.distributed.checkpoint loads, without the DTensors' knowledge."""
    net, batches, calls = fully_shard(small_net()), tasks(1)[0], []
    optimizer, (old, own) = wrap(net), cross_head_losses(net, 1, F.cross_entropy)

    def old_head(batch):
        calls.append("old")
        if len(calls) == len(batches) + 1:
            raise KeyboardInterrupt
        return old(batch)

    def own_head(batch):
        calls.append("own")
        return own(batch)

    losses = [old_head, own_head]
    with pytest.raises(KeyboardInterrupt):
        optimizer.measure_importance(batches, losses, progress=False)
    for p in net.parameters():
        distributed.local(p).mul_(0.5)
    optimizer.measure_importance(batches, losses, progress=False)
    assert calls.count("own") == 2 * len(batches)


def heads_stay_heads_while_a_test_has_gathered_them(directory):
    """Of a forward without a backward FSDP2 leaves modules with other parameters than the optimizer has."""
    alone, net, batches = small_net(), fully_shard(small_net()), tasks(1)[0]
    expected, optimizer = wrap(alone), wrap(net)
    for model, opt in ((alone, expected), (net, optimizer)):
        model(batches[0][0], 1)
        opt.measure_importance(batches, cross_head_losses(model, 1, F.cross_entropy), progress=False)
        model(batches[0][0], 1)
        model.heads.append(nn.Linear(5, 3))
        opt.add_param_group({"params": model.heads[3].parameters()})
    assert list(optimizer.importance) == list(expected.importance)
    assert difference(optimizer.importance.values(), expected.importance.values()) <= CLOSE


def batches_are_moved_to_the_device_of_the_mesh(directory):
    class Seen(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, head):
            assert x.device.type == "cpu"
            return x

    net = fully_shard(small_net()).to("meta")  # as under CPUOffloadPolicy shards lie elsewhere than they are computed with
    (loss,) = cross_head_losses(Seen(net), 0, F.cross_entropy)
    assert loss(tasks(1)[0][0]).device.type == "cpu"


def importance_follows_parameters_into_shards(directory):
    net = small_net()
    before = wrap(net, "SGD")
    set_gradients(net.parameters())
    before.accumulate_importance()
    gammas = {name: gamma.clone() for name, gamma in before.importance.items()}
    fully_shard(net)
    after = wrap(net, "AdamW", importance=before.importance)
    for name, gamma in gammas.items():
        assert after.importance[name].placements == net.get_parameter(name).placements
        assert difference([after.importance[name]], [gamma]) == 0
    after.importance.save(directory / f"importance-{dist.get_world_size()}")
    dist.barrier()
    loaded = Importance.load(directory / f"importance-{dist.get_world_size()}")
    assert equal(loaded.values(), gammas.values())
    again = fully_shard(small_net())
    loaded.bind(again.named_parameters())
    loaded["trunk.0.weight"] = torch.full((5, 10), 0.25)  # whole, or sharded
    loaded["trunk.2.bias"] = torch.zeros_like(again.trunk[2].bias) + 0.5
    assert difference([loaded["trunk.0.weight"]], [torch.full((5, 10), 0.25)]) == 0
    assert difference([loaded["trunk.2.bias"]], [torch.full((5,), 0.5)]) == 0
    again(torch.zeros(1, 10), 0)
    with pytest.raises(ValueError, match="trunk.0.weight: was sharded and is not any more.*call model.reshard"):
        loaded.bind(again.named_parameters())  # of a forward without a backward FSDP2 leaves the gathered parameters
    again.reshard()
    loaded.bind(again.named_parameters())
    one_bad_element = torch.full((5, 10), 0.5)
    one_bad_element[-1, -1] = 1.5
    with pytest.raises(ValueError, match=r"trunk.0.weight: expected finite values in \[0, 1\], got 0.5 to 1.5"):
        loaded["trunk.0.weight"] = one_bad_element
    codes = Importance(again.named_parameters(), dtype=torch.uint8)
    codes["trunk.0.weight"] = torch.full((5, 10), 0.5)
    assert codes.active and 0.5 <= float(codes["trunk.0.weight"].full_tensor().mean()) < 0.52


def a_model_born_on_meta_is_sharded_then_filled(directory):
    with torch.device("meta"):
        net = Net(hidden=5)
    fully_shard(net)
    known = Importance(small_net().trunk.named_parameters("trunk"))
    known["trunk.2.weight"] = torch.full((5, 5), 0.75)
    optimizer = wrap(net, "SGD", importance=known)
    net.to_empty(device="cpu")
    optimizer.importance.bind(net.named_parameters())
    assert difference([optimizer.importance[net.trunk[2].weight]], [torch.full((5, 5), 0.75)]) == 0


def flattened_parameters_are_refused(directory):
    for use_orig_params in (False, True):
        net = FullyShardedDataParallel(small_net(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="flattens parameters into one.*use FSDP2"):
            SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1))
    net = small_net()
    optimizer = wrap(net, "SGD")
    FullyShardedDataParallel(net, use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD,
                             device_id=torch.device("cpu"))
    set_gradients(net.parameters())
    with pytest.raises(ValueError, match="flattens parameters into one.*use FSDP2"):  # though each has its shape still
        optimizer.accumulate_importance()
    assert not optimizer.importance.active


def an_optimizer_that_steps_in_backward_is_refused(directory):
    net = small_net()
    inner = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1)
    with pytest.raises(ValueError, match="overlap_with_ddp"):
        SPGOptimizer(inner)


CHANGES = (non_finite_gradients_raise_the_same_everywhere, a_pass_whose_gradients_nobody_reduced_is_refused,
           a_trunk_that_runs_past_its_reducer_is_refused, an_interrupted_pass_begins_anew_after_a_write_to_shards,
           heads_stay_heads_while_a_test_has_gathered_them, batches_are_moved_to_the_device_of_the_mesh,
           importance_follows_parameters_into_shards, a_model_born_on_meta_is_sharded_then_filled,
           flattened_parameters_are_refused, an_optimizer_that_steps_in_backward_is_refused)


def test_two_three_and_four_ranks_refuse_and_follow_together(tmp_path):
    ranks.run(tmp_path, *((world, CHANGES) for world in (4, 3, 2)))

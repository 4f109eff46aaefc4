"""torch.distributed.checkpoint: what 2 ranks save, 3 and 1 go on from."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from spg_kernels import distributed

from . import ranks
from .test_distributed import difference, small_net
from .wrapping import wrap

DTYPES = (torch.float32, torch.uint8)


def set_same_gradients(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = distributed.placed(torch.randn(p.shape, generator=generator), p)


def train(net, optimizer, seeds):
    for seed in seeds:
        set_same_gradients(net, seed)
        optimizer.accumulate_importance()
        optimizer.step()


def wrapped(net, dtype):
    return net, wrap(net, "AdamW", importance_dtype=dtype)


def empty(dtype, shard=fully_shard):
    """What a checkpoint has everything to say about."""
    net = small_net()
    for p in net.parameters():
        nn.init.zeros_(p)
    return wrapped(shard(net), dtype)


def assert_equals(net, optimizer, dtype, seeds):
    """As one process that was trained with `seeds`."""
    alone, expected = wrapped(small_net(), dtype)
    train(alone, expected, seeds)
    assert difference(net.parameters(), alone.parameters()) <= 2e-6
    assert optimizer.importance.active and difference(optimizer.importance.values(), expected.importance.values()) <= 2e-6


def load(directory, net, optimizer):
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)
    set_state_dict(net, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def two_ranks_save(directory):
    writing = dist.new_group()  # the thread that writes has its own, or its calls and training's would cross
    for dtype in DTYPES:
        net, optimizer = wrapped(fully_shard(small_net()), dtype)
        train(net, optimizer, range(2))
        assert_equals(net, optimizer, dtype, range(2))
        model_state, optimizer_state = get_state_dict(net, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.save(state, checkpoint_id=directory / f"{dtype}")
        future = dcp.async_save(state, checkpoint_id=directory / f"{dtype} asynchronous", process_group=writing)
        train(net, optimizer, [2])  # while the copy that was taken is being written
        future.result()


def ranks_load(directory):
    for dtype in DTYPES:
        for name in (f"{dtype}", f"{dtype} asynchronous"):
            net, optimizer = empty(dtype)
            load(directory / name, net, optimizer)
            assert_equals(net, optimizer, dtype, range(2))
            train(net, optimizer, [2, 3])
            assert_equals(net, optimizer, dtype, range(4))


def what_is_loaded_in_place_counts(directory):
    """torch.distributed.checkpoint loads into the shards themselves; without set_state_dict nothing else tells of it."""
    for dtype in DTYPES:
        for is_active in (False, True):
            net, optimizer = empty(dtype)
            if is_active:
                optimizer.importance["trunk.0.bias"] = torch.full((5,), 0.1)
                optimizer.importance.mean_on(torch.device("cpu"))
            model_state, optimizer_state = get_state_dict(net, optimizer)
            dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory / f"{dtype}")
            assert_equals(net, optimizer, dtype, range(2))
            optimizer.importance.update_means()
            total = sum(gamma.full_tensor().sum() for gamma in optimizer.importance.values())
            expected = total / sum(gamma.numel() for gamma in optimizer.importance.values())
            assert abs(optimizer.importance.mean_on(torch.device("cpu")) - expected) <= 1e-6


def a_full_state_is_broadcast_from_rank_0(directory):
    for dtype in DTYPES:
        net, optimizer = empty(dtype)
        load(directory / f"{dtype}", net, optimizer)
        full = get_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            gamma = full[1]["state"]["trunk.0.weight"]["spg_importance"]
            assert type(gamma) is torch.Tensor and gamma.dtype == dtype and gamma.shape == (5, 10)
        net, optimizer = empty(dtype)
        model_state, optimizer_state = full if dist.get_rank() == 0 else ({}, {})
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(net, model_state, options=options)
        set_optimizer_state_dict(net, optimizer, optimizer_state, options=options)
        assert_equals(net, optimizer, dtype, range(2))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """What two ranks saved, and two and three ranks went on from."""
    directory = tmp_path_factory.mktemp("checkpoints")
    going_on = (ranks_load, what_is_loaded_in_place_counts, a_full_state_is_broadcast_from_rank_0)
    ranks.run(directory, (2, (two_ranks_save, *going_on)), (3, going_on))
    return directory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", ["", " asynchronous"])
def test_one_process_goes_on_from_what_two_saved(directory, dtype, suffix):
    net, optimizer = empty(dtype, shard=lambda net: net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        load(directory / f"{dtype}{suffix}", net, optimizer)
    assert_equals(net, optimizer, dtype, range(2))
    train(net, optimizer, [2, 3])
    assert_equals(net, optimizer, dtype, range(4))

"""Exact past one device: gloo on the CPU, several ranks against one process and against the oracle."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from spg_kernels import (
    SPGOptimizer,
    accumulate_importance_,
    cross_head_losses,
    distributed,
)

from . import oracle, ranks
from .models import Net, set_gradients, tasks
from .wrapping import INNER, equal, values, wrap

CLOSE = 2e-6


def difference(actual, expected) -> float:
    pairs = zip(actual, expected, strict=True)
    return max((float((distributed.whole(a).detach() - e.detach()).abs().max()) for a, e in pairs if e.numel()), default=0.0)


def small_net() -> Net:
    """Its 5 rows over 2, 3 or 4 ranks are uneven shards, and over 4 one is empty."""
    torch.manual_seed(0)
    return Net(hidden=5)


def learn(net, optimizer, stream) -> None:
    """Train on each task and measure its importance. Every rank has whole batches: averaged gradients are those of one."""
    for t, batches in enumerate(stream):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x, t), y).backward()
            optimizer.step()
        for head in range(t + 1):
            optimizer.zero_grad()
            for x, y in batches:
                (F.cross_entropy(net(x, t), y) if head == t else net(x, head).sum()).backward()
            optimizer.accumulate_importance()


# Importance of one tensor


def shards_equal_the_oracle(directory):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sizes = (0, 1, 2, 3, 5, 17, 1000, 16385)
    cases = [(n, dtype, kind) for n in sizes for dtype in oracle.DTYPES for kind in oracle.KINDS]
    whole = [oracle.gradient(*case) for case in cases]
    grads = [distribute_tensor(grad, mesh, [Shard(0)]) for grad in whole]
    gammas = [torch.zeros_like(grad, dtype=torch.float32) for grad in grads]
    codes = [torch.zeros_like(grad, dtype=torch.uint8) for grad in grads]
    with CommDebugMode() as communication:
        distributed.fold(gammas, grads, ["name"] * len(grads), "auto")
    assert communication.get_total_counts() == 1
    distributed.fold(codes, grads, ["name"] * len(grads), "auto")
    for case, grad, gamma, code in zip(cases, whole, gammas, codes, strict=True):
        assert difference([gamma], [oracle.importance(grad)]) <= CLOSE, case
        expected = torch.zeros_like(grad, dtype=torch.uint8)
        accumulate_importance_([expected], [grad])
        assert torch.equal(code.full_tensor(), expected), case


def wide_float64_gradients_keep_their_digits(directory):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(1000, dtype=torch.float64)
    for grad in (x * 1e-200, x * 1e200, 1e9 + x * 1e-4, torch.view_as_complex(torch.stack([x, 3 - x], -1))):
        expected, sharded = torch.zeros(grad.shape), distribute_tensor(grad, mesh, [Shard(0)])
        accumulate_importance_([expected], [grad], backend="reference")
        gamma = torch.zeros_like(sharded, dtype=torch.float32)
        distributed.fold([gamma], [sharded], ["name"], "auto")
        assert difference([gamma], [expected]) <= 2e-7


def every_placement_equals_the_oracle(directory):
    world = dist.get_world_size()
    meshes = [init_device_mesh("cpu", (world,))]
    if world == 4:
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")))
    single = [Shard(0), Shard(1), Replicate()]
    grad = torch.randn(5, 7) + 3
    expected = oracle.importance(grad)
    for mesh in meshes:
        placements = [[a] for a in single] if mesh.ndim == 1 else [[a, b] for a in single for b in single]
        sharded = [distribute_tensor(grad, mesh, p) for p in placements]
        gammas = [torch.zeros_like(s, dtype=torch.float32) for s in sharded]
        with CommDebugMode() as communication:
            distributed.fold(gammas, sharded, [str(p) for p in placements], "auto")
        assert communication.get_total_counts() == mesh.ndim
        for gamma, placement in zip(gammas, placements):
            assert gamma.placements == tuple(placement)
            assert difference([gamma], [expected]) <= CLOSE, placement
            # To the bit the same on every rank that holds the same elements.
            total = distributed.mean_gamma([gamma], torch.device("cpu"))
            everywhere = [torch.empty_like(total) for _ in range(world)]
            dist.all_gather(everywhere, total)
            assert len({float(x) for x in everywhere}) == 1
        parts = DTensor.from_local(grad / world, mesh, [Partial()] * mesh.ndim, run_check=False)
        gamma = torch.zeros_like(sharded[0], dtype=torch.float32)
        distributed.fold([gamma], [parts], ["partial"], "auto")
        assert difference([gamma], [expected]) <= CLOSE


# Training


def fully_sharded_training_equals_one_process(directory):
    stream = tasks(3)
    for inner, settings in [("SGD", {}), ("SGD momentum", {"mask": "gradient"}), ("AdamW", {}), ("AdamW amsgrad", {}),
                            ("SGD momentum", {"importance_dtype": torch.uint8}), ("RMSprop", {}),
                            ("RMSprop", {"mask": "gradient"}), ("AdamW", {"backend": "reference"})]:
        alone, net = small_net(), fully_shard(small_net())
        expected, optimizer = wrap(alone, inner, **settings), wrap(net, inner, **settings)
        if not (inner == "RMSprop" or settings.get("backend")):
            optimizer._generic_step = None  # the fused kernels take the shards
        learn(alone, expected, stream)
        learn(net, optimizer, stream)
        assert difference(net.parameters(), alone.parameters()) <= CLOSE, (inner, settings)
        for name, parameter in alone.named_parameters():
            if name in expected.importance:
                sharded = optimizer.importance[name]
                assert sharded.placements == net.get_parameter(name).placements
                # Adam's first updates are signs of gradients, which amplify a last bit of it.
                assert difference([sharded], [expected.importance[name]]) <= CLOSE, (inner, settings, name)
        assert abs(optimizer.importance.mean() - expected.importance.mean()) <= CLOSE


def importance_of_the_same_gradients_equals_one_process(directory):
    alone, net = small_net(), fully_shard(small_net())
    expected, optimizer = wrap(alone), wrap(net)
    for seed in range(3):
        set_gradients(alone.parameters(), seed)
        for p, q in zip(net.parameters(), alone.parameters()):
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
        expected.accumulate_importance()
        with CommDebugMode() as communication:
            optimizer.accumulate_importance()
            optimizer.step()
            optimizer.step()
        assert communication.get_total_counts() == 2, "one gather for all parameters, and one for the heads' mean(gamma)"
        expected.step()
        expected.step()
    assert difference(net.parameters(), alone.parameters()) <= CLOSE
    for name in expected.importance:
        assert difference([optimizer.importance[name]], [expected.importance[name]]) <= CLOSE
    table, reference = optimizer.importance.summary(), expected.importance.summary()
    for row, twin in zip(table.rows, reference.rows, strict=True):
        assert row.elements == twin.elements and row.above_half == twin.above_half and row.above_99 == twin.above_99
        assert abs(row.mean - twin.mean) <= CLOSE


def scaled_steps_on_shards_skip_together(directory):
    """A GradScaler's own collective tells every rank of the inf in one rank's shard."""
    for inner in ("SGD fused", "AdamW fused"):
        alone, net = small_net(), fully_shard(small_net())
        expected, optimizer = (wrap(model, inner, 0.5) for model in (alone, net))
        optimizer._generic_step = None  # the fused kernels take the shards
        scalers = [torch.amp.GradScaler("cpu", init_scale=3000.7, backoff_factor=0.3) for _ in range(2)]
        for seed in range(4):
            set_gradients(alone.parameters(), seed)
            if seed in (0, 2):
                alone.trunk[0].weight.grad[0, 0] = float("inf")
            for p, q in zip(net.parameters(), alone.parameters()):
                q.grad *= scalers[0].scale(torch.ones(()))
                p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
            scalers[1].scale(torch.ones(()))
            assert optimizer._step_supports_amp_scaling
            versions = [p._version for p in net.parameters()]
            for opt, scaler in zip((expected, optimizer), scalers):
                scaler.step(opt)
                scaler.update()
            assert scalers[0].get_scale() == scalers[1].get_scale()
            assert difference(net.parameters(), alone.parameters()) == 0
            assert seed in (0, 2) or all(p._version > v for p, v in zip(net.parameters(), versions)), "autograd is told"


def tensor_parallel_training_equals_one_process(directory):
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, 2) if world == 4 else (1, world), mesh_dim_names=("data", "tensor"))

    def features():  # divisible by the ranks of tensor parallel, as its layers need
        torch.manual_seed(0)
        return Net(hidden=12)

    alone, net = features(), features()
    parallelize_module(net.trunk, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if world == 4:
        fully_shard(net, mesh=mesh["data"])
    expected, optimizer = wrap(alone, "SGD momentum"), wrap(net, "SGD momentum")
    learn(alone, expected, tasks(2))
    learn(net, optimizer, tasks(2))
    assert difference(net.parameters(), alone.parameters()) <= CLOSE
    for name in expected.importance:
        assert difference([optimizer.importance[name]], [expected.importance[name]]) <= CLOSE, name


def data_parallel_training_equals_one_process(directory):
    """Each rank has its share of every batch; with no_sync the shares of two batches are added up first."""
    rank, world = dist.get_rank(), dist.get_world_size()
    stream = [[(x.repeat(3, 1), y.repeat(3)) for x, y in batches] for batches in tasks(2)]  # 24 divide by 2, 3, 4
    zero = {"optimizer_class": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1}
    for make, twin, settings in [
        (INNER["SGD momentum"], INNER["SGD momentum"], {}),
        (INNER["AdamW"], INNER["AdamW"], {"importance_dtype": torch.uint8}),
        (lambda p: ZeroRedundancyOptimizer(p, **zero), INNER["AdamW"], {}),
        (lambda p: ZeroRedundancyOptimizer(p, parameters_as_bucket_view=True, **zero), INNER["AdamW"], {}),
        (lambda p: ZeroRedundancyOptimizer(p, **zero), INNER["AdamW"], {"mask": "gradient"}),
    ]:
        warnings.simplefilter("ignore", UserWarning)
        alone, net = small_net(), small_net()
        parallel = DistributedDataParallel(net, gradient_as_bucket_view=True, find_unused_parameters=True)
        expected = SPGOptimizer(twin(alone.parameters()), heads=alone.heads, **settings)
        optimizer = SPGOptimizer(make(net.parameters()), heads=net.heads, **settings)
        for t, batches in enumerate(stream):
            for i, (x, y) in enumerate(batches):
                if i % 2 == 0:
                    optimizer.zero_grad()
                    expected.zero_grad()
                F.cross_entropy(alone(x, t), y).backward()
                own = (parallel(x[rank::world], t), y[rank::world])
                if i % 2 == 0:
                    with parallel.no_sync():
                        F.cross_entropy(parallel(x[rank::world], t), y[rank::world]).backward()
                else:
                    F.cross_entropy(*own).backward()
                    optimizer.step()
                    expected.step()
            expected.measure_importance(batches, cross_head_losses(alone, t, F.cross_entropy), progress=False)
            shares = [(x[rank::world], y[rank::world]) for x, y in batches]
            optimizer.measure_importance(shares, cross_head_losses(parallel, t, F.cross_entropy), progress=False)
        assert difference(net.parameters(), alone.parameters()) <= CLOSE, settings
        for name in expected.importance:
            assert difference([optimizer.importance[name]], [expected.importance[name]]) <= CLOSE
        assert equal(values(net), _of_rank_0(values(net))), "every rank holds the same bits"


def a_zero_redundancy_checkpoint_has_the_importance(directory):
    def made():
        net = small_net()
        inner = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=0.01)
        return net, SPGOptimizer(inner, heads=net.heads, named_parameters=net.named_parameters())

    net, optimizer = made()
    learn(net, optimizer, tasks(1))
    with pytest.raises(RuntimeError, match="consolidate_state_dict"):
        optimizer.state_dict()
    optimizer.inner.consolidate_state_dict(to=0)
    sent = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent)
    _, loaded = made()
    loaded.load_state_dict(sent[0])
    assert equal(loaded.importance.values(), optimizer.importance.values()) and loaded.importance.active


def _of_rank_0(tensors):
    for tensor in (copies := [t.clone() for t in tensors]):
        dist.broadcast(tensor, 0)
    return copies


ONE_TENSOR = (shards_equal_the_oracle, wide_float64_gradients_keep_their_digits, every_placement_equals_the_oracle)
TRAINING = (fully_sharded_training_equals_one_process, importance_of_the_same_gradients_equals_one_process,
            scaled_steps_on_shards_skip_together, tensor_parallel_training_equals_one_process,
            data_parallel_training_equals_one_process, a_zero_redundancy_checkpoint_has_the_importance)


def test_two_three_and_four_ranks_equal_one_process(tmp_path):
    cases = ONE_TENSOR + TRAINING
    ranks.run(tmp_path, (4, cases), (3, cases), (2, cases))

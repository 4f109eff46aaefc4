"""Importance past one device. A mask is elementwise, so kernels run on the shard of a DTensor that a rank holds; only mean
and standard deviation are over the whole tensor. Each rank describes its shards by four float64 numbers a tensor, one gather
for each process group that tensors are sharded over (one under FSDP2, two under FSDP2 and tensor parallel) brings those of
all tensors together, and every rank merges them in the same order to the same bits.

Ordinary tensors (DDP, ZeroRedundancyOptimizer) and replicated DTensors cost no communication. Nothing here imports
torch.distributed before there is a DTensor.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import ops
from .backends.tensors import PLAIN

PIECE = 1 << 16  # elements: what is float64 for a moment stays in the cache, whatever the size of a shard
_TINY = torch.finfo(torch.float64).tiny


def is_dtensor(tensor: Tensor) -> bool:
    return type(tensor) not in PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, in the same memory; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        shard = tensor.to_local()
    return shard


def version(tensor: Tensor) -> int:
    """Grows with whatever is written to a tensor, or to its shard, into which torch.distributed.checkpoint loads."""
    return tensor._version if type(tensor) in PLAIN else tensor._version + local(tensor)._version


def device_of(parameter: Tensor) -> torch.device:
    """Where `parameter` is computed with: CPUOffloadPolicy keeps shards on the CPU, to be gathered on the mesh's device."""
    if is_dtensor(parameter) and parameter.device.type != parameter.device_mesh.device_type:
        return torch.device(parameter.device_mesh.device_type)
    return parameter.device


def local_lists(lists: tuple[list[Tensor], ...]) -> tuple[list[Tensor], ...]:
    """A masked step's lists (params, grads, gammas, ...), for kernels: what this rank holds of every tensor."""
    params, grads, *others = lists
    if set(map(type, params)) <= PLAIN:
        return lists
    # Kernels write to the shards, which autograd does not know of.
    torch.autograd.graph.increment_version(params)
    grads = [placed(grad, param) for grad, param in zip(grads, params)]
    return tuple([local(tensor) for tensor in tensors] for tensors in (params, grads, *others))


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, on every rank: a collective call; any other tensor itself."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` sharded as `like` is. A whole one becomes this rank's shard of it: it must be the same on every rank."""
    if not is_dtensor(like):
        return whole(tensor)
    from torch.distributed.tensor import DTensor, Replicate

    if not (is_dtensor(tensor) and tensor.device_mesh == like.device_mesh):
        replicas = [Replicate()] * like.device_mesh.ndim
        tensor = DTensor.from_local(whole(tensor), like.device_mesh, replicas, run_check=False)
    return tensor if tensor.placements == like.placements else tensor.redistribute(placements=like.placements)


def on_shards(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """An elementwise function of a tensor, of a DTensor by its shards."""
    if not is_dtensor(tensor):
        return function(tensor)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(function(local(tensor)), tensor.device_mesh, tensor.placements, run_check=False,
                              shape=tensor.shape, stride=tensor.stride())


def writes(tensors: Iterable[Tensor]) -> bool:
    """Whether this rank is to write a file of `tensors`: the first rank of their meshes, any rank without DTensors."""
    return all(not any(tensor.device_mesh.get_coordinate()) for tensor in tensors if is_dtensor(tensor))


def refuse_flattened(name: str, parameter: Tensor) -> None:
    """ValueError for a parameter that torch.distributed.fsdp.FullyShardedDataParallel has flattened."""
    if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(f"{name}: FullyShardedDataParallel flattens parameters into one and cuts that up, so which elements "
                         "make up one weight or bias, over which importance is standardized, is lost; use FSDP2, "
                         "torch.distributed.fsdp.fully_shard, which shards each parameter by itself")


def fold(gammas: list[Tensor], grads: list[Tensor], names: list[str], backend: str) -> None:
    """`ops.fold`, with mean and standard deviation of sharded gradients over all their shards: a collective call then.

    Raises:
        NonFiniteGradientError: on every rank, with the same names, whichever rank holds the inf or NaN.
    """
    if not any(map(is_dtensor, gammas)):
        ops.fold(gammas, grads, names, backend)
        return
    sharded = [i for i, gamma in enumerate(gammas) if _groups(gamma)]
    grads = [local(placed(grad, gamma)) for grad, gamma in zip(grads, gammas)]
    shards = [local(gamma) for gamma in gammas]
    complete = sorted(set(range(len(gammas))) - set(sharded))
    not_finite: set[str] = set()
    try:
        ops.fold([shards[i] for i in complete], [grads[i] for i in complete], [names[i] for i in complete], backend)
    except ops.NonFiniteGradientError as error:  # raised below: the other ranks wait in the gather
        not_finite.update(error.names)
    if sharded:
        described = _over_shards([gammas[i] for i in sharded], [_describe_shard(grads[i]) for i in sharded], _merge)
        for i, description in zip(sharded, described.tolist()):
            if all(map(math.isfinite, description)):
                _fold_shard(shards[i], grads[i], *description)
            else:
                not_finite.add(names[i])
    if not_finite:
        raise ops.NonFiniteGradientError([name for name in names if name in not_finite])


def mean_gamma(gammas: list[Tensor], device: torch.device) -> Tensor:
    """`ops.mean_gamma`, over all shards: a collective call if any gamma is sharded."""
    if not any(map(is_dtensor, gammas)):
        return ops.mean_gamma(gammas, device)
    shards = [local(gamma) for gamma in gammas]
    rows = [(ops.mean_gamma([shard]).double() * shard.numel()).reshape(1) for shard in shards]
    total = _over_shards(gammas, rows, _add).sum()
    return (total / max(1, sum(gamma.numel() for gamma in gammas))).float().to(device)


def totals(tensor: Tensor, measure: Callable[[Tensor], Tensor]) -> list[float]:
    """The sum of `measure(piece)`, float64 values, over small pieces of all shards: a collective call if it is sharded."""
    row = sum(measure(piece) for piece in local(tensor).reshape(-1).split(PIECE))
    return _over_shards([tensor], [row], _add)[0].tolist()


def some(tensor: Tensor) -> bool:
    """Whether any element differs from 0, in any shard: a collective call if `tensor` is sharded."""
    found = local(tensor).any().double().reshape(1)
    return bool(_over_shards([tensor], [found], lambda gathered: gathered.amax(0)))


def _groups(tensor: Tensor) -> list[tuple]:
    """The (process group, its size, its kind of device) of each mesh dimension that `tensor` is sharded over."""
    if not is_dtensor(tensor):
        return []
    mesh = tensor.device_mesh
    return [(mesh.get_group(d), mesh.size(d), mesh.device_type) for d, placement in enumerate(tensor.placements)
            if not placement.is_replicate() and mesh.size(d) > 1]


def _over_shards(tensors: list[Tensor], rows: list[Tensor], merge: Callable[[Tensor], Tensor]) -> Tensor:
    """Row i, numbers on this rank's part of tensors[i], as `merge` makes it of (parts, tensors, numbers), for all parts."""
    parts: dict[tuple, list[int]] = {}
    for i, tensor in enumerate(tensors):
        for group in _groups(tensor):
            parts.setdefault(group, []).append(i)
    merged = torch.stack([row.cpu() for row in rows])
    for (group, size, device_type), chosen in parts.items():
        import torch.distributed as dist

        own = merged[chosen].to(device_type)
        gathered = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(gathered, own, group=group)
        merged[chosen] = merge(torch.stack(gathered).cpu())
    return merged


def _add(rows: Tensor) -> Tensor:
    return rows.sum(0)


def _describe_shard(shard: Tensor) -> Tensor:
    pieces = [_describe(piece) for piece in _numbers(shard).split(PIECE)]
    return pieces[0] if len(pieces) == 1 else _merge(torch.stack(pieces).unsqueeze(1)).squeeze(0)


def _numbers(shard: Tensor) -> Tensor:
    """(elements, 1), or (elements, 2) of complex ones, whose parts are standardized together."""
    parts = torch.view_as_real(shard.resolve_conj()) if shard.is_complex() else shard.unsqueeze(-1)
    return parts.reshape(-1, parts.shape[-1])


def _describe(values: Tensor) -> Tensor:
    """(n, origin, mean - origin, root of the summed squares about the mean) of values, float64; not finite if a value is not.

    The origin is one of the values: a constant's deviations are exactly 0, and a small spread keeps its digits.
    """
    n = values.numel()
    if not n:
        return torch.zeros(4, dtype=torch.float64, device=values.device)
    origin = values.flatten()[0].double()
    x = values.double() - origin
    largest = torch.linalg.vector_norm(x, math.inf).clamp(min=_TINY)
    x /= largest  # squares stay in range
    mean = x.mean()
    root = torch.linalg.vector_norm(x.sub_(mean))
    return torch.stack([torch.full_like(origin, n), origin, mean * largest, root * largest])


def _merge(rows: Tensor) -> Tensor:
    """Descriptions of parts, (parts, tensors, 4), to those of the wholes, (tensors, 4) (Chan et al. 1979)."""
    n, origins, means, roots = rows.unbind(-1)
    total = n.sum(0)
    origin = origins.gather(0, (n > 0).int().argmax(0, keepdim=True)).squeeze(0)  # an empty part has none
    means = origins - origin + means
    mean = (n / total.clamp(min=1) * means).sum(0)
    apart = torch.where(n > 0, means - mean, 0)
    largest = torch.maximum(roots, apart.abs()).amax(0).clamp(min=_TINY)
    root = ((roots / largest).square() + n * (apart / largest).square()).sum(0).sqrt() * largest
    return torch.stack([total, origin, mean, root], -1)


def _fold_shard(gamma: Tensor, grad: Tensor, n: float, origin: float, mean: float, root: float) -> None:
    """gamma <- max(gamma, |tanh((g - mean) / std)|) for this rank's shard; a constant has no importance."""
    if root == 0:
        return
    std = root / math.sqrt(n - 1)
    in_order = gamma.reshape(-1)  # a copy where memory has another order
    for a, g in zip(in_order.split(PIECE), _numbers(grad).split(PIECE)):
        z = (g.double() - origin).sub_(mean).div_(std).abs_()
        z = z.squeeze(-1) if z.shape[-1] == 1 else z.amax(-1)
        # Of the digits that a float64 tanh computes, at twice the time of all else here, float32 gammas keep none.
        torch.maximum(a, ops.squash(z.float() if a.dtype == torch.float32 else z, a.dtype), out=a)
    if not gamma.is_contiguous():
        gamma.copy_(in_order.view(gamma.shape))

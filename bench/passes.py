"""The elementwise passes: importance, soft mask, update mask. What they are compared with, and what they must compute."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import spg_kernels
from spg_kernels import reference

from . import peers
from .buffers import Buffers
from .machine import cache_bytes
from .timing import Contender


@dataclass(frozen=True)
class Pass:
    """A pass over a whole model.

    Args:
        kinds: the buffers it works on.
        least_bytes: bytes per parameter that the most frugal contender touches in a call.
        contenders: all ways to do it, on given buffers.
        expected: (buffers, contender, i) -> what tensor i must be after one call, in float64, by kind.
        dtype: of everything but importance.
    """

    name: str
    kinds: tuple[str, ...]
    least_bytes: float
    contenders: Callable[[Buffers], list[Contender]]
    expected: Callable[[Buffers, Contender, int], dict[str, Tensor]]
    dtype: torch.dtype = torch.float32


def _on_slots(buffers: Buffers, function: Callable, *kinds: str) -> list[Callable]:
    return [partial(function, *(lists[kind] for kind in kinds)) for lists in buffers.lists]


def _compiled_on_slots(buffers: Buffers, one: Callable, *kinds: str) -> list[Callable]:
    return [peers.compiled_over(one, [lists[kind] for kind in kinds]) for lists in buffers.lists]


def _importance_bytes(buffers: Buffers, gamma_bytes: int) -> float:
    """The gradient is read once more, from memory where the tensor is larger than the cache; gamma is read and written."""
    numels = buffers.set.numels
    again = sum(4 * n for n in numels if 4 * n > cache_bytes(buffers.device.type))
    return 4 + 2 * gamma_bytes + again / sum(numels)


def _importance_contenders(buffers: Buffers) -> list[Contender]:
    on = partial(_on_slots, buffers)
    ours = spg_kernels.accumulate_importance_
    return [
        Contender("spg float32", on(ours, "gammas", "grads"), _importance_bytes(buffers, 4), "gammas"),
        Contender("spg 8-bit", on(ours, "codes", "grads"), _importance_bytes(buffers, 1), "codes"),
        Contender("eager", on(peers.eager_importance, "gammas", "grads"), 52, "gammas"),
        Contender("foreach", on(peers.foreach_importance, "gammas", "grads"), 48, "gammas"),
        Contender("compile", _compiled_on_slots(buffers, peers.one_importance, "gammas", "grads"), 16, "gammas"),
    ]


def _expected_importance(buffers: Buffers, contender: Contender, i: int) -> dict[str, Tensor]:
    gamma = buffers.initial(contender.gamma, i)
    reference.accumulate_importance_([gamma], [buffers.initial("grads", i)])
    return {contender.gamma: gamma}


def _soft_mask_contenders(buffers: Buffers) -> list[Contender]:
    on = partial(_on_slots, buffers)
    restore = partial(buffers.fill, kinds=("grads",))
    return [
        Contender("spg float32", on(spg_kernels.soft_mask_, "grads", "gammas"), 12, "gammas", restore=restore),
        Contender("spg 8-bit", on(spg_kernels.soft_mask_, "grads", "codes"), 9, "codes", restore=restore),
        Contender("eager", on(peers.eager_soft_mask, "grads", "gammas"), 20, "gammas", restore=restore),
        Contender("foreach", on(peers.foreach_soft_mask, "grads", "gammas"), 12, "gammas", restore=restore),
        Contender("compile", _compiled_on_slots(buffers, peers.one_soft_mask, "grads", "gammas"), 12, "gammas",
                  restore=restore),
    ]


def _expected_soft_mask(buffers: Buffers, contender: Contender, i: int) -> dict[str, Tensor]:
    grad = buffers.initial("grads", i).double()
    reference.soft_mask_([grad], [buffers.initial(contender.gamma, i)])
    return {"grads": grad}


def _update_mask_contenders(buffers: Buffers) -> list[Contender]:
    on = partial(_on_slots, buffers)
    names = ("params", "old_params", "gammas")
    return [
        Contender("spg float32", on(spg_kernels.update_mask_, *names), 16, "gammas"),
        Contender("spg 8-bit", on(spg_kernels.update_mask_, "params", "old_params", "codes"), 13, "codes"),
        Contender("eager", on(peers.eager_update_mask, *names), 16, "gammas"),
        Contender("foreach", on(peers.foreach_update_mask, *names), 16, "gammas"),
        Contender("compile", _compiled_on_slots(buffers, peers.one_update_mask, *names), 16, "gammas"),
    ]


def _expected_update_mask(buffers: Buffers, contender: Contender, i: int) -> dict[str, Tensor]:
    param = buffers.initial("params", i).double()
    reference.update_mask_([param], [buffers.initial("old_params", i).double()], [buffers.initial(contender.gamma, i)])
    return {"params": param}


ELEMENTWISE = (
    Pass("importance", ("gammas", "codes", "grads"), 5, _importance_contenders, _expected_importance),
    Pass("soft mask", ("grads", "gammas", "codes"), 5, _soft_mask_contenders, _expected_soft_mask),
    Pass("update mask", ("params", "old_params", "gammas", "codes"), 9, _update_mask_contenders, _expected_update_mask),
)


def assert_correct(the_pass: Pass, buffers: Buffers, contenders: list[Contender]) -> None:
    """Run each contender once on fresh buffers; AssertionError unless every number of every tensor is the reference's."""
    tensors = range(len(buffers.set.shapes))
    for meaning in dict.fromkeys((c.gamma, c.mask) for c in contenders):
        equals = [c for c in contenders if (c.gamma, c.mask) == meaning]
        expected = [_in_storage(the_pass.expected(buffers, equals[0], i)) for i in tensors]
        for contender in equals:
            buffers.fill(0, the_pass.kinds)
            contender.calls[0]()
            for i in tensors:
                for kind, right in expected[i].items():
                    wrong = count_wrong(buffers.lists[0][kind][i].detach(), right)
                    assert not wrong, (f"{contender.name}, {the_pass.name}, {buffers.set.name}: "
                                       f"{wrong} elements of {kind}[{i}] are wrong")


def _in_storage(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    # Rounded once, which is far below what is asserted; in float64 the whole model might not fit.
    return {kind: value.float() if value.is_floating_point() else value for kind, value in expected.items()}


def count_wrong(actual: Tensor, expected: Tensor) -> int:
    """Elements further from the reference than 4e-6, relative where it is above 1, or in half precision than 4e-6 and what two
    roundings add; NaN is wrong.
    """
    if actual.dtype == torch.uint8:
        # A code is a ceiling: a last-bit difference in z may take the next one, rarely.
        off = (actual.int() - expected.int()).abs()
        near = int((off == 1).sum())
        return int((off > 1).sum()) + (near if near > 1 + 1e-4 * off.numel() else 0)
    magnitude = expected.abs()
    if actual.dtype == torch.float32:
        allowed = magnitude.clamp_(min=1).mul_(4e-6)
    else:
        allowed = magnitude.mul_(torch.finfo(actual.dtype).eps).add_(4e-6)
    return int((~((actual - expected).abs_() <= allowed)).sum())

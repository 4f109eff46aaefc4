"""A whole training step with and without protection, and the measuring pass, of a small network."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.optim import AdamW

from spg_kernels import Importance, SharedTrunkLosses, SPGOptimizer, cross_head_losses, reference

from . import peers
from .network import problem
from .passes import count_wrong
from .timing import Contender

_SET = "small network"


def _size(model) -> tuple[int, int]:
    return sum(p.numel() for p in model.parameters()), len(list(model.parameters()))


def _step(own, optimizer, around=lambda step: step()) -> None:
    optimizer.zero_grad()
    own.loss().backward()
    around(optimizer.step)


def _expected_after_step(device, gamma_dtype: torch.dtype | None, mask: str) -> list[torch.Tensor]:
    own = problem(device)
    own.loss().backward()
    trained = [p for p in own.model.parameters() if p.grad is not None]
    gammas = [torch.zeros((), device=device)] * len(trained)
    if gamma_dtype is not None:
        known = zip(own.model.parameters(), own.gammas(own.importance(gamma_dtype)))
        gammas = [gamma for p, gamma in known if p.grad is not None]
    params = [p.detach().double() for p in own.model.parameters()]
    moving = [new for new, p in zip(params, own.model.parameters()) if p.grad is not None]
    zeros = [[torch.zeros_like(p) for p in moving] for _ in range(2)]
    reference.masked_adamw_(moving, [p.grad.double() for p in trained], gammas, *zeros, [], [torch.zeros(()) for _ in moving],
                            lr=1e-3, mask=mask)
    return params


def _training_contenders(device) -> list[tuple[Contender, torch.dtype | None]]:
    """(contender, its gamma's dtype), each with a network of its own, all equal."""
    def own_problem(**how):
        own = problem(device)
        return own, AdamW(own.model.parameters(), lr=1e-3, **how)

    contenders = []
    for name, dtype in (("spg float32", torch.float32), ("spg 8-bit", torch.uint8)):
        own, inner = own_problem()
        optimizer = SPGOptimizer(inner, heads=own.model.heads, importance=own.importance(dtype))
        contenders.append((Contender(name, [partial(_step, own, optimizer)]), dtype))
    for name, mask in (("eager", "gradient"), ("copy, step, lerp", "update")):
        own, inner = own_problem(fused=True)
        trained = [i for i, (n, _) in enumerate(own.model.named_parameters()) if n.startswith(("trunk.", "heads.0."))]
        params, gammas = list(own.model.parameters()), own.gammas(own.importance(torch.float32))
        params, gammas = [params[i] for i in trained], [gammas[i] for i in trained]
        masked = (peers.eager_mask_step if name == "eager"
                  else partial(peers.copy_step_lerp, [p.detach().clone() for p in params]))
        around = partial(torch.no_grad()(masked), params, gammas)
        contenders.append((Contender(name, [partial(_step, own, inner, around)], mask=mask), torch.float32))
    for name, how in (("unmasked fused", {"fused": True}), ("unmasked foreach", {"foreach": True})):
        contenders.append((Contender(name, [partial(_step, *own_problem(**how))]), None))
    return contenders


def test_training_step(device, timed):
    contenders = _training_contenders(device)
    for contender, dtype in contenders:
        contender.calls[0]()
        moved = contender.calls[0].args[0].model.parameters()
        for i, (actual, expected) in enumerate(zip(moved, _expected_after_step(device, dtype, contender.mask))):
            assert not count_wrong(actual.detach(), expected), f"{contender.name}: parameter {i}"
    timed([contender for contender, _ in contenders], "training step", _SET, *_size(problem(device).model), False)


def _measure_by_hand(own, losses, fold) -> None:
    for loss in losses:
        own.model.zero_grad()
        for batch in own.loader:
            loss(batch).backward()
        fold([p.grad for _, p in own.trunk()])
    own.model.zero_grad()


@pytest.mark.parametrize("heads", [1, 5, 10])
def test_measuring(heads, device, without, timed):
    own = problem(device)
    losses = cross_head_losses(own.model, heads - 1, F.cross_entropy)

    def zeros(dtype):
        return [torch.zeros_like(p, dtype=dtype, requires_grad=False) for _, p in own.trunk()]

    expected = {torch.float32: zeros(torch.float32), torch.uint8: zeros(torch.uint8)}
    for gammas in expected.values():
        _measure_by_hand(own, losses, partial(reference.accumulate_importance_, gammas))

    contenders, measured = [], {}
    shared = SharedTrunkLosses(own.model.trunk, own.model.heads, heads - 1, F.cross_entropy)
    for name, dtype, ours in (("spg float32", torch.float32, shared), ("spg 8-bit", torch.uint8, shared),
                              ("a pass a head", torch.float32, losses)):
        importance = Importance(own.trunk(), dtype)
        optimizer = SPGOptimizer(AdamW(own.model.parameters()), heads=own.model.heads, importance=importance)
        measured[name] = [importance.gamma(p) for _, p in own.trunk()]
        contenders.append(Contender(name, [partial(optimizer.measure_importance, own.loader, ours, progress=False)]))
    for name, fold in (("eager", peers.eager_importance), ("foreach", peers.foreach_importance), ("compile", None)):
        if name in without:
            continue
        gammas = measured[name] = zeros(torch.float32)
        fold = partial(fold, gammas) if fold else partial(_compiled_fold, gammas)
        contenders.append(Contender(name, [partial(_measure_by_hand, own, losses, torch.no_grad()(fold))]))
    contenders.append(Contender("gradients only", [partial(_measure_by_hand, own, losses, lambda grads: None)]))

    for contender in contenders:
        contender.calls[0]()
        gammas = measured.get(contender.name, [])
        for i, (actual, right) in enumerate(zip(gammas, expected[gammas[0].dtype] if gammas else [])):
            assert not count_wrong(actual, right), f"{contender.name}: gamma of parameter {i}"
    timed(contenders, f"measuring, {heads} head{'s' if heads > 1 else ''}", _SET, *_size(own.model), False)


def _compiled_fold(gammas, grads) -> None:
    peers.compiled_over(peers.one_importance, [gammas, grads])()

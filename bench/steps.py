"""The optimizer steps, as users call them: SPGOptimizer around torch's optimizer, and what is done without it.

"unmasked" is the floor: torch's own step, which protects nothing. "eager" and "foreach" mask the gradient and then take
torch's fused step; "copy, step, lerp" masks the update of torch's fused step; "compile" is the masked step compiled.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from spg_kernels import Importance, SPGOptimizer, reference

from . import peers
from .buffers import Buffers
from .passes import Pass
from .timing import Contender

LR, MOMENTUM, BETAS, EPS, WEIGHT_DECAY = 1e-3, 0.9, (0.9, 0.999), 1e-8, 1e-2
STEPS_BEFORE = 10  # the state is that of a run under way
# These round between their operations, and in half precision are not equal to the reference.
_ROUNDING_BETWEEN = ("eager", "foreach", "copy, step, lerp", "unmasked foreach")


@dataclass(frozen=True)
class Step:
    """An optimizer to be masked.

    Args:
        states: its state's names in torch, and the kinds of buffers they are.
        fused_accesses, foreach_accesses: elements that torch's fused and foreach step read and write per parameter; gamma is
            read on top.
        dtype: of parameters, gradients and states.
    """

    name: str
    make: Callable[..., Optimizer]
    states: dict[str, str]
    fused_accesses: int
    foreach_accesses: int
    reference: Callable[..., None]
    compiled: Callable[[dict[str, list[Tensor]], list[Tensor]], Callable[[], None]]
    dtype: torch.dtype = torch.float32


def _optimizer(step: Step, lists: dict[str, list[Tensor]], **arguments) -> Optimizer:
    """torch's optimizer on the buffers of a slot, which all contenders share; only the step counts are its own."""
    optimizer = step.make(lists["params"], **arguments)
    for i, parameter in enumerate(lists["params"]):
        state = {name: lists[kind][i] for name, kind in step.states.items()}
        if step.make is ADAMW.make:
            on = parameter.device if arguments.get("fused") else "cpu"  # as torch makes them
            state["step"] = torch.tensor(float(STEPS_BEFORE), device=on)
        optimizer.state[parameter] = state
    return optimizer


def _prepare(buffers: Buffers) -> None:
    for lists in buffers.lists:
        lists["params"] = [torch.nn.Parameter(tensor) for tensor in lists["params"]]
        for parameter, grad in zip(lists["params"], lists["grads"]):
            parameter.grad = grad


def _importance(buffers: Buffers, lists: dict[str, list[Tensor]], kind: str) -> Importance:
    named = [(str(i), parameter) for i, parameter in enumerate(lists["params"])]
    importance = Importance(named, torch.uint8 if kind == "codes" else torch.float32)
    for i in range(len(named)):
        importance.store({str(i): buffers.initial(kind, i)})
    return importance


def _contenders(step: Step, buffers: Buffers) -> list[Contender]:
    _prepare(buffers)
    importances = [{kind: _importance(buffers, lists, kind) for kind in ("gammas", "codes")} for lists in buffers.lists]
    gammas = [[own["gammas"].gamma(p) for p in lists["params"]] for own, lists in zip(importances, buffers.lists)]
    restore = partial(buffers.fill, kinds=("grads",))
    old = [torch.empty_like(p, requires_grad=False) for p in buffers.lists[0]["params"]]

    def masked(kind: str) -> list[Callable]:
        return [SPGOptimizer(_optimizer(step, lists), importance=own[kind]).step
                for lists, own in zip(buffers.lists, importances)]

    def unmasked(**how: bool) -> list[Callable]:
        return [_optimizer(step, lists, **how).step for lists in buffers.lists]

    def around(function: Callable) -> list[Callable]:
        return [partial(function, lists["params"], own_gammas, fused)
                for fused, lists, own_gammas in zip(unmasked(fused=True), buffers.lists, gammas)]

    size = step.dtype.itemsize
    fused = size * step.fused_accesses
    contenders = [
        Contender("spg float32", masked("gammas"), fused + 4, "gammas"),
        Contender("spg 8-bit", masked("codes"), fused + 1, "codes"),
        Contender("eager", around(peers.eager_mask_step), fused + 20, "gammas", "gradient", restore),
        Contender("foreach", around(peers.foreach_mask_step), fused + 12, "gammas", "gradient", restore),
        Contender("copy, step, lerp", around(partial(peers.copy_step_lerp, old)), fused + 24, "gammas"),
        Contender("compile", [step.compiled(lists, own) for lists, own in zip(buffers.lists, gammas)], fused + 4, "gammas"),
        Contender("unmasked fused", unmasked(fused=True), fused),
        Contender("unmasked foreach", unmasked(foreach=True), size * step.foreach_accesses),
    ]
    return [c for c in contenders if step.dtype == torch.float32 or c.name not in _ROUNDING_BETWEEN]


def _expected(step: Step, buffers: Buffers, contender: Contender, i: int) -> dict[str, Tensor]:
    values = {kind: buffers.initial(kind, i).double() for kind in ("params", "grads", *step.states.values())}
    gamma = torch.zeros((), device=buffers.device) if contender.gamma is None else buffers.initial(contender.gamma, i)
    states = [[values[kind]] for kind in step.states.values()]
    step.reference([values["params"]], [values["grads"]], [gamma], *states, mask=contender.mask)
    del values["grads"]
    return values


def _reference_sgd(params, grads, gammas, buffers=(), *, mask: str) -> None:
    reference.masked_sgd_(params, grads, gammas, buffers, lr=LR, momentum=MOMENTUM if buffers else 0.0, mask=mask)


def _reference_adamw(params, grads, gammas, exp_avgs, exp_avg_sqs, *, mask: str) -> None:
    steps = [torch.tensor(float(STEPS_BEFORE))]
    reference.masked_adamw_(params, grads, gammas, exp_avgs, exp_avg_sqs, [], steps, lr=LR, beta1=BETAS[0], beta2=BETAS[1],
                            eps=EPS, weight_decay=WEIGHT_DECAY, mask=mask)


def _compiled_sgd(lists: dict[str, list[Tensor]], gammas: list[Tensor]) -> Callable[[], None]:
    call = peers.compiled_over(peers.one_masked_sgd, [lists["params"], lists["grads"], gammas])
    return partial(call, LR)


def _compiled_momentum(lists: dict[str, list[Tensor]], gammas: list[Tensor]) -> Callable[[], None]:
    call = peers.compiled_over(peers.one_masked_momentum, [lists["params"], lists["grads"], gammas, lists["momentum_buffers"]])
    return partial(call, LR, MOMENTUM)


def _compiled_adamw(lists: dict[str, list[Tensor]], gammas: list[Tensor]) -> Callable[[], None]:
    tensors = [lists["params"], lists["grads"], gammas, lists["exp_avgs"], lists["exp_avg_sqs"]]
    call = peers.compiled_over(peers.one_masked_adamw, tensors)
    device, steps = gammas[0].device, STEPS_BEFORE

    def step() -> None:
        nonlocal steps
        steps += 1
        # As tensors: a new number every step would compile a new graph every step. Filled, for a copy would synchronize.
        corrections = (torch.full((), 1 - beta**steps, device=device) for beta in BETAS)
        call(*corrections, LR, *BETAS, EPS, WEIGHT_DECAY)

    return step


def _adamw(params, **how) -> AdamW:
    return AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **how)


ADAMW = Step("adamw", _adamw, {"exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs"}, 7, 20, _reference_adamw, _compiled_adamw)
SGD_PLAIN = Step("sgd", partial(SGD, lr=LR), {}, 3, 3, _reference_sgd, _compiled_sgd)
SGD_MOMENTUM = Step("sgd momentum", partial(SGD, lr=LR, momentum=MOMENTUM), {"momentum_buffer": "momentum_buffers"}, 5, 8,
                    _reference_sgd, _compiled_momentum)
# Not SGD as well: on the CPU torch's fused one leaves parameters in half precision where they are (torch 2.13).
ADAMW_BFLOAT16 = replace(ADAMW, name="adamw bfloat16", dtype=torch.bfloat16)


def _pass(step: Step) -> Pass:
    least = step.dtype.itemsize * (step.fused_accesses - 1 - len(step.states))
    return Pass(step.name, ("params", "grads", *step.states.values()), least, partial(_contenders, step),
                partial(_expected, step), step.dtype)


STEPS = tuple(map(_pass, (SGD_PLAIN, SGD_MOMENTUM, ADAMW, ADAMW_BFLOAT16)))

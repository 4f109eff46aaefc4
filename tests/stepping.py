"""SPGOptimizer in plain float64, one parameter at a time: the model its property tests compare every step with."""

from dataclasses import dataclass, field

import torch

from . import oracle


@dataclass
class Slot:
    """One parameter and all that belongs to it; gamma as stored, None for a head."""

    value: torch.Tensor
    grad: torch.Tensor | None
    gamma: torch.Tensor | None
    group: dict
    state: dict = field(default_factory=dict)


def snapshot(optimizer) -> list[Slot]:
    slots = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for p in group["params"]:
            gamma = optimizer.importance.gamma(p)
            state = {key: value.clone() for key, value in optimizer.inner.state.get(p, {}).items()
                     if isinstance(value, torch.Tensor)}
            slots.append(Slot(p.detach().clone(), None if p.grad is None else p.grad.clone(),
                              None if gamma is None else gamma.clone(), settings, state))
    return slots


def same(a: list[Slot], b: list[Slot]) -> bool:
    """Bit for bit; state that is not there yet is the zeros that torch begins with."""
    def equal(x, y):
        return x is y if x is None or y is None else (torch.equal(x.nan_to_num(7), y.nan_to_num(7))
                                                      and torch.equal(x.isnan(), y.isnan()))

    return len(a) == len(b) and all(
        equal(x.value, y.value) and equal(x.grad, y.grad) and equal(x.gamma, y.gamma) and x.group == y.group
        and all(equal(x.state.get(key, torch.zeros_like(y.state.get(key, x.value))),
                      y.state.get(key, torch.zeros_like(x.state.get(key, x.value))))
                for key in {*x.state, *y.state}) for x, y in zip(a, b))


def mean_gamma(slots: list[Slot]) -> torch.Tensor:
    keeps = [oracle.keep(slot.gamma).flatten() for slot in slots if slot.gamma is not None]
    return 1 - torch.cat(keeps).mean() if sum(keep.numel() for keep in keeps) else torch.tensor(0.0).double()


def step(slots: list[Slot], kind: str, mask: str) -> list[dict]:
    """What each parameter and its state are after a masked step: {"value", "rounding", state...}, float64."""
    head_keep = 1 - mean_gamma(slots)
    return [one_step(slot, kind, mask, head_keep if slot.gamma is None else oracle.keep(slot.gamma)) for slot in slots]


def one_step(slot: Slot, kind: str, mask: str, keep: torch.Tensor) -> dict:
    old, group = slot.value.double(), slot.group
    if slot.grad is None:
        return {"value": old, **{key: value.double() for key, value in slot.state.items()}}
    d = slot.grad.double()
    d = torch.where(keep == 0, 0.0, d * keep) if mask == "gradient" else d
    state = {key: value.double() for key, value in slot.state.items()}
    lr, decay = group["lr"], group["weight_decay"]
    if kind == "SGD":
        d = d + decay * old
        if group["momentum"]:
            buffer = d
            if "momentum_buffer" in state:
                buffer = group["momentum"] * state["momentum_buffer"] + (1 - group["dampening"]) * d
            state["momentum_buffer"] = buffer
            d = d + group["momentum"] * buffer if group["nesterov"] else buffer
        new = old - lr * d
    elif kind == "AdamW":
        (beta1, beta2), zeros = group["betas"], torch.zeros_like(old)
        count = state["step"] = state.get("step", torch.tensor(0.0).double()) + 1
        m = state["exp_avg"] = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * d
        v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * d**2
        if group["amsgrad"]:
            v = state["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", zeros), v)
        new = old * (1 - lr * decay) - lr / (1 - beta1**count) * m / (v.sqrt() / (1 - beta2**count) ** 0.5 + group["eps"])
    else:
        assert kind == "RMSprop"
        d = d + decay * old
        state["step"] = state.get("step", torch.tensor(0.0).double()) + 1
        v = state["square_avg"] = group["alpha"] * state.get("square_avg", torch.zeros_like(old)) + (1 - group["alpha"]) * d**2
        new = old - lr * d / (v.sqrt() + group["eps"])
    blended = torch.where(keep == 0, old, old + keep * (new - old)) if mask == "update" else new
    return {"value": blended, **state}


def assert_stepped(before: list[Slot], after: list[Slot], expected: list[dict], mask: str) -> None:
    eps = torch.finfo(torch.float32).eps
    for was, now, right in zip(before, after, expected, strict=True):
        bound = 16 * eps * was.value.double().abs() + 100 * eps * was.group["lr"]
        assert ((now.value - right["value"]).abs() <= bound).all(), (now.value - right["value"]).abs().max()
        if mask == "update" and was.gamma is not None:
            frozen = oracle.keep(was.gamma) == 0
            assert torch.equal(now.value[frozen], was.value[frozen])
        assert {*now.state} == {*right} - {"value"} or was.grad is None
        for key, state in now.state.items():
            expected_state = right.get(key, torch.zeros_like(state))
            assert ((state - expected_state).abs() <= 16 * eps * (expected_state.abs() + 1)).all(), key
    assert same([Slot(s.value * 0, s.grad, s.gamma, s.group) for s in before],
                [Slot(s.value * 0, s.grad, s.gamma, s.group) for s in after]), "gradients, gammas and settings keep every bit"

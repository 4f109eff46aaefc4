"""Calls of the masks and steps with all kinds of tensors, for Triton's interpreter and for a GPU."""

import torch

import spg_kernels
from spg_kernels import ops, reference

STEPS = 6  # the place of the step counts among AdamW's lists
# Around the blocks of the steps (1024) and masks (2048, 4096 in half precision), and past a chunk of the steps.
SIZES = (0, 1, 3, 1023, 1024, 1025, 2048, 4097, 8193)
GAMMAS = ("float32", "8-bit")


def gammas_of(shapes, kind: str) -> list[torch.Tensor]:
    """Of the shapes, float32 or codes, with all values in them; every third is one value, as the heads' are."""
    made = []
    for i, shape in enumerate(shapes):
        gamma = torch.rand(shape)
        gamma.view(-1)[::5] = 1
        gamma.view(-1)[1::5] = 0
        codes = torch.randint(0, 256, shape, dtype=torch.uint8)
        made.append(torch.rand(()) if i % 3 == 2 else gamma if kind == "float32" else codes)
    return made


def inputs(op: str, dtype, state_dtype, gamma_kind: str, shapes=None, seed: int = 0):
    """The lists of a call."""
    torch.manual_seed(seed)
    shapes = [(n,) for n in SIZES] if shapes is None else shapes

    def normal(kind=dtype):
        return [torch.randn(shape).to(kind) for shape in shapes]

    gammas = gammas_of(shapes, gamma_kind)
    if op == "soft_mask_":
        return normal(), gammas
    if op == "update_mask_":
        return normal(), normal(), gammas
    if op == "masked_sgd_":
        return normal(), normal(), gammas, normal(state_dtype)
    squares = [[t.square() for t in normal(state_dtype)] for _ in range(2)]
    return normal(), normal(), gammas, normal(state_dtype), *squares, [torch.tensor(float(i % 4)) for i in range(len(shapes))]


SETTINGS = {
    "soft_mask_": [{}],
    "update_mask_": [{}],
    "masked_sgd_": [
        dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01, nesterov=True),
        dict(lr=torch.tensor(0.1), momentum=0.9, is_first_step=True, maximize=True, mask="gradient"),
        dict(lr=0.1, momentum=0.9, maximize=True, grad_scale=torch.tensor(3000.7), found_inf=torch.tensor(0.0)),
    ],
    "masked_adamw_": [
        dict(lr=0.1, weight_decay=0.01),
        dict(lr=torch.tensor(0.1), beta1=0.5, beta2=0.95, weight_decay=0.01, decoupled=False, maximize=True, mask="gradient"),
        dict(lr=0.1, weight_decay=0.01, grad_scale=torch.tensor(3000.7), found_inf=torch.tensor(0.0)),
    ],
}
CASES = [(op, settings) for op in SETTINGS for settings in SETTINGS[op]]


def copies(lists):
    return tuple([t.clone() for t in tensors] for tensors in lists)


def in_float64(lists):
    """The same numbers for the reference in float64; codes stay codes and step counts float32."""
    return tuple([t.double() if t.is_floating_point() and k != STEPS else t.clone() for t in tensors]
                 for k, tensors in enumerate(lists))


def worst(k: int, actual, exact, before) -> float:
    """The largest error in list `k`, in units of its dtype at the largest number that the result was summed from."""
    errors = [0.0]
    for i, (ours, truth) in enumerate(zip(actual[k], exact[k])):
        size = torch.stack([truth.abs(), *(tensors[i].double().abs().expand_as(truth) for tensors in before[:2])]).amax(0)
        error = (ours.double() - truth).abs() / (torch.finfo(ours.dtype).eps * size.clamp(min=torch.finfo(ours.dtype).tiny))
        errors += [error.max().item()] if ours.numel() else []
    return max(errors)


def compare_with_float64(op: str, settings: dict, lists, spare: float = 0) -> None:
    """Run `op`; its error is at most twice the error of the reference, in the same dtypes, and `spare` units more."""
    if op == "masked_adamw_" and settings.get("decoupled", True):
        lists = (*lists[:5], [], lists[6])  # no amsgrad
    before, theirs, exact = copies(lists), copies(lists), in_float64(lists)
    getattr(spg_kernels, op)(*lists, **settings, backend="triton")
    getattr(reference, op)(*theirs, **settings)
    getattr(reference, op)(*exact, **settings)
    for k in ops._MUTATED[op]:
        if k == STEPS:
            assert lists[k] == exact[k]
        else:
            assert worst(k, lists, exact, before) <= 2 * worst(k, theirs, exact, before) + spare, k
    for k, (tensors, old) in enumerate(zip(lists, before)):
        assert k in ops._MUTATED[op] or all(torch.equal(a, b) for a, b in zip(tensors, old)), "an input was written"


def equal(ours, theirs) -> bool:
    """Whether two calls' lists hold the same bits."""
    return all(torch.equal(a, b) for tensors, others in zip(ours, theirs) for a, b in zip(tensors, others))


def fold(gammas: list[torch.Tensor], grads: list[torch.Tensor]) -> torch.Tensor:
    """The Triton kernel's own answer: which gradients were finite."""
    return ops._run("accumulate_importance_", (gammas, grads), {}, "triton")

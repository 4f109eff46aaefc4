"""Which optimizers can be wrapped, with which mask: what is refused, and what a warning says."""

from torch.optim import LBFGS, SGD, Optimizer

from .checks import check_mask


def check_maskable(inner: Optimizer, mask: str) -> None:
    """ValueError if there is no such mask, or `inner` goes past or undoes it. TypeError if it is no whole torch optimizer."""
    check_mask(mask)
    if not hasattr(inner, "defaults"):
        raise TypeError(f"optimizer: {type(inner).__name__} has no `defaults`, as a torch optimizer has: put SPGOptimizer "
                        "around the optimizer inside it")
    if getattr(inner, "_overlap_with_ddp", False):
        raise ValueError("optimizer: ZeroRedundancyOptimizer with overlap_with_ddp=True steps inside backward, where no mask "
                         "reaches; use overlap_with_ddp=False")
    if mask == "update" and callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None)):
        raise ValueError(f"mask: {type(inner).__name__} moves the parameters in train() and eval() too, which undoes "
                         "mask='update'; use mask='gradient'")


def caveat_of(inner: Optimizer, mask: str) -> str | None:
    """What `inner` does that does not go with `mask`; None if they go together."""
    if isinstance(inner, LBFGS):
        masked = "training may diverge" if mask == "update" else "all that is not fully important moves further than it should"
        return f"makes one step of all parameters together: {masked}; SGD and AdamW can be masked"
    if mask == "update":
        return None
    undone = "important parameters will move all the same; mask='update' protects them"
    if not isinstance(inner, SGD):
        return f"adapts its step to the scale of the gradient: {undone}"
    return f"decays weights: {undone}" if any(group.get("weight_decay") for group in inner.param_groups) else None

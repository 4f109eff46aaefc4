"""The task heads: modules or parameters, which hold no gamma."""

from collections.abc import Iterable

from torch import Tensor, nn


def heads_of(heads) -> list[nn.Module | Tensor]:
    """`heads` as a list; a list itself, which may grow. TypeError if it is neither modules nor parameters."""
    if not isinstance(heads, nn.Module | Iterable):
        raise TypeError(f"heads: expected modules or parameters, got {type(heads).__name__}")
    if isinstance(heads, nn.Module | Tensor):
        return [heads]
    return heads if isinstance(heads, list) else list(heads)


def parameters_of(heads: list[nn.Module | Tensor]) -> list[Tensor]:
    """The parameters of all heads as they are now. TypeError names what is no head."""
    for i, head in enumerate(heads):
        if not isinstance(head, nn.Module | Tensor):
            raise TypeError(f"heads[{i}]: expected a module or a parameter, got {type(head).__name__}")
    return [p for head in heads for p in (head.parameters() if isinstance(head, nn.Module) else (head,))]


def refuse_known(known: list[str]) -> None:
    """ValueError if there are heads that the importance knows, by these names."""
    if known:
        raise ValueError(f"heads: {', '.join(known)} have an importance, as trunk parameters do; leave heads out of it, and "
                         "append a head to `heads` before its parameters come with add_param_group")

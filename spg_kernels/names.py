"""Parameters by name, as `model.named_parameters()` gives them."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor


def as_named(named_parameters: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """(name, parameter) pairs, of a mapping its items. TypeError for anything else, such as `model.parameters()`."""
    pairs = named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters
    expected = "(name, parameter), as model.named_parameters() gives them"
    if not isinstance(pairs, Iterable):
        raise TypeError(f"named_parameters: expected pairs {expected}, got {type(pairs).__name__}")
    pairs = list(pairs)
    for i, pair in enumerate(pairs):
        is_sequence = isinstance(pair, tuple | list)  # a tensor of two rows is none
        if not (is_sequence and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)):
            seen = f"({', '.join(type(part).__name__ for part in pair)})" if is_sequence else type(pair).__name__
            raise TypeError(f"named_parameters[{i}]: expected {expected}, got {seen}")
    return pairs


def by_name(named_parameters: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The pairs as a dictionary. ValueError where two parameters have one name."""
    parameters = dict(named_parameters)
    for name, parameter in named_parameters:
        if parameters[name] is not parameter:
            raise ValueError(f"{name}: two parameters are called so; named_parameters=model.named_parameters(), of one model "
                             "that holds them all, tells them apart")
    return parameters

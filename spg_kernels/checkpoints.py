"""An optimizer's checkpoint, taken apart: the importance, and what the inner optimizer loads."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .files import check_tasks
from .importance import Importance
from .state import KEY, TASKS, without_importance


def by_key(state_dict: dict, parameters: list[Tensor]) -> dict[int | str, Tensor]:
    """The parameters by what the groups of a state dict call them: a number or, torch.distributed.checkpoint, a name."""
    return dict(zip((key for group in state_dict["param_groups"] for key in group["params"]), parameters))


def taken_apart(state_dict: dict, parameters: list[Tensor], importance: Importance,
                slot_of: Callable[[Tensor], str]) -> tuple[dict[str, Tensor], int, dict]:
    """The gammas of a state dict by name, the number of tasks, and the inner optimizer's state dict.

    Args:
        parameters, importance: what the optimizer has that loads it.
        slot_of: names a parameter that the importance does not know, for errors.

    Raises:
        ValueError, TypeError: it is no state dict, or its importance does not fit. It warns if that lacks some parameter.
    """
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not (isinstance(groups, Sequence) and all(isinstance(group, Mapping) and "params" in group for group in groups)
            and isinstance(state_dict.get("state"), Mapping)):
        raise ValueError("state_dict: expected 'state' and 'param_groups' with 'params' in each, as state_dict() gives them")
    saved = by_key(state_dict, parameters)
    named = _by_name(state_dict, saved, importance)
    if any(saved[key] is not parameter for key, parameter in named.items()):
        saved = named
        warnings.warn("state_dict: its parameters come in another order than this optimizer's; the importance goes by name, "
                      "the inner optimizer's state, as torch loads it, by position", stacklevel=3)
    gammas, inner_state = {}, {}
    for key, state in state_dict["state"].items():
        inner_state[key] = without_importance(state)
        if key in saved and KEY in state:
            if not isinstance(state[KEY], Tensor):
                raise TypeError(f"state[{key!r}][{KEY!r}]: expected a tensor, got {type(state[KEY]).__name__}")
            name = importance.name_of(saved[key])
            if name is not None and state[KEY].dim() == 0 < saved[key].dim():
                raise ValueError(f"{name}: is a head in this checkpoint but has an importance here; name it in `heads`")
            if name is not None:
                gammas[name] = state[KEY]
            elif state[KEY].dim():
                raise ValueError(f"{slot_of(saved[key])} has an importance in this checkpoint but is a head here")
        if not inner_state[key]:
            del inner_state[key]  # it held the importance alone
    gammas = _recover_codes(gammas)
    importance.check(gammas)
    tasks = state_dict.get(TASKS, importance.tasks)
    check_tasks(tasks)
    names = [importance.name_of(p) for p in parameters if p.requires_grad]
    if gammas and (missing := [name for name in names if name is not None and name not in gammas]):
        warnings.warn(f"state_dict: it has an importance for other parameters but none for {', '.join(missing)}; theirs stays "
                      "what it was", stacklevel=3)
    return gammas, tasks, {**{key: value for key, value in state_dict.items() if key != TASKS}, "state": inner_state}


def _by_name(state_dict: dict, saved: dict[int | str, Tensor], importance: Importance) -> dict[int | str, Tensor]:
    """Trunk parameters by key, as the checkpoint names them; none unless it names all, the trunk as `importance` does."""
    names = [name for group in state_dict["param_groups"] for name in group.get("param_names", ())]
    own = {name: p for p in saved.values() if (name := importance.name_of(p)) is not None}
    is_named = len(names) == len(saved) and own.keys() <= set(names)
    return {key: own[name] for key, name in zip(saved, names) if name in own} if is_named else {}


def _recover_codes(gammas: dict[str, Tensor]) -> dict[str, Tensor]:
    """The importance of a checkpoint, as 8-bit codes again if a plain optimizer has loaded and saved it.

    torch casts state to its parameter's dtype. Whole numbers throughout the checkpoint, one of them above 1 where gammas
    end, can only be codes: what was measured holds codes of 20 and more, since in every tensor some |z| exceeds 0.7.
    """
    values = list(gammas.values())
    whole = all(bool(((g == g.round()) & (g >= 0) & (g <= 255)).all()) for g in values)
    if whole and any(g.is_floating_point() and bool((g > 1).any()) for g in values):
        return {name: gamma.to(torch.uint8) for name, gamma in gammas.items()}
    return gammas

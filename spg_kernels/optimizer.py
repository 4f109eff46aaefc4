"""SPGOptimizer: a torch optimizer around a torch optimizer, that lets important parameters move less."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import distributed, fused, ops
from .importance import Importance, measure

KEY = "spg_importance"  # of a parameter's gamma in the state dict


class SPGOptimizer(Optimizer):
    """Soft-masks any torch optimizer by the importance of every parameter to the tasks so far (Konishi et al., ICML 2023).

    Args:
        optimizer: the inner optimizer.
        heads: the task heads: modules, an nn.ModuleList (heads appended later count too), or parameters. They hold no
            gamma and are scaled by 1 - mean(gamma).
        named_parameters: `model.named_parameters()`, to key the importance by. Without it: the names that `importance`
            knows these parameters by, those the inner optimizer was built with, or "group.slot".
        mask: "update" scales what the inner step adds to a parameter, right for every optimizer; "gradient" scales the
            gradient, the paper's rule, which adaptive optimizers and weight decay undo.
        importance: an `Importance` to go on from, as when every task gets a fresh inner optimizer.
        importance_dtype: torch.float32, or torch.uint8 for 8-bit codes; ignored if `importance` is given.
        backend: "auto", "triton", "native", or "reference": the inner optimizer's own step with the mask around it.

    Raises:
        TypeError, ValueError: an argument is not what it should be; BackendError: `backend` does not run here.
    """

    def __init__(self, optimizer: Optimizer, *, heads: Iterable[nn.Module | Tensor] | nn.Module | Tensor = (),
                 named_parameters: Iterable[tuple[str, Tensor]] | None = None, mask: str = "update",
                 importance: Importance | None = None, importance_dtype: torch.dtype = torch.float32,
                 backend: str = "auto"):
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, SPGOptimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer to wrap, got {type(optimizer).__name__}")
        if mask not in ops.MASKS:
            raise ValueError(f"mask: expected 'update' or 'gradient', got {mask!r}")
        if importance is not None and not isinstance(importance, Importance):
            raise TypeError(f"importance: expected an Importance, got {type(importance).__name__}")
        if mask == "update" and callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise ValueError(f"mask: {type(optimizer).__name__} moves the parameters in train() and eval() too, which undoes "
                             "mask='update'; use mask='gradient'")
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise ValueError("optimizer: ZeroRedundancyOptimizer with overlap_with_ddp=True steps inside backward, where no "
                             "mask reaches; use overlap_with_ddp=False")
        ops.require_backend(backend)
        self.inner = optimizer
        self.importance = Importance(dtype=importance_dtype) if importance is None else importance
        self.mask = mask
        self.backend = backend
        self._heads = _as_list(heads)
        self._head_parameters: dict[int, Tensor] = {}
        self._set_up()
        self._find_heads()
        self._name_trunk(dict(named_parameters) if named_parameters is not None else None)
        if mask == "gradient":
            _warn_if_undone(optimizer)

    def _set_up(self) -> None:
        # Optimizer.__init__ would take over the parameter groups; its __setstate__ makes what else the base class needs.
        Optimizer.__setstate__(self, {})
        # Step hooks of the inner optimizer are this one's: they fire once, around the masked step.
        self._optimizer_step_pre_hooks = self.inner._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = self.inner._optimizer_step_post_hooks

    @property
    def param_groups(self) -> list[dict]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> dict:
        return self.inner.state

    @state.setter
    def state(self, state: dict) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict:
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict) -> None:
        self.inner.defaults = defaults

    # Heads and trunk

    def _find_heads(self) -> None:
        parameters = [p for head in self._heads for p in (head.parameters() if isinstance(head, nn.Module) else (head,))]
        self._head_parameters = {id(p): p for p in parameters}

    def _name_trunk(self, named: dict[str, Tensor] | None) -> None:
        """Make every parameter of the groups that is no head known to the importance."""
        given = None if named is None else {id(parameter): name for name, parameter in named.items()}
        trunk = []
        for g, group in enumerate(self.inner.param_groups):
            for s, parameter in enumerate(group["params"]):
                if id(parameter) in self._head_parameters:
                    continue
                if given is not None and id(parameter) not in given:
                    raise ValueError(f"named_parameters: param_groups[{g}]['params'][{s}] of shape {tuple(parameter.shape)} "
                                     "is not among them")
                built_with = group["param_names"][s] if "param_names" in group else f"{g}.{s}"
                name = given[id(parameter)] if given is not None else self.importance.name_of(parameter) or built_with
                trunk.append((name, parameter))
        for name, parameter in trunk:
            self.importance.add(name, parameter)

    def _gamma(self, parameter: Tensor) -> Tensor:
        """What masks `parameter`: its gamma as stored, or the heads' one value."""
        gamma = self.importance.gamma(parameter)
        if gamma is not None:
            return gamma
        if id(parameter) not in self._head_parameters:
            self._find_heads()
        if id(parameter) in self._head_parameters:
            return self.importance.mean_on(parameter.device)
        raise ValueError(f"{self._slot_of(parameter)} of shape {tuple(parameter.shape)} is unknown to the importance; after "
                         "parameters were replaced, call opt.importance.bind(model.named_parameters())")

    def _slot_of(self, parameter: Tensor) -> str:
        return next(f"param_groups[{g}]['params'][{s}]" for g, group in enumerate(self.inner.param_groups)
                    for s, p in enumerate(group["params"]) if p is parameter)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group to the inner optimizer; parameters of `heads` are heads, all others trunk with gamma = 0."""
        self.inner.add_param_group(param_group)
        self._find_heads()
        self._name_trunk(None)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.inner.param_groups for p in group["params"]]

    # The step

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One masked step of the inner optimizer; unmasked until importance was measured. Leaves every `.grad` as it was.

        Returns:
            The closure's loss, if there is a closure.
        """
        # A learning-rate scheduler built on the inner optimizer asks it whether it has stepped.
        self.inner._opt_called = True
        if not self.importance.active:
            return self._inner_step(closure)
        if self.backend == "reference" or not fused.takes(self.inner):
            return self._generic_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not fused.step(self.inner, self._gamma, self.mask, self.backend):
            self._generic_step(None)
        return loss

    def _inner_step(self, closure: Callable | None):
        """The inner optimizer's step without its hooks, which are this optimizer's and run around the masked step."""
        arguments = () if closure is None else (closure,)
        if (patched := fused.patched_step(self.inner)) is not None:
            return patched(*arguments)
        step = type(self.inner).step
        return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self.inner, *arguments)

    def _generic_step(self, closure: Callable | None):
        return self._update_masked_step(closure) if self.mask == "update" else self._gradient_masked_step(closure)

    def _update_masked_step(self, closure: Callable | None):
        """p <- p_old + (1 - gamma)(p_new - p_old) around the inner step. If that fails, parameters are as before."""
        parameters = [p for p in self._parameters() if p.requires_grad]
        gammas = [distributed.local(self._gamma(p)) for p in parameters]
        old = [p.clone() for p in _values(parameters)]
        if parameters:
            # A backend that refuses must do so before the inner step changes its state.
            ops.choose("update_mask_", (_values(parameters), old, gammas), self.backend)
        try:
            loss = self._inner_step(closure)
            ops.update_mask_(_values(parameters), old, gammas, backend=self.backend)
        except BaseException:
            for parameter, value in zip(_values(parameters), old):
                parameter.copy_(value)
            raise
        return loss

    def _gradient_masked_step(self, closure: Callable | None):
        """The inner step on masked copies of the gradients. A closure makes new gradients, which are masked after it ran."""
        originals: list[tuple[Tensor, Tensor]] = []

        def restore() -> None:
            while originals:
                parameter, grad = originals.pop()
                parameter.grad = grad

        @torch.no_grad()
        def mask() -> None:
            parameters = [p for p in self._parameters() if p.grad is not None]
            masked = [_masked_copy(distributed.placed(p.grad, p), self._gamma(p), self.backend) for p in parameters]
            for parameter, grad in zip(parameters, masked):
                originals.append((parameter, parameter.grad))
                parameter.grad = grad

        def masked_closure():
            restore()
            with torch.enable_grad():
                loss = closure()
            mask()
            return loss

        try:
            if closure is None:
                mask()
            return self._inner_step(closure and masked_closure)
        finally:
            restore()

    def accumulate_importance(self) -> None:
        """Fold the current `.grad` of every trunk parameter into gamma; `.grad` is left alone, None changes nothing.

        The scale of a gradient cancels, so one scaled by a GradScaler gives the same importance. Over sharded parameters
        (FSDP2, tensor parallel) a collective call, in plain PyTorch whatever the backend, whose kernels measure whole tensors.

        Raises:
            NonFiniteGradientError: names every parameter with an inf or NaN in its gradient; their gamma is untouched.
        """
        self._find_heads()
        trunk = [p for p in self._parameters() if p.grad is not None and id(p) not in self._head_parameters]
        for parameter in trunk:
            self._gamma(parameter)
        self.importance.accumulate(trunk, self.backend)

    def measure_importance(self, loader: Iterable, losses: Sequence[Callable], *, progress: bool = True) -> None:
        """The whole measuring pass after a task: for each loss clear gradients, run `loader`, fold; then count the task.

        Leaves `.grad` None; parameters, optimizer state and the model's mode stay as they were.

        Args:
            loader: gives batches, once for every loss.
            losses: functions of a batch, `cross_head_losses(model, t, loss)`.
            progress: show a progress bar.

        Raises:
            ValueError: no losses, no batches, or an iterator that only the first loss could use.
            NonFiniteGradientError: see `accumulate_importance`. What earlier losses folded in stays, which is harmless:
                folding it in again changes nothing.
        """
        measure(loader, losses, self.zero_grad, self.accumulate_importance, progress)
        self.importance.tasks += 1

    # Checkpoints

    def state_dict(self) -> dict:
        """The inner optimizer's, with `state[i]["spg_importance"]` added for every parameter: gamma as stored, for a head 0.

        A plain optimizer loads it, and `load_state_dict` takes a plain optimizer's. The inner state is initialized first
        where it is not yet: torch's optimizers take a state that holds anything for one that holds everything.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        _initialize_state(self.inner)
        state_dict = self.inner.state_dict()
        state_dict["state"] = {**state_dict["state"], **{
            i: {**state_dict["state"].get(i, {}), KEY: self._stored_gamma(p)} for i, p in self._by_key(state_dict).items()}}
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    def _by_key(self, state_dict: dict) -> dict[int | str, Tensor]:
        """The parameters by what the groups of a state dict call them: a number or, torch.distributed.checkpoint, a name."""
        return dict(zip((key for group in state_dict["param_groups"] for key in group["params"]), self._parameters()))

    def _stored_gamma(self, parameter: Tensor) -> Tensor:
        gamma = self.importance.gamma(parameter)
        if gamma is not None:
            return gamma
        self._gamma(parameter)  # raises unless it is a head, which holds no gamma
        return torch.zeros((), device=parameter.device)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the inner optimizer's state and, where `state_dict` has it, the importance.

        Raises:
            ValueError: groups, shapes or values that do not fit; gamma and the inner optimizer are as before.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        saved = self._by_key(state_dict)
        gammas, inner_state = {}, {}
        for i, state in state_dict["state"].items():
            inner_state[i] = {key: value for key, value in state.items() if key != KEY} if isinstance(state, dict) else state
            if i in saved and KEY in state:
                name = self.importance.name_of(saved[i])
                if name is not None:
                    gammas[name] = state[KEY]
                elif state[KEY].dim():
                    raise ValueError(f"{self._slot_of(saved[i])} has an importance in this checkpoint but is a head here")
            if not inner_state[i]:
                del inner_state[i]  # it held the importance alone
        self.importance.check(gammas)
        self.inner.load_state_dict({**state_dict, "state": inner_state})
        self.importance.store(gammas)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict:
        # As torch's own: no hooks, and no step that a scheduler patched onto this object.
        return {key: vars(self)[key] for key in ("inner", "importance", "mask", "backend", "_heads")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._set_up()
        self._find_heads()


def _as_list(heads) -> list[nn.Module | Tensor]:
    heads = [heads] if isinstance(heads, nn.Module | Tensor) else list(heads)
    for i, head in enumerate(heads):
        if not isinstance(head, nn.Module | Tensor):
            raise TypeError(f"heads[{i}]: expected a module or a parameter, got {type(head).__name__}")
    return heads


def _warn_if_undone(inner: Optimizer) -> None:
    adaptive = not isinstance(inner, torch.optim.SGD)
    decays = any(group.get("weight_decay") for group in inner.param_groups)
    if adaptive or decays:
        reason = "adapts its step to the scale of the gradient" if adaptive else "decays weights"
        warnings.warn(f"mask='gradient' around {type(inner).__name__}, which {reason}: important parameters will move all the "
                      "same; mask='update' protects them", stacklevel=3)


def _masked_copy(grad: Tensor, gamma: Tensor, backend: str) -> Tensor:
    """(1 - gamma) grad; of a sparse gradient, the elements it has."""
    if grad.layout == torch.sparse_coo:
        grad = grad.coalesce()
        gamma = gamma if gamma.dim() == 0 else gamma[tuple(grad.indices())]
        return torch.sparse_coo_tensor(grad.indices(), _masked_copy(grad.values(), gamma, backend), grad.shape,
                                       is_coalesced=True, check_invariants=False)
    masked = grad.detach().clone()
    ops.soft_mask_([distributed.local(masked)], [distributed.local(gamma)], backend=backend)
    return masked


def _values(parameters: list[Tensor]) -> list[Tensor]:
    """What kernels mask: parameters without their autograd history, this rank's shards of DTensors."""
    return [distributed.local(p).detach() for p in parameters]


def _initialize_state(inner: Optimizer) -> None:
    """Give every parameter the state that torch's optimizers make lazily, in the first step that sees its gradient."""
    if not hasattr(inner, "_init_group"):
        return
    lists = len(inspect.signature(inner._init_group).parameters) - 1
    for group in inner.param_groups:
        missing = [p for p in group["params"] if p.requires_grad and not inner.state.get(p)]
        without_grad = [p for p in missing if p.grad is None]
        try:
            for parameter in without_grad:
                parameter.grad = parameter.detach().new_zeros(()).expand_as(parameter)
            inner._init_group({**group, "params": missing}, *([] for _ in range(lists)))
        finally:
            for parameter in without_grad:
                parameter.grad = None

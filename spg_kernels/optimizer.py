"""SPGOptimizer: a torch optimizer around a torch optimizer, that lets important parameters move less."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import fused, generic, ops
from .checkpoints import by_key, taken_apart
from .files import check_tasks
from .heads import heads_of, parameters_of, refuse_known
from .hooks import own_hooks_suspended, with_hooks, without_hooks
from .importance import Importance
from .inner import caveat_of, check_maskable
from .measuring import Interrupted, measure
from .names import as_named, by_name
from .state import KEY, SCALER, TASKS, State, forget_rates, initialize, without_importance


def _of_inner(name: str) -> property:
    """An attribute that is the inner optimizer's own, to read, set and delete."""
    return property(lambda self: getattr(self.inner, name), lambda self, value: setattr(self.inner, name, value),
                    lambda self: delattr(self.inner, name))


class SPGOptimizer(Optimizer):
    """Soft-masks any torch optimizer by the importance of every parameter to the tasks so far (Konishi et al., ICML 2023).

    Args:
        optimizer: the inner optimizer.
        heads: the task heads: modules or parameters, one or several. What is appended later to an nn.ModuleList or a list
            counts too. They hold no gamma, so `importance` must not know them, and are scaled by 1 - mean(gamma).
        named_parameters: `model.named_parameters()`, to key the importance by, of groups added later too. Without it: the
            names that `importance` knows these parameters by, those the inner optimizer was built with, or "group.slot".
        mask: "update" scales what the inner step adds to a parameter, right for every torch optimizer but LBFGS, which warns;
            "gradient" scales the gradient, the paper's rule, which adaptive optimizers and weight decay undo.
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
        if importance is not None and not isinstance(importance, Importance):
            raise TypeError(f"importance: expected an Importance, got {type(importance).__name__}")
        check_maskable(optimizer, mask)
        ops.require_backend(backend)
        self.inner = optimizer
        self.importance = Importance(dtype=importance_dtype) if importance is None else importance
        self._mask = mask
        self.backend = backend
        self._heads = heads_of(heads)
        self._set_up()
        self._find_heads()
        self._named = {} if named_parameters is None else by_name(as_named(named_parameters))
        self._name_trunk(all_are_named=named_parameters is not None)
        own = {id(p) for p in self._parameters()}
        self._named = {name: p for name, p in self._named.items() if id(p) not in own}  # for groups that are added later
        self._warn_of_caveat(before=None)

    def _set_up(self) -> None:
        # Optimizer.__init__ would build parameter groups of its own; __setstate__ makes all else that the base class needs.
        Optimizer.__setstate__(self, {})
        # Step hooks of the inner optimizer are this one's: they fire once, around the masked step.
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):  # wrappers may do without, as this one does
            vars(self.inner).setdefault(hooks, OrderedDict())
        self._optimizer_step_pre_hooks = self.inner._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = self.inner._optimizer_step_post_hooks
        self._head_parameters: dict[int, Tensor] = {}
        self._fused_step = fused.FusedStep()
        self._may_be_ahead = True  # whether the inner optimizer may have state of parameters that it has not stepped yet
        self._interrupted = Interrupted()

    param_groups = _of_inner("param_groups")
    defaults = _of_inner("defaults")
    grad_scale, found_inf = map(_of_inner, SCALER)  # torch's fused optimizers look for them among their own attributes

    @property
    def mask(self) -> str:
        """"update" or "gradient"; may be changed between steps."""
        return self._mask

    @mask.setter
    def mask(self, mask: str) -> None:
        check_maskable(self.inner, mask)
        before = caveat_of(self.inner, self._mask)
        self._mask = mask
        self._warn_of_caveat(before)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling and skipping to the step, so that the host does not wait for the device.

        Only where the inner optimizer was built to (`fused=True`): clipping in some trainers refuses any that does.
        """
        if not (getattr(self.inner, "_step_supports_amp_scaling", False) and fused.takes(self.inner)):
            return False
        if not self.importance.active:
            return not fused.begins_momentum(self.inner)
        return ops.has_kernels(self._parameters(), self.backend)

    @property
    def state(self) -> State:
        """The inner optimizer's, by parameter, written through; each parameter's shows its "spg_importance" as well."""
        return State(self.inner.state, self._shown_gamma, self._store_gamma)

    @state.setter
    def state(self, state: MutableMapping) -> None:
        if isinstance(state, State):
            state = state.inner
        for parameter, entry in state.items():
            state[parameter] = without_importance(entry)
        self.inner.state = state

    def __getattr__(self, name: str) -> object:
        # Trainers switch the mode of an optimizer that has one, as schedule-free ones do. Nothing else is forwarded: another
        # method of the inner optimizer, called through here, would go past the mask.
        if name in ("train", "eval"):
            return getattr(self.inner, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # Heads and trunk

    def _find_heads(self) -> None:
        parameters = parameters_of(self._heads)
        refuse_known([name for name in map(self.importance.name_of, parameters) if name is not None])
        # Earlier ones are kept: while FSDP2 has parameters gathered after a forward pass, modules list other objects.
        self._head_parameters |= {id(p): p for p in parameters}

    def _name_trunk(self, all_are_named: bool) -> None:
        """Make every parameter of the groups that is no head known to the importance."""
        # A tied one's first name, as torch's.
        given = {id(parameter): name for name, parameter in reversed(self._named.items())}
        trunk: list[tuple[str, Tensor]] = []
        taken: set[str] = set()
        own = {id(p) for p in self._parameters()}
        for g, group in enumerate(self.inner.param_groups):
            for s, parameter in enumerate(group["params"]):
                if id(parameter) in self._head_parameters:
                    continue
                if all_are_named and id(parameter) not in given:
                    raise ValueError(f"named_parameters: param_groups[{g}]['params'][{s}] of shape {tuple(parameter.shape)} "
                                     "is not among them")
                name = given.get(id(parameter)) or self.importance.name_of(parameter)
                if name is None:
                    name = group["param_names"][s] if "param_names" in group else self._slot_name(g, s, taken, own)
                taken.add(name)
                trunk.append((name, parameter))
        others = [(name, p) for name, p in self._named.items() if name in self.importance] if all_are_named else []
        refuse_known([name for name, p in others if id(p) in self._head_parameters])
        self.importance.attach(others + trunk, all_are_named)

    def _slot_name(self, g: int, s: int, taken: set[str], own: set[int]) -> str:
        """"group.slot", with a later group where a parameter of this optimizer (`own`, by id) has that name already."""
        while f"{g}.{s}" in taken or id(self.importance.parameter(f"{g}.{s}")) in own:
            g += 1
        return f"{g}.{s}"

    def _gamma(self, parameter: Tensor) -> Tensor:
        """What masks `parameter`: its gamma as stored, or the heads' one value."""
        gamma = self.importance.gamma(parameter)
        if gamma is not None:
            return gamma
        self._require_head(parameter)
        return self.importance.mean_on(parameter.device)

    def _require_head(self, parameter: Tensor) -> None:
        if id(parameter) not in self._head_parameters:
            self._find_heads()
        if id(parameter) in self._head_parameters:
            return
        raise ValueError(f"{self._slot_of(parameter)} of shape {tuple(parameter.shape)} is unknown to the importance; after "
                         "parameters were replaced, call opt.importance.bind(model.named_parameters()); new ones come by "
                         "opt.add_param_group; optimizers that share an importance need named_parameters, all of them")

    def _slot_of(self, parameter: Tensor) -> str:
        return next((f"param_groups[{g}]['params'][{s}]" for g, group in enumerate(self.inner.param_groups)
                     for s, p in enumerate(group["params"]) if p is parameter), "a parameter in no group")

    def add_param_group(self, param_group: dict) -> None:
        """Add a group to the inner optimizer; parameters of `heads` are heads, all others trunk, new names with gamma = 0."""
        self._find_heads()
        before = caveat_of(self.inner, self.mask)
        self.inner.add_param_group(param_group)
        try:
            self._warn_of_caveat(before)
            self._name_trunk(all_are_named=False)
        except BaseException:
            del self.inner.param_groups[-1]
            raise

    def _warn_of_caveat(self, before: str | None) -> None:
        if not before and (caveat := caveat_of(self.inner, self.mask)):
            warnings.warn(f"mask={self.mask!r} around {type(self.inner).__name__}, which {caveat}", stacklevel=3)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.inner.param_groups for p in group["params"]]

    # The step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The inner optimizer's."""
        self.inner.zero_grad() if set_to_none else self.inner.zero_grad(False)  # older optimizers' takes no argument

    @with_hooks
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One masked step of the inner optimizer; unmasked until importance was measured. Leaves every `.grad` as it was.

        Returns:
            The closure's loss, if there is a closure.
        """
        if not torch.compiler.is_compiling():  # a scheduler built on the inner optimizer asks it whether it stepped
            self.inner._opt_called = True
        if not self.importance.active:
            return self._inner_step(closure)
        self.importance.update_means()
        if self.backend == "reference" or not fused.takes(self.inner):
            return self._generic_step(closure, self._parameters())
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._fused_step.step(self.inner, self.importance, self._gamma, self.mask, self.backend, self._step_alone)
        return loss

    def _inner_step(self, closure: Callable | None):
        """The inner optimizer's step without its hooks, which are this optimizer's and run around the masked step."""
        if self._may_be_ahead:
            forget_rates(self.inner)
            if not torch.compiler.is_compiling():  # the compiler of torch 2.11 fails where an optimizer's attribute is set
                self._may_be_ahead = False
        arguments = () if closure is None else (closure,)
        step = fused.patched_step(self.inner) or partial(without_hooks(type(self.inner).step), self.inner)
        if not (self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks):
            return step(*arguments)
        with own_hooks_suspended(self.inner):  # a step of a user's own may call torch's, in its wrapper
            return step(*arguments)

    def _generic_step(self, closure: Callable | None, parameters: list[Tensor]):
        masked_step = generic.update_masked_step if self.mask == "update" else generic.gradient_masked_step
        differentiable = generic.is_differentiable(self.inner, self.backend)
        return masked_step(self._inner_step, closure, parameters, self._gamma, self.backend, differentiable)

    def _step_alone(self, parameters: list[Tensor]) -> None:
        generic.step_alone(partial(self._generic_step, parameters=parameters), self.inner, parameters)

    def accumulate_importance(self) -> None:
        """Fold the current `.grad` of every trunk parameter into gamma; `.grad` is left alone, None changes nothing.

        The scale of a gradient cancels, so one scaled by a GradScaler gives the same importance. Over sharded parameters
        (FSDP2, tensor parallel) a collective call, in plain PyTorch whatever the backend, whose kernels measure whole tensors.

        Raises:
            NonFiniteGradientError: names every parameter with an inf or NaN in its gradient; their gamma is untouched.
        """
        self.importance.accumulate(self._trunk_of([p for p in self._parameters() if p.grad is not None]), self.backend)

    def _trunk_of(self, parameters: list[Tensor]) -> list[Tensor]:
        """Those that are no head's, each of which the importance must know."""
        self._find_heads()
        trunk = [p for p in parameters if id(p) not in self._head_parameters]
        for parameter in trunk:
            self._gamma(parameter)
        return trunk

    def measure_importance(self, loader: Iterable, losses: Sequence[Callable], *, progress: bool = True) -> None:
        """The whole measuring pass after a task: for each loss clear gradients, run `loader`, fold; then count the task.

        Leaves `.grad` None; parameters, optimizer state and the model's mode stay as they were. In train mode running
        statistics go on. Interrupted, by an error or by hand, and called again with the same `loader` and `losses`, it goes on
        with the first loss that is not folded in; unless a parameter or an importance was changed in between: then it starts
        anew. What was written through `.data` alone goes unnoticed.

        Args:
            loader: gives batches, once for every loss; with `SharedTrunkLosses` once for many.
            losses: functions of a batch that give one number each, such as `cross_head_losses` and `SharedTrunkLosses` make.
            progress: show a progress bar.

        Raises:
            ValueError: no losses, no batches, no gradient from any loss, an iterator that only one loss could use, no trunk.
            TypeError: no list of such losses.
            NonFiniteGradientError: see `accumulate_importance`. After any error, what losses before folded in stays: harmless
                if the same ones are called again. They run from the last to the first, so that where a task's own loss, as
                `cross_head_losses` has it last, cannot run, nothing has changed.
        """
        trunk = self._trunk_of([p for p in self._parameters() if p.requires_grad])
        if not self.importance:
            raise ValueError("heads: expected the task heads, got every parameter of this optimizer: no trunk is left "
                             "to protect")
        # What the losses so far were measured at, and what they were folded into.
        tensors = [*self._parameters(), *self._others(), *(self.importance.gamma(p) for p in trunk)]
        first = self._interrupted.finished(loader, losses, tensors)
        measure(loader, losses, trunk, first, self._clear_gradients, partial(self.importance.fold, backend=self.backend),
                lambda finished: self._interrupted.note(finished, loader, losses, tensors), progress)
        self._interrupted = Interrupted()
        self.importance.tasks += 1

    def _others(self) -> list[Tensor]:
        """Parameters that losses reach, though another optimizer may train them."""
        return [*parameters_of(self._heads), *self._named.values()]

    def _clear_gradients(self) -> None:
        for parameter in (*self._parameters(), *self._others()):  # not by zero_grad: an older optimizer's may leave zeros
            parameter.grad = None

    # Checkpoints

    def state_dict(self) -> dict:
        """The inner optimizer's, with `state[i]["spg_importance"]` added for every parameter: gamma as stored, for a head 0;
        and with "spg_tasks", the number of tasks so far (torch.distributed.checkpoint leaves that out).

        A plain optimizer loads it, and `load_state_dict` takes a plain optimizer's. The inner state is initialized first
        where it is not yet: torch's optimizers take a state that holds anything for one that holds everything. Where there is
        no `_init_group` for that (SparseAdam, others than torch's) a plain one may fail at a parameter not stepped before.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        initialize(self.inner)
        self._may_be_ahead = True
        state_dict = self.inner.state_dict()
        if "state" not in state_dict:
            raise TypeError(f"{type(self.inner).__name__}.state_dict() has {sorted(state_dict)} and no 'state' to put the "
                            "importance into: save it and opt.importance.state_dict() side by side")
        state_dict["state"] = {**state_dict["state"], **{
            i: {**state_dict["state"].get(i, {}), KEY: self._stored_gamma(p)}
            for i, p in by_key(state_dict, self._parameters()).items()}}
        check_tasks(self.importance.tasks)
        state_dict[TASKS] = self.importance.tasks
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    def _stored_gamma(self, parameter: Tensor) -> Tensor:
        gamma = self.importance.hand_out(parameter)
        if gamma is not None:
            return gamma
        self._require_head(parameter)  # which holds no gamma
        return torch.zeros((), device=parameter.device)

    def _shown_gamma(self, parameter: Tensor) -> Tensor | None:
        is_known = id(parameter) in self._head_parameters or self.importance.gamma(parameter) is not None
        if not is_known and all(p is not parameter for p in self._parameters()):
            return None  # it was replaced, and left its state behind
        return self._stored_gamma(parameter)

    def _store_gamma(self, parameter: Tensor, gamma: Tensor) -> None:
        if (name := self.importance.name_of(parameter)) is not None:
            self.importance.store({name: gamma})

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the inner optimizer's state and, where `state_dict` has it, the importance.

        Raises:
            ValueError, TypeError: groups, shapes or values that do not fit, or whatever the inner optimizer raises; gamma and
                the inner optimizer are as before. Post hooks run when all is loaded, so an error of theirs undoes nothing.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        gammas, tasks, inner = taken_apart(state_dict, self._parameters(), self.importance, self._slot_of)
        before = self.inner.state, self.inner.param_groups  # which torch's optimizers replace, not change
        try:
            self.inner.load_state_dict(inner)
        except BaseException:
            self.inner.state, self.inner.param_groups = before
            raise
        for own, group in zip(before[1], self.inner.param_groups):
            if "param_names" in own:  # torch takes the checkpoint's, whose order may be another
                group["param_names"] = own["param_names"]
        self._may_be_ahead = True
        self.importance.store(gammas)
        self.importance.tasks = tasks
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict:
        # As torch's own: no hooks, and no step that a scheduler patched onto this object.
        return {key: vars(self)[key] for key in ("inner", "importance", "_mask", "backend", "_heads", "_named")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)  # heads are looked up when needed: being unpickled, they may have no parameters yet
        self._set_up()

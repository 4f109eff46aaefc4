"""The operators: schemas, fake kernels, and the choice of a backend.

Every operator works on lists of tensors, one call for a whole model, in place, and is registered as
`torch.ops.spg_kernels.<name>`, opaque to torch.compile with its mutated arguments declared. A backend is a module with

- `DEVICE_TYPES`: where its tensors live,
- `unavailable() -> str | None`: what is missing here, None if it runs,
- `PLANS`: which tensors it takes and what it keeps of them from call to call (`backends/plans.py`),
- one function for each operator: `(launch, addresses, **settings)`, a plan's launch, the addresses of all tensors, and the
  settings that its twin in `reference.py` takes.
"""

import functools
import importlib
import logging
from array import array
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from . import reference
from .backends.plans import DTYPES, LISTS, Plan
from .backends.tensors import PLAIN, Lists
from .checks import check_lists, check_settings
from .memory import check_disjoint
from .reference import decode, encode_gamma, mean_gamma, squash  # noqa: F401  (importance.py reads gammas through this room)

log = logging.getLogger("spg_kernels")

BACKENDS = ("auto", "triton", "native", "reference")
_MODULES = {"triton": "spg_kernels.backends.triton", "native": "spg_kernels.backends.native"}


class SPGError(Exception):
    """Base class of the package's own errors."""


class NonFiniteGradientError(SPGError, FloatingPointError):
    """A gradient holds an inf or a NaN. `names` lists every such parameter; their gamma is untouched."""

    def __init__(self, names: list[str]):
        self.names = list(names)
        super().__init__(f"inf or NaN in the gradient of {', '.join(self.names)}: their importance is unchanged")

    def __reduce__(self):
        return type(self), (self.names,)  # an exception pickles its message as its arguments


class BackendError(SPGError, RuntimeError):
    """A backend asked for by name does not run here, or cannot take a tensor it was given."""


def backend_module(name: str) -> ModuleType:
    return reference if name == "reference" else importlib.import_module(_MODULES[name])


def why_unavailable(name: str) -> str | None:
    """What backend `name` lacks on this machine; None if it runs."""
    return None if name == "reference" else backend_module(name).unavailable()


def require_backend(backend: str) -> None:
    """ValueError if there is no such backend, BackendError if it is asked for by name and does not run here."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto" and (missing := why_unavailable(backend)):
        raise BackendError(f"backend {backend!r} does not run here: {missing}")


@functools.cache
def resolve(backend: str, device_type: str) -> ModuleType:
    """The module that serves `backend` for tensors on `device_type`."""
    if backend == "auto":
        missing = "no backend has kernels there"
        for name in _MODULES:
            if device_type in backend_module(name).DEVICE_TYPES:
                if (missing := why_unavailable(name)) is None:
                    return backend_module(name)
        log.debug("tensors on %s take the reference: %s", device_type, missing)
        return reference
    require_backend(backend)
    return backend_module(backend)


@functools.cache
def _modules(backend: str) -> list[ModuleType]:
    """The modules whose plans may serve `backend`, whether or not they run here. Interpreted Triton's never serve "auto"."""
    if backend != "auto":
        return [backend_module(backend)] if backend in _MODULES else []
    return [module for module in map(backend_module, _MODULES) if module.PLANS.device_type in module.DEVICE_TYPES]


def _known(op: str, lists: Lists, backend: str) -> tuple[ModuleType, Plan, array | None] | None:
    """The backend that has a plan for tensors like these, the plan, and their addresses, or none if it refuses some tensor."""
    for module in _modules(backend):  # a plan compares devices itself, which is faster than reading a tensor's `.device`
        if known := module.PLANS.known(op, lists):
            return module, *known
    return None


def _make(op: str, lists: Lists, backend: str) -> tuple[ModuleType, Plan | None, array | None]:
    """The backend for tensors of which no plan is known, with a new one, and without addresses if that refuses some tensor."""
    chosen = resolve(backend, lists[0][0].device.type) if lists[0] else reference
    return (reference, None, None) if chosen is reference else (chosen, *chosen.PLANS.make(op, lists))


def choose(op: str, lists: Lists, backend: str) -> tuple[ModuleType, Plan | None, array | None]:
    """The backend that will run `op`, with its plan for these tensors and their addresses; the reference needs none.

    Raises:
        ValueError, TypeError: lists that do not match. BackendError: a backend asked for by name cannot take some tensor.
    """
    try:
        known = _known(op, lists, backend)
    except TypeError:  # an argument is no list: `check_lists` below says which
        known = None
    if known and known[2] is not None:
        return known
    check_lists(op, lists)  # not needed above: tensors like these passed when the plan was made
    chosen, plan, addresses = known or _make(op, lists, backend)
    if plan is not None and plan.refused and backend != "auto":
        _check_memory(op, lists)  # first: shared memory is an error under every backend
        index, reason = plan.first_refusal()
        raise BackendError(f"backend {backend!r}, {op}: tensor {index} of {len(lists[0])} {reason}")
    return chosen, plan, addresses


def _run(op: str, lists: Lists, kwargs: dict, backend: str):
    """Run `op` on the chosen backend; under "auto", tensors it cannot take go to the reference."""
    chosen, plan, addresses = choose(op, lists, backend)
    if addresses is not None:
        if not plan.is_disjoint(addresses):
            _check_memory(op, lists)
            plan.remember_disjoint(addresses)
        # Kernels write through raw pointers, which autograd cannot see, so versions are counted up here. Before the launch:
        # the tensors' records are still in the CPU's cache from the look-up, and after a pass over a model they are not.
        for i in _MUTATED[op]:
            increment_version(lists[i])
        return getattr(chosen, op)(plan.launch, addresses, **kwargs)
    _check_memory(op, lists)
    if plan is None:
        with torch.no_grad():  # returned outside: between a return in here and the end of it, Ctrl-C leaves no_grad on
            result = getattr(reference, op)(*lists, **kwargs)
        return result
    log.debug("%s: %d of %d tensors take the reference, the first (%d) because it %s",
              op, len(plan.refused), len(lists[0]), *plan.first_refusal())
    taken = [i for i in range(len(lists[0])) if i not in plan.refused]
    results = [(part, _run(op, tuple([tensors[i] for i in part] if tensors else [] for tensors in lists), kwargs, name))
               for part, name in ((taken, backend), (list(plan.refused), "reference")) if part]
    if results[0][1] is None:
        return None
    merged = torch.empty(len(lists[0]), dtype=results[0][1].dtype, device=results[0][1].device)
    for part, result in results:
        merged[part] = result
    return merged


def _check_memory(op: str, lists: Lists) -> None:
    """What is written shares no memory with anything else of the call."""
    named = list(zip(LISTS[op], lists))
    check_disjoint(dict(named[i] for i in _MUTATED[op]), dict(named[i] for i in range(len(named)) if i not in _MUTATED[op]))


_SGD = ("float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, bool maximize=False, "
        "bool is_first_step=False, str mask='update', Tensor? grad_scale=None, Tensor? found_inf=None")
_ADAMW = ("float beta1=0.9, float beta2=0.999, float eps=1e-8, float weight_decay=1e-2, bool decoupled=True, "
          "bool maximize=False, str mask='update', Tensor? grad_scale=None, Tensor? found_inf=None")
_SGD_LISTS = "Tensor(a!)[] params, Tensor[] grads, Tensor[] gammas, Tensor(b!)[] momentum_buffers"
_ADAMW_LISTS = ("Tensor(a!)[] params, Tensor[] grads, Tensor[] gammas, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
                "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps")
_SCHEMAS = {
    "importance": "(Tensor grad, *, str backend='auto') -> (Tensor, Tensor)",
    "accumulate_importance_": "(Tensor(a!)[] gammas, Tensor[] grads, *, str backend='auto') -> Tensor",
    "soft_mask_": "(Tensor(a!)[] grads, Tensor[] gammas, *, str backend='auto') -> ()",
    "update_mask_": "(Tensor(a!)[] params, Tensor[] old_params, Tensor[] gammas, *, str backend='auto') -> ()",
    "masked_sgd_": f"({_SGD_LISTS}, *, float lr, {_SGD}, str backend='auto') -> ()",
    "masked_sgd_.tensor_lr": f"({_SGD_LISTS}, *, Tensor lr, {_SGD}, str backend='auto') -> ()",
    "masked_adamw_": f"({_ADAMW_LISTS}, *, float lr, {_ADAMW}, str backend='auto') -> ()",
    "masked_adamw_.tensor_lr": f"({_ADAMW_LISTS}, *, Tensor lr, {_ADAMW}, str backend='auto') -> ()",
}
# The positions of the lists that a schema marks as written.
_MUTATED = {op: [i for i, argument in enumerate(schema.split(", ")) if "!" in argument] for op, schema in _SCHEMAS.items()}
# Kernels keep tables and workspaces on the device from call to call. Where inductor captures CUDA graphs by itself
# (mode="reduce-overhead") nothing may outlive a call; with the second tag, which torch 2.6 lacks, operators stay outside.
_TAGS = tuple(getattr(torch.Tag, tag) for tag in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, tag))
_LIBRARY = torch.library.Library("spg_kernels", "DEF")


def call(op: str, lists: Lists, backend: str, **kwargs):
    """Run `op`; through torch's dispatcher only under a tracer, for with long lists it takes longer than a step."""
    if torch.jit.is_tracing():  # it records operations in place on tensors, but not on lists of tensors
        return _run(op, lists, kwargs, "reference")
    if not is_compiling() and not _len_torch_dispatch_stack():
        return _run(op, lists, kwargs, backend)
    check_lists(op, lists)
    # The overload is named: torch would choose the one that makes a float of a tensor lr, which synchronizes with a GPU.
    overload = "tensor_lr" if isinstance(kwargs.get("lr"), Tensor) else "default"
    return getattr(getattr(torch.ops.spg_kernels, op), overload)(*lists, backend=backend, **kwargs)


def has_kernels(tensors: list[Tensor], backend: str) -> bool:
    """Whether `backend` has kernels for parameters of these devices and dtypes."""
    def has_one(device: torch.device, dtype: torch.dtype) -> bool:
        chosen = resolve(backend, device.type)
        return dtype in DTYPES and chosen is not reference and chosen.PLANS.device_type == device.type

    return all(has_one(*kind) for kind in {(t.device, t.dtype) for t in tensors})


class Call(NamedTuple):
    """A masked optimizer step over lists that are known to match: one parameter group's."""

    op: str
    lists: Lists
    settings: dict


class Kernel(NamedTuple):
    """What serves such calls: a backend's function, and the plan for tensors like those of a call."""

    function: Callable
    plan: Plan

    def launch(self, addresses: array, call: Call, common: dict) -> None:
        # Before, as in `_run`; of what a step writes, a graph can only have saved the parameters.
        increment_version(call.lists[0])
        self.function(self.plan.launch, addresses, **call.settings, **common)


def find_kernels(calls: list[Call], backend: str) -> tuple[list[Kernel], list[array], list[tuple[int, int]]]:
    """The kernel of every call, and its tensors' addresses; and the tensors that no kernel takes, as (position of the call,
    position in its lists). A call with such a tensor has no kernel.
    """
    kernels, located, refused = [], [], []
    for k, (op, lists, _) in enumerate(calls):
        chosen, plan, addresses = _known(op, lists, backend) or _make(op, lists, backend)
        if plan is None:
            refused += [(k, i) for i in range(len(lists[0]))]
        elif addresses is None:
            refused += [(k, i) for i in plan.refused]
            log.debug("%s: %d of %d tensors take the generic step, the first (%d) because it %s",
                      op, len(plan.refused), len(lists[0]), *plan.first_refusal())
        else:
            kernels.append(Kernel(getattr(chosen, op), plan))
            located.append(addresses)
    return kernels, located, refused


def trace(calls: list[Call], common: dict, backend: str) -> None:
    """Every call through torch's dispatcher, for its compiler to see."""
    for op, lists, settings in calls:
        call(op, lists, backend, **settings, **common)


def _importance(grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    # gamma = max(0, a) = a: the fold into zeros is the importance itself.
    gamma = _empty_importance(grad).zero_()
    finite = _run("accumulate_importance_", ([gamma], [grad.detach()]), {}, backend)
    return gamma, finite[0].clone()


def _empty_importance(grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        return torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
    return torch.empty_like(grad, dtype=torch.float32, requires_grad=False)


def _register(name: str, schema: str) -> None:
    op = name.partition(".")[0]

    def kernel(*lists, backend="auto", **kwargs):
        if "lr" in kwargs:  # again, for direct calls of torch.ops.spg_kernels
            kwargs = check_settings(op, lists, kwargs)
        return _importance(*lists, backend) if op == "importance" else _run(op, lists, kwargs, backend)

    def fake(*lists, backend="auto", **kwargs):
        if op == "importance":
            return _empty_importance(lists[0]), torch.empty((), dtype=torch.bool, device=lists[0].device)
        if op == "accumulate_importance_":
            return torch.empty(len(lists[1]), dtype=torch.bool, device=lists[1][0].device if lists[1] else None)
        return None

    _LIBRARY.define(name + schema, tags=_TAGS)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"spg_kernels::{name}", fake, lib=_LIBRARY)


for _name, _schema in _SCHEMAS.items():
    _register(_name, _schema)


def _require_finite(finite: Tensor, names: list[str]) -> None:
    if finite.is_meta:
        return
    if is_compiling() or type(finite) not in PLAIN:  # a tracer's fake tensor
        torch._assert_async(finite.all(), "spg_kernels: inf or NaN in a gradient, its importance is unchanged")
    elif not finite.all():
        raise NonFiniteGradientError([name for name, ok in zip(names, finite.reshape(-1).tolist()) if not ok])


def importance_of(grad: Tensor, backend: str) -> Tensor:
    """The importance of one gradient, through torch's dispatcher where somebody traces."""
    if is_compiling() or _len_torch_dispatch_stack() or torch.jit.is_tracing() or grad.is_meta:
        value, finite = torch.ops.spg_kernels.importance(grad, backend=backend)
    else:
        value, finite = _importance(grad, backend)
    _require_finite(finite, ["grad"])
    return value


def fold(gammas: list[Tensor], grads: list[Tensor], names: list[str], backend: str) -> None:
    """`accumulate_importance_` with the names that a NonFiniteGradientError reports."""
    _require_finite(call("accumulate_importance_", (gammas, grads), backend), names)

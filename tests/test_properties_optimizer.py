"""Random histories of an SPGOptimizer, every operation of them compared with a float64 model (stepping.py).

The long run: `python -m pytest tests/test_properties_optimizer.py --hypothesis-profile=long`.
"""

import copy
import io
import pickle
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import nn

from spg_kernels import Importance, NonFiniteGradientError, SPGOptimizer

from . import oracle, stepping
from .stepping import snapshot
from .test_properties_operators import assert_codes

INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, dampening=0.3, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.5, 0.9), amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.01),
}


class History:
    """A model and its wrapped optimizer, taken through operations, each checked as it is done."""

    def __init__(self, inner: str, mask: str, dtype: torch.dtype, backend: str):
        self.net = nn.ModuleDict({"trunk": nn.ModuleList([nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1)]),
                                  "heads": nn.ModuleList([nn.Linear(1, 2)])})
        self.mask, self.dtype = mask, dtype
        self.checkpoints, self.others, self.tasks = [], [], 0
        self.wrap(inner, backend, named_parameters=self.net.named_parameters())

    def wrap(self, inner: str, backend: str, **arguments) -> None:
        self.inner, self.backend = inner, backend
        self.optimizer = SPGOptimizer(INNER[inner](self.net.parameters()), heads=self.net["heads"], mask=self.mask,
                                      importance_dtype=self.dtype, backend=backend, **arguments)

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def trunk(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p in self.optimizer.importance]

    def gradients(self, seed: int) -> list[torch.Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(len(self.parameters()), generator=generator)
        return [None if missing < 0.15 else torch.randn(p.shape, generator=generator)
                for p, missing in zip(self.parameters(), draws)]

    def set_gradients(self, seed: int) -> None:
        for p, grad in zip(self.parameters(), self.gradients(seed)):
            p.grad = grad

    # Operations that compute

    def step(self, seed: int) -> None:
        self.set_gradients(seed)
        self.check_step(lambda: self.optimizer.step())

    def step_with_closure(self, seed: int) -> None:
        self.set_gradients(seed)

        def closure():
            self.set_gradients(seed)
            return torch.tensor(2.5)

        def run():
            assert self.optimizer.step(closure) == 2.5

        self.check_step(run)

    def check_step(self, run) -> None:
        before = snapshot(self.optimizer)
        expected = stepping.step(before, self.inner.split()[0], self.mask)
        run()
        stepping.assert_stepped(before, snapshot(self.optimizer), expected, self.mask)

    def failing_step(self, seed: int) -> None:
        self.set_gradients(seed)

        def closure():
            raise KeyboardInterrupt

        before = snapshot(self.optimizer)
        with pytest.raises(KeyboardInterrupt):
            self.optimizer.step(closure)
        assert stepping.same(before, snapshot(self.optimizer))

    def fold(self, seed: int) -> None:
        self.set_gradients(seed)
        bad = [p for k, p in enumerate(self.trunk()) if p.grad is not None and (seed >> k) % 16 == 15]
        for p in bad:
            p.grad.flatten()[-1:] = (float("inf"), float("nan"))[seed % 2]
        before = snapshot(self.optimizer)
        try:
            self.optimizer.accumulate_importance()
            assert not bad
        except NonFiniteGradientError as error:
            assert error.names == [self.optimizer.importance.name_of(p) for p in bad]
        self.check_folded(before, [slot.grad for slot in before])

    def check_folded(self, before: list, *folds: list[torch.Tensor | None]) -> None:
        for i, (was, now) in enumerate(zip(before, snapshot(self.optimizer))):
            grads = [grads[i] for grads in folds if grads[i] is not None and grads[i].isfinite().all()]
            if was.gamma is None:
                assert now.gamma is None
            elif not grads:
                assert torch.equal(now.gamma, was.gamma)
            elif self.dtype == torch.uint8:
                assert_codes(now.gamma, was.gamma, 28 * torch.stack([oracle.z(grad) for grad in grads]).amax(0))
            else:
                exact = torch.stack([was.gamma.double(), *map(oracle.importance, grads)]).amax(0)
                assert ((now.gamma - exact).abs() <= 2e-6).all()
            assert torch.equal(now.value, was.value) and now.state.keys() == was.state.keys()

    def measure(self, seed: int) -> None:
        losses = [self.loss_with([torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + k))
                                  for p in self.parameters()]) for k in range(2)]
        before = snapshot(self.optimizer)
        self.optimizer.measure_importance([1.0, 0.5], [loss for loss, _ in losses], progress=False)
        self.check_folded(before, *([1.5 * grad for grad in grads] for _, grads in losses))
        self.tasks += 1
        assert self.optimizer.importance.tasks == self.tasks and all(p.grad is None for p in self.parameters())

    def loss_with(self, grads: list[torch.Tensor]):
        return (lambda scale: sum((p * grad).sum() for p, grad in zip(self.parameters(), grads)) * scale), grads

    def set_importance(self, seed: int) -> None:
        p = self.trunk()[seed % len(self.trunk())]
        gamma = torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)).round(decimals=seed % 3)
        self.optimizer.importance[p] = gamma
        kept = self.optimizer.importance[p]
        assert torch.equal(kept, gamma) if self.dtype == torch.float32 else (kept >= gamma).all()

    def change_learning_rate(self, seed: int) -> None:
        self.optimizer.param_groups[seed % len(self.optimizer.param_groups)]["lr"] = (0.0, 0.003, 0.3)[seed % 3]

    # Operations that must keep everything as it is

    def add_group(self, seed: int) -> None:
        before = snapshot(self.optimizer)
        layer = nn.Linear(1 + seed % 3, 2)
        self.net["heads" if seed % 2 else "trunk"].append(layer)
        self.optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.05})
        now = snapshot(self.optimizer)
        assert stepping.same(before, now[:len(before)]) and len(now) == len(before) + 2
        assert all((slot.gamma is None) if seed % 2 else not slot.gamma.any() for slot in now[len(before):])

    def save(self, seed: int) -> None:
        before = snapshot(self.optimizer)
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        assert stepping.same(before, snapshot(self.optimizer))
        self.checkpoints.append((self.inner, file, before, self.tasks))

    def load(self, seed: int) -> None:
        if not self.checkpoints:
            return
        inner, file, saved, tasks = self.checkpoints[seed % len(self.checkpoints)]
        if inner != self.inner:
            return
        file.seek(0)
        state, now = torch.load(file, weights_only=True), snapshot(self.optimizer)
        if [slot.value.shape for slot in saved] != [slot.value.shape for slot in now] or len(state["param_groups"]) != len(
                self.optimizer.param_groups) or [s.gamma is None for s in saved] != [s.gamma is None for s in now]:
            with pytest.raises(ValueError):
                self.optimizer.load_state_dict(state)
            assert stepping.same(now, snapshot(self.optimizer)) and self.optimizer.importance.tasks == self.tasks
            return
        self.optimizer.load_state_dict(state)
        self.tasks = tasks
        for p, slot in zip(self.parameters(), saved):
            p.data.copy_(slot.value)
            p.grad = slot.grad
        assert stepping.same(saved, snapshot(self.optimizer))

    def load_plain(self, seed: int) -> None:
        """A plain optimizer's checkpoint: its state, and the importance stays."""
        before = snapshot(self.optimizer)
        plain = copy.deepcopy(self.optimizer.inner).state_dict()
        self.optimizer.load_state_dict(plain)
        assert stepping.same(before, snapshot(self.optimizer))

    def copy(self, seed: int) -> None:
        """Go on with a copy, with the original set aside."""
        before = snapshot(self.optimizer)
        self.others.append((self.optimizer, before))
        pair = (self.net, self.optimizer)
        self.net, self.optimizer = copy.deepcopy(pair) if seed % 2 else pickle.loads(pickle.dumps(pair))
        assert stepping.same([*map(without_gradient, before)], [*map(without_gradient, snapshot(self.optimizer))])

    def fresh_inner(self, seed: int) -> None:
        """The next task's optimizer, of any kind, on any backend, takes over the importance."""
        gammas = [self.optimizer.importance.gamma(p) for p in self.net.parameters()]
        self.wrap([*INNER][seed % len(INNER)], ("auto", "native", "reference")[seed % 3], importance=self.optimizer.importance)
        assert all(a is b for a, b in zip(gammas, map(self.optimizer.importance.gamma, self.net.parameters())))

    def change_backend(self, seed: int) -> None:
        self.optimizer.backend = ("auto", "native", "reference")[seed % 3]

    def through_a_file(self, seed: int) -> None:
        importance = self.optimizer.importance
        with tempfile.TemporaryDirectory() as folder:
            importance.save(Path(folder) / "importance")
            loaded = Importance.load(Path(folder) / "importance")
        assert loaded.tasks == importance.tasks and list(loaded) == list(importance)
        assert all(torch.equal(loaded[name], importance[name]) for name in importance)
        loaded.bind((importance.name_of(p), p) for p in self.trunk())
        self.optimizer.importance = loaded


def without_gradient(slot: stepping.Slot) -> stepping.Slot:
    return stepping.Slot(slot.value, None, slot.gamma, slot.group, slot.state)


OPERATIONS = ["step"] * 4 + ["fold"] * 3 + ["save", "load"] * 2 + [
    "step_with_closure", "failing_step", "measure", "set_importance", "change_learning_rate", "add_group", "load_plain",
    "copy", "fresh_inner", "change_backend", "through_a_file"]


@settings(max_examples=max(1, settings.default.max_examples // 4))
@given(st.sampled_from([*INNER]), st.sampled_from(["update", "gradient"]), st.sampled_from([torch.float32, torch.uint8]),
       st.sampled_from(["auto", "native", "reference"]),
       st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 1 << 16)), min_size=8, max_size=16))
def test_any_history_is_the_models(inner, mask, dtype, backend, operations):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what mask="gradient" says of adaptive optimizers
        history = History(inner, mask, dtype, backend)
        for operation, seed in operations:
            getattr(history, operation)(seed)
            event(operation)
    assert all(stepping.same(before, snapshot(original)) for original, before in history.others), (
        "a copy is apart from its original")

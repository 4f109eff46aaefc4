"""The measuring pass: arguments that cannot work, and those that can although they look odd."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from spg_kernels import NonFiniteGradientError, SharedTrunkLosses, SPGOptimizer, cross_head_losses, reference

from .models import Net, tasks
from .wrapping import equal, wrap


class Once(IterableDataset):
    """Gives its batches to whoever asks first."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


def test_arguments_that_cannot_work_say_why(net):
    with pytest.raises(ValueError, match="heads: expected at least 4.*0 to 3, got 3"):
        SharedTrunkLosses(net.trunk, net.heads, 3, F.cross_entropy)
    with pytest.raises(ValueError, match="task: expected 0 or more, got -1"):
        SharedTrunkLosses(net.trunk, net.heads, -1, F.cross_entropy)
    with pytest.raises(TypeError, match="task: expected a whole number, got str"):
        cross_head_losses(net, "1", F.cross_entropy)
    with pytest.raises(TypeError, match="heads: expected a sequence of modules, got Linear"):
        SharedTrunkLosses(net.trunk, net.heads[0], 0, F.cross_entropy)
    with pytest.raises(TypeError, match=r"heads\[1\]: expected a module, got function"):
        SharedTrunkLosses(net.trunk, [net.heads[0], lambda x: x], 1, F.cross_entropy)
    with pytest.raises(TypeError, match="memory: expected a number of bytes, got str"):
        SharedTrunkLosses(net.trunk, net.heads, 1, F.cross_entropy, memory="1G")
    with pytest.raises(TypeError, match=r"losses\[1\]: expected a function of a batch, got NoneType"):
        wrap(net).measure_importance(tasks()[0], [lambda batch: None, None])
    with pytest.raises(TypeError, match="losses: expected a list of functions.*got dict"):
        wrap(net).measure_importance(tasks()[0], {"a": None})
    with pytest.raises(ValueError, match=r"losses\[0\]: expected a loss that depends on a parameter"):
        wrap(net).measure_importance(tasks()[0], [lambda batch: batch[0].sum()])
    with pytest.raises(ValueError, match="heads: .* every parameter of this optimizer"):
        SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=net).measure_importance(
            tasks()[0], cross_head_losses(net, 1, F.cross_entropy))
    with pytest.raises(TypeError, match="trunk: .*one tensor, got tuple"):
        wrap(net).measure_importance(tasks()[0], SharedTrunkLosses(lambda x: (x, x), net.heads, 1, F.cross_entropy))


FORMS = pytest.mark.parametrize("form", [cross_head_losses, lambda net, *rest: SharedTrunkLosses(net.trunk, net.heads, *rest)],
                                ids=["plain", "shared"])


@FORMS
@pytest.mark.parametrize("batch, seen", [({"x": 1, "y": 2}, "dict of 2"), ([torch.ones(8, 10)] * 3, "list of 3"),
                                         (torch.ones(2, 10), "Tensor of 2")], ids=["dict", "three", "inputs alone"])
def test_a_batch_is_a_pair(net, form, batch, seen):
    with pytest.raises(TypeError, match=rf"batch: expected a pair of tensors \(inputs, targets\), got {seen}"):
        wrap(net).measure_importance([batch], form(net, 1, F.cross_entropy), progress=False)


@FORMS
@pytest.mark.parametrize("batch, message", [(({"x": 1}, torch.ones(8)), r"batch\[0\]: expected a tensor, got dict"),
                                            ((torch.ones(8, 10), [1] * 8), r"batch\[1\]: expected a tensor, got list")])
def test_both_of_a_batch_are_tensors(net, form, batch, message):
    with pytest.raises(TypeError, match=message):
        wrap(net).measure_importance([batch], form(net, 1, F.cross_entropy), progress=False)


@FORMS
@pytest.mark.parametrize("loss, seen", [
    (lambda outputs, y: (F.cross_entropy(outputs, y), outputs.square().mean()), "tuple"),  # torch.autograd.grad took their sum
    (lambda outputs, y: F.cross_entropy(outputs, y, reduction="none"), r"a tensor of shape \(8,\)"),
    (lambda outputs, y: F.cross_entropy(outputs, y).item(), "float"),
], ids=["tuple", "vector", "number"])
def test_a_loss_is_one_number(net, form, loss, seen):
    optimizer = wrap(net)
    with pytest.raises(TypeError, match=rf"losses\[1\]: expected a function that gives a tensor of one element, got {seen}"):
        optimizer.measure_importance(tasks()[0], form(net, 1, loss), progress=False)
    assert optimizer.importance.tasks == 0 and all(p.grad is None for p in net.parameters())


@FORMS
def test_an_old_head_is_probed_by_one_tensor(net, form):
    class Dictionary(torch.nn.Linear):
        def forward(self, features):
            return {"logits": super().forward(features)}

    net.heads[0] = Dictionary(16, 3)
    with pytest.raises(TypeError, match="(model.x, 0.|heads.0..features.): expected one tensor of outputs.*, got dict"):
        wrap(net).measure_importance(tasks()[0], form(net, 1, F.cross_entropy), progress=False)


@FORMS
def test_a_pass_that_gives_no_gradient_at_all_is_none(net, form):
    optimizer, losses, batches = wrap(net), form(Net(), 1, F.cross_entropy), tasks()[0]
    for _ in range(2):  # nor is it one that was interrupted at its end, which the same loader and losses would go on with
        with pytest.raises(ValueError, match="losses: expected a gradient for some trunk parameter, got none"):
            optimizer.measure_importance(batches, losses, progress=False)
    assert optimizer.importance.tasks == 0 and not optimizer.importance.active


def test_the_backend_that_was_asked_for_measures(net, monkeypatch):
    calls, accumulate = [], reference.accumulate_importance_
    monkeypatch.setattr(reference, "accumulate_importance_", lambda *lists: (calls.append(lists), accumulate(*lists))[1])
    wrap(net, backend="reference").measure_importance(tasks()[0], cross_head_losses(net, 1, F.cross_entropy), progress=False)
    assert len(calls) == 2


def test_one_loss_that_gives_a_gradient_is_enough(net):
    other, own = (cross_head_losses(model, 0, F.cross_entropy)[0] for model in (Net(), net))
    for losses in ([other, own], [own, other], (loss for loss in (other, own))):
        optimizer = wrap(net)
        optimizer.measure_importance(tasks()[0], losses, progress=False)
        assert optimizer.importance.tasks == 1 and optimizer.importance.active


@pytest.mark.parametrize("error", [TypeError, NotImplementedError])
def test_a_loader_need_not_know_its_length(net, error, capsys):
    class Loader(list):
        def __len__(self):
            raise error

    optimizer = wrap(net)
    optimizer.measure_importance(Loader(tasks()[0]), cross_head_losses(net, 1, F.cross_entropy))
    assert optimizer.importance.tasks == 1 and " 4batch" in capsys.readouterr().err, "batches are counted, of an unknown total"


def test_a_loader_may_give_its_batches_by_index_alone(net):
    class Loader:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return tasks()[0][index]

    by_index, listed = wrap(net), wrap(net)
    for optimizer, loader in ((by_index, Loader()), (listed, tasks()[0])):
        optimizer.measure_importance(loader, cross_head_losses(net, 1, F.cross_entropy), progress=False)
    assert equal(by_index.importance.values(), listed.importance.values()) and by_index.importance.active


def test_a_measuring_pass_that_cannot_work_says_why(net):
    optimizer = SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=net.heads)
    batches, losses = tasks()[0], cross_head_losses(net, 1, F.cross_entropy)
    with pytest.raises(ValueError, match="iterator"):
        optimizer.measure_importance(iter(batches), losses)
    with pytest.raises(TypeError, match="loader: expected something to run over.*, got NoneType"):
        optimizer.measure_importance(None, losses)
    with pytest.raises(ValueError, match="at least one batch, got none$"):
        optimizer.measure_importance([], losses, progress=False)
    with pytest.raises(ValueError, match="losses"):
        optimizer.measure_importance(batches, [])
    with pytest.raises(TypeError, match="losses: expected a list of functions.*, got function"):
        optimizer.measure_importance(batches, losses[0])
    with pytest.raises(NonFiniteGradientError) as error:
        optimizer.measure_importance([(batches[0][0] * float("nan"), batches[0][1])], losses, progress=False)
    assert error.value.names == ["0.0", "0.1", "0.2", "0.3"]
    assert optimizer.importance.tasks == 0 and all(p.grad is None for p in net.parameters())
    assert not optimizer.importance["0.0"].any()
    with pytest.raises(ValueError, match="at least one batch, got none after the losses before"):
        optimizer.measure_importance(DataLoader(Once(batches), batch_size=None), losses, progress=False)


@FORMS
@pytest.mark.parametrize("mistake", ["no such head", "labels out of range", "no loss"])
def test_where_the_tasks_own_loss_cannot_run_nothing_is_folded_in(net, form, mistake):
    """gamma only grows: what the wrong call folded in, the right one would not take back."""
    batches, loss, task = tasks()[0], F.cross_entropy, 2
    if mistake == "no such head":
        net.heads = net.heads[:2]
        task = 1 if form is not cross_head_losses else 2  # else refused before
        loss = F.cross_entropy if form is cross_head_losses else lambda outputs, y: outputs[:, 5]
    elif mistake == "no loss":
        loss = None
    else:
        batches = [(x, y + 5) for x, y in batches]
    optimizer = wrap(net)
    with pytest.raises((IndexError, TypeError)):
        optimizer.measure_importance(batches, form(net, task, loss), progress=False)
    assert not optimizer.importance.active and not any(gamma.any() for gamma in optimizer.importance.values())


class Checkpointed(torch.nn.Module):
    """Parameters in a checkpointed block, with nothing trained before it, and after it."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.block, self.last, self.use_reentrant = torch.nn.Linear(10, 16), torch.nn.Linear(16, 16), use_reentrant

    def forward(self, x):
        return self.last(checkpoint(lambda x: self.block(x).tanh(), x.detach().requires_grad_(),
                                    use_reentrant=self.use_reentrant))


def test_a_checkpoint_that_hides_its_parameters_is_refused(net):
    """torch.autograd.grad passes a reentrant one by: its parameters would count for nothing."""
    gammas = []
    for use_reentrant, form in ((True, FORMS.args[1][0]), (False, FORMS.args[1][1]), (True, FORMS.args[1][1])):
        torch.manual_seed(0)
        net.trunk = Checkpointed(use_reentrant)
        optimizer = wrap(net)
        if len(gammas) == 2:
            with pytest.raises(TypeError, match="trunk: .*use_reentrant=False"):
                optimizer.measure_importance(tasks()[0], form(net, 1, F.cross_entropy), progress=False)
            assert not optimizer.importance.active
        else:
            optimizer.measure_importance(tasks()[0], form(net, 1, F.cross_entropy), progress=False)
            gammas.append(list(optimizer.importance.values()))
    assert all(torch.allclose(one, other, atol=2e-6) for one, other in zip(*gammas, strict=True)) and gammas[0][0].any()


@FORMS
def test_a_pass_in_inference_mode_measures_all_the_same(net, form):
    """Where trainers validate, in a hook at a task's end."""
    optimizers, batches = [wrap(net), wrap(net)], tasks()[0]
    for optimizer, mode in zip(optimizers, (torch.inference_mode, torch.enable_grad)):
        with mode():
            optimizer.measure_importance(batches, form(net, 1, F.cross_entropy), progress=False)
    assert all(map(torch.equal, *(optimizer.importance.values() for optimizer in optimizers)))

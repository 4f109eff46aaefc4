"""The measuring pass: its losses, one trunk for many heads, and what it does when it is interrupted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

from spg_kernels import NonFiniteGradientError, SharedTrunkLosses, SPGOptimizer, cross_head_losses

from . import oracle
from .models import Net, set_gradients, tasks
from .wrapping import equal, values


class Counted(nn.Module):
    """A trunk that counts its forward passes."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.calls = trunk, 0

    def forward(self, x):
        self.calls += 1
        return self.trunk(x)


def wrapped(net, **kwargs):
    return SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=net.heads,
                        named_parameters=net.named_parameters(), **kwargs)


def shared(net, task=2, **kwargs):
    return SharedTrunkLosses(net.trunk, net.heads, task, F.cross_entropy, **kwargs)


def gammas(optimizer):
    return [optimizer.importance[name] for name in optimizer.importance]


def measured_plainly(net, batches, task=2, **kwargs):
    optimizer = wrapped(net, **kwargs)
    optimizer.measure_importance(batches, cross_head_losses(net, task, F.cross_entropy), progress=False)
    assert all(gamma.max() > 0.3 for gamma in gammas(optimizer) if gamma.numel() > 1)
    return gammas(optimizer)


def convolutional():
    net = Net()
    net.trunk = nn.Sequential(nn.Unflatten(1, (1, 10)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(),
                              nn.Linear(32, 16), nn.Dropout(0.0))
    return net


def channels_last():
    net = Net()
    net.trunk = nn.Sequential(nn.Unflatten(1, (1, 2, 5)), nn.Conv2d(1, 4, (1, 2)), nn.Conv2d(4, 2, 2), nn.Tanh(), nn.Flatten(),
                              nn.Linear(6, 16)).to(memory_format=torch.channels_last)
    return net


def deep_heads():
    net = Net()
    net.heads = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3)) for _ in range(3))
    return net


def a_head_on_a_trunk_weight():
    net = Net()
    for head in net.heads:
        nn.utils.parametrize.register_parametrization(head, "weight", _Rows(net.trunk[2]))
    return net


class _Rows(nn.Module):
    """A weight plus the first rows of another layer's, which thereby has two ways to a gradient."""

    def __init__(self, layer):
        super().__init__()
        self.layers = [layer]  # not a submodule: its parameters stay the trunk's

    def forward(self, weight):
        return weight + self.layers[0].weight[:3]


def heads_that_write_in_place():
    net = Net()
    net.trunk[3] = nn.Linear(16, 16)  # whose backward does not need its output: autograd would not notice
    net.heads = nn.ModuleList(nn.Sequential(nn.ELU(inplace=True), nn.Linear(16, 3)) for _ in range(3))
    return net


MODELS = [Net, convolutional, channels_last, deep_heads, a_head_on_a_trunk_weight, heads_that_write_in_place]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_one_pass_through_the_trunk_gives_the_importance_of_one_pass_a_head(make, backend):
    net, batches = make(), tasks()[1]
    optimizer = wrapped(net, backend=backend)
    optimizer.measure_importance(batches, shared(net), progress=False)
    for name, actual, plain in zip(optimizer.importance, gammas(optimizer), measured_plainly(net, batches, backend=backend)):
        assert torch.equal(actual, plain), name


def test_the_importance_is_the_methods_in_float64(net):
    batches = tasks()[1]
    optimizer = wrapped(net)
    optimizer.measure_importance(batches, shared(net), progress=False)
    double = Net().double()
    double.load_state_dict(net.state_dict())
    expected = [torch.zeros_like(p) for p in double.trunk.parameters()]
    for head in range(3):
        double.zero_grad()
        for x, y in batches:
            outputs = double(x.double(), head)
            (F.cross_entropy(outputs, y) if head == 2 else outputs.sum()).backward()
        expected = [torch.maximum(gamma, oracle.importance(p.grad)) for gamma, p in zip(expected, double.trunk.parameters())]
    for actual, right in zip(gammas(optimizer), expected):
        assert (actual - right).abs().max() < 2e-6


def test_plain_losses_in_the_users_own_loop(net):
    x, y = tasks()[0][0]
    losses, plain = shared(net), cross_head_losses(net, 2, F.cross_entropy)
    assert len(losses) == 3 and len(list(losses)) == 3
    for one, other in zip(losses, plain):
        assert torch.equal(one((x, y)), other((x, y)))
    assert torch.equal(losses[-1]([x, y]), plain[2]([x, y]))
    with pytest.raises(IndexError):
        losses[3]
    optimizer = wrapped(net)
    for loss_of in losses:
        optimizer.zero_grad()
        for batch in tasks()[1]:
            loss_of(batch).backward()
        optimizer.accumulate_importance()
    assert equal(gammas(optimizer), measured_plainly(net, tasks()[1]))


@pytest.mark.parametrize("sums, passes", [(4, 1), (3, 2), (2, 3), (0, 3), (100, 1)])
def test_as_many_heads_at_a_time_as_the_memory_allows(net, sums, passes):
    net.trunk = Counted(net.trunk)
    batches, optimizer = tasks()[1], wrapped(net)
    trunk_bytes = 4 * sum(p.numel() for p in net.trunk.parameters())
    optimizer.measure_importance(batches, shared(net, memory=sums * trunk_bytes), progress=False)
    assert net.trunk.calls == passes * len(batches)
    assert equal(gammas(optimizer), measured_plainly(net, batches))


def test_nothing_is_computed_that_was_not_asked_for(net):
    net.trunk[0].bias.requires_grad_(False)
    net.trunk.append(unused := nn.Linear(16, 16))
    unused.forward = lambda x: x
    asked = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: asked.append(name))
    batches, optimizer = tasks()[1], wrapped(net)
    optimizer.importance["trunk.4.weight"] = torch.full((16, 16), 0.25)
    set_gradients(p for p in net.parameters() if p.requires_grad)
    before = values(net)
    net.train()
    with torch.no_grad():
        optimizer.measure_importance(batches, shared(net), progress=False)
    assert set(asked) == {"trunk.0.weight", "trunk.2.weight", "trunk.2.bias"} and len(asked) == 3 * 3 * len(batches)
    assert net.training and equal(values(net), before) and not optimizer.state
    assert all(p.grad is None for p in net.parameters()) and optimizer.importance.tasks == 1
    assert (optimizer.importance["trunk.4.weight"] == 0.25).all() and not optimizer.importance["trunk.0.bias"].any()
    assert optimizer.importance["trunk.0.weight"].max() > 0.5


def test_running_statistics_are_updated_once_a_batch():
    net, batches = convolutional(), tasks()[1]
    wrapped(net).measure_importance(batches, shared(net), progress=False)
    assert net.trunk[2].num_batches_tracked == len(batches)


class Frees(nn.Module):
    """A trunk whose activations of the batch before must be gone."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.held = trunk, []

    def forward(self, x):
        assert all(storage.expired() for storage in self.held)
        hidden = self.trunk(x)
        self.held.append(StorageWeakRef(hidden.untyped_storage()))
        return hidden.square()  # whose backward needs `hidden`


def test_activations_of_one_batch_at_a_time(net):
    net.trunk = Frees(net.trunk)
    wrapped(net).measure_importance(tasks()[1], shared(net), progress=False)
    assert len(net.trunk.held) == len(tasks()[1])


@pytest.mark.parametrize("form", [shared, lambda net, task: cross_head_losses(net, task, F.cross_entropy)],
                         ids=["shared", "a pass a head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_are_summed_in_float32(dtype, form):
    """In its own dtype a sum over many batches stops growing: a pass a head was 0.07 off here, over 2,000 batches 0.3."""
    net = Net(tasks=2).to(dtype)
    nn.init.zeros_(net.heads[1].weight)  # leaves the importance to head 0
    batches = [(x.to(dtype), y) for task in tasks(40, 8) for x, y in task]
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in net.trunk.parameters()]
    for batch in batches:
        for total, gradient in zip(exact, torch.autograd.grad(shared(net, 1)[0](batch), list(net.trunk.parameters()))):
            total += gradient
    optimizer = wrapped(net)
    optimizer.measure_importance(batches, form(net, 1), progress=False)
    worst = max(float((actual - oracle.importance(total)).abs().max()) for actual, total in zip(gammas(optimizer), exact))
    assert worst < 1e-4
    assert all(p.grad is None for p in net.parameters())


def test_hooks_that_change_a_gradient_do_so_for_every_head(net):
    weight = net.trunk[0].weight

    def masks(parameter):
        parameter.grad[:5] = 0

    weight.register_post_accumulate_grad_hook(masks)  # which torch.autograd.grad does not call
    net.trunk[2].weight.register_hook(lambda grad: grad * (torch.arange(16) < 5))
    optimizer = wrapped(net)
    optimizer.measure_importance(tasks()[2], shared(net), progress=False)
    for actual, plain in zip(gammas(optimizer), measured_plainly(net, tasks()[2])):
        assert (actual - plain).abs().max() < 2e-6
    assert optimizer.importance[weight][:5].unique().numel() == 1, "what is masked stands out alike"


def test_sparse_gradients(net):
    words = [(torch.randint(0, 20, (8, 4)), y) for _, y in tasks()[0]]
    net.trunk = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Tanh())
    optimizer = wrapped(net)
    optimizer.measure_importance(words, shared(net), progress=False)
    for actual, plain in zip(gammas(optimizer), measured_plainly(net, words)):
        assert (actual - plain).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sparse_gradients_in_half_precision_are_summed_in_float32(dtype):
    """Float16 ones torch cannot add up at all, bfloat16 ones were 0.002 off."""
    words, table = torch.randint(0, 20, (5, 8, 4)), nn.Embedding(20, 4, sparse=True, dtype=dtype)
    weights = torch.randn(4, 4)
    optimizer = SPGOptimizer(torch.optim.SGD(table.parameters(), lr=0.1))
    optimizer.measure_importance(words, [lambda batch: (table(batch).float() * weights).sum()], progress=False)
    total = torch.zeros(20, 4, dtype=torch.float64)
    total.index_add_(0, words.flatten(), weights.to(dtype).double().repeat(40, 1))
    assert (optimizer.importance[table.weight] - oracle.importance(total)).abs().max() < 1e-6


class Stops:
    """Batches, until on pass `at` something goes wrong in the middle."""

    def __init__(self, batches, at):
        self.batches, self.at, self.passes = batches, at, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.passes += 1
        yield from self.batches[:2]
        if self.passes == self.at:
            raise KeyboardInterrupt
        yield from self.batches[2:]


def both(net):
    memory = 3 * 4 * sum(p.numel() for p in net.trunk.parameters())
    return [cross_head_losses(net, 3, F.cross_entropy), shared(net, 3, memory=memory)]


@pytest.mark.parametrize("form, passes", [(0, 4), (1, 2)], ids=["plain", "shared"])
def test_an_interrupted_pass_goes_on_where_it_stopped(form, passes):
    net = Net(tasks=4)
    losses, loader, optimizer = both(net)[form], Stops(tasks()[1], at=passes), wrapped(net)
    with pytest.raises(KeyboardInterrupt):
        optimizer.measure_importance(loader, losses, progress=False)
    assert optimizer.importance.tasks == 0 and all(p.grad is None for p in net.parameters())
    optimizer.measure_importance(loader, losses, progress=False)
    assert loader.passes == passes + 1 and optimizer.importance.tasks == 1
    assert equal(gammas(optimizer), measured_plainly(net, loader.batches, 3))
    optimizer.measure_importance(loader, losses, progress=False)
    assert loader.passes == 2 * passes + 1 and optimizer.importance.tasks == 2, "a finished pass is not interrupted"


def _step(net, optimizer):
    set_gradients(net.trunk.parameters())
    optimizer.step()


def _other_heads_step(net):
    set_gradients(net.heads.parameters())
    torch.optim.SGD(net.heads.parameters(), lr=0.1).step()


CHANGES = {
    "a step": _step,
    "weights loaded": lambda net, optimizer: net.load_state_dict(Net(tasks=4).state_dict()),
    "gamma set": lambda net, optimizer: optimizer.importance.store({"trunk.0.bias": torch.zeros(16)}),
    "heads that another optimizer trains": lambda net, optimizer: _other_heads_step(net),
    "a state loaded": lambda net, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_interrupted_pass_starts_anew_after_a_change(change):
    net = Net(tasks=4)
    optimizer = SPGOptimizer(torch.optim.SGD(net.trunk.parameters(), lr=0.1), heads=net.heads,
                             named_parameters=net.named_parameters())
    losses, loader = both(net)[0], Stops(tasks()[1], at=3)
    with pytest.raises(KeyboardInterrupt):
        optimizer.measure_importance(loader, losses, progress=False)
    change(net, optimizer)
    optimizer.measure_importance(loader, losses, progress=False)
    assert loader.passes == 3 + 4


@pytest.mark.parametrize("other", ["loader", "losses", "order"])
def test_another_measuring_pass_is_not_the_interrupted_one(other):
    net = Net(tasks=4)
    losses, loader, optimizer = both(net)[0], Stops(tasks()[1], at=3), wrapped(net)
    with pytest.raises(KeyboardInterrupt):
        optimizer.measure_importance(loader, losses, progress=False)
    if other == "order":
        losses.reverse()
    second = Stops(tasks()[1], at=0) if other == "loader" else loader
    optimizer.measure_importance(second, both(net)[0] if other == "losses" else losses, progress=False)
    assert second.passes == (4 if other == "loader" else 3 + 4)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_hooks_that_reduce_gradients_are_called(net, process_group):
    expected = measured_plainly(net, tasks()[1])
    optimizer, batches, net.trunk = wrapped(net), tasks()[1], Counted(DistributedDataParallel(net.trunk))
    reduced = []
    net.trunk.trunk.register_comm_hook(None, lambda state, bucket: _reduced(bucket, reduced))
    optimizer.measure_importance(batches, shared(net), progress=False)
    assert net.trunk.calls == 3 * len(batches) == len(reduced)
    assert equal(gammas(optimizer), expected)


def _reduced(bucket, reduced):
    reduced.append(bucket.index())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_progress_says_heads_and_batches(net, capsys):
    memory = 3 * 4 * sum(p.numel() for p in net.trunk.parameters())
    wrapped(net).measure_importance(tasks()[1], shared(net, memory=memory))
    shown = capsys.readouterr().err
    assert "losses 2 to 3 of 3" in shown and "/8 " in shown
    wrapped(net).measure_importance(tasks()[1], shared(net), progress=False)
    assert not capsys.readouterr().err


def test_a_gradient_that_is_not_finite_is_named_and_what_was_folded_before_it_counts(net):
    """The task's own loss is the first."""
    batches = tasks()[1]
    net.heads[1].weight.data[0, 0] = float("inf")
    optimizer, losses = wrapped(net), shared(net)
    with pytest.raises(NonFiniteGradientError) as error:
        optimizer.measure_importance(batches, losses, progress=False)
    assert error.value.names == [f"trunk.{name}" for name, _ in net.trunk.named_parameters()]
    assert optimizer.importance.tasks == 0 and all(p.grad is None for p in net.parameters())
    expected = wrapped(net)
    expected.measure_importance(batches, [cross_head_losses(net, 2, F.cross_entropy)[2]], progress=False)
    assert equal(gammas(optimizer), gammas(expected))


def test_a_head_may_have_no_parameters(net):
    (x, y), *_ = tasks()[0]
    (loss,) = SharedTrunkLosses(net.trunk, [torch.nn.Identity()], 0, F.cross_entropy)
    assert torch.equal(loss((x, y)), F.cross_entropy(net.trunk(x), y))


def test_losses_probe_old_heads_with_the_sum_of_their_outputs(net):
    x, y = tasks()[0][0]
    losses = cross_head_losses(net, 2, F.cross_entropy)
    assert len(losses) == 3
    assert torch.equal(losses[0]((x, y)), net(x, 0).sum()) and torch.equal(losses[1]([x, y]), net(x, 1).sum())
    assert torch.equal(losses[2]((x, y)), F.cross_entropy(net(x, 2), y))
    with pytest.raises(ValueError, match="task"):
        cross_head_losses(net, -1, F.cross_entropy)


def test_measuring_equals_the_loop_in_the_users_own_hands(net, capsys):
    batches = tasks()[1]
    losses = cross_head_losses(net, 1, F.cross_entropy)

    def wrapped():
        return SPGOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), heads=net.heads)

    by_hand, measured = wrapped(), wrapped()
    for loss_of in losses:
        by_hand.zero_grad()
        for batch in batches:
            loss_of(batch).backward()
        by_hand.accumulate_importance()
    set_gradients(net.parameters())
    parameters = [p.detach().clone() for p in net.parameters()]
    net.train()
    with torch.no_grad():
        measured.measure_importance(batches, losses, progress=True)
    assert "importance" in capsys.readouterr().err
    assert measured.importance.tasks == 1 and net.training
    assert all(p.grad is None for p in net.parameters()) and not measured.state
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), parameters))
    for name in by_hand.importance:
        assert torch.equal(by_hand.importance[name], measured.importance[name])
        assert by_hand.importance[name].max() > 0.5


@pytest.mark.parametrize("form", [lambda net: cross_head_losses(net, 1, F.cross_entropy), lambda net: shared(net, 1)],
                         ids=["plain", "shared"])
def test_no_gradient_is_left_to_another_optimizer(net, form):
    """Of heads that another one trains, or parameters that none does yet: its next step would take the whole pass."""
    set_gradients(net.parameters())
    optimizer = SPGOptimizer(torch.optim.SGD(net.trunk[2].parameters(), lr=0.1), heads=net.heads,
                             named_parameters=net.named_parameters())
    optimizer.measure_importance(tasks()[1], form(net), progress=False)
    assert all(p.grad is None for p in net.parameters())
    assert list(optimizer.importance) == ["trunk.2.weight", "trunk.2.bias"]

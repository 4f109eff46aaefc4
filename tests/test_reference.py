"""SPGOptimizer against METHOD.md written out as a loop, in float64."""

import pytest
import torch
import torch.nn.functional as F

from spg_kernels import SPGOptimizer, cross_head_losses, reference

from .models import Net, tasks


def written_out(model: Net, stream: list, lr: float, epochs: int) -> dict[str, torch.Tensor]:
    """METHOD.md, literally: soft-masked plain SGD and cross-head importance. Trains `model`, returns gamma."""
    trunk = dict(model.trunk.named_parameters())
    heads = list(model.heads.parameters())
    gamma = {name: torch.zeros_like(p) for name, p in trunk.items()}
    for t, batches in enumerate(stream):
        for _ in range(epochs):
            for x, y in batches:
                model.zero_grad()
                F.cross_entropy(model(x, t), y).backward()
                mean = sum(g.sum() for g in gamma.values()) / sum(g.numel() for g in gamma.values())
                with torch.no_grad():
                    for name, p in trunk.items():
                        p -= lr * (1 - gamma[name]) * p.grad
                    for p in heads:
                        if p.grad is not None:
                            p -= lr * (1 - mean) * p.grad
        for tau in range(t + 1):
            model.zero_grad()
            for x, y in batches:
                outputs = model(x, tau)
                (F.cross_entropy(outputs, y) if tau == t else outputs.sum()).backward()
            for name, p in trunk.items():
                z = (p.grad - p.grad.mean()) / p.grad.std()
                gamma[name] = torch.maximum(gamma[name], z.tanh().abs())
    return gamma


@pytest.mark.parametrize("mask", ["update", "gradient"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh optimizer a task", "one optimizer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_three_tasks_with_heads_equal_the_method_written_out(backend, mask, fresh, dtype):
    stream = tasks(dtype=torch.float64)
    torch.manual_seed(0)
    expected = Net().double()
    model = Net().to(dtype)
    model.load_state_dict(expected.state_dict())
    gamma = written_out(expected, stream, lr=0.2, epochs=3)
    backend = "auto" if backend == "native" and dtype == torch.float64 else backend

    def wrap(importance):
        return SPGOptimizer(torch.optim.SGD(model.parameters(), lr=0.2), heads=model.heads, mask=mask, importance=importance,
                            named_parameters=model.named_parameters(), backend=backend)

    optimizer = wrap(None)
    for t, batches in enumerate(stream):
        batches = [(x.to(dtype), y) for x, y in batches]
        if fresh and t:
            optimizer = wrap(optimizer.importance)
        for _ in range(3):
            for x, y in batches:
                optimizer.zero_grad()
                F.cross_entropy(model(x, t), y).backward()
                optimizer.step()
        optimizer.measure_importance(batches, cross_head_losses(model, t, F.cross_entropy), progress=False)
    # In float64 gamma itself, kept in float32, is what rounds; a float32 model drifts by its own rounding.
    limit = 3e-6 if dtype == torch.float64 else 1e-4
    assert optimizer.importance.tasks == 3 and len(optimizer.importance) == len(gamma)
    for (name, p), q in zip(model.named_parameters(), expected.parameters()):
        assert (p - q).abs().max() < limit, name
    for name, exact in gamma.items():
        assert (optimizer.importance[f"trunk.{name}"] - exact).abs().max() < limit, name


def test_half_precision_is_widened_before_it_is_subtracted_or_scaled():
    new = torch.tensor([60000.0], dtype=torch.float16)
    reference.update_mask_([new], [-new], [torch.tensor([0.25])])
    assert new == 30000, "the difference of the two is beyond float16"
    grad = torch.tensor([1000.0], dtype=torch.float16)
    share = 1e-6
    reference.soft_mask_([grad], [torch.tensor(1 - share)])
    assert abs(float(grad) - 1000 * (1 - float(torch.tensor(1 - share)))) <= 1e-3 * torch.finfo(torch.float16).eps

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from spg_kernels import Importance, SPGOptimizer

from .models import Net, set_gradients


def measured(net, dtype=torch.float32):
    importance = Importance(net.trunk.named_parameters(), dtype=dtype)
    set_gradients(net.trunk.parameters())
    importance.accumulate(net.trunk.parameters())
    return importance


def test_a_mapping_by_name_and_by_parameter(net):
    importance = measured(net)
    assert len(importance) == 4 and list(importance) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    weight = net.trunk[0].weight
    assert (weight in importance and "0.weight" in importance and net.heads[0].weight not in importance
            and "x" not in importance)
    assert torch.equal(importance[weight], importance["0.weight"]) and importance[weight].dtype == torch.float32
    importance[weight].fill_(0.5)
    assert not (importance[weight] == 0.5).all(), "what is read is a copy"
    importance["0.bias"] = torch.full((16,), 0.25, requires_grad=True)
    assert (importance[net.trunk[0].bias] == 0.25).all() and not importance[net.trunk[0].bias].requires_grad
    with pytest.raises(KeyError):
        importance[net.heads[0].weight]
    assert importance == importance and importance != measured(net)


@pytest.mark.parametrize("value, kind, message", [
    (torch.rand(4), ValueError, r"0.weight.*\(16, 10\).*\(4,\)"),
    (torch.full((16, 10), 1.5), ValueError, r"0.weight.*\[0, 1\].*1.5"),
    (torch.full((16, 10), -0.1), ValueError, r"0.weight.*\[0, 1\]"),
    (torch.full((16, 10), float("nan")), ValueError, r"0.weight.*finite"),
    (torch.ones(16, 10, dtype=torch.int64), TypeError, "0.weight.*int64"),
    (None, TypeError, "0.weight: expected a tensor, got NoneType"),
    ("high", TypeError, "0.weight: expected a tensor, got str"),
])
def test_setting_checks_shape_range_and_finiteness(net, value, kind, message):
    importance = measured(net)
    before = importance["0.weight"]
    with pytest.raises(kind, match=message):
        importance["0.weight"] = value
    assert torch.equal(importance["0.weight"], before)


def test_the_mean_is_over_elements_not_over_tensors(net):
    importance = measured(net)
    exact = torch.cat([importance[name].double().flatten() for name in importance]).mean()
    assert abs(float(importance.mean()) - float(exact)) < 1e-7
    coded = measured(net, torch.uint8)
    exact = torch.cat([coded[name].double().flatten() for name in coded]).mean()
    assert abs(float(coded.mean()) - float(exact)) < 1e-7
    assert float(Importance().mean()) == 0


def test_what_is_measured_reaches_the_heads_mean_where_it_lies(net):
    """A captured CUDA graph reads it there, and nothing that its replays call could bring it up to date."""
    importance = measured(net)
    mean = importance.mean_on(torch.device("cpu"))
    before = float(mean)
    for p in net.trunk.parameters():
        p.grad = torch.randn_like(p)
    importance.accumulate(net.trunk.parameters())
    after = float(mean)  # first: whoever asks for the importance may refresh it
    assert after > before and abs(after - torch.cat([importance[name].flatten() for name in importance]).mean()) < 1e-6


def test_eight_bits_protect_at_least_as_much(net):
    exact, coded = measured(net), measured(net, torch.uint8)
    for name in exact:
        assert (coded[name] >= exact[name] - 1e-6).all()
        assert (1 - coded[name] >= 0.93 * (1 - exact[name]) - 1e-6).all()
    coded["0.bias"] = torch.linspace(0, 1, 16)
    assert coded["0.bias"][0] == 0 and coded["0.bias"][-1] == 1


def test_summary_is_the_capacity_table(net):
    importance = measured(net)
    importance["0.bias"] = torch.tensor([0.6] * 4 + [0.995] * 4 + [0.1] * 8)
    importance.tasks = 2
    summary = importance.summary()
    row = next(row for row in summary.rows if row.name == "0.bias")
    assert row.elements == 16 and abs(row.mean - (0.6 * 4 + 0.995 * 4 + 0.1 * 8) / 16) < 1e-6
    assert row.above_half == 0.5 and row.above_99 == 0.25
    assert abs(summary.head_factor - (1 - float(importance.mean()))) < 1e-7 and summary.tasks == 2
    assert "0.bias" in str(summary) and "25.0%" in str(summary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_state_dict_and_file_round_trips_are_exact(net, dtype, tmp_path):
    importance = measured(net, dtype)
    importance.tasks = 3
    importance.save(tmp_path / "a.safetensors")
    loaded = Importance.load(tmp_path / "a.safetensors")
    fresh = Importance(net.trunk.named_parameters(), dtype=dtype)
    fresh.load_state_dict(importance.state_dict())
    for other in (loaded, fresh, copy.deepcopy(importance), pickle.loads(pickle.dumps(importance))):
        assert other.tasks == 3 and other.active and other.dtype == dtype and list(other) == list(importance)
        assert all(torch.equal(other[name], importance[name]) for name in importance)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"], "no temporary file is left"


def test_a_loaded_importance_is_attached_by_name(net, tmp_path):
    importance = measured(net)
    importance.save(tmp_path / "a")
    other = Net()
    loaded = Importance.load(tmp_path / "a")
    assert other.trunk[0].weight not in loaded
    loaded.bind(other.trunk.named_parameters())
    assert torch.equal(loaded[other.trunk[0].weight], importance["0.weight"])
    loaded.bind([("heads.0.weight", net.heads[0].weight)])
    assert len(loaded) == 4, "bind attaches known names only"
    with pytest.raises(ValueError, match="0.weight.*shape"):
        loaded.bind([("0.weight", nn.Parameter(torch.zeros(4)))])


def test_loading_says_what_is_missing_or_unexpected(net, tmp_path):
    importance = measured(net)
    state = importance.state_dict()
    state["gammas"] = {"0.weight": state["gammas"]["0.weight"], "extra": torch.zeros(3)}
    before = {name: importance[name] for name in importance}
    with pytest.raises(ValueError, match=r"missing \['0.bias', '2.weight', '2.bias'\], unexpected \['extra'\]"):
        importance.load_state_dict(state)
    with pytest.raises(ValueError, match="version"):
        importance.load_state_dict({**importance.state_dict(), "version": 99})
    assert all(torch.equal(importance[name], before[name]) for name in importance)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="importance file"):
        Importance.load(tmp_path / "other")


def test_names_and_shapes_of_parameters_are_checked(net):
    importance = Importance(net.trunk.named_parameters())
    with pytest.raises(ValueError, match="already known as 0.weight"):
        importance.add("module.0.weight", net.trunk[0].weight)
    with pytest.raises(TypeError, match="int.*int64; leave out what is never trained"):
        importance.add("int", torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="dtype"):
        Importance(dtype=torch.float16)


@pytest.mark.parametrize("pairs, seen", [
    (lambda net: net.trunk.parameters(), r"\[0\]: .*, got Parameter"),
    (lambda net: [torch.zeros(2, 3)], r"\[0\]: .*, got Tensor"),  # two rows are no name and no parameter
    (lambda net: net.trunk.named_modules(), r"\[0\]: .*, got \(str, Sequential\)"),
    (lambda net: [*net.trunk.named_parameters(), ("a", 1, 2)], r"\[4\]: .*, got \(str, int, int\)"),
    (lambda net: net, ": .*, got Net"),
], ids=["parameters", "two rows", "modules", "three", "model"])
@pytest.mark.parametrize("take", [Importance, lambda pairs: Importance().bind(pairs),
                                  lambda pairs: SPGOptimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1),
                                                             named_parameters=pairs)],
                         ids=["importance", "bind", "optimizer"])
def test_what_is_no_list_of_named_parameters_is_refused(net, pairs, seen, take):
    with pytest.raises(TypeError, match=rf"named_parameters{seen}"):
        take(pairs(net))


def test_named_parameters_may_be_a_dictionary(net):
    importance = Importance(dict(net.trunk.named_parameters()))
    importance.bind(dict(net.trunk.named_parameters()))
    assert list(importance) == [name for name, _ in net.trunk.named_parameters()]


@pytest.mark.parametrize("dtype, size", [(torch.float32, "25.1 GiB"), (torch.uint8, "6.3 GiB")], ids=str)
def test_what_a_model_of_seven_billion_parameters_needs_is_told_without_its_memory(dtype, size):
    hidden, inner, words = 4096, 11008, 32000
    layer = {"q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "o": (hidden, hidden),
             "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner), "norm1": (hidden,), "norm2": (hidden,)}
    shapes = {f"layers.{i}.{name}": shape for i in range(32) for name, shape in layer.items()}
    shapes |= {"embedding": (words, hidden), "norm": (hidden,), "head": (words, hidden)}
    importance = Importance(((name, torch.empty(shape, device="meta")) for name, shape in shapes.items()), dtype)
    assert repr(importance) == f"Importance(291 parameters, 6,738,415,616 elements, {dtype}, {size}, tasks=0)"


def test_the_size_of_a_small_model_is_told_in_mib(net):
    assert "1,232 elements, torch.float32, 0.0 MiB" in repr(Importance([("w", nn.Parameter(torch.zeros(28, 44)))]))
    assert "0.5 MiB" in repr(Importance([("w", nn.Parameter(torch.zeros(1 << 17)))]))


def test_memory_is_one_buffer_a_parameter_and_follows_the_model():
    with torch.device("meta"):
        net = Net()
    importance = Importance(net.trunk.named_parameters(), dtype=torch.uint8)
    assert all(gamma.is_meta and gamma.dtype == torch.uint8 for gamma in importance.state_dict()["gammas"].values())
    net.to_empty(device="cpu")
    importance.bind(net.trunk.named_parameters())
    set_gradients(net.trunk.parameters())
    importance.accumulate(net.trunk.parameters())
    assert importance[net.trunk[0].weight].max() > 0


def test_a_gradient_that_is_none_changes_nothing(net):
    importance = measured(net)
    before = {name: importance[name] for name in importance}
    net.zero_grad()
    net.trunk[0].bias.grad = torch.randn(16)
    importance.accumulate(net.trunk.parameters())
    assert not torch.equal(importance["0.bias"], before["0.bias"])
    assert all(torch.equal(importance[name], before[name]) for name in importance if name != "0.bias")


def test_sparse_and_complex_gradients_have_an_importance():
    embedding = nn.Embedding(6, 4, sparse=True)
    embedding(torch.tensor([1, 1, 3])).square().sum().backward()
    importance = Importance(embedding.named_parameters())
    importance.accumulate(embedding.parameters())
    dense = Importance([("dense", twin := nn.Parameter(torch.zeros(6, 4)))])
    twin.grad = embedding.weight.grad.to_dense()
    dense.accumulate([twin])
    assert (importance["weight"] - dense["dense"]).abs().max() < 2e-6 and dense["dense"].max() > 0.5
    wave = nn.Parameter(torch.randn(5, dtype=torch.complex64))
    wave.grad = torch.randn(5, dtype=torch.complex64)
    importance = Importance([("wave", wave)])
    importance.accumulate([wave])
    parts = torch.view_as_real(wave.grad).double()
    expected = ((parts - parts.mean()) / parts.std()).tanh().abs().amax(-1)
    assert (importance["wave"] - expected).abs().max() < 1e-6


def test_the_summary_is_plain_numbers(net):
    row = measured(net).summary().rows[0]
    assert json.loads(json.dumps(vars(row)))["name"] == "0.weight"


def test_the_summary_prints_any_name():
    text = str(Importance([("experts[/0]", nn.Parameter(torch.zeros(2))), ("[bold]", nn.Parameter(torch.zeros(2)))]).summary())
    assert "experts[/0]" in text and "[bold]" in text


def test_the_summary_prints_the_ends_of_long_names():
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{ab}.default.weight" for i in (0, 31) for ab in "AB"]
    text = str(Importance([(name, nn.Parameter(torch.zeros(2))) for name in names]).summary())
    parts = "".join(line.split("│")[1].strip() for line in text.splitlines() if "│" in line)
    assert all(name in parts for name in names) and max(map(len, text.splitlines())) <= 100

"""Where tensors like some others lie: through DLPack and csrc/, through torch's guards, and through neither."""

import gc
import sys
import weakref

import pytest
import torch
from torch import nn

from spg_kernels import BackendError, soft_mask_, update_mask_
from spg_kernels.backends import library, tensors

PATHS = ["exchange", "guards", "public"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param == "exchange" and tensors._functions() is None:
        pytest.skip("torch before 2.10 offers no exchange table" if library.load()[0] else library.load()[1])
    if request.param != "exchange":
        monkeypatch.setattr(tensors, "_functions", lambda: None)
    if request.param == "public":
        monkeypatch.setattr(tensors, "TensorGuards", None)
    return request.param


def located(locate, lists):
    addresses = locate(lists)
    return None if addresses is None else list(addresses)


def test_the_addresses_of_like_tensors_list_after_list(path):
    def lists():
        return ([torch.randn(4, 5), torch.zeros(0, 3), torch.zeros(())], [],
                [torch.randn(3, 2).t().bfloat16(), torch.zeros(4)[1:]])

    locate = tensors.locator(lists())
    for _ in range(3):
        again = lists()
        assert located(locate, again) == [t.data_ptr() for own in again for t in own]


def test_a_tensor_that_comes_twice_is_held_to_its_places(path):
    a, b, one = torch.zeros(3), torch.zeros(3), torch.zeros(())
    locate = tensors.locator(([a, b], [one, one]))
    assert located(locate, ([b, a], [one, one])) == [b.data_ptr(), a.data_ptr(), one.data_ptr(), one.data_ptr()]


class Other(torch.Tensor):
    pass


SQUARE = torch.randn(4, 4)
OTHERS = {
    "float64": SQUARE.double(), "float16": SQUARE.half(), "bool": SQUARE > 0, "complex": SQUARE.to(torch.complex64),
    "transposed": SQUARE.t(), "flat": SQUARE.flatten(), "shorter": SQUARE[:3].clone(), "meta": SQUARE.to("meta"),
    "strided": torch.zeros(4, 8)[:, :4], "expanded": torch.zeros(4, 1).expand(4, 4), "one dimension more": SQUARE[None],
    "sparse": SQUARE.to_sparse(), "a subclass": SQUARE.as_subclass(Other), "None": None, "a number": 1.0, "a list": [SQUARE],
    "mkldnn": SQUARE.to_mkldnn(),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("place", [0, 11])
def test_other_tensors_have_none(path, name, place):
    if path == "public" and not isinstance(OTHERS[name], torch.Tensor):
        pytest.skip("checked before it comes here")
    alike = [torch.zeros(4, 4) for _ in range(12)]
    locate = tensors.locator((alike, [torch.zeros(())]))
    others = [*alike[:place], OTHERS[name], *alike[place + 1:]]
    assert locate((others, [torch.zeros(())])) is None
    assert located(locate, (alike, [torch.ones(())])) is not None, "and no error is left behind"


@pytest.mark.parametrize("lists", [([SQUARE],), ([SQUARE, SQUARE], []), ([], [SQUARE, SQUARE]), ([SQUARE], [SQUARE], [])])
def test_as_many_tensors_in_other_lists_have_none(path, lists):
    assert tensors.locator(([SQUARE], [SQUARE]))(lists) is None


def test_parameters_and_what_needs_a_gradient_are_like_tensors():
    if tensors._functions() is None:
        pytest.skip("a guard tells them apart")
    locate = tensors.locator(([SQUARE],))
    assert located(locate, ([nn.Parameter(SQUARE)],)) == located(locate, ([SQUARE.detach()],)) == [SQUARE.data_ptr()]


def test_an_address_follows_what_a_tensor_is_given(path):
    tensor = torch.zeros(3)
    locate = tensors.locator(([tensor],))
    tensor.data = torch.ones(3)
    assert located(locate, ([tensor],)) == [tensor.data_ptr()]
    tensor.data = torch.ones(4)
    assert locate(([tensor],)) is None


def test_no_tensor_is_kept(path):
    tensor = torch.zeros(3)
    gone = weakref.ref(tensor)
    locate = tensors.locator(([tensor],))
    locate(([tensor],))
    del tensor
    gc.collect()
    assert gone() is None and located(locate, ([torch.zeros(3)],)) is not None


def test_references_are_balanced():
    alike = [torch.zeros(3) for _ in range(20)]
    locate = tensors.locator((alike,))
    before = sys.getrefcount(alike[7]), sys.getrefcount(torch.Tensor), sys.getrefcount(None)
    for _ in range(1000):
        locate((alike,))
        locate(([*alike[:-1], None],))
    after = sys.getrefcount(alike[7]), sys.getrefcount(torch.Tensor), sys.getrefcount(None)
    assert all(abs(x - y) < 100 for x, y in zip(before, after))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_negated_view_of_one_element_is_masked_as_what_it_shows(backend):
    """What a complex parameter's conjugate gives: dense, as it has one element, and the same in all but its sign."""
    plain = torch.tensor([2.0])
    soft_mask_([plain], [torch.tensor([0.25])], backend=backend)
    values = torch.tensor([1 + 2j]).conj()
    assert values.imag.is_neg()
    soft_mask_([values.imag], [torch.tensor([0.25])], backend=backend)
    assert plain.item() == 1.5 and values.imag.item() == -1.5


@pytest.mark.parametrize("cached", [False, True])
def test_a_tensor_without_memory_is_no_kernels(cached):
    gamma, zeros = torch.rand(4, 5), torch._efficientzerotensor((4, 5))
    if cached:
        update_mask_([torch.randn(4, 5)], [torch.randn(4, 5)], [gamma])
    new = torch.randn(4, 5)
    param = new.clone()
    update_mask_([param], [zeros], [gamma])
    assert torch.allclose(param, (1 - gamma) * new)
    released = torch.randn(4, 5)
    released.untyped_storage().resize_(0)
    with pytest.raises(BackendError, match="without memory"):
        soft_mask_([released], [gamma], backend="native")


def test_a_functionalized_call_masks():
    grad, gamma = torch.randn(4, 5), torch.rand(4, 5)
    soft_mask_([grad.clone()], [gamma])

    def masked(x):
        y = x.clone()
        soft_mask_([y], [gamma])
        return y

    assert torch.allclose(torch.func.functionalize(masked)(grad), (1 - gamma) * grad)

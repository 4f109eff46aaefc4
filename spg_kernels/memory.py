"""No call writes an element twice, or reads one that it writes as another: kernels take every tensor for memory of its own."""

from bisect import bisect_left
from itertools import chain, islice
from operator import add, le

import torch
from torch import Tensor

from .backends.tensors import PLAIN

_STRIDED = {torch.strided}
_layout, _nbytes = Tensor.layout.__get__, Tensor.nbytes.__get__


def check_disjoint(written: dict[str, list[Tensor]], read: dict[str, list[Tensor]]) -> None:
    """Every tensor of the `written` lists shares no element with any other of the call; those only `read` may share theirs.

    Lists are given by the name an error reports. Looks at addresses alone: no synchronization, the numbers stay unread.

    Raises:
        ValueError: two tensors that share elements, or a written one that holds an element twice (expanded).
        TypeError: a written tensor that is not strided.
    """
    tensors = [*chain(*written.values()), *{id(t): t for t in chain(*read.values())}.values()]
    if torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, tensors)):
        return
    if _STRIDED.issuperset(map(_layout, tensors)) and all(map(Tensor.is_contiguous, tensors)):
        # Disjoint intervals stay disjoint, and in order, when starts and ends are sorted apart. An empty tensor starts at 0.
        starts = list(map(Tensor.data_ptr, tensors))
        ends = sorted(map(add, starts, map(_nbytes, tensors)))
        starts.sort()
        if all(map(le, ends, islice(starts, 1, None))):
            return
    _find_overlap(written, read)


def _find_overlap(written: dict[str, list[Tensor]], read: dict[str, list[Tensor]]) -> None:
    """`check_disjoint` with the names, and for tensors that interleave, element by element."""
    spans = []
    for lists, is_written in ((written, True), (read, False)):
        for name, tensor in ((f"{name}[{i}]", t) for name, tensors in lists.items() for i, t in enumerate(tensors)):
            if is_written and tensor.layout != torch.strided:
                raise TypeError(f"{name}: expected a strided tensor to write to, got {tensor.layout}")
            if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
                if is_written and _holds_an_element_twice(tensor):
                    raise ValueError(f"{name}: cannot be written, it holds elements more than once (shape "
                                     f"{tuple(tensor.shape)}, strides {tensor.stride()}); clone it first")
                spans.append((tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), is_written, name, tensor))
    spans.sort(key=lambda span: span[:2])
    for k, (_, end, is_written, name, tensor) in enumerate(spans):
        for _, _, other_is_written, other_name, other in spans[k + 1:bisect_left(spans, end, key=lambda span: span[0])]:
            if (is_written or other_is_written) and _share_elements(tensor, other):
                raise ValueError(f"{name} and {other_name} share memory, and {name if is_written else other_name} is written")


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to past the last element."""
    return (1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))) * tensor.element_size()


def _holds_an_element_twice(tensor: Tensor) -> bool:
    reach = 1
    for stride, n in sorted((stride, n) for stride, n in zip(tensor.stride(), tensor.shape) if n > 1):
        if stride < reach:
            return int(_marked(tensor, tensor.data_ptr(), _extent(tensor)).sum()) < tensor.nbytes
        reach += (n - 1) * stride
    return False


def _share_elements(one: Tensor, other: Tensor) -> bool:
    if one.is_contiguous() and other.is_contiguous():
        return True  # their spans overlap and have no gaps
    start = min(one.data_ptr(), other.data_ptr())
    marked = _marked(one, start, max(t.data_ptr() + _extent(t) for t in (one, other)) - start)
    return bool(_bytes(other, marked, start).any())


def _marked(tensor: Tensor, start: int, size: int) -> Tensor:
    """A flag for each of the `size` bytes from `start`, set where `tensor` has its elements."""
    flags = torch.zeros(size, dtype=torch.bool, device="cpu")
    _bytes(tensor, flags, start).fill_(True)
    return flags


def _bytes(tensor: Tensor, flags: Tensor, start: int) -> Tensor:
    """The flags of the bytes that `tensor` has its elements in."""
    size = tensor.element_size()
    strides = (*(size * stride for stride in tensor.stride()), 1)
    return flags.as_strided((*tensor.shape, size), strides, tensor.data_ptr() - start)

"""The importance kernel's work queue: what is in it, and that no schedule of programs deadlocks on it."""

import random

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from spg_kernels.backends.triton import importance

STATISTICS, FOLD, BOTH = (kind.value for kind in (importance.STATISTICS, importance.FOLD, importance.BOTH))


def unpacked(sizes, itemsize, tiling):
    """(kind, tensor, tile) of every item, in the queue's order."""
    return [(item & 3, item >> 2 & 0x3FFFFFFF, item >> 32) for item in importance.work_items(sizes, itemsize, tiling).tolist()]


def random_case(seed):
    """Sizes of a model, and a tiling under which they make anything between one group and one for every tensor."""
    draw = random.Random(seed)
    tiling = importance.Tiling(tile=draw.choice([16, 64]), group_bytes=draw.choice([256, 2000, 10000]))
    sizes = tuple(draw.choice([0, 1, draw.randrange(70), draw.randrange(500), draw.randrange(3000)])
                  for _ in range(draw.randrange(1, 30)))
    return draw, sizes, draw.choice([2, 4]), tiling


def tiles(size, tiling):
    return -(-size // tiling.tile)


@pytest.mark.parametrize("seed", range(100))
def test_every_tile_is_measured_once_and_then_folded_once(seed):
    _, sizes, itemsize, tiling = random_case(seed)
    queue = unpacked(sizes, itemsize, tiling)
    assert len(set(queue)) == len(queue)
    expected = set()
    for tensor, size in enumerate(sizes):
        if size <= tiling.tile:
            expected.add((BOTH, tensor, 0))
        else:
            expected |= {(kind, tensor, tile) for kind in (STATISTICS, FOLD) for tile in range(tiles(size, tiling))}
    assert set(queue) == expected
    place = {item: i for i, item in enumerate(queue)}
    for kind, tensor, tile in queue:
        if kind == FOLD:
            assert max(place[STATISTICS, tensor, t] for t in range(tiles(sizes[tensor], tiling))) < place[kind, tensor, tile]


@pytest.mark.parametrize("seed", range(100))
def test_groups_are_interleaved_and_fit_the_cache(seed):
    """S0 S1 F0 S2 F1 ...: between a group's statistics and its folds stand the next group's statistics and nothing else."""
    _, sizes, itemsize, tiling = random_case(seed)
    queue = unpacked(sizes, itemsize, tiling)
    groups = [[]]
    for tensor, size in enumerate(sizes):
        if groups[-1] and sum(sizes[t] for t in groups[-1]) * itemsize + size * itemsize > tiling.group_bytes:
            groups.append([])
        groups[-1].append(tensor)
    statistics = [[(STATISTICS if sizes[t] > tiling.tile else BOTH, t, tile) for t in group
                   for tile in range(max(1, tiles(sizes[t], tiling)))] for group in groups]
    folds = [[(FOLD, t, tile) for kind, t, tile in reversed(part) if kind == STATISTICS] for part in statistics]
    expected = list(statistics[0])
    for i in range(1, len(groups)):
        expected += statistics[i] + folds[i - 1]
    assert queue == expected + folds[-1]


def run_schedule(queue, sizes, tiling, draw, programs, resident, turns):
    """The kernel's protocol, one step of a random resident program at a time; counts the steps in which a fold waited.

    As on a GPU, a program leaves its place to another only when the queue is empty. Some are far slower than others.
    """
    taken, measured, ready, folded = 0, {}, set(), []
    waiting_outside, held, waits = programs - min(programs, resident), [None] * min(programs, resident), 0
    speed = [10 ** -draw.uniform(0, 3) for _ in held]
    for _ in range(turns):
        if not held:
            break
        who = draw.choices(range(len(held)), speed[:len(held)])[0]
        if held[who] is None:
            if taken < len(queue):
                held[who] = queue[taken]
                taken += 1
            elif waiting_outside:
                waiting_outside -= 1
            else:
                held.pop(who)
            continue
        kind, tensor, tile = held[who]
        if kind == FOLD and tensor not in ready:
            waits += 1
            # If all who are resident wait, they wait forever.
            assert any(item is None or item[0] != FOLD or item[1] in ready for item in held), "deadlock"
            continue
        if kind == STATISTICS:
            measured.setdefault(tensor, set()).add(tile)
            if len(measured[tensor]) == tiles(sizes[tensor], tiling):
                ready.add(tensor)
        else:
            if kind == FOLD:
                assert len(measured[tensor]) == tiles(sizes[tensor], tiling)
            folded.append((tensor, tile))
        held[who] = None
    assert not held, "not done in time"
    assert sorted(folded) == [(t, tile) for t, size in enumerate(sizes) for tile in range(max(1, tiles(size, tiling)))]
    return waits


@pytest.mark.parametrize("seed", range(150))
def test_no_schedule_deadlocks_and_folds_see_complete_statistics(seed):
    draw, sizes, itemsize, tiling = random_case(seed)
    queue = unpacked(sizes, itemsize, tiling)
    programs, resident = draw.choice([1, 2, 5, 40]), draw.choice([1, 2, 3, 20])
    run_schedule(queue, sizes, tiling, draw, programs, resident, turns=1000 * (len(queue) + programs))


def test_the_schedules_do_make_folds_wait():
    draw, sizes, itemsize, tiling = random.Random(0), (3000, 500, 2000), 4, importance.Tiling(tile=16, group_bytes=256)
    assert run_schedule(unpacked(sizes, itemsize, tiling), sizes, tiling, draw, 20, 20, turns=1_000_000) > 0


def test_the_model_notices_a_queue_that_deadlocks():
    queue = [(FOLD, 0, 0), (FOLD, 0, 1), (STATISTICS, 0, 0), (STATISTICS, 0, 1)]
    with pytest.raises(AssertionError, match="deadlock"):
        run_schedule(queue, (32,), importance.Tiling(tile=16), random.Random(0), 2, 2, turns=10000)


def test_a_tensor_beyond_two_to_the_31_elements():
    tiling = importance.Tiling()
    n = (1 << 33) + 5
    queue = importance.work_items((3, n), 2, tiling)
    count = tiles(n, tiling)
    assert len(queue) == 1 + 2 * count and queue[0] == BOTH
    kind, tensor, tile = queue & 3, queue >> 2 & 0x3FFFFFFF, queue >> 32
    assert (tensor[1:] == 1).all()
    assert (kind[1:1 + count] == STATISTICS).all() and torch.equal(tile[1:1 + count], torch.arange(count))
    assert (kind[1 + count:] == FOLD).all() and torch.equal(tile[1 + count:], torch.arange(count).flip(0))
    assert 0 < n - tile.max() * tiling.tile <= tiling.tile


def test_the_table_of_tensors():
    table = importance._tensor_table((8192, 8193, 0, 100000, 5), (4, 3, 2, 1, 0), 8192)
    assert table.tolist() == [[8192, 0, 4], [8193, 0, 3], [0, 2, 2], [100000, 2, 1], [5, 15, 0]]

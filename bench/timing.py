"""Interleaved rounds: every contender once a round, in a new order each round, on the buffers that were used longest ago.

Machines drift (clocks, neighbours, temperature). Rounds spread the drift over all contenders, and ratios are medians of
ratios within a round. The order is random because a call runs faster after one that is like it: in a fixed circle
A B C A B C, one of ours would always follow torch.compile and the other one always the first.

pytest-benchmark times one function a test, in a block, and would give A A A B B B; so it drives the rounds here and keeps
the record (`--benchmark-json`), and the clock around each call is ours.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy
import torch

from .bandwidth import copied_bytes, copy_call
from .machine import peak_extra_bytes

OURS = {"vs_float32": "spg float32", "vs_8bit": "spg 8-bit"}
COPY = "copy"
_LEAST_ROUNDS, _MOST_ROUNDS = 15, 200


@dataclass
class Contender:
    """One way to do a pass.

    Args:
        calls: the same call on each set of buffers.
        bytes_per_parameter: what it must read and write at least, None for a pass that is not bound by memory.
        gamma: the kind of buffer its mask reads, None if it does not mask.
        mask: "update" or "gradient".
        restore: puts back what the call spoiled in a set of buffers, outside the clock: a gradient masked in place
            again and again would end in denormals.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    bytes_per_parameter: float | None = None
    gamma: str | None = None
    mask: str = "update"
    restore: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Row:
    """One contender of one pass over one parameter set. Times are in microseconds; ratios are its time over ours.

    Args:
        added_us: our float32 call's time on the host less its own, median over rounds: what a wrapper adds to what it wraps.
    """

    pass_name: str
    set_name: str
    contender: str
    parameters: int
    tensors: int
    rounds: int
    median_us: float
    p20_us: float
    p80_us: float
    host_us: float | None = None
    added_us: float | None = None
    bytes_per_parameter: float | None = None
    copy_share: float | None = None
    vs_float32: float | None = None
    vs_8bit: float | None = None
    extra_mib: float | None = None
    copy_gb_s: float | None = None


@dataclass
class Rounds:
    """The times of every contender, a list entry a round: of the device, and on a GPU of the host."""

    contenders: Sequence[Contender]
    device: torch.device
    times: dict[str, list[float]] = field(default_factory=dict)
    host_times: dict[str, list[float]] = field(default_factory=dict)
    _calls: int = 0
    _order: random.Random = field(default_factory=lambda: random.Random(0))

    def one(self) -> None:
        for contender in self._order.sample(list(self.contenders), len(self.contenders)):
            # On a GPU two calls, each on buffers of its own: the second must not find the first one's data in the cache.
            host = self._run(contender, _host_seconds)
            on_gpu = self.device.type == "cuda"
            elapsed = self._run(contender, partial(_device_seconds, host=host)) if on_gpu else host
            self.times.setdefault(contender.name, []).append(elapsed)
            self.host_times.setdefault(contender.name, []).append(host if on_gpu else None)

    def _run(self, contender: Contender, clock: Callable[[Callable], float]) -> float:
        slot = self._calls % len(contender.calls)
        self._calls += 1
        seconds = clock(contender.calls[slot])
        if contender.restore:
            contender.restore(slot)
        return seconds

    def forget(self) -> None:
        self.times.clear()
        self.host_times.clear()


def _host_seconds(call: Callable) -> float:
    """Until `call` returns: on a GPU, until it is enqueued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _device_seconds(call: Callable, host: float) -> float:
    """What `call` takes on the GPU alone, if the host needs `host` seconds to enqueue it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    # The device sleeps until the host has enqueued the whole call, so that the events do not time the host.
    torch.cuda._sleep(int(2.5e9 * host))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(benchmark, contenders: list[Contender], device: torch.device, seconds: float, pass_name: str, set_name: str,
            parameters: int, tensors: int, cold: bool) -> list[Row]:
    """Rows of contenders that have run before (checked, compiled); about `seconds` of interleaved rounds.

    Args:
        cold: the buffers rotate past the cache, so that copy bandwidth is the ceiling.
    """
    if cold:
        contenders = [*contenders, Contender(COPY, [copy_call(device)])]
    extra = {c.name: peak_extra_bytes(device.type, c.calls[0]) for c in contenders}
    for contender in contenders:
        if contender.restore:
            contender.restore(0)
    rounds = Rounds(contenders, device)
    gc.collect()
    gc.disable()
    try:
        warm_up = []
        for _ in range(2):
            begin = time.perf_counter()
            rounds.one()
            warm_up.append(time.perf_counter() - begin)
        rounds.forget()
        count = min(max(round(seconds / min(warm_up)), _LEAST_ROUNDS), _MOST_ROUNDS)
        benchmark.pedantic(rounds.one, rounds=count)
    finally:
        gc.enable()
    return _rows(rounds, extra, pass_name, set_name, parameters, tensors)


def _rows(rounds: Rounds, extra: dict[str, int | None], pass_name: str, set_name: str, parameters: int,
          tensors: int) -> list[Row]:
    times = rounds.times
    bandwidth = None
    if COPY in times:
        bandwidth = copied_bytes(rounds.device) / statistics.median(times[COPY])
    rows = []
    for contender in rounds.contenders:
        own = times[contender.name]
        p20, median, p80 = numpy.percentile(own, (20, 50, 80)) * 1e6
        share = None
        if bandwidth and contender.bytes_per_parameter:
            share = contender.bytes_per_parameter * parameters / statistics.median(own) / bandwidth
        ratios = {column: statistics.median(a / b for a, b in zip(own, times[ours])) for column, ours in OURS.items()
                  if ours in times and contender.name not in (ours, COPY)}
        host, bytes_held = rounds.host_times[contender.name], extra[contender.name]
        added = None
        if "vs_float32" in ratios:
            # Not the difference of two medians: a call's times spread over more than what a wrapper adds to it.
            on_host = rounds.host_times if host[0] is not None else times
            added = statistics.median(a - b for a, b in zip(on_host[OURS["vs_float32"]], on_host[contender.name])) * 1e6
        rows.append(Row(
            pass_name, set_name, contender.name, parameters, tensors, len(own), median, p20, p80,
            host_us=None if host[0] is None else statistics.median(host) * 1e6, added_us=added,
            bytes_per_parameter=contender.bytes_per_parameter, copy_share=share, **ratios,
            extra_mib=None if bytes_held is None else bytes_held / 2**20,
            copy_gb_s=bandwidth and bandwidth / 1e9))
    return rows

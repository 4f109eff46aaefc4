"""Triton's driver with the emulator behind it, so that every launch is as on a GPU, from the operator to the machine code."""

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget

from spg_kernels.backends.plans import LISTS, STATES
from spg_kernels.backends.triton import launch, plans

from .emulator import Region, execute

_BEFORE_ARGUMENTS = 9  # what Triton gives a launcher before the kernel's own arguments: the grid, the stream, hooks


def _region(tensor: torch.Tensor) -> Region:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, tensor.itemsize


def _word(kind: str, value) -> int:
    """A parameter as the bits of its slot."""
    if kind[0] == "*":
        return value.data_ptr() if isinstance(value, torch.Tensor) else value
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    assert kind in ("i32", "i64"), kind
    return value & ((1 << int(kind[1:])) - 1)


class Driver:
    """Triton's driver for one kind of GPU.

    There is one for each, for good: Triton keeps a kernel with the launcher that it was compiled under.

    Attributes:
        resident: how many programs run at a time.
        seed: of the next launch; the one after it has another.
        watched: (start, end, bytes of an element) of the memory that a call's tensors hold.
        edit: what is made of a kernel's PTX before it runs.
        moved: bytes loaded from the watched memory and stored to it, by all launches.
    """

    def __init__(self, arch: int):
        self.arch = arch
        self.launches = 0
        self._loading = ""
        self._loaded: list[str] = []
        self.utils = SimpleNamespace(load_binary=self._load_binary, unload_module=lambda *_: None,
                                     get_device_properties=lambda _: {"max_shared_mem": 232448})
        self.reset()

    def reset(self) -> None:
        self.resident, self.seed, self.watched, self.edit, self.moved = 16, 0, [], lambda ptx: ptx, 0

    def get_current_device(self) -> int:
        return (1 << 20) + self.arch  # Triton keeps what it compiled for each device: none that exists

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def about_to_load(self, module, function, name, metadata_group, hash) -> None:
        """Triton's hook: the files of the kernel that `_load_binary` is called for next."""
        self._loading = next(path for file, path in metadata_group.items() if file.endswith(".ptx"))

    def _load_binary(self, name, kernel, shared, device):
        self._loaded.append(Path(self._loading).read_text())
        return 0, len(self._loaded) - 1, 32, 0, 1024

    def launcher_cls(self, source, metadata):
        kinds = list(source.signature.values())

        def run(*arguments):
            own = [(kind, value) for kind, value in zip(kinds, arguments[_BEFORE_ARGUMENTS:], strict=True)
                   if kind != "constexpr"]
            self._run(self._loaded[arguments[4]], arguments[:3], own, metadata.shared)
        return run

    def _run(self, ptx: str, grid: tuple, arguments: list[tuple], shared: int) -> None:
        assert grid[1:] == (1, 1)
        tables = [found.tensor for found in launch._tables.get(torch.device("cpu"), {}).values()]
        tensors = tables + [value for _, value in arguments if isinstance(value, torch.Tensor)]
        self.seed += 1
        self.launches += 1
        traffic = execute(self.edit(ptx), grid[0], [_word(kind, value) for kind, value in arguments],
                          self.watched + [_region(tensor) for tensor in tensors], shared, self.resident, self.seed)
        watched = {start for start, _, _ in self.watched}
        self.moved += sum(count for start, count in traffic if start in watched)


class Watched(plans.Launches):
    """Launches that tell the drivers what memory a call's tensors hold."""

    def __init__(self, op: str, named):
        super().__init__(op, named)
        self.op = op

    def pieces(self, addresses: array) -> list[plans.Piece]:
        pieces = super().pieces(addresses)
        for driver in DRIVERS.values():
            driver.watched = [region for piece in pieces for region in self._regions(piece)]
        return pieces

    def _regions(self, piece: plans.Piece) -> Iterator[Region]:
        group = piece.group
        for name, column in zip(LISTS[self.op], piece.columns):
            if name == "state_steps" and group.steps_on_host:
                continue  # a GPU cannot read them
            for k, (address, size) in enumerate(zip(column, piece.sizes)):
                dtype = group.gamma if name == "gammas" else group.state if name in STATES else group.dtype
                if name == "state_steps" or (name == "gammas" and k in piece.one_value):
                    dtype, size = torch.float32, 1
                yield address, address + size * dtype.itemsize, dtype.itemsize


DRIVERS = {arch: Driver(arch) for arch in (80, 89, 90, 100, 120)}

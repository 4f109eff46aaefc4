"""`python -m spg_kernels`: which backends run on this machine, and why not those that do not."""

import torch
from rich.console import Console
from rich.table import Column, Table

from . import __version__, ops


def main() -> None:
    devices = ["cpu"] + ([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])
    table = Table("backend", "tensors on", "runs", Column(overflow="fold"),  # paths are longer than a column
                  title=f"spg_kernels {__version__}, torch {torch.__version__}, {', '.join(devices)}")
    for name in ops.BACKENDS[1:]:
        module = ops.backend_module(name)
        missing = ops.why_unavailable(name)
        table.add_row(name, ", ".join(getattr(module, "DEVICE_TYPES", ("any device with float64",))),
                      "no" if missing else "yes", missing or getattr(module, "describe", lambda: "plain PyTorch")())
    Console().print(table)


if __name__ == "__main__":
    main()

"""Where the emulator runs, and how much of it: by default some kernels of each operator, for `make emulated` all of them.

A kernel is compiled by Triton, translated and compiled once more, which is what the time goes into.
"""

import os
import platform
import shutil

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if platform.machine() != "x86_64" or shutil.which("g++") is None:
    pytest.skip("the emulator needs g++ and a processor with x86-64", allow_module_level=True)

ARCHITECTURES = [int(arch) for arch in os.environ.get("PTX_ARCHITECTURES", "90").split(",")]
EVERYTHING = os.environ.get("PTX_EVERYTHING") == "1"

"""What a masked Triton step takes on the host, without a GPU: `python -m tests.host_time`.

ResNet-50's 161 tensors, with a driver that launches nothing (`test_triton_launch.py`), beside torch's own fused step over as
many tensors of four elements. Microseconds; the lowest 2 % of steps, for a machine's noise only adds. On a GPU `pytest bench/`
measures it.
"""

import time
from functools import partial

import torch
import triton
from torch.optim import SGD, AdamW

from bench.sets import SETS
from spg_kernels import SPGOptimizer, ops
from spg_kernels.backends.triton import plans

from .test_triton_launch import Driver

SHAPES = SETS["resnet50"].shapes
OPTIMIZERS = {"SGD": partial(SGD, lr=0.1), "SGD, momentum": partial(SGD, lr=0.1, momentum=0.9), "AdamW": AdamW}
STEPS = 3000


def parameters(shapes) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.zeros_like(parameter)
    return made


def microseconds(step) -> float:
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return sorted(times)[STEPS // 50] * 1e6


def main() -> None:
    torch.set_num_threads(1)
    triton.runtime.driver._active = Driver()
    plans.PLANS.device_type = "cpu"
    ops.backend_module("triton").unavailable = lambda: None
    for name, make in OPTIMIZERS.items():
        masked = SPGOptimizer(make(parameters(SHAPES)), backend="triton", importance_dtype=torch.uint8)
        masked.importance["0.0"] = torch.full(SHAPES[0], 0.5)
        plain = make(parameters([(4,)] * len(SHAPES)), fused=True)
        print(f"{name}: masked {microseconds(masked.step):.0f} us, torch's fused {microseconds(plain.step):.0f} us")


if __name__ == "__main__":
    main()

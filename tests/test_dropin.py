"""The ways in which wrappers around optimizers break, each a line with at least one test: `pytest -m 'dropin(line=13)'`."""

import re
from pathlib import Path

LINES = {
    1: "step(closure) masks the closure's gradients, not stale ones, and returns its loss",
    2: "no importance is the inner optimizer, bit for bit; full importance does not move; every class in torch.optim",
    3: "a step leaves .grad as it was",
    4: "full importance holds under gradients and updates that are not finite",
    5: "importance keeps its precision beside half-precision parameters and through checkpoints",
    6: "an importance of another shape or range is refused, not broadcast",
    7: "replaced parameters are an error until they are bound by name",
    8: "a fresh inner optimizer keeps the importance; momentum from before does not move what is important now",
    9: "optimizers with hidden iterates are refused, or their gradient is masked",
    10: "it is a torch Optimizer with live properties, and every scheduler reaches the inner one",
    11: "nothing of the wrapper's is ever in the inner optimizer's state",
    12: "checkpoints load with and without the wrapper, from before the first step on",
    13: "torch.distributed.checkpoint: get, set, flattened, full",
    14: "gradient scalers, with clipping; importance from scaled gradients",
    15: "copies, pickles; hooks and profiler ranges exactly once",
    16: "gradients that are None, sparse, complex, strided, expanded, tied or differentiated through",
    17: "no host synchronization; torch.compile without recompiling",
    18: "distributed training, and optimizers that step inside backward",
    19: "meta devices, a model that changes dtype, groups and heads added later",
    20: "training frameworks",
    21: "with SGD both masks are the paper's rule",
}


def test_every_line_has_a_test():
    sources = (path.read_text() for path in Path(__file__).parent.rglob("test_*.py") if path != Path(__file__))
    tested = {int(line) for source in sources for line in re.findall(r"mark\.dropin\(line=(\d+)\)", source)}
    assert tested == set(LINES)

"""The targets, in one place, and what was measured of each: met or missed, with the number."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

_LARGE = ("resnet18", "resnet50", "vit_b_16", "tensor_64m", "gpt2_xl")


@dataclass(frozen=True)
class Target:
    """One row of the table of targets.

    Args:
        kind: what is bounded:
            "faster" `against`'s time over `ours`'s, at least; "cost" `ours`'s time over `against`'s, at most;
            "share" of the copy bandwidth, at least; "host" host time in us, at most; "host cost" over `against`'s, at most;
            "added" to `against`'s host time by `ours`, which wraps it, in us, at most.
    """

    pass_name: str
    ours: str
    kind: str
    bound: float
    against: str = ""
    sets: tuple[str, ...] = _LARGE

    def measured(self, rows: dict[str, dict]) -> float | None:
        """From the rows of one pass over one set, by contender; None if one of them is missing."""
        ours, against = rows.get(self.ours), rows.get(self.against)
        if ours is None or (self.against and against is None):
            return None
        ratio = against and against["vs_float32" if self.ours == "spg float32" else "vs_8bit"]
        return {
            "faster": lambda: ratio,
            "cost": lambda: 1 / ratio,
            "share": lambda: ours["copy_share"],
            "host": lambda: ours["host_us"],
            "host cost": lambda: ours["host_us"] / against["host_us"],
            "added": lambda: against["added_us"],
        }[self.kind]()

    def is_met(self, measured: float) -> bool:
        return measured >= self.bound if self.kind in ("faster", "share") else measured <= self.bound

    def __str__(self) -> str:
        what = {
            "faster": f"{self.against} takes at least {self.bound:g}x",
            "cost": f"at most {self.bound:.2f}x {self.against}",
            "share": f"at least {self.bound:.0%} of copy bandwidth",
            "host": f"host time at most {self.bound:g} us",
            "host cost": f"host time at most {self.bound:.2f}x {self.against}",
            "added": f"adds at most {self.bound:g} us to torch's step",
        }[self.kind]
        return f"{self.pass_name}, {self.ours}: {what}"

    def show(self, measured: float) -> str:
        if self.kind == "share":
            return f"{measured:.0%}"
        return f"{measured:.1f} us" if self.kind in ("host", "added") else f"{measured:.2f}x"


_STEPS = tuple(
    Target(pass_name, ours, "cost", bound, "unmasked fused")
    for pass_name, bounds in (("sgd", (1.10, 1.35)), ("sgd momentum", (1.10, 1.35)), ("adamw", (1.05, 1.15)))
    for ours, bound in zip(("spg 8-bit", "spg float32"), bounds))
_SMALL = (
    *(Target(name, "spg float32", "cost", 1.0, "unmasked foreach", ("small_62",))
      for name in ("sgd", "sgd momentum", "adamw")),
    *(Target(f"{name}, before importance", "spg float32", "added", 30, "unmasked foreach", ("small_62",))
      for name in ("sgd momentum", "adamw")),
)
TARGETS = {
    "cpu": (
        Target("importance", "spg float32", "faster", 8, "eager"),
        Target("importance", "spg float32", "faster", 4, "compile"),
        Target("soft mask", "spg float32", "cost", 1.0, "foreach"),
        Target("soft mask", "spg 8-bit", "faster", 1.2, "foreach"),
        *_STEPS, *_SMALL,
    ),
    "cuda": (
        Target("importance", "spg float32", "faster", 8, "eager"),
        Target("importance", "spg float32", "faster", 3, "compile"),
        Target("importance", "spg float32", "share", 0.85),
        Target("soft mask", "spg float32", "share", 0.92),
        Target("soft mask", "spg float32", "cost", 1.0, "foreach"),
        Target("soft mask", "spg 8-bit", "faster", 1.25, "foreach"),
        *_STEPS,
        Target("adamw", "spg float32", "host", 50, sets=("resnet50",)),
        Target("adamw", "spg float32", "host cost", 0.5, "unmasked fused", ("resnet50",)),
        *_SMALL,
    ),
}


@dataclass(frozen=True)
class Verdict:
    target: Target
    set_name: str
    measured: float
    met: bool


def verdicts(rows: Iterable[dict], device_type: str) -> list[Verdict]:
    """Every target of the device on every set that was measured for it."""
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["pass_name"], row["set_name"]), {})[row["contender"]] = row
    found = []
    for target in TARGETS[device_type]:
        for set_name in target.sets:
            measured = target.measured(cases.get((target.pass_name, set_name), {}))
            if measured is not None:
                found.append(Verdict(target, set_name, measured, target.is_met(measured)))
    return found


def rich_table(found: list[Verdict]) -> Table:
    table = Table("target", "parameters", "measured", "", title="targets")
    for verdict in found:
        table.add_row(str(verdict.target), verdict.set_name, verdict.target.show(verdict.measured),
                      "met" if verdict.met else "MISSED")
    return table

"""Rows as tables: for the terminal, for the README (a line a pass) and for `results/<device>.md` (a line a contender)."""

from rich.table import Table

from . import targets
from .results import is_old
from .sets import SETS
from .timing import COPY

OLD = " †"
_PASSES = ("importance", "soft mask", "update mask", "sgd", "sgd momentum", "adamw", "adamw bfloat16", "training step",
           "measuring, 1 head", "measuring, 5 heads", "measuring, 10 heads", "sgd momentum, before importance",
           "adamw, before importance")
_PEERS = ("a pass a head", "eager", "foreach", "compile", "copy, step, lerp", "unmasked foreach", "unmasked fused")
_SET_ORDER = (*SETS, "small network")
LEGEND = (
    "Times are medians in milliseconds (p20 to p80). The columns from `eager` on are that contender's time over ours with "
    "float32 gamma, within the same round: above 1 it is slower than ours, **below 1 faster**. `of copy` is the share of the "
    "machine's copy bandwidth, measured in the same rounds, at the bytes a pass must move at least; a pass in place can "
    "exceed it, where writing what was just read is faster than copying. `unmasked` is torch's own step, which protects "
    "nothing. In optimizer steps `eager` and `foreach` mask the gradient before torch's fused step. With parameters, "
    "gradients and states in bfloat16 only those are left that round once and so equal the reference. Measuring goes once "
    "through the trunk for all heads (`SharedTrunkLosses`); the others, and ours as `a pass a head`, once a head. Every row "
    "was checked against the reference, element by element, before it was timed."
)


def cases(rows: list[dict]) -> dict[tuple[str, str], dict[str, dict]]:
    """Rows by (pass, set), then by contender, in the order of the tables."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in sorted(rows, key=lambda row: (_PASSES.index(row["pass_name"]), _SET_ORDER.index(row["set_name"]))):
        found.setdefault((row["pass_name"], row["set_name"]), {})[row["contender"]] = row
    return found


def chosen_sets(rows: list[dict]) -> list[str]:
    """What the README shows: one network, the one large tensor, and whole training steps."""
    measured = {row["set_name"] for row in rows}
    network = [name for name in ("resnet50", "resnet18") if name in measured][:1]
    return network + [name for name in ("tensor_64m", "small network") if name in measured]


def _time(row: dict) -> str:
    digits = 3 if row["median_us"] < 10_000 else 1
    median, p20, p80 = (f"{row[key] / 1e3:.{digits}f}" for key in ("median_us", "p20_us", "p80_us"))
    return f"{median} ({p20} to {p80})"


def _share(row: dict | None) -> str:
    return f"{row['copy_share']:.0%}" if row and row["copy_share"] else ""


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    text = f"{value:.2f}×" if value < 10 else f"{value:.1f}×"
    return f"**{text}**" if value < 1 else text


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _markdown(head: list[str], lines: list[list[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def stamp_lines(rows: list[dict]) -> str:
    """Where, with what and when; and the older commits among the rows."""
    newest = max(rows, key=lambda row: (not is_old(row), row["date"]))
    copies = sorted(row["copy_gb_s"] for row in rows if row["contender"] == COPY)
    isa = f", {newest['isa']}, {newest['threads']} threads" if newest["isa"] else ""
    copy = f" Copy bandwidth {copies[0]:.1f} to {copies[-1]:.1f} GB/s over the cases." if copies else ""
    text = (f"**{newest['machine']}{isa}**. torch {newest['torch']}, triton {newest['triton']}, {newest['compiler']}; "
            f"commit {newest['commit']}, {newest['date']}.{copy}")
    old = sorted({f"{row['commit']} ({row['date']})" for row in rows if is_old(row)})
    if not old:
        return text
    return f"{text}\n\n{OLD.strip()} measured at {', '.join(old)}; `spg_kernels/` or `csrc/` has changed since."


def pass_table(rows: list[dict]) -> str:
    """A line a pass and set: both of ours, and every peer relative to ours with float32 gamma."""
    lines = []
    for (pass_name, set_name), by_name in cases(rows).items():
        ours, small = by_name.get("spg float32"), by_name.get("spg 8-bit")
        if ours is None:
            continue
        peers = [_ratio(by_name[name]["vs_float32"]) if name in by_name else "" for name in _PEERS]
        old = OLD if any(is_old(row) for row in by_name.values()) else ""
        eight_bit = [_time(small) if small else "", _share(small)]
        lines.append([pass_name + old, set_name, _time(ours), _share(ours), *eight_bit, *peers])
    return _markdown(["pass", "parameters", "float32 γ, ms", "of copy", "8-bit γ, ms", "of copy", *_PEERS], lines, left=2)


def target_table(rows: list[dict], device_type: str) -> str:
    """A line a target, a column a parameter set; what is missed says so."""
    found = targets.verdicts(rows, device_type)
    columns = [name for name in _SET_ORDER if any(verdict.set_name == name for verdict in found)]
    lines: dict[str, dict[str, str]] = {}
    for verdict in found:
        mark = "met" if verdict.met else "**missed**"
        lines.setdefault(str(verdict.target), {})[verdict.set_name] = f"{verdict.target.show(verdict.measured)} {mark}"
    return _markdown(["target", *columns], [[name, *(cells.get(c, "") for c in columns)] for name, cells in lines.items()])


def contender_table(by_name: dict[str, dict]) -> str:
    """A line a contender of one pass over one set, with everything that was recorded."""
    on_gpu = any(row["host_us"] is not None for row in by_name.values())
    head = ["contender", "ms (p20 to p80)", *(["host, us"] if on_gpu else []), "bytes/parameter", "of copy", "over float32 γ",
            "over 8-bit γ", "extra MiB", "rounds"]
    lines = []
    for name, row in by_name.items():
        old = OLD if is_old(row) else ""
        host = [_number(row["host_us"], 1)] if on_gpu else []
        lines.append([name + old, _time(row), *host, _number(row["bytes_per_parameter"], 1), _share(row),
                      _ratio(row["vs_float32"]), _ratio(row["vs_8bit"]), _number(row["extra_mib"], 1), str(row["rounds"])])
    return _markdown(head, lines)


def readme_section(rows: list[dict], name: str) -> str:
    """One device in the README."""
    shown = set(chosen_sets(rows))
    return "\n\n".join([
        stamp_lines(rows), pass_table([row for row in rows if row["set_name"] in shown]),
        f"![{name}](bench/results/{name}.png)",
        target_table(rows, rows[0]["device"]),
        f"Every contender and parameter set: {_page(name)}."])


def readme_line(rows: list[dict], name: str) -> str:
    """What is left to say of a machine that the README has a section of, under other settings."""
    found = targets.verdicts(rows, rows[0]["device"])
    return f"{stamp_lines(rows)} Of {len(found)} targets {sum(verdict.met for verdict in found)} are met: {_page(name)}."


def _page(name: str) -> str:
    return f"[bench/results/{name}.md](bench/results/{name}.md)"


def full_page(rows: list[dict], name: str) -> str:
    """`results/<device>.md`: every row."""
    parts = [f"# {name}", stamp_lines(rows), LEGEND, "## Targets", target_table(rows, rows[0]["device"]),
             "## Passes", pass_table(rows)]
    for (pass_name, set_name), by_name in cases(rows).items():
        row = next(iter(by_name.values()))
        parts += [f"## {pass_name}, {set_name}: {row['parameters']:,} parameters in {row['tensors']} tensors",
                  contender_table(by_name)]
    return "\n\n".join(parts) + "\n"


def terminal_tables(rows: list[dict]) -> list[Table]:
    """A table a case."""
    tables = []
    for (pass_name, set_name), by_name in cases(rows).items():
        copy = f", copy {by_name[COPY]['copy_gb_s']:.1f} GB/s" if COPY in by_name else ""
        table = Table("contender", title=f"{pass_name}, {set_name}{copy}", title_justify="left")
        for column in ("ms", "p20", "p80", "host us", "bytes/parameter", "of copy", "over float32", "over 8-bit", "extra MiB",
                       "rounds"):
            table.add_column(column, justify="right")
        for name, row in by_name.items():
            times = [_number(row[key] / 1e3, 3) for key in ("median_us", "p20_us", "p80_us")]
            table.add_row(name, *times, _number(row["host_us"], 1), _number(row["bytes_per_parameter"], 1), _share(row),
                          _number(row["vs_float32"], 2), _number(row["vs_8bit"], 2), _number(row["extra_mib"], 1),
                          str(row["rounds"]))
        tables.append(table)
    return tables

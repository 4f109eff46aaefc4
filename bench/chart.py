"""The bar chart of a device: time of every contender, a panel a pass, and what a copy of as many bytes would take."""

from hashlib import sha256
from pathlib import Path

from .tables import cases, chosen_sets
from .timing import COPY

_OURS, _UNMASKED, _PEER = "#1f6fb4", "#b9b9b9", "#e0a34a"
_PASSES = ("importance", "soft mask", "update mask", "sgd", "sgd momentum", "adamw")


def digest(table: Path) -> str:
    """Of the CSV a chart shows, kept inside the PNG: whether a chart is up to date is not a question of its pixels."""
    return sha256(table.read_bytes()).hexdigest()[:16]


def drawn_from(chart: Path) -> str | None:
    from PIL import Image

    if not chart.exists():
        return None
    with Image.open(chart) as image:
        return image.text.get("Source")


def draw(rows: list[dict], table: Path, chart: Path) -> None:
    """Draw `rows` of the CSV `table` to the PNG `chart`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    set_name = next((name for name in chosen_sets(rows) if name != "small network"), None)
    found = {pass_name: by_name for (pass_name, own_set), by_name in cases(rows).items()
             if own_set == set_name and pass_name in _PASSES}
    if not found:
        return
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis in axes.flat[len(found):]:
        axis.set_visible(False)
    for axis, (pass_name, by_name) in zip(axes.flat, found.items()):
        _panel(axis, pass_name, by_name)
    handles = [Patch(color=_OURS, label="spg_kernels"), Patch(color=_PEER, label="masked, without spg_kernels"),
               Patch(color=_UNMASKED, label="torch's step, protects nothing"),
               plt.Line2D([], [], color="black", linestyle="--", label="a copy that moves as many bytes as float32 γ")]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    row = next(iter(next(iter(found.values())).values()))
    where = ", ".join(filter(None, (row["machine"], row["isa"], row["isa"] and f"{row['threads']} threads")))
    tensors = f"{row['tensors']} tensors" if row["tensors"] > 1 else "one tensor"
    figure.suptitle(f"{set_name}: {row['parameters'] / 1e6:.1f} M parameters in {tensors}. {where}", fontsize=13)
    figure.savefig(chart, dpi=110, metadata={"Source": digest(table), "Software": None})
    plt.close(figure)


def _panel(axis, pass_name: str, by_name: dict[str, dict]) -> None:
    bars = [(name, row["median_us"] / 1e3, row) for name, row in by_name.items() if name != COPY]
    names, times = [name for name, _, _ in bars], [time for _, time, _ in bars]
    colors = [_OURS if name.startswith("spg") else _UNMASKED if name.startswith("unmasked") else _PEER for name in names]
    spread = [[(row["median_us"] - row["p20_us"]) / 1e3 for _, _, row in bars],
              [(row["p80_us"] - row["median_us"]) / 1e3 for _, _, row in bars]]
    drawn = axis.barh(names, times, color=colors, xerr=spread, error_kw={"elinewidth": 1, "ecolor": "#444444"})
    axis.bar_label(drawn, [f"{time:.3g}" if time < 100 else f"{time:.0f}" for time in times], padding=6, fontsize=10,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axis.invert_yaxis()
    axis.margins(x=0.15)
    ours = by_name.get("spg float32")
    if ours and ours["copy_share"]:
        axis.axvline(ours["copy_share"] * ours["median_us"] / 1e3, color="black", linestyle="--", linewidth=1)
    axis.set_title(pass_name, fontsize=12, fontweight="bold")
    axis.set_xlabel("ms, median; whiskers p20 to p80")
    axis.spines[["top", "right"]].set_visible(False)

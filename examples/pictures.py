"""Two pictures: the accuracy of every task as later tasks are trained, and the capacity that each layer has used up."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from methods import METHODS, Run, Settings
from report import average_accuracy, title

# Okabe and Ito's palette, made to be told apart with any colour vision; each also has its marker.
OPTIMIZER_COLOURS = {"SGD": "#0072B2", "AdamW": "#D55E00"}
LAYER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = "osD^vPX*<>"
MASK_STYLES = {None: ("--", "o"), "gradient": (":", "s"), "update": ("-", "D")}
BAND = {"alpha": 0.13, "linewidth": 0}
DOTS_PER_INCH = 160


def draw_accuracy(path: Path, settings: Settings, runs: Sequence[Run]) -> None:
    """One panel per method, a line per task: its test accuracy from when it was trained on. The last: their average."""
    methods = [method for method in METHODS if not method.alone]
    figure = Figure(figsize=(11.5, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, settings.tasks))
    for panel, method in zip(panels, methods):
        own = [run for run in runs if run.method == method.name]
        for j in range(settings.tasks):
            x = np.arange(j, settings.tasks) + 1
            y = np.array([[100 * run.accuracy[i][j] for i in range(j, settings.tasks)] for run in own])
            marker = MARKERS[j % len(MARKERS)]
            _line_with_band(panel, x, y, color=colours[j], marker=marker, label=f"task {j + 1}")
        final = 100 * np.mean([average_accuracy(run) for run in own])
        panel.set_title(f"{method.name}: {final:.1f} % in the end", fontsize="medium")
    for method in methods:
        own = [run for run in runs if run.method == method.name]
        y = np.array([[100 * average_accuracy(run, i) for i in range(settings.tasks)] for run in own])
        style, marker = MASK_STYLES[method.mask]
        _line_with_band(
            panels[-1],
            np.arange(settings.tasks) + 1,
            y,
            color=OPTIMIZER_COLOURS[method.optimizer],
            linestyle=style,
            marker=marker,
            label=method.name,
        )
    panels[-1].set_title("average over the tasks so far", fontsize="medium")
    panels[0].set_ylim(top=min(101, panels[0].get_ylim()[1]))  # a band does reach above 100 %, accuracies do not
    panels[-1].legend(fontsize="small")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(settings.tasks, 10))
    for panel in panels[3:]:
        panel.set_xlabel("tasks trained")
    for panel in panels[::3]:
        panel.set_ylabel("test accuracy (%)")
    _finish(figure, panels, path, f"Accuracy. {_heading(settings, runs)}")


def draw_capacity(path: Path, settings: Settings, runs: Sequence[Run]) -> None:
    """A row per SPG method: mean gamma and the shares above 0.5 and 0.99 of each layer, and the head factor."""
    methods = [method for method in METHODS if method.mask is not None]
    figure = Figure(figsize=(11.5, 8), layout="constrained")
    panels = figure.subplots(len(methods), 4, sharex=True, sharey=True, squeeze=False)
    x = np.arange(settings.tasks) + 1
    columns = {"mean": "mean γ", "above_half": "share of γ > 0.5", "above_99": "share of γ > 0.99"}
    for row, method in zip(panels, methods):
        own = [run for run in runs if run.method == method.name]
        for panel, field in zip(row, columns):
            for number, (layer, y) in enumerate(_by_layer(own, field).items()):
                colour, marker = LAYER_COLOURS[number % len(LAYER_COLOURS)], MARKERS[number % len(MARKERS)]
                _line_with_band(panel, x, y, color=colour, marker=marker, label=layer)
        y = np.array([[capacity["head_factor"] for capacity in run.capacity] for run in own])
        _line_with_band(row[-1], x, y, color="black", marker="o", label="all heads")
        row[0].set_ylabel(method.name, fontsize="large")
    for panel, name in zip(panels[0], (*columns.values(), "head factor 1 − mean(γ)")):
        panel.set_title(name)
    panels[0, 2].legend(fontsize="small")
    for panel in panels[-1]:
        panel.set_xlabel("tasks trained")
    panels[0, 0].set_ylim(0, 1.02)
    _finish(figure, panels.ravel(), path, f"Capacity used. {_heading(settings, runs)}")


def _heading(settings: Settings, runs: Sequence[Run]) -> str:
    several = len({run.seed for run in runs}) > 1
    return title(settings, runs) + (" (mean, band ± 1 standard deviation)" if several else "")


def _by_layer(runs: Sequence[Run], field: str) -> dict[str, np.ndarray]:
    """(seeds, tasks) of `field` by layer: its weight and bias together, weighted by their elements."""
    result: dict[str, np.ndarray] = {}
    names = [row["name"] for row in runs[0].capacity[0]["rows"]]
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in names):
        chosen = [number for number, name in enumerate(names) if name.rpartition(".")[0] == layer]
        sizes = [runs[0].capacity[0]["rows"][number]["elements"] for number in chosen]
        values = [[[after["rows"][number][field] for number in chosen] for after in run.capacity] for run in runs]
        result[layer.removeprefix("trunk.")] = np.average(values, axis=2, weights=sizes)
    return result


def _line_with_band(panel: Axes, x: np.ndarray, y: np.ndarray, *, color, **style) -> None:
    """The mean of y (seeds, points), and one standard deviation around it where there is more than one seed."""
    mean = y.mean(axis=0)
    panel.plot(x, mean, color=color, markersize=4.5, linewidth=1.6, **style)
    if len(y) > 1:
        deviation = y.std(axis=0, ddof=1)
        panel.fill_between(x, mean - deviation, mean + deviation, color=color, **BAND)


def _finish(figure: Figure, panels: Sequence[Axes], path: Path, heading: str) -> None:
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading)
    figure.savefig(path, dpi=DOTS_PER_INCH)

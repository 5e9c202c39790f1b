"""Results as bars of seqkern and its peers, with the limit that was measured as a line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqkern.bench.record import Record, title
from seqkern.bench.rows import (
    COMPILE,
    CUDNN,
    EFFICIENT,
    EVERY_MODE,
    FLASH,
    FLEX,
    LOOP,
    MATH,
    ONNX,
    OURS,
    TORCH,
    VARLEN,
)
from seqkern.bench.suites import SUITES
from seqkern.bench.tables import HEADINGS, by_first, label, rate, subjects, times
from seqkern.bench.targets import PLAIN, best_ratio

COLOURS = {
    OURS: "#1f4e9c",
    TORCH: "#e8a33d",
    COMPILE: "#c9c2b4",
    ONNX: "#6b9a8b",
    FLEX: "#a05a7c",
    CUDNN: "#c4731f",
    FLASH: "#8a9a3b",
    EFFICIENT: "#6b9a8b",
    MATH: "#c9c2b4",
    VARLEN: "#8a9a3b",
    LOOP: "#c9c2b4",
    PLAIN: "#9db7dd",
}
LIMIT, GOOD, BAD = "#b42318", "#1a7f37", "#b42318"
MACHINE = "limit of the machine"
COLUMNS = 2
THICK = 0.15  # inches of a bar


def panels(records: Sequence[Record]) -> list[list[Record]]:
    """The records of one group, mode and unit each."""
    found = {}
    for record in sorted(
        records, key=lambda r: (by_first(records, "group").index(r.group), EVERY_MODE.index(r.mode))
    ):
        found.setdefault((record.group, record.mode, record.unit), []).append(record)
    return list(found.values())


def draw(records: Sequence[Record], path: Path) -> None:
    """One panel for each group and mode, one group of bars for each row, with the ratio over the best peer beside it.

    Raises ModuleNotFoundError where matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = panels(records)
    columns = min(COLUMNS, len(found))
    lines = [found[i : i + columns] for i in range(0, len(found), columns)]
    bars = [max(len(panel) * (len(subjects(panel)) + 1) for panel in line) for line in lines]
    heights = [0.9 + THICK * n for n in bars]
    figure = Figure(figsize=(6.6 * columns, 0.9 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
    handles: dict[str, Any] = {}
    for i, line in enumerate(lines):
        for j, panel in enumerate(line):
            axes = figure.add_subplot(grid[i, j])
            _panel(axes, panel)
            handles |= {text: h for h, text in zip(*axes.get_legend_handles_labels())}
    if MACHINE in handles:  # after the bars
        handles[MACHINE] = handles.pop(MACHINE)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.supxlabel(footnote(records[-1]), fontsize=8)
    figure.savefig(path, dpi=110)


def footnote(record: Record) -> str:
    """What the numbers in the names are, and where they were measured."""
    machine = title(record.machine) + ("" if "gpu" in record.machine else f", {record.threads} threads")
    return f"{record.suite}: {SUITES[record.suite].sizes}; {machine}, torch {record.versions['torch']}"


def _panel(axes: Any, panel: Sequence[Record]) -> None:
    names = subjects(panel)
    thick = 0.84 / len(names)
    limits = [r.limit for r in panel if r.limit]
    widest = max(limits + [r.speed(n) or 0.0 for r in panel for n in names])
    for i, record in enumerate(panel):
        here = [name for name in names if name in record.timings]
        top = i - 0.42 + (len(names) - len(here)) * thick / 2
        for j, name in enumerate(here):
            value, at = record.speed(name) or 0.0, top + (j + 0.5) * thick
            axes.barh(at, value, thick, color=COLOURS[name], label=label(name))
            axes.text(value + widest * 0.006, at, rate(value), va="center", fontsize=6.5, color="#444444")
        ratio = best_ratio(record.ratios)
        if ratio is not None:
            colour = GOOD if ratio >= 1 else BAD
            told = {"va": "center", "ha": "right", "color": colour, "weight": "bold", "fontsize": 9}
            axes.text(widest * 1.19, i, times(ratio), **told)
        if record.limit:
            line = {"color": LIMIT, "linewidth": 1, "linestyle": "--", "label": MACHINE}
            axes.plot([record.limit] * 2, [i - 0.5, i + 0.5], **line)
    group, mode, unit = panel[0].group, panel[0].mode, panel[0].unit
    axes.set(
        yticks=range(len(panel)),
        yticklabels=[r.name for r in panel],
        xlim=(0, widest * 1.2),
        ylim=(len(panel) - 0.4, -0.6),
        xlabel=f"{unit}; right: seqkern over the best peer, by time",
    )
    axes.set_title(f"{HEADINGS.get(group, group)}; {mode}", fontsize=10)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

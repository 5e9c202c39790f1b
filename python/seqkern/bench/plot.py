"""Results as a picture: bars of seqkern and its peers, with the measured FMA peak as a line."""

from collections.abc import Sequence
from pathlib import Path

from seqkern.bench.record import Record
from seqkern.bench.rows import MODES, OURS, PEERS
from seqkern.bench.tables import label, rate, subjects, times
from seqkern.bench.targets import best_ratio

COLOURS = {OURS: "#1f4e9c", "torch": "#e8a33d", "compile": "#c9c2b4", "onnxruntime": "#6b9a8b"}
OTHERS = ("#a05a7c", "#7c7c7c", "#4c8c2b")  # peers that later suites bring


def draw(records: Sequence[Record], path: Path, group: str = PEERS) -> None:
    """One panel for each mode, one group of bars for each row, with the ratio over the best peer beside it.

    Raises ModuleNotFoundError where matplotlib is not installed, ValueError where no record is of the group.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [[r for r in records if r.mode == mode and r.group == group] for mode in MODES]
    panels = [each for each in panels if each]
    if not panels:
        raise ValueError(f"there is no result of the group {group!r} to draw")
    names = subjects(r for panel in panels for r in panel)
    colours = dict(zip([n for n in names if n not in COLOURS], OTHERS)) | COLOURS
    rows = max(map(len, panels))
    figure = Figure(
        figsize=(6.6 * len(panels), 1.9 + (0.16 + 0.13 * len(names)) * rows), layout="constrained"
    )
    FigureCanvasAgg(figure)
    thick = 0.84 / len(names)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        peak = max((r.fma_peak for r in panel if r.fma_peak), default=None)
        widest = max([peak or 0.0] + [r.gflops(n) or 0.0 for r in panel for n in names])
        for i, record in enumerate(panel):
            for j, name in enumerate(names):
                value = record.gflops(name)
                if value is None:
                    continue
                at = i - 0.42 + (j + 0.5) * thick
                axes.barh(at, value, thick, color=colours[name], label=None if i else label(name))
                axes.text(value + widest * 0.006, at, rate(value), va="center", fontsize=6.5, color="#444444")
            ratio = best_ratio(record.ratios)
            if ratio is not None:
                colour = "#1a7f37" if ratio >= 1 else "#b42318"
                axes.text(
                    widest * 1.17,
                    i,
                    times(ratio),
                    va="center",
                    ha="right",
                    color=colour,
                    weight="bold",
                    fontsize=9,
                )
        if peak is not None:
            axes.axvline(
                peak, color="#b42318", linewidth=1, linestyle="--", label=f"FMA peak, {peak:.0f} GF/s"
            )
        axes.set(
            yticks=range(len(panel)),
            yticklabels=[r.name for r in panel],
            xlim=(0, widest * 1.18),
            ylim=(len(panel) - 0.4, -0.6),
            xlabel="GF/s; right: seqkern over the best peer, by time",
            title=panel[0].mode,
        )
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {text: h for axes in figure.axes for h, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False)
    last = panels[0][-1]
    figure.supxlabel(
        f"{last.suite}: B,T,I,H; {last.machine['cpu']} {last.machine['isa']}, {last.threads} threads, "
        f"torch {last.versions['torch']}",
        fontsize=8,
    )
    figure.savefig(path, dpi=110)

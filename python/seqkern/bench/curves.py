"""Speed over the length of the sequence, as curves."""

from collections.abc import Sequence
from pathlib import Path

from seqkern.bench.bars import COLOURS, LIMIT, footnote
from seqkern.bench.record import Record
from seqkern.bench.tables import label, subjects


def draw(records: Sequence[Record], path: Path) -> None:
    """One panel for full and one for causal attention, one curve for each subject, with the FMA peak.

    Raises ModuleNotFoundError where matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = subjects(records)
    for axes, causal in zip(figure.subplots(1, 2, sharey=True), (0, 1)):
        panel = sorted(
            (r for r in records if r.sizes["causal"] == causal), key=lambda record: record.sizes["L"]
        )
        for name in names:
            points = [(r.sizes["L"], r.speed(name)) for r in panel if name in r.timings]
            if points:
                axes.plot(*zip(*points), marker="o", markersize=4, color=COLOURS[name], label=label(name))
        peak = max((r.limit for r in panel if r.limit), default=None)
        if peak is not None:
            axes.axhline(peak, color=LIMIT, linestyle="--", linewidth=1, label="FMA peak")
        lengths = [r.sizes["L"] for r in panel]
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.set(title="causal, counted as half" if causal else "full", xlabel="length", ylabel="GF/s")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_tick_params(labelleft=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {text: h for axes in figure.axes for h, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.supxlabel(footnote(records[-1]), fontsize=8)
    figure.savefig(path, dpi=110)

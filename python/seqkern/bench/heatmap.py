"""The ratio over torch for every shape of a sweep, as a heat map."""

import math
from collections.abc import Sequence
from pathlib import Path

from seqkern.bench.attention import SLOWEST
from seqkern.bench.bars import footnote
from seqkern.bench.record import Record
from seqkern.bench.rows import TORCH
from seqkern.bench.tables import rate

SPAN = 4.0  # times at which the colours end, either way


def draw(records: Sequence[Record], path: Path) -> None:
    """One panel for each batch, a row for each L and S, a column for each D; framed where torch is the faster one.

    Raises ModuleNotFoundError where matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    records = [r for r in records if r.timings.get(TORCH)]
    batches = list(dict.fromkeys((r.sizes["causal"], r.sizes["B"], r.sizes["H"]) for r in records))
    places = sorted({(r.sizes["L"], r.sizes["S"]) for r in records})
    heads = sorted({r.sizes["D"] for r in records})
    figure = Figure(
        figsize=(2.0 + (0.7 + 0.42 * len(heads)) * len(batches), 1.7 + 0.2 * len(places)),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    image = None
    for i, (axes, batch) in enumerate(zip(figure.subplots(1, len(batches), squeeze=False)[0], batches)):
        table = [[math.nan] * len(heads) for _ in places]
        for r in records:
            n, ratio = r.sizes, r.ratios[TORCH]
            if (n["causal"], n["B"], n["H"]) != batch:
                continue
            y, x = places.index((n["L"], n["S"])), heads.index(n["D"])
            table[y][x] = math.log2(ratio)
            axes.text(x, y, rate(ratio), ha="center", va="center", fontsize=6.5)
            if ratio < SLOWEST:
                frame = {"fill": False, "edgecolor": "#b42318", "linewidth": 1.4}
                axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, **frame))
        norm = TwoSlopeNorm(0.0, -math.log2(SPAN), math.log2(SPAN))
        image = axes.imshow(table, cmap="RdYlGn", norm=norm, aspect="auto")
        causal, B, H = batch
        axes.set_title(f"{'causal, ' * causal}B {B}, H {H}", fontsize=10)
        axes.set_xticks(range(len(heads)), heads, fontsize=8)
        axes.set_yticks(range(len(places)), [f"{L}, {S}" for L, S in places] if i == 0 else [], fontsize=8)
        axes.set_xlabel("D")
        if i == 0:
            axes.set_ylabel("L, S")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    assert image is not None
    bar = figure.colorbar(image, ax=figure.axes, fraction=0.025, pad=0.01)
    ticks = [1 / SPAN, 0.5, 1.0, 2.0, SPAN]
    bar.set_ticks([math.log2(t) for t in ticks], labels=[f"{t:g}x" for t in ticks])
    figure.suptitle(f"torch's time over seqkern's; framed below {SLOWEST:g}x", fontsize=11)
    figure.supxlabel(footnote(records[-1]), fontsize=8)
    figure.savefig(path, dpi=110)

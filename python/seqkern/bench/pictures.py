"""Which pictures the results of a suite make."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from seqkern.bench import bars, curves, heatmap
from seqkern.bench.attention import LENGTHS, SWEEP
from seqkern.bench.record import Record, timed
from seqkern.bench.rows import OTHER


def missing() -> str:
    """Why nothing can be drawn, and the remedy; empty if it can."""
    return (
        "" if find_spec("matplotlib") else "no picture: matplotlib is missing; pip install 'seqkern[bench]'"
    )


def draw(records: Sequence[Record], results: Path) -> dict[str, Path]:
    """The pictures, beside the file of the results, each with what it shows in words. None without matplotlib.

    Raises ValueError where there is nothing to draw.
    """
    if not records:
        raise ValueError("there is no result to draw")
    records = timed(records)
    if missing():
        return {}
    drawn: dict[str, Path] = {}
    sweep = [r for r in records if r.group == SWEEP]
    lengths = [r for r in records if r.group == LENGTHS]
    rest = [r for r in records if r.group not in (SWEEP, LENGTHS)]
    known = [r for r in rest if r.group != OTHER] or rest
    if known:
        drawn["seqkern and its peers, with the machine's limits"] = path = results.with_suffix(".png")
        bars.draw(known, path)
    if lengths:
        path = results.with_name(f"{results.stem}-lengths.png")
        drawn["speed over the length of the sequence"] = path
        curves.draw(lengths, path)
    if sweep:
        drawn["torch's time over seqkern's, for every shape of the sweep"] = path = results.with_suffix(
            ".png"
        )
        heatmap.draw(sweep, path)
    return drawn

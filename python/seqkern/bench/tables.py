"""Results as tables: for the terminal, and in Markdown between markers of a page."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from seqkern import report
from seqkern.bench.peers import PEERS
from seqkern.bench.record import Record
from seqkern.bench.rows import GROUPS, MODES, OURS, TRAINING
from seqkern.bench.targets import best_ratio

HEADINGS = {"peers": "the rows of the peers' published figures", "other": "other shapes, dtypes and cells"}


def subjects(records: Iterable[Record]) -> list[str]:
    """seqkern and the peers that any record timed, in the order of `PEERS`."""
    seen = {name for record in records for name in record.timings}
    return [name for name in (OURS, *PEERS) if name in seen]


def label(subject: str) -> str:
    return PEERS[subject].label if subject in PEERS else subject


def rate(value: float | None) -> str:
    """Three digits, or more before the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{rate(value * scale)} {unit}"
    raise AssertionError


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def terminal(records: Sequence[Record], mode: str):
    """A table of one mode's records, in GF/s."""
    found = [record for record in records if record.mode == mode]
    names = subjects(found)
    short = {"onnxruntime": "ORT"}
    columns = ["row", *(short.get(name, name) for name in names), "best", "peak", "L2", "target"]
    rows = [
        (
            record.name,
            *(rate(record.gflops(name)) for name in names),
            times(best_ratio(record.ratios)),
            share(record.share_of_peak),
            share(record.share_of_l2),
            record.verdict,
        )
        for record in found
    ]
    title = f"{mode}: GF/s; times over the best peer; shares of FMA peak and of L2"
    return report.table(title, columns, rows, range(1, len(columns) - 1), tight=True)


def line(record: Record) -> str:
    """A record in short, for a log."""
    speeds = ", ".join(f"{label(name)} {rate(record.gflops(name))}" for name in subjects([record]))
    return f"{record.name}, {record.mode}: GF/s {speeds}; best {times(best_ratio(record.ratios))}"


def machine_line(records: Sequence[Record]) -> str:
    """Where, when and with what the records were measured; the limits are those of the last one."""
    last = max(records, key=lambda record: record.run)
    days = sorted({record.run[:10] for record in records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    limits = [] if last.fma_peak is None else [f"FMA peak {last.fma_peak:.0f} GF/s"]
    limits += [f"{level} {rate(value)} GB/s" for level, value in last.bandwidth.items()]
    machine = " ".join(str(last.machine[key]) for key in ("cpu", "isa"))
    load = last.machine.get("load")
    busy = "" if load is None else f", load {load} at the start"
    used = ", ".join(f"{name} {version}" for name, version in last.versions.items())
    return (
        f"{machine}, {last.threads} threads, {when}{busy}; {used}. "
        f"Measured in the same run: {', '.join(limits) or 'no limits'}."
    )


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(each)} |" for each in (columns, rule, *rows)]


def _pair(record: Record, field: str, show) -> str:
    """seqkern's figure and torch's."""
    values = [getattr(record.timings[name], field) for name in (OURS, "torch") if name in record.timings]
    return " / ".join(show(value) for value in values)


def _megabytes(value: int | None) -> str:
    return "-" if value is None else rate(value / 1e6)


def _section(records: list[Record], mode: str, group: str) -> list[str]:
    names = subjects(records)
    columns = [
        "B,T,I,H",
        *(label(name) for name in names),
        "over the best peer (p20 to p80)",
        "of FMA peak",
        *([] if mode == TRAINING else ["of L2"]),
        "time of a call",
        "first call, seqkern / torch",
        "MB, seqkern / torch",
        "target",
    ]
    rows = []
    for record in records:
        peers = {name: each for name, each in record.timings.items() if each.ratio is not None}
        best = min(peers.values(), key=lambda each: each.ratio or 0.0, default=None)
        span = f"{times(best.ratio)} ({times(best.ratio_p20)} to {times(best.ratio_p80)})" if best else "-"
        rows.append(
            (
                record.name,
                *(rate(record.gflops(name)) for name in names),
                span,
                share(record.share_of_peak),
                *([] if mode == TRAINING else [share(record.share_of_l2)]),
                seconds(record.timings[OURS].median),
                _pair(record, "first_call", seconds),
                _pair(record, "peak_bytes", _megabytes),
                f"{record.target}: {record.verdict}" if record.target else "-",
            )
        )
    return [f"{mode.capitalize()}, GF/s, {HEADINGS[group]}:", "", *_markdown(columns, rows), ""]


def markdown(records: Sequence[Record], picture: str | None = None) -> str:
    """All of a suite's records as Markdown: the machine, a table for each mode and group, the picture."""
    lines = [machine_line(records), ""]
    if picture:
        lines += [f"![GF/s of seqkern and its peers, with the machine's FMA peak]({picture})", ""]
    for group in GROUPS:
        for mode in MODES:
            found = [record for record in records if (record.mode, record.group) == (mode, group)]
            if found:
                lines += _section(found, mode, group)
    return "\n".join(lines).rstrip()


def put(page: Path, name: str, text: str) -> bool:
    """Puts the text between ``<!-- name -->`` and ``<!-- /name -->``; whether the page changed.

    Raises ValueError where the page lacks the markers.
    """
    before = page.read_text(encoding="utf-8")
    after, count = re.subn(
        rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)",
        lambda match: f"{match[1]}{text}\n{match[2]}",
        before,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(
            f"{page} has {count} places between <!-- {name} --> and <!-- /{name} -->, expected 1"
        )
    if after != before:
        page.write_text(after, encoding="utf-8")
    return after != before


def between(page: Path, name: str) -> str:
    """What `put` put there."""
    found = re.search(
        rf"<!-- {re.escape(name)} -->\n(.*?)\n?<!-- /{re.escape(name)} -->",
        page.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    if found is None:
        raise ValueError(f"{page} has nothing between <!-- {name} --> and <!-- /{name} -->")
    return found[1]

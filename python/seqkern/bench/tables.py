"""Results as tables: for the terminal, and in Markdown between markers of a page."""

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqkern import report
from seqkern.bench.attention import BF16, DECODE, LENGTHS, OPTION, SLOWEST, SWEEP
from seqkern.bench.peers import PEERS as PEER_CLASSES
from seqkern.bench.peers import SUBJECTS
from seqkern.bench.record import Record, Timing, timed, title
from seqkern.bench.recurrent_gpu import GRAPHED, ON_CHIP, PACKED, STEPS
from seqkern.bench.rows import (
    CUDNN,
    EFFICIENT,
    EVERY_MODE,
    FLASH,
    FLEX,
    LOOP,
    MATH,
    ONNX,
    OTHER,
    OURS,
    PEERS,
    TORCH,
    VARLEN,
)
from seqkern.bench.suites import SUITES
from seqkern.bench.targets import PLAIN, best_ratio
from seqkern.bench.transformer import DECODER, GENERATION, LINEAR

HEADINGS = {
    PEERS: "the rows of the peers' published figures",
    OTHER: "other shapes, dtypes and cells",
    OPTION: "options, each against seqkern without it",
    DECODE: "decoding, one query: B,H/kv,S,D",
    BF16: "bfloat16",
    LENGTHS: "the length of the sequence",
    DECODER: "a decoder with a memory: B,L,S",
    GENERATION: "greedy decoding",
    LINEAR: "models of torch.nn.Linear: B,L",
    ON_CHIP: "recurrent weights that one multiprocessor holds",
    STEPS: "weights that fit no multiprocessor",
    PACKED: "packed sequences, lengths even from 1 to T",
    GRAPHED: "every subject replayed as a CUDA graph",
}
SHORT = {
    ONNX: "ORT",
    FLEX: "flex",
    PLAIN: "plain",
    CUDNN: "cuDNN",
    EFFICIENT: "effic.",
    FLASH: "flash",
    MATH: "math",
    LOOP: "loop",
    VARLEN: "varlen",
}
SLOW_SHOWN = 10  # of a sweep
IN_SHORT = frozenset({PEERS, DECODE, GENERATION, LINEAR, ON_CHIP, STEPS, PACKED, GRAPHED})


def by_first(records: Iterable[Record], field: str) -> list[str]:
    """The values of a field, in the order in which they first come."""
    return list(dict.fromkeys(getattr(record, field) for record in records))


def subjects(records: Iterable[Record]) -> list[str]:
    """seqkern, the peers that any record timed, in the order of `PEERS`, and the yardstick."""
    seen = {name for record in records for name in record.timings}
    return [name for name in (OURS, *PEER_CLASSES, PLAIN) if name in seen]


def label(subject: str) -> str:
    return SUBJECTS[subject].label


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


def terminal(records: Sequence[Record]) -> Iterator[Any]:
    """A table for each mode and unit of the records; of a sweep the slowest only."""
    swept = [record for record in records if record.group == SWEEP]
    if swept:
        yield report.table(sweep_line(swept), *_slowest(swept), range(1, 5), tight=True)
    for mode in EVERY_MODE:
        of_mode = [record for record in records if record.mode == mode and record.group != SWEEP]
        for unit in by_first(of_mode, "unit"):
            yield _table([record for record in of_mode if record.unit == unit], mode, unit)


def peak(records: Iterable[Record]) -> str:
    """What the shares of a peak are shares of."""
    return "the matmul rate" if any(record.peaks for record in records) else "FMA peak"


def _table(found: Sequence[Record], mode: str, unit: str) -> Any:
    names = subjects(found)
    columns = ["row", *(SHORT.get(name, name) for name in names), "best", "peak", "read", "target"]
    rows = [
        (
            record.name,
            *(rate(record.speed(name)) for name in names),
            times(best_ratio(record.ratios)),
            share(record.share_of_peak),
            share(record.share_of_read),
            record.verdict,
        )
        for record in found
    ]
    heading = f"{mode}: {unit}; times over the best peer; shares of {peak(found)} and of the bandwidth"
    return report.table(heading, columns, rows, range(1, len(columns) - 1), tight=True)


def line(record: Record) -> str:
    """A record in short, for a log."""
    if record.failure:
        return f"{record.name}, {record.mode}: no figure: {record.failure}"
    speeds = ", ".join(f"{label(name)} {rate(record.speed(name))}" for name in subjects([record]))
    return f"{record.name}, {record.mode}: {record.unit} {speeds}; best {times(best_ratio(record.ratios))}"


def _ratio(record: Record) -> float:
    """Over torch, for a sweep."""
    return record.ratios.get(TORCH, float("inf"))


def sweep_line(records: Sequence[Record]) -> str:
    """A sweep in a sentence."""
    ratios = [_ratio(record) for record in records]
    slow = sum(record.verdict == "missed" for record in records)
    return (
        f"{len(records)} calls of scaled_dot_product_attention: torch's time over seqkern's is "
        f"{times(min(ratios))} to {times(max(ratios))}, {times(statistics.median(ratios))} in the median; "
        f"{slow} are below {SLOWEST:g}x"
    )


def _slowest(records: Sequence[Record]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Columns and rows of the calls that gain least."""
    columns = [SUITES[records[0].suite].sizes, "seqkern", "torch", "ratio (p20 to p80)", "backend"]
    rows = []
    for record in sorted(records, key=_ratio)[:SLOW_SHOWN]:
        spans = [seconds(record.timings[n].median) if n in record.timings else "-" for n in (OURS, TORCH)]
        rows.append((record.name, *spans, _span(record.timings.get(TORCH)), record.backend))
    return columns, rows


def _span(timing: Timing | None) -> str:
    if timing is None or timing.ratio is None:
        return "-"
    return f"{times(timing.ratio)} ({times(timing.ratio_p20)} to {times(timing.ratio_p80)})"


def machine_line(records: Sequence[Record]) -> str:
    """Where, when and with what the records were measured; the limits are those of the last one."""
    last = max(records, key=lambda record: record.run)
    days = sorted({record.run[:10] for record in records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    limits = [] if last.fma_peak is None else [f"FMA peak {last.fma_peak:.0f} GF/s"]
    limits += [f"matmul {dtype} {rate(value / 1e3)} TF/s" for dtype, value in last.peaks.items()]
    limits += [f"{level} {rate(value)} GB/s" for level, value in last.bandwidth.items()]
    load = last.machine.get("load")
    busy = "" if load is None else f", load {load} at the start"
    told = [f"{each} {last.machine[each]}" for each in ("driver", "clock") if each in last.machine]
    driven = ", ".join(told) if "gpu" in last.machine else f"{last.threads} threads"
    used = ", ".join(f"{name} {version}" for name, version in last.versions.items())
    return (
        f"{title(last.machine)}, {driven}, {when}{busy}; {used}. "
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


def _section(records: list[Record], group: str) -> list[str]:
    """A table; columns that no record fills are left out."""
    mode, unit = records[0].mode, records[0].unit
    names = [name for name in subjects(records) if name != PLAIN]
    columns = [
        SUITES[records[0].suite].sizes,
        *(label(name) for name in names),
        "over the best peer (p20 to p80)",
        "over its own plain time",
        f"of {peak(records)}",
        "of the bandwidth",
        "time of a call",
        "first call, seqkern / torch",
        "MB, seqkern / torch",
        "target",
    ]
    rows = []
    for record in records:
        peers = [each for name, each in record.timings.items() if each.ratio is not None and name != PLAIN]
        plain = record.ratios.get(PLAIN)
        read = share(record.share_of_read)
        rows.append(
            (
                record.name,
                *(rate(record.speed(name)) for name in names),
                _span(min(peers, key=lambda each: each.ratio or 0.0, default=None)),
                times(plain and 1 / plain),
                share(record.share_of_peak),
                read if record.share_of_read is None else f"{read} of {record.level}",
                seconds(record.timings[OURS].median),
                _pair(record, "first_call", seconds),
                _pair(record, "peak_bytes", _megabytes),
                f"{record.target}: {record.verdict}" if record.target else "-",
            )
        )
    used = [i for i in range(len(columns)) if any(row[i] not in ("-", "- / -") for row in rows)]
    told = [[row[i] for i in used] for row in rows]
    heading = f"{mode.capitalize()}, {unit}, {HEADINGS.get(group, group)}:"
    return [heading, "", *_markdown([columns[i] for i in used], told), ""]


def markdown(records: Sequence[Record], pictures: Mapping[str, str] | None = None) -> str:
    """All of a suite's records as Markdown: the machine, the pictures (by what they show), the tables."""
    lines = [machine_line(records), ""]
    failed = [record for record in records if record.failure]
    records = timed(records)
    for said, path in (pictures or {}).items():
        lines += [f"![{said}]({path})", ""]
    swept = [record for record in records if record.group == SWEEP]
    if swept:
        lines += [f"{sweep_line(swept)}. Those that gain least:", "", *_markdown(*_slowest(swept)), ""]
    for group in by_first(records, "group"):
        for mode in EVERY_MODE:
            of_mode = [record for record in records if (record.mode, record.group) == (mode, group)]
            for unit in by_first(of_mode, "unit") if group != SWEEP else ():
                lines += _section([record for record in of_mode if record.unit == unit], group)
    if failed:
        lines += [
            "No figure:",
            "",
            *(f"- {record.name}, {record.mode}: {record.failure}" for record in failed),
        ]
    return "\n".join(lines).rstrip()


def page(of_machines: Sequence[tuple[Sequence[Record], Mapping[str, str]]]) -> str:
    """The `markdown` of each machine's records and pictures: the first as it is, the others folded away."""
    first, *others = (markdown(records, shown) for records, shown in of_machines)
    folded = [
        f"<details>\n<summary>{title(records[-1].machine)}, {records[-1].run[:10]}</summary>\n\n{text}\n\n</details>"
        for (records, _), text in zip(of_machines[1:], others)
    ]
    return "\n\n".join((first, *folded))


def short(of_machines: Sequence[tuple[Sequence[Record], Mapping[str, str]]]) -> str:
    """The ratios over the best peer on each machine, side by side, below the first one's pictures."""
    machines = [
        (f"{title(records[-1].machine)}, {records[-1].run[:10]}", timed(records))
        for records, _ in of_machines
    ]
    lines = [part for said, path in of_machines[0][1].items() for part in (f"![{said}]({path})", "")]
    of_sweep = [(name, [r for r in records if r.group == SWEEP]) for name, records in machines]
    if any(swept for _, swept in of_sweep):
        return "\n".join((*lines, *(f"- {name}: {sweep_line(swept)}." for name, swept in of_sweep if swept)))
    told = [(name, [r for r in records if r.group in IN_SHORT]) for name, records in machines]
    every = [record for _, records in told for record in records]
    if not every:
        return "\n".join((*lines, "None of these rows has a figure."))
    modes = [mode for mode in EVERY_MODE if any(record.mode == mode for record in every)]
    rows = []
    for row in by_first(every, "name"):
        found = [{r.mode: best_ratio(r.ratios) for r in records if r.name == row} for _, records in told]
        rows.append(
            (row, *(" / ".join(times(of.get(mode)) for mode in modes) if of else "-" for of in found))
        )
    columns = [f"{SUITES[every[0].suite].sizes}: {' / '.join(modes)}", *(name for name, _ in told)]
    return "\n".join((*lines, *_markdown(columns, rows)))


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

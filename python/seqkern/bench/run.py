"""``seqkern bench``: a suite's rows timed, judged, written down, drawn and shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from seqkern import report, testing
from seqkern.bench import limits, measure, plot, record, tables
from seqkern.bench.peers import PEERS, Ours, Peer
from seqkern.bench.record import Record, Timing
from seqkern.bench.rows import MODES, OURS, SUITES, Row
from seqkern.explanation import explain

ROWS = ("peers", "all")
WIDTH = 100  # columns of what is written to a file


@dataclass(frozen=True)
class Options:
    """What a run is asked for."""

    suite: str
    rows: str = "peers"
    only: str = ""  #: a part of the names of the rows wanted
    mode: str = "both"
    rounds: int = 11
    seconds: float = 4.0  #: of timing, for each row and mode
    threads: int | None = None
    peers: tuple[str, ...] = tuple(PEERS)

    def check(self) -> None:
        """Raises ValueError naming the option, what came and what was expected."""
        if self.suite not in SUITES:
            raise ValueError(f"suite is {self.suite!r}, expected one of {', '.join(SUITES)}")
        if self.rows not in ROWS:
            raise ValueError(f"rows is {self.rows!r}, expected one of {', '.join(ROWS)}")
        if self.mode not in (*MODES, "both"):
            raise ValueError(f"mode is {self.mode!r}, expected one of {', '.join(MODES)}, both")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}, expected at least 1")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds-per-row is {self.seconds:g}, expected more than 0")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, expected at least 1")
        for name in self.peers:
            if name not in PEERS:
                raise ValueError(f"peers names {name!r}, expected some of {', '.join(PEERS)}")
        if not self.wanted():
            known = ", ".join(row.name for row in SUITES[self.suite])
            raise ValueError(
                f"filter {self.only!r} fits none of the rows ({self.rows}); the suite has: {known}"
            )

    def wanted(self) -> list[Row]:
        rows = (row for row in SUITES[self.suite] if self.rows == "all" or row.group == "peers")
        return [row for row in rows if self.only.lower() in row.name.lower()]

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.mode == "both" else (self.mode,)


def run_row(
    row: Row,
    mode: str,
    ours: Peer,
    peers: Sequence[Peer],
    found: limits.Limits,
    options: Options,
    about: dict,
) -> tuple[Record, list[str]]:
    """One record, and what had to be left out of it. Raises measure.WrongResult where seqkern fails the gate."""
    left_out = []
    subjects = {OURS: ours.prepare(row, mode)}
    ran = {OURS: ours}
    for peer in peers:
        if not peer.serves(row, mode):
            continue
        try:
            subjects[peer.name] = peer.prepare(row, mode)
        except Exception as e:  # a peer's failure is no reason to lose the row
            left_out.append(f"{row.name}, {mode}: {peer.label} is left out: {e}")
        else:
            ran[peer.name] = peer
    times = None
    while times is None:
        try:
            times = measure.interleaved(subjects, rounds=options.rounds, seconds=options.seconds)
        except measure.PeerFailed as e:
            del subjects[e.peer]
            left_out.append(f"{row.name}, {mode}: {PEERS[e.peer].label} is left out: {e}")
    found.sample()
    over = measure.ratios(times, OURS)
    timings = {}
    for name, each in times.items():
        t, r = measure.spread(each), over.get(name)
        ratio = (r.median, r.p20, r.p80) if r else (None, None, None)
        timings[name] = Timing(t.median, t.p20, t.p80, *ratio, ran[name].first_call, ran[name].peak_bytes)
    model, inputs = row.build()
    backends = explain(measure.accelerated(model), *inputs).rows
    made = Record(
        **{"suite": row.suite, "name": row.name, "group": row.group, "mode": mode, "dtype": row.dtype},
        flop=row.flop(mode),
        timings=timings,
        backend=", ".join(sorted({each.backend for each in backends})),
        weight_bytes=row.weight_bytes(mode),
        target=row.target(mode),
        rounds=len(times[OURS]),
        threads=torch.get_num_threads(),
        **about,
    )
    return made, left_out


def run(options: Options, output: Path, console: Console) -> tuple[Path, list[str]]:
    """Times every row wanted and appends the results. Returns their file and the rows that failed the gate."""
    about = {
        "machine": record.machine(),
        "versions": record.versions(),
        "commit": record.commit(),
        "run": record.now(),
    }
    path = output / f"{options.suite}-{record.kind(about['machine'])}.jsonl"
    ours, peers, failed, notes = Ours(torch.get_num_threads()), [], [], []
    for name in options.peers:
        if reason := PEERS[name].missing():
            console.print(Text(reason, "yellow"))
        else:
            peers.append(PEERS[name](torch.get_num_threads()))
    work = [(row, mode) for row in options.wanted() for mode in options.modes]
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    made: list[Record] = []
    found = limits.Limits()
    try:
        with Progress(*parts, console=console) as progress:
            bar = progress.add_task("limits of this machine", total=len(work))
            found = limits.measure()
            for row, mode in work:
                progress.update(bar, description=f"{row.name}, {mode}")
                try:
                    each, more = run_row(row, mode, ours, peers, found, options, about)
                except measure.WrongResult as e:
                    failed.append(str(e))
                else:
                    made.append(each)
                    notes += more
                    if not console.is_terminal:  # where no bar is seen to move
                        console.print(Text(tables.line(each)))
                progress.advance(bar)
    finally:  # also after an interrupt: what was measured is kept
        for peer in peers:
            peer.close()
        made = [each.held_against(found) for each in made]
        record.append(path, made)
    for mode in options.modes:
        if any(each.mode == mode for each in made):
            console.print(tables.terminal(made, mode))
    if made:
        console.print(Text(tables.machine_line(made)))
    for note in notes:
        console.print(Text(note, "yellow"))
    return path, failed


def publish(path: Path, suite: str, page: Path | None = None) -> Path | None:
    """Draws the picture of a results file beside it and, given a page, renews its tables.

    Returns the picture's path, None where matplotlib is missing.
    """
    records = record.latest(record.read(path))
    picture: Path | None = path.with_suffix(".png")
    try:
        plot.draw(records, picture, records[0].group if all(r.group != "peers" for r in records) else "peers")
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] != "matplotlib":
            raise
        picture = None
    if page is not None:
        shown = path.with_suffix(".png").relative_to(page.parent).as_posix() if picture else None
        tables.put(page, f"bench:{suite}", tables.markdown(records, shown))
    return picture


def main(options: Options, output: Path | None = None, console: Console | None = None) -> int:
    """Runs a suite and writes its results and picture into ``output``. Returns the exit code: 1 where a kernel
    failed the gate.

    Raises ValueError for options that make no sense and for a folder that cannot be written, before anything runs.
    """
    options.check()
    output = report.writable(output or record.default_folder())
    console = console or Console()
    if not console.is_terminal:
        console.width = max(WIDTH, console.width)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with testing.without_torchs_warnings():
        path, failed = run(options, output, console)
    for each in failed:
        console.print(Text(f"no figure for a wrong result: {each}", "bold red"))
    if path.exists():
        console.print(Text(f"results: {path}"))
        picture = publish(path, options.suite)
        shown = (
            f"picture: {picture}"
            if picture
            else "no picture: matplotlib is missing; pip install 'seqkern[bench]'"
        )
        console.print(Text(shown))
    return 1 if failed else 0

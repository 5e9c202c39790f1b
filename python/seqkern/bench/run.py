"""``seqkern bench``: a suite's rows timed, judged, written down, drawn and shown."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from seqkern import report, testing
from seqkern.bench import limits, measure, pictures, record, tables
from seqkern.bench.peers import PEERS, SUBJECTS, Ours, Peer, Plain
from seqkern.bench.record import Record, Timing
from seqkern.bench.rows import MODES, OURS, TORCH, TRAINING, Row
from seqkern.bench.suites import SUITES
from seqkern.explanation import explain

ROWS = ("peers", "all")
WIDTH = 100  # columns of what is written to a file
SHOWN = 40  # rows' names in a message


@dataclass(frozen=True)
class Options:
    """What a run is asked for."""

    suite: str
    rows: str = "peers"
    only: str = ""  #: a part of the names of the rows wanted
    mode: str = "both"
    rounds: int | None = None  #: the suite's if None
    seconds: float | None = None  #: of timing, for each row and mode; the suite's if None
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
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}, expected at least 1")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds-per-row is {self.seconds:g}, expected more than 0")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, expected at least 1")
        for name in self.peers:
            if name not in PEERS:
                raise ValueError(f"peers names {name!r}, expected some of {', '.join(PEERS)}")
        if not self.work():
            names = [row.name for row in SUITES[self.suite].rows]
            more = "" if len(names) <= SHOWN else f" and {len(names) - SHOWN} more"
            raise ValueError(
                f"filter {self.only!r} fits none of the rows ({self.rows}, {self.mode}); the suite has: "
                f"{', '.join(names[:SHOWN])}{more}"
            )

    def work(self) -> list[tuple[Row, str]]:
        """The rows that are wanted, each with a mode."""
        rows = SUITES[self.suite].wanted(self.rows == "all", self.only)
        return [(row, mode) for row in rows for mode in row.modes if mode in self.modes]

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.mode == "both" else (self.mode,)

    @property
    def pace(self) -> tuple[int, float]:
        """Rounds, and seconds of timing, for each row and mode."""
        suite = SUITES[self.suite]
        return self.rounds or suite.rounds, self.seconds or suite.seconds


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
    rivals = row.rivals(mode)
    for peer in (*peers, Plain(ours.threads)):
        if peer.name not in rivals:
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
            rounds, seconds = options.pace
            times = measure.interleaved(subjects, rounds=rounds, seconds=seconds)
        except measure.PeerFailed as e:
            del subjects[e.peer]
            left_out.append(f"{row.name}, {mode}: {SUBJECTS[e.peer].label} is left out: {e}")
    level = found.level(row.bytes_held(mode))
    found.sample(levels={"L2", level} if row.bytes_read(mode) else {"L2"})
    over = measure.ratios(times, OURS)
    timings = {}
    for name, each in times.items():
        t, r = measure.spread(each), over.get(name)
        ratio = (r.median, r.p20, r.p80) if r else (None, None, None)
        timings[name] = Timing(t.median, t.p20, t.p80, *ratio, ran[name].first_call, ran[name].peak_bytes)
    model, inputs = row.build()
    with torch.set_grad_enabled(mode == TRAINING):
        ours_alone = row.ours(model).train(mode == TRAINING)
        # As a function: a module is followed by wrapping its forwards, which `generate` refuses.
        backends = explain(lambda *given: ours_alone(*given), *inputs).rows
    made = Record(
        **{"suite": row.suite, "name": row.name, "group": row.group, "mode": mode, "dtype": row.dtype},
        flop=row.flop(mode),
        timings=timings,
        backend=", ".join(sorted({each.backend for each in backends})) or TORCH,
        unit=row.unit,
        amount=row.amount(mode),
        sizes=row.sizes(),
        bytes_read=row.bytes_read(mode),
        level=level,
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
    work = options.work()
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
                    if not console.is_terminal and row.probed:  # where no bar is seen to move
                        console.print(Text(tables.line(each)))
                progress.advance(bar)
    finally:  # also after an interrupt: what was measured is kept
        for peer in peers:
            peer.close()
        made = [each.held_against(found) for each in made]
        record.append(path, made)
    for table in tables.terminal(made):
        console.print(table)
    if made:
        console.print(Text(tables.machine_line(made)))
    for note in notes:
        console.print(Text(note, "yellow"))
    return path, failed


def publish(path: Path, suite: str, page: Path | None = None) -> list[Path]:
    """Draws the pictures of a results file beside it and, given a page, renews its tables.

    Returns the pictures' paths, none where matplotlib is missing.
    """
    records = record.latest(record.read(path))
    drawn = pictures.draw(records, path)
    if page is not None:
        shown = {said: each.relative_to(page.parent).as_posix() for said, each in drawn.items()}
        tables.put(page, f"bench:{suite}", tables.markdown(records, shown))
    return list(drawn.values())


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
    start = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with testing.without_torchs_warnings():
        path, failed = run(options, output, console)
    for each in failed:
        console.print(Text(f"no figure for a wrong result: {each}", "bold red"))
    if path.exists():
        console.print(Text(f"results: {path}"))
        for picture in publish(path, options.suite):
            console.print(Text(f"picture: {picture}"))
        if pictures.missing():
            console.print(Text(pictures.missing()))
    console.print(Text(f"{options.suite} took {time.perf_counter() - start:.0f} s"))
    return 1 if failed else 0

"""``seqkern bench``: a suite's rows timed, judged, written down, drawn and shown."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from seqkern import report, testing
from seqkern.bench import limits, measure, pictures, place, record, tables
from seqkern.bench.peers import PEERS, SUBJECTS, Ours, Peer, Plain
from seqkern.bench.place import DeviceLost, Place
from seqkern.bench.record import Record, Timing
from seqkern.bench.rows import EVERY_MODE, INFERENCE, OURS, TORCH, Row
from seqkern.bench.suites import SUITES
from seqkern.explanation import explain

ROWS = ("peers", "all")
WIDTH = 100  # columns of what is written to a file
SHOWN = 40  # rows' names in a message
LOST = 3  # exit code: the device answers no more in this process, rows are left for another
SAID = 300  # letters of an error that are kept


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
    device: str | None = None  #: cpu or cuda; the suite's if None
    resume: bool = False  #: leave out the rows that the results file has already

    def check(self) -> None:
        """Raises ValueError naming the option, what came and what was expected."""
        if self.suite not in SUITES:
            raise ValueError(f"suite is {self.suite!r}, expected one of {', '.join(SUITES)}")
        if self.rows not in ROWS:
            raise ValueError(f"rows is {self.rows!r}, expected one of {', '.join(ROWS)}")
        if self.mode not in (*EVERY_MODE, "both"):
            raise ValueError(f"mode is {self.mode!r}, expected one of {', '.join(EVERY_MODE)}, both")
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
            names = list(dict.fromkeys(row.name for row, _ in replace(self, only="").work()))
            more = "" if len(names) <= SHOWN else f" and {len(names) - SHOWN} more"
            others = len({row.name for row, _ in replace(self, rows="all").work()})
            raise ValueError(
                f"filter {self.only!r} fits none of the rows ({self.rows}, {self.mode}), which are: "
                f"{', '.join(names[:SHOWN])}{more}"
                + (f"; it fits {others} with --rows all" if others else "")
            )

    def work(self) -> list[tuple[Row, str]]:
        """The rows that are wanted, each with a mode."""
        rows = SUITES[self.suite].wanted(self.rows == "all", self.only)
        return [(row, mode) for row in rows for mode in row.modes if mode in self.modes]

    @property
    def modes(self) -> tuple[str, ...]:
        return EVERY_MODE if self.mode == "both" else (self.mode,)

    @property
    def pace(self) -> tuple[int, float]:
        """Rounds, and seconds of timing, for each row and mode."""
        suite = SUITES[self.suite]
        return self.rounds or suite.rounds, self.seconds or suite.seconds


def short(e: Exception) -> str:
    """An error in a line."""
    kind = "" if isinstance(e, (measure.WrongResult, measure.PeerFailed)) else f"{type(e).__name__}: "
    said = " ".join(f"{kind}{e}".split())
    return said if len(said) <= SAID else f"{said[:SAID]} ..."


def guarded(name: str, run: measure.Timed) -> measure.Timed:
    """A subject whose failures name it."""

    def guard(calls: int) -> float:
        try:
            return run(calls)
        except measure.PeerFailed:
            raise
        except Exception as e:  # a compiler's, an allocator's or a driver's
            raise measure.PeerFailed(name, short(e)) from e

    return guard


def run_row(
    row: Row,
    mode: str,
    ours: Peer,
    peers: Sequence[Peer],
    found: limits.Limits | place.Ceilings,
    options: Options,
    about: dict,
) -> Record:
    """One record, without timings where seqkern failed the gate or broke down."""
    here = ours.place
    made = Record(
        **{"suite": row.suite, "name": row.name, "group": row.group, "mode": mode, "dtype": row.dtype},
        flop=row.flop(mode),
        timings={},
        backend="",
        unit=row.unit,
        amount=row.amount(mode),
        sizes=row.sizes(),
        bytes_read=row.bytes_read(mode),
        level=found.level(row.bytes_held(mode)),
        target=row.target(mode),
        rounds=0,
        threads=torch.get_num_threads(),
        **about,
    )
    rivals, backend = row.rivals(mode), ""
    left_out: dict[str, str] = {}

    def recover() -> None:
        try:
            here.recover(f"{row.name}, {mode}: {left_out}")
        except DeviceLost as e:
            e.row = replace(made, left_out={OURS: str(e)} | left_out)
            raise

    subjects: dict[str, measure.Timed] = {}
    ran: dict[str, Peer] = {}
    for peer in (ours, *peers, Plain(ours.threads, here)):
        if peer is not ours and peer.name not in rivals:
            continue
        try:
            subjects[peer.name] = guarded(peer.name, peer.prepare(row, mode))
            backend = backend or which_backend(row, mode, here)
        except Exception as e:  # a peer's failure is no reason to lose the row, nor a row's to lose the run
            left_out[peer.name] = short(e)
        else:
            ran[peer.name] = peer
            continue
        recover()
        if peer is ours:
            return replace(made, left_out=left_out)
    rounds, seconds = options.pace
    pace = {"rounds": rounds, "seconds": seconds, "settle": here.settle, "most_calls": here.most_calls}
    times = None
    while times is None:
        try:
            times = measure.interleaved(subjects, **pace)
        except measure.PeerFailed as e:
            del subjects[e.peer]
            left_out[e.peer] = str(e)
        if times is None:
            recover()
        if times is None and OURS in left_out:
            return replace(made, left_out=left_out)
    found.sample(levels={"L2", made.level} if made.bytes_read else {"L2"})
    over = measure.ratios(times, OURS)
    timings = {}
    for name, each in times.items():
        t, r = measure.spread(each), over.get(name)
        ratio = (r.median, r.p20, r.p80) if r else (None, None, None)
        timings[name] = Timing(t.median, t.p20, t.p80, *ratio, ran[name].first_call, ran[name].peak_bytes)
    rounds = len(times[OURS])
    return replace(made, timings=timings, backend=backend, rounds=rounds, left_out=left_out)


def which_backend(row: Row, mode: str, here: Place) -> str:
    """The backends that seqkern runs a row on."""
    model, inputs = here.build(row)
    with torch.set_grad_enabled(mode != INFERENCE), here.kernels():
        ours = row.ours(model).train(mode != INFERENCE)
        # As a function: a module is followed by wrapping its forwards, which `generate` refuses.
        found = explain(lambda *given: ours(*given), *inputs).rows
    return ", ".join(sorted({each.backend for each in found})) or TORCH


def wanted_peers(options: Options, here: Place, console: Console) -> list[Peer]:
    """The peers that are there, of those that some row asks for."""
    asked = {name for row, mode in options.work() for name in row.rivals(mode)}
    found = []
    for name in options.peers:
        if name not in asked:
            continue
        if reason := PEERS[name].missing():
            console.print(Text(reason, "yellow"))
        else:
            found.append(PEERS[name](torch.get_num_threads(), here))
    return found


def run(options: Options, here: Place, output: Path, console: Console) -> tuple[Path, list[str]]:
    """Times every row wanted and appends the results. Returns their file and the rows that failed."""
    about = {
        "machine": here.machine(),
        "versions": here.versions(),
        "commit": record.commit(),
        "run": record.now(),
    }
    path = output / f"{options.suite}-{record.kind(about['machine'])}.jsonl"
    ours, peers = Ours(torch.get_num_threads(), here), wanted_peers(options, here, console)
    kept = record.read(path) if path.exists() else []  # also to find now what could not be read afterwards
    done = {each.key for each in kept} if options.resume else set()
    work = [(row, mode) for row, mode in options.work() if (row.name, mode) not in done]
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    made: list[Record] = []
    found = limits.Limits()
    settled = isinstance(
        here, place.Gpu
    )  # its limits are measured once, so each row can be written as it comes
    try:
        with Progress(*parts, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("limits of this machine", total=len(work))
            found = here.limits()
            for row, mode in work:
                progress.update(bar, description=f"{row.name}, {mode}")
                lost = None
                try:
                    with here.rounding(row.dtype):
                        each = run_row(row, mode, ours, peers, found, options, about)
                except DeviceLost as e:
                    if e.row is None:
                        raise
                    each, lost = e.row, e
                made.append(each)
                if settled:
                    record.append(path, [each.held_against(found)])
                if lost is not None:
                    raise lost
                if not console.is_terminal and row.probed | settled:  # where no bar is seen to move
                    console.print(Text(tables.line(each)))
                progress.advance(bar)
            longer = SUITES[options.suite].again
            missed = [i for i, each in enumerate(made) if longer and not settled and each.verdict == "missed"]
            progress.update(bar, total=len(work) + len(missed))
            for i in missed:  # a neighbour's burst outlasts a short row's turns
                row, mode = work[i]
                progress.update(bar, description=f"{row.name} again")
                pace = replace(options, seconds=options.seconds or longer)
                with here.rounding(row.dtype):
                    each = run_row(row, mode, ours, peers, found, pace, about)
                if each.ratios:
                    made[i] = each
                progress.advance(bar)
    finally:  # also after an interrupt: what was measured is kept
        for peer in peers:
            peer.close()
        made = [each.held_against(found) for each in made]
        if not settled:
            record.append(path, made)
    for table in tables.terminal(record.timed(made)):
        console.print(table)
    if made:
        console.print(Text(tables.machine_line(made)))
    for each in made:
        for name, reason in each.left_out.items():
            if name != OURS:
                label = SUBJECTS[name].label
                console.print(Text(f"{each.name}, {each.mode}: {label} is left out: {reason}", "yellow"))
    return path, [f"{each.name}, {each.mode}: {each.failure}" for each in made if each.failure]


def publish(paths: Sequence[Path], suite: str, page: Path, front: Path) -> list[Path]:
    """Draws the pictures of a suite's results files and renews its tables: all of them on one page, and what they
    come to on the front one. Returns the pictures' paths."""
    found = [(record.latest(record.read(path)), path) for path in paths]
    drawn = [pictures.draw(records, path) for records, path in found]
    for where, told in ((page, tables.page), (front, tables.short)):
        shown = [
            {said: os.path.relpath(each, where.parent) for said, each in of_one.items()} for of_one in drawn
        ]
        tables.put(where, f"bench:{suite}", told([(records, of) for (records, _), of in zip(found, shown)]))
    return [each for of_one in drawn for each in of_one.values()]


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Has SIGTERM, a scheduler's or a container's, unwind as an interrupt does, so that what was measured is kept."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(options: Options, output: Path | None = None, console: Console | None = None) -> int:
    """Runs a suite and writes its results and picture into ``output``. Returns the exit code: 1 where a kernel
    failed the gate or broke down, `LOST` where its device then answered no more.

    Raises ValueError for options that make no sense and for a folder that cannot be written, before anything runs.
    """
    options.check()
    here = place.found(options.device or SUITES[options.suite].device)
    output = report.writable(output or record.default_folder())
    console = console or Console()
    if not console.is_terminal:
        console.width = max(WIDTH, console.width)
    start = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        with testing.without_torchs_warnings(), ended_in_order():
            path, failed = run(options, here, output, console)
    except DeviceLost as e:
        console.print(Text(f"{options.suite} stopped: {e}", "bold red"))
        return LOST
    for each in failed:
        console.print(Text(f"no figure: {each}", "bold red"))
    if path.exists():
        console.print(Text(f"results: {path}"))
        for picture in pictures.draw(record.latest(record.read(path)), path).values():
            console.print(Text(f"picture: {picture}"))
        if pictures.missing():
            console.print(Text(pictures.missing()))
    console.print(Text(f"{options.suite} took {time.perf_counter() - start:.0f} s"))
    return 1 if failed else 0

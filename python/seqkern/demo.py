"""Trains a character language model twice from one seed, on torch and accelerated, and shows both side by side."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from seqkern import charmodel, report
from seqkern.charmodel import CharModel, Corpus, Training
from seqkern.explanation import Explanation, explain
from seqkern.ops import _library
from seqkern.swap import accelerate

BLOCK = 10  # steps of one run before the other's turn, so that a noisy machine slows both alike
SAMPLE = 400
SECONDS = 180  # of training, all cells together, beyond which the run stops early
COLOURS = {"torch": "#e8a33d", "seqkern": "#1f4e9c"}


@dataclass
class Result:
    """Both runs of one cell."""

    cell: str
    torch: Training
    seqkern: Training
    held_out: tuple[float, float]  #: torch, seqkern
    writing: tuple[float, float]  #: seconds to write the sample: torch, seqkern
    sample: str  #: from the accelerated model
    backends: Explanation

    @property
    def ratio(self) -> float:
        return self.torch.seconds[-1] / self.seqkern.seconds[-1]

    @property
    def largest_gap(self) -> float:
        return max(abs(a - b) for a, b in zip(self.torch.losses, self.seqkern.losses, strict=True))

    @property
    def backend(self) -> str:
        """Of the recurrent layer."""
        return ", ".join(sorted({row.backend for row in self.backends.rows if row.name == "recurrent"}))


def smooth(values: list[float]) -> list[float]:
    """Exponential mean over about 20 steps, corrected for its start: the noise of single batches taken out."""
    found, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean += (value - mean) * 0.05
        found.append(mean / (1 - 0.95**i))
    return found


def train(
    cell: str,
    corpus: Corpus,
    *,
    steps: int,
    hidden: int = 256,
    batch: int = 32,
    length: int = 64,
    seed: int = 0,
    until: float = float("inf"),
    advance: Callable[[Training, Training], Any] = lambda theirs, ours: None,
) -> Result:
    """Trains one cell on torch and accelerated, in alternating blocks of steps, from the same seed.

    It stops early at ``until`` on `time.monotonic`'s clock, with as many steps in both runs. ``advance`` is called
    after each block of both.
    """

    def build() -> CharModel:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return CharModel(cell, len(corpus.characters), hidden)

    def fresh(model: CharModel) -> Training:
        return Training(model, corpus.batches(batch, length, seed))

    for model in (build(), accelerate(build())):  # the first calls of a process pay for what later ones find
        fresh(model).run(2)
    theirs, ours = fresh(build()), fresh(accelerate(build()))
    order = [theirs, ours]
    while len(ours.losses) < steps and (not ours.losses or time.monotonic() < until):
        for run in order:
            run.run(min(BLOCK, steps - len(run.losses)))
        order.reverse()
        advance(theirs, ours)
    numbers, _ = next(corpus.batches(batch, length, seed))
    backends = explain(ours.model, numbers)
    written, texts = [], []
    for run in (theirs, ours):
        start = time.perf_counter()
        texts.append(charmodel.generate(run.model, corpus, "The ", SAMPLE, seed))
        written.append(time.perf_counter() - start)
    held_out = tuple(charmodel.held_out_loss(run.model, corpus) for run in (theirs, ours))
    return Result(cell, theirs, ours, held_out, (written[0], written[1]), texts[1], backends)  # type: ignore[arg-type]


def table(results: list[Result]):
    """A column for each cell, a line for each figure."""
    lines: dict[str, Callable[[Result], str]] = {
        "backend": lambda each: each.backend,
        "training, torch": lambda each: f"{each.torch.seconds[-1]:.1f} s",
        "training, seqkern": lambda each: f"{each.seqkern.seconds[-1]:.1f} s",
        "ratio": lambda each: f"{each.ratio:.2f}x",
        "loss, torch": lambda each: f"{smooth(each.torch.losses)[-1]:.4f}",
        "loss, seqkern": lambda each: f"{smooth(each.seqkern.losses)[-1]:.4f}",
        "largest gap of a step": lambda each: f"{each.largest_gap:.1e}",
        "held-out loss, torch": lambda each: f"{each.held_out[0]:.3f}",
        "held-out loss, seqkern": lambda each: f"{each.held_out[1]:.3f}",
        "writing, torch": lambda each: f"{each.writing[0]:.2f} s",
        "writing, seqkern": lambda each: f"{each.writing[1]:.2f} s",
    }
    rows = [(name, *map(show, results)) for name, show in lines.items()]
    steps = {len(each.torch.losses) for each in results}
    if len(steps) > 1:
        rows.insert(1, ("steps", *(str(len(each.torch.losses)) for each in results)))
    columns = ["", *(each.cell for each in results)]
    what = f"{steps.pop()} steps of training" if len(steps) == 1 else "Training"
    return report.table(f"{what}, same seed, same text", columns, rows, range(1, len(columns)))


def draw(results: list[Result], path: Path) -> None:
    """Loss over steps and over seconds, both runs in both panels, a row for each cell.

    Raises ModuleNotFoundError where matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.8 + 3.1 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, each in zip(figure.subplots(len(results), 2, squeeze=False), results, strict=True):
        runs = {"torch": each.torch, "seqkern": each.seqkern}
        for panel, over in zip(row, ("steps", "seconds"), strict=True):
            for name, run in runs.items():
                x = run.seconds if over == "seconds" else list(range(1, len(run.losses) + 1))
                wide = name == "torch" and over == "steps"  # below the other curve, which lies on it
                label = f"{name}, {run.seconds[-1]:.1f} s" if over == "seconds" else name
                y = smooth(run.losses)
                panel.plot(x, y, color=COLOURS[name], linewidth=6 if wide else 2, label=label)
                if over == "seconds":
                    panel.plot(x[-1], y[-1], "o", color=COLOURS[name], markersize=7)
            panel.set(
                xlabel=over if over == "steps" else "seconds of training", ylabel="loss, nats per character"
            )
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False)
        row[0].set_title(f"{each.cell.upper()}: largest difference of a step's loss {each.largest_gap:.1e}")
        row[1].set_title(
            f"{each.cell.upper()}: torch / seqkern = {each.ratio:.2f}x  (backend {each.backend})"
        )
        row[1].set_xlim(left=0)
    figure.suptitle("A character language model, trained from one seed on torch and on seqkern")
    figure.savefig(path, dpi=110)


def main(
    cell: str = "all",
    *,
    steps: int = 600,
    output: Path = Path("demo"),
    text: Path | None = None,
    seed: int = 0,
    hidden: int = 256,
    batch: int = 32,
    length: int = 64,
    console: Console | None = None,
) -> int:
    """Runs the demo and writes ``loss.png`` into ``output``. Returns the exit code.

    Raises:
        ValueError: an unknown cell, no steps, a text that cannot be read, an output folder that cannot be
            written; all before anything is trained.
    """
    if cell != "all" and cell not in charmodel.CELLS:
        raise ValueError(f"cell is {cell!r}, expected one of {', '.join(charmodel.CELLS)}, all")
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    output = report.writable(Path(output))
    corpus = Corpus(charmodel.read_text(text))
    console = console or Console()
    cells = list(charmodel.CELLS) if cell == "all" else [cell]
    size = len(corpus.train) + len(corpus.held_out)
    console.print(
        f"text: {size} characters, {len(corpus.characters)} different; {text or 'pydoc_data.topics'}"
    )
    console.print(f"model: torch.nn, {hidden} hidden units; batches of {batch} x {length} characters")
    if _library.native() is None:
        console.print(
            Text(f"compiled kernels are missing, torch's run in both: {_library.why_missing()}", "yellow")
        )
    end, results = time.monotonic() + SECONDS, []
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*parts, TextColumn("{task.fields[losses]}"), console=console) as progress:
        bars = [progress.add_task(each, total=steps, start=False, losses="") for each in cells]
        for each, bar in zip(cells, bars, strict=True):
            progress.start_task(bar)

            def advance(theirs: Training, ours: Training, bar=bar) -> None:
                losses = f"loss torch {theirs.losses[-1]:.3f}, seqkern {ours.losses[-1]:.3f}"
                progress.update(bar, completed=len(ours.losses), losses=losses)

            now = time.monotonic()
            until = now + (end - now) / (len(cells) - len(results))  # what is left, shared out
            options = {"hidden": hidden, "batch": batch, "length": length, "seed": seed}
            results.append(train(each, corpus, steps=steps, until=until, advance=advance, **options))
    console.print(table(results))
    if any(len(each.torch.losses) < steps for each in results):
        console.print(Text(f"stopped after {SECONDS} seconds, before {steps} steps", "yellow"))
    for each in results:
        console.print(each.backends)
    best = min(results, key=lambda each: each.held_out[1])
    console.print(Text(f"\nwritten by the accelerated {best.cell}:", "bold"))
    console.print(Text(best.sample.encode(console.encoding, "replace").decode(console.encoding)))
    picture = output / "loss.png"
    try:
        draw(results, picture)
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] != "matplotlib":
            raise
        console.print(Text("no picture: matplotlib is missing; pip install 'seqkern[demo]'", "yellow"))
    else:
        console.print(Text(f"\npicture: {picture.resolve()}"))
    return 0

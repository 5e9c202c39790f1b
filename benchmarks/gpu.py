"""The parts of gpu.sh that are Python.

    gpu.py check | bench SUITE FOLDER [TEXT] | tune FOLDER | summary FOLDER

They need no package beyond torch, Triton and rich.
"""

import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from seqkern import report, tune
from seqkern.bench import record, run, tables
from seqkern.bench.targets import best_ratio

WIDTH = 120
# What the suites' first rows run on: plain attention, decoding for eight query heads to a key head, two layers.
TUNED = (
    *(tune.Attention("bfloat16", D) for D in (128, 64)),
    *(tune.Decode("bfloat16", D) for D in (128, 64)),
    *(tune.Recurrent("lstm", "bfloat16", H, 16) for H in (128, 768)),
)


def check() -> int:
    if reason := tune.why_not():
        print(f"gpu.sh: {reason.replace('nothing was timed', 'nothing was run')}", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    return 0


def bench(suite: str, folder: str, only: str = "") -> int:
    """A suite; the rows that the folder's results have already are left out."""
    return run.main(run.Options(suite, only=only, resume=True), Path(folder), Console(width=WIDTH))


def tuned(folder: str) -> int:
    """The choices for a few calls, kept in the folder; a stop loses but the kernel that is being timed."""
    tune.tune(TUNED, path=Path(folder) / "tuning.json", say=lambda line: print(line, flush=True))
    return 0


def summary(folder: str) -> int:
    """A line for each group of rows and mode, and what failed."""
    console = Console(width=WIDTH)
    for path in sorted(Path(folder).glob("*-cuda-*.jsonl")):
        found = record.latest(record.read(path))
        rows = []
        for group, mode in dict.fromkeys((each.group, each.mode) for each in found):
            here = [each for each in found if (each.group, each.mode) == (group, mode)]
            timed = record.timed(here)
            best = [ratio for each in timed if (ratio := best_ratio(each.ratios)) is not None]
            verdicts = [each.verdict for each in timed]
            rows.append(
                (
                    group,
                    mode,
                    len(here),
                    tables.times(min(best, default=None)),
                    tables.times(statistics.median(best) if best else None),
                    tables.times(max(best, default=None)),
                    tables.share(max((each.share_of_peak or 0.0 for each in timed), default=0.0)),
                    sum(each.startswith("met") for each in verdicts),
                    sum(each.startswith("missed") for each in verdicts),
                    len(here) - len(timed),
                )
            )
        columns = ["group", "mode", "rows", "least", "median", "most", "of peak", "met", "missed", "failed"]
        title = f"{found[0].suite}: the best peer's time over seqkern's; targets" if found else path.name
        console.print(report.table(title, columns, rows, range(2, 10), tight=True))
        for each in found:
            if each.failure:
                console.print(Text(f"{each.name}, {each.mode}: {each.failure}"))
    return 0


COMMANDS = {"check": check, "bench": bench, "tune": tuned, "summary": summary}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    sys.exit(COMMANDS[sys.argv[1]](*sys.argv[2:]))

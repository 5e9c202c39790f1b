"""Results as lines of JSON: one for each row and mode of a run, appended to a file for each suite and machine."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import seqkern
from seqkern.bench.ceilings import Ceilings
from seqkern.bench.limits import Limits
from seqkern.bench.rows import FLOP, OURS, TERAFLOP
from seqkern.bench.targets import Target, judge
from seqkern.ops import _library

ROOT = Path(seqkern.__file__).resolve().parents[2]  # of the checkout, where the package runs from one


@dataclass(frozen=True)
class Timing:
    """One subject of a row: seconds of a call, and the ratio of them to seqkern's (None for seqkern itself)."""

    median: float
    p20: float
    p80: float
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    first_call: float | None = None  #: seconds
    peak_bytes: int | None = None  #: of a call, beyond inputs and weights


@dataclass(frozen=True)
class Record:
    """One row in one mode."""

    suite: str
    name: str
    group: str
    mode: str
    dtype: str
    flop: float  #: of a call
    timings: dict[str, Timing]  #: by subject
    backend: str  #: which of seqkern's ran
    target: Target | None
    run: str  #: when the run began, the same for all of its records
    rounds: int
    threads: int
    unit: str = FLOP  #: what the speed is told in
    amount: float | None = None  #: how much of the unit, per second, a call is; None for its GFLOP
    sizes: dict[str, int] = field(default_factory=dict)  #: what is drawn over
    bytes_read: float | None = None  #: that a call must read, where that is the limit
    level: str = "L2"  #: where they lie
    share_of_peak: float | None = None
    share_of_read: float | None = None  #: of the level's bandwidth
    fma_peak: float | None = None  #: GF/s, the highest that the run saw
    bandwidth: dict[str, float] = field(default_factory=dict)  #: GB/s read from each level, likewise
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""  #: of the checkout, with a + where files had been changed; empty elsewhere
    peaks: dict[str, float] = field(
        default_factory=dict
    )  #: GF/s of torch's own large matmul on a GPU, by dtype
    left_out: dict[str, str] = field(default_factory=dict)  #: subjects without a timing, and why

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.mode

    @property
    def failure(self) -> str:
        """Why seqkern itself has no figure; empty where it has one."""
        return self.left_out.get(OURS, "")

    @property
    def ratios(self) -> dict[str, float]:
        return {name: each.ratio for name, each in self.timings.items() if each.ratio is not None}

    @property
    def verdict(self) -> str:
        return judge(self.target, self.ratios, self.share_of_peak, self.share_of_read)

    @property
    def limit(self) -> float | None:
        """The speed, in the record's unit, that the machine would allow; None where it was not measured."""
        if self.bytes_read is not None and self.unit != FLOP:
            read = self.bandwidth.get(self.level)
            return read and read * 1e9 * self._amount / self.bytes_read
        if self.unit == TERAFLOP:
            return self.peaks[self.dtype] / 1e3 if self.dtype in self.peaks else None
        return self.fma_peak if self.unit == FLOP and self.dtype == "float32" else None

    def held_against(self, found: Limits | Ceilings) -> "Record":
        """The record with a run's limits and its shares of them."""
        limits: dict[str, Any] = {"fma_peak": found.fma_peak, "bandwidth": dict(found.bandwidth)}
        if isinstance(found, Ceilings):
            limits["peaks"] = dict(found.peaks)
        if not self.failure:
            own = self.timings[OURS].median
            limits["share_of_peak"] = found.share_of_peak(self.flop, own, self.dtype)
            limits["share_of_read"] = found.share_of_read(self.bytes_read, own, self.level)
        return dataclasses.replace(self, **limits)

    @property
    def _amount(self) -> float:
        return self.flop / 1e9 if self.amount is None else self.amount

    def speed(self, subject: str) -> float | None:
        """In the record's unit; None where the subject was not timed."""
        return self._amount / self.timings[subject].median if subject in self.timings else None


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """The processor and what is used of it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    told = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*: (.*)$", text, re.MULTILINE))
    native = _library.native()
    return {
        "cpu": told.get("model name", platform.processor() or platform.machine()),
        "family": "-".join(told[key] for key in ("cpu family", "model", "stepping") if key in told),
        "cores": len(_allowed_cores()),
        "isa": native.isa() if native else "",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # threads wanting to run
        "system": f"{platform.system()} {platform.machine()}",
    }


def _allowed_cores() -> list[int]:
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )


# AMD's cores by family and the model's upper digit in base 16: the model name of a cloud machine tells neither.
_AMD = {(25, 0): "Zen 3", (25, 1): "Zen 4", (26, 0): "Zen 5", (26, 1): "Zen 5"}


def _generation(machine: dict[str, Any]) -> str:
    """What the cores are called whose name does not tell; empty where it is not known."""
    numbers = [int(each) for each in machine["family"].split("-") if each]
    known = machine["cpu"].startswith("AMD") and len(numbers) > 1
    return _AMD.get((numbers[0], numbers[1] // 16), "") if known else ""


def title(machine: dict[str, Any]) -> str:
    """What a table or picture calls the machine: its GPU where that was measured."""
    return machine.get("gpu") or " ".join(
        filter(None, (machine["cpu"], _generation(machine), machine["isa"]))
    )


def kind(machine: dict[str, Any]) -> str:
    """A name of the kind of machine for a file."""
    words = f"{machine['cpu']} {machine['family']} {machine['cores']}c {machine['isa']}"
    words = str(machine.get("gpu", words)).lower()
    return "-".join(re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)", "", words)))


def versions() -> dict[str, str]:
    found = {"seqkern": seqkern.__version__, "torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["onnxruntime"] = importlib.metadata.version("onnxruntime")
    return found


def commit(root: Path = ROOT) -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (root / ".git").exists():
        return ""
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except OSError:  # no git
        return ""


def in_checkout(root: Path = ROOT) -> bool:
    return (root / "pyproject.toml").is_file() and (root / "benchmarks").is_dir()


def default_folder() -> Path:
    return ROOT / "benchmarks" / "results" if in_checkout() else Path("seqkern-bench")


def append(path: Path, records: Sequence[Record]) -> None:
    if not records:
        return
    with path.open("a+b") as before:
        cut = before.tell() and (before.seek(-1, os.SEEK_END), before.read(1))[1] != b"\n"
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" if cut else "")
        file.writelines(json.dumps(dataclasses.asdict(each)) + "\n" for each in records)


def read(path: Path) -> list[Record]:
    """Every record of a file, in order. Raises ValueError where a line is none."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            told = json.loads(line)
            told["timings"] = {name: Timing(**each) for name, each in told["timings"].items()}
            told["target"] = told["target"] and Target(**told["target"])
            found.append(Record(**told))
        except (ValueError, TypeError, KeyError) as e:
            raise ValueError(
                f"{path}, line {number} is not a result: {e}; remove the line, or the file"
            ) from e
    return found


def latest(records: list[Record]) -> list[Record]:
    """The last record of each row and mode, in the order in which they first came."""
    return list({record.key: record for record in records}.values())


def timed(records: Sequence[Record]) -> list[Record]:
    """Those with a figure of seqkern's own."""
    return [record for record in records if not record.failure]


def published(folder: Path, suite: str) -> list[Path]:
    """The suite's files, one of each machine, the one with the newest run first."""
    found = [(read(path)[-1], path) for path in folder.glob(f"{suite}-*.jsonl") if path.stat().st_size]
    mine = [(last.run, path) for last, path in found if last.suite == suite]
    return [path for _, path in sorted(mine, reverse=True)]

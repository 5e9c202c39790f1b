"""The machine's limits, measured in the run whose figures they are held against."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from seqkern.ops import _library

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
SHARED_CACHE = 16 << 20  # bytes of a last-level cache that one process can count on
MEMORY = 512 << 20  # bytes, beyond any last-level cache that one process has to itself


def caches(room: Path = CACHES) -> dict[int, int]:
    """Bytes of the data caches that one core sees, by level; empty where the system does not tell."""
    found = {}
    for index in sorted(room.glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            size = re.fullmatch(r"(\d+)([KM])", (index / "size").read_text().strip())
            level = int((index / "level").read_text())
        except (OSError, ValueError):
            continue
        if size and kind != "Instruction":
            found[level] = int(size[1]) << (10 if size[2] == "K" else 20)
    return found


def working_sets(sizes: Mapping[int, int], threads: int) -> dict[str, int]:
    """For each level the bytes that all threads together read: half of it, and more than the level before holds.

    Of a third level that many cores share, as those of cloud machines, little can be counted on: ``SHARED_CACHE``, or
    four times the level before.
    """
    found = {}
    if 2 in sizes:
        found["L2"] = threads * sizes[2] // 2
    if 3 in sizes and sizes[3] // 2 > 2 * threads * sizes.get(2, 0):
        found["L3"] = min(sizes[3] // 2, max(SHARED_CACHE, 4 * threads * sizes.get(2, 0)))
    return found | {"memory": max(MEMORY, 4 * sizes.get(3, 0)) if sizes.get(3, 0) <= MEMORY // 2 else MEMORY}


@dataclass
class Limits:
    """GFLOP/s of float32 multiply-adds and GB/s read; empty without compiled kernels, whose probes these are."""

    fma_peak: float | None = None
    bandwidth: dict[str, float] = field(default_factory=dict)
    sets: dict[str, int] = field(default_factory=dict)  #: bytes that are read for each bandwidth
    rooms: dict[str, int] = field(default_factory=dict)  #: bytes of a level, or twice its set

    def sample(self, seconds: float = 0.05, levels: Iterable[str] = ("L2",)) -> None:
        """Measures once more and keeps the highest: what a busy machine shows is no limit."""
        if (native := _library.native()) is None:
            return
        self.fma_peak = max(self.fma_peak or 0.0, native.fma_peak(seconds))
        for level in self.sets.keys() & set(levels):
            here = native.read_bandwidth(self.sets[level], seconds)
            self.bandwidth[level] = max(self.bandwidth.get(level, 0.0), here)

    def share_of_peak(self, flop: float, seconds: float, dtype: str) -> float | None:
        """None for other dtypes than float32, whose peak is another one."""
        if self.fma_peak is None or dtype != "float32":
            return None
        return flop / seconds / 1e9 / self.fma_peak

    def level(self, held: float | None) -> str:
        """The nearest level that may have room for so many bytes; the cores' own, L2, where None."""
        if held is None:
            return "L2"
        room = {name: self.rooms.get(name, 2 * size) for name, size in self.sets.items() if name != "memory"}
        return next((name for name, size in room.items() if held <= size), "memory")

    def share_of_read(self, size: float | None, seconds: float, level: str) -> float | None:
        """Of the bandwidth of a level, by reading so many bytes."""
        if size is None or level not in self.bandwidth:
            return None
        return size / seconds / 1e9 / self.bandwidth[level]


def measure(seconds: float = 0.2) -> Limits:
    native = _library.native()
    found = Limits()
    if native:
        sizes = caches()
        found.sets = working_sets(sizes, native.num_threads())
        found.rooms = {"L3": sizes[3]} if "L3" in found.sets else {}
    for _ in range(3):
        found.sample(seconds, found.sets)
    found.bandwidth = {level: found.bandwidth[level] for level in found.sets if level in found.bandwidth}
    return found

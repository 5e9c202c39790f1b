"""A GPU's limits, measured in the run whose figures they are held against: large matmuls and a large copy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from seqkern.bench.measure import Timed

MATMUL = 8192  # rows, columns and depth
COPIED = 2 << 30  # bytes, far beyond any L2
CALLS, TRIES = 5, 3
TYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


@dataclass
class Ceilings:
    """GFLOP/s of torch's matmul by dtype, and GB/s of a copy, read and written; as `limits.Limits` of a processor."""

    peaks: dict[str, float] = field(default_factory=dict)
    bandwidth: dict[str, float] = field(default_factory=dict)
    fma_peak: None = None

    def sample(self, seconds: float = 0.0, levels: Iterable[str] = ()) -> None:
        """Nothing: no other program makes a GPU show less than it can, as it does a processor."""

    def share_of_peak(self, flop: float, seconds: float, dtype: str) -> float | None:
        return flop / seconds / 1e9 / self.peaks[dtype] if dtype in self.peaks else None

    def level(self, held: float | None) -> str:
        return "memory"

    def share_of_read(self, size: float | None, seconds: float, level: str) -> float | None:
        if size is None or level not in self.bandwidth:
            return None
        return size / seconds / 1e9 / self.bandwidth[level]


def measure(
    device: str,
    timer: Callable[[Callable[[], object]], Timed],
    matmul: int = MATMUL,
    copied: int = COPIED,
) -> Ceilings:
    """The highest of a few tries, on random numbers: zeros would run faster than any data."""

    def least(call: Callable[[], object]) -> float:
        run = timer(call)
        run(1)
        return min(run(CALLS) / CALLS for _ in range(TRIES))

    found = Ceilings()
    before = torch.get_float32_matmul_precision()
    try:
        for name, dtype in TYPES.items():
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            a, b = (torch.randn(matmul, matmul, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            seconds = least(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
            found.peaks[name] = 2.0 * matmul**3 / seconds / 1e9
    finally:
        torch.set_float32_matmul_precision(before)
    source = torch.randint(-100, 100, (copied // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    found.bandwidth["memory"] = 2.0 * copied / least(lambda: target.copy_(source)) / 1e9
    return found

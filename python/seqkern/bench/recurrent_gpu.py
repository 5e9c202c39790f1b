"""The suite ``rnn-cuda``: recurrent layers as they are used on GPUs, where cuDNN is the peer."""

from dataclasses import dataclass
from typing import Any

from seqkern.bench.recurrent import RecurrentRow
from seqkern.bench.rows import LOOP, TERAFLOP, TORCH
from seqkern.bench.targets import Target

ON_CHIP, STEPS, PACKED, GRAPHED = "on chip", "steps", "packed", "graphed"
KINDS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "tf32"}
LOOPED = 256  # steps of the rows that a loop over cells is timed on, which takes 0.5 ms a step in training


@dataclass(frozen=True)
class GpuRecurrentRow(RecurrentRow):
    """A layer against torch's, which is cuDNN's, and, in graphs, against a loop over torch's cells."""

    suite = "rnn-cuda"
    probed = False

    @property
    def unit(self) -> str:
        return TERAFLOP

    def rivals(self, mode: str) -> frozenset[str]:
        looped = self.group in (STEPS, GRAPHED) and self.T <= LOOPED and not self.packed
        return frozenset({TORCH, *([LOOP] if looped else [])})

    def bytes_read(self, mode: str) -> float | None:
        return None  # on a GPU what takes the time of a step is not known to be that

    def target(self, mode: str) -> Target | None:
        if self.group == ON_CHIP:
            return Target(1.0, TORCH)
        if self.group == PACKED:
            return Target(2.0, TORCH)
        return Target(5.0, LOOP) if LOOP in self.rivals(mode) else None


def rows() -> tuple[GpuRecurrentRow, ...]:
    def row(group: str, module: str, B: int, T: int, H: int, dtype: str = "bfloat16", **more: Any):
        words = [
            KINDS[dtype],
            "packed" if more.get("packed") else "",
            "graph of" if more.get("graphed") else "",
        ]
        layers = f"{more['layers']}x bi-" if more.get("bidirectional") else ""
        name = f"{' '.join(filter(None, words))} {layers}{module} {B},{T},{H},{H}"
        return GpuRecurrentRow(name, group, dtype, module, B, T, H, H, **more)

    modules = ("LSTM", "GRU", "RNN")
    found = [row(ON_CHIP, module, 16, 1024, H) for module in modules for H in (64, 128)]
    found += [row(ON_CHIP, module, B, 512, 128) for module in ("LSTM", "GRU") for B in (1, 256)]
    found.append(row(ON_CHIP, "LSTM", 16, 1024, 128, "float16"))
    # 16,1024,768: the shape of the peers' published figures.
    found += [row(STEPS, "LSTM", 16, 1024, 768, dtype) for dtype in KINDS]
    found += [row(STEPS, module, 16, 1024, 768) for module in ("GRU", "RNN")]
    found += [row(STEPS, module, 16, LOOPED, 768) for module in modules]
    found += [row(PACKED, module, 64, 512, 128, packed=True) for module in ("LSTM", "GRU")]
    found.append(row(PACKED, "LSTM", 32, 200, 128, packed=True, layers=2, bidirectional=True))
    # Last: a capture that fails may leave the process in a worse state than it found it.
    found += [row(GRAPHED, module, 16, LOOPED, 768, graphed=True) for module in modules]
    found += [row(GRAPHED, "LSTM", B, LOOPED, 1024, graphed=True) for B in (1, 64)]
    found.append(row(GRAPHED, "LSTM", 1, LOOPED, 128, graphed=True))
    return tuple(found)

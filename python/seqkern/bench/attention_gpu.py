"""The suite ``attention-cuda``: attention as it is used on GPUs, bfloat16 and long."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqkern.bench.attention import DECODE, OPTION, AttentionRow
from seqkern.bench.attention_models import BySeqkern, ByTorch
from seqkern.bench.rows import (
    BACKWARD,
    BYTES,
    CUDNN,
    EFFICIENT,
    FLASH,
    FLEX,
    INFERENCE,
    MATH,
    PEERS,
    TERAFLOP,
    TORCH,
    VARLEN,
)
from seqkern.bench.targets import PLAIN, Target

TOKENS = 16384  # of a row: the batch shrinks as the length grows
WIDTH = 2048  # of all heads together
LENGTHS = (2048, 4096, 8192, 16384)
FOR_MATH = 2048  # the longest that torch's unfused kernel is given, which holds all weights
FLEXIBLE = ("", "softcap", "window")
# Of the time without it, an option may take so much, and be no slower than what torch runs for it.
MOST = 1.3
COPIED = 0.85  # of the rate of a copy, which decoding is to reach
FORWARD_OF_BEST, BACKWARD_OF_BEST = 0.9, 0.8  # of the best kernel that torch has, by the kernels for Hopper


@dataclass(frozen=True)
class GpuAttentionRow(AttentionRow):
    """A row whose gate looks at the heads of the first and the last group: all would not fit into memory in float64."""

    suite = "attention-cuda"
    probed = False
    partly_judged = True

    @property
    def modes(self) -> tuple[str, ...]:
        return (INFERENCE,) if self.group == DECODE else (INFERENCE, BACKWARD)

    @property
    def unit(self) -> str:
        return BYTES if self.group == DECODE else TERAFLOP

    def kv_heads(self) -> list[int]:
        """Of the groups that are judged; the mask of dropout is drawn by the number of a head, so there the first."""
        last = self.shape.kv - 1
        return [0] if self.option == "dropout" or last == 0 else [0, last]

    def heads(self) -> list[int]:
        each = self.shape.H // self.shape.kv
        return [h * each + i for h in self.kv_heads() for i in range(each)]

    def judged(self, name: str, result: Tensor) -> Tensor:
        heads = self.kv_heads() if name in ("d input1", "d input2") else self.heads()
        dim = 0 if name == "d input3" else 1  # a bias is [H, L, S]
        return result.index_select(dim, torch.tensor(heads, device=result.device))

    def oracle(self) -> tuple[nn.Module, tuple[Any, ...]]:
        model, inputs = super().build()
        assert isinstance(model, ByTorch)
        few = tuple(self.judged(f"d input{i}", x) for i, x in enumerate(inputs))
        asked = model.asked.of_heads(self.heads())
        return (BySeqkern(asked, "reference") if self.option == "dropout" else ByTorch(asked)), few

    def rivals(self, mode: str) -> frozenset[str]:
        found = {TORCH}
        if self.option:
            found |= {PLAIN, *([VARLEN] if self.option == "varlen" else [])}
        else:
            found |= {CUDNN, FLASH}
        if self.group == PEERS:
            found |= {EFFICIENT, *([MATH] if self.L <= FOR_MATH else [])}
        if self.flex and self.option in FLEXIBLE:
            found.add(FLEX)
        return frozenset(found)

    def target(self, mode: str) -> Target | None:
        if self.group == DECODE:
            return Target(None, read=COPIED)
        if self.group == OPTION:
            allowed = self.forward_flop() / self.plain().forward_flop() * MOST
            return Target(1 / allowed, PLAIN, and_best=1.0)
        return Target(BACKWARD_OF_BEST if mode == BACKWARD else FORWARD_OF_BEST)


def rows() -> tuple[GpuAttentionRow, ...]:
    def row(group: str, L: int, D: int, **more: Any) -> GpuAttentionRow:
        B, H = more.pop("B", TOKENS // L), WIDTH // D
        words = [more.get("option", ""), "causal" if more.get("causal") else ""]
        name = " ".join(filter(None, [*words, f"{B},{H},{L},{D}"]))
        return GpuAttentionRow(name, group, "bfloat16", B, H, L, D, **more)

    found = [
        row(PEERS, L, D, causal=causal, flex=(L, D) == (4096, 128))
        for D in (128, 64)
        for L in LENGTHS
        for causal in (True, False)
    ]
    found += [
        row(
            OPTION,
            4096,
            128,
            B=8 if option == "varlen" else 2,
            option=option,
            causal=option in ("window", "varlen"),
            flex=option != "alibi",
        )
        for option in ("mask", "bias", "dropout", "softcap", "alibi", "window", "sinks", "varlen")
    ]
    for B, S in ((64, 2048), (16, 8192), (1, 131072)):  # 537 MB of keys and values and more
        name = f"decode {B},64/8,{S},128"
        found.append(GpuAttentionRow(name, DECODE, "bfloat16", B, 64, 1, 128, S=S, kv=8))
    return tuple(found)

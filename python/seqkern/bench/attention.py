"""The suites ``attention`` and ``sdpa-sweep``: attention on tensors."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from seqkern.bench.attention_models import OPTIONS, WINDOW, Asked, ByDoor, BySeqkern, ByTorch, Sizes
from seqkern.bench.rows import (
    BACKWARD,
    BYTES,
    FLEX,
    FLOP,
    INFERENCE,
    MODES,
    ONNX,
    PEERS,
    TORCH,
    TRAINING,
    Row,
)
from seqkern.bench.targets import PLAIN, Target

ATTENTION_TRAINING_FLOP = 3.5  # two matmuls forward, five backward, which computes the scores again
OPTION, DECODE, LENGTHS, BF16, SWEEP = "options", "decode", "lengths", "bf16", "sweep"
MOST = {"": 1.3, "weights": 1.5}  # times the plain time that an option may take
NOT_IN_ONNX = ("dropout", "weights", "sinks", "varlen")
SLOWEST = 0.95  # of torch's speed, for any call that torch serves
SWEPT = (1, 7, 64, 128, 500, 2048)
SWEPT_HEADS = (8, 32, 64, 80, 128, 256)
SWEPT_BATCHES = ((1, 1, False), (1, 8, False), (1, 8, True), (4, 16, False))  # batch, heads, causal
SWEPT_FLOP = 5e9  # of one call, at most


@dataclass(frozen=True)
class AttentionRow(Row):
    """Attention of query ``[B, H, L, D]`` over key and value ``[B, kv, S, D]``."""

    suite = "attention"

    B: int
    H: int
    L: int
    D: int
    S: int = 0  #: L if 0
    kv: int = 0  #: H if 0
    option: str = ""  #: one of `OPTIONS`
    causal: bool = False
    flex: bool = False  #: also timed against FlexAttention, which takes long to compile

    def __post_init__(self) -> None:
        assert self.option in OPTIONS
        assert self.causal or self.option != "window"

    @property
    def shape(self) -> Sizes:
        return Sizes(self.B, self.H, self.L, self.S or self.L, self.D, self.kv or self.H)

    @property
    def modes(self) -> tuple[str, ...]:
        only_forward = self.group in (DECODE, LENGTHS, SWEEP) or self.option == "weights"
        return (INFERENCE,) if only_forward else MODES

    @property
    def unit(self) -> str:
        return BYTES if self.group == DECODE else FLOP

    def _drawn(self) -> tuple[Asked, tuple[Any, ...]]:
        n = self.shape
        shapes: list[tuple[int, ...]] = [(n.B, n.H, n.L, n.D), *[(n.B, n.kv, n.S, n.D)] * 2]
        if self.option == "varlen":
            shapes = [(sum(n.lengths()), heads, n.D) for heads in (n.H, n.kv, n.kv)]
        if self.option == "bias":
            shapes.append((n.H, n.L, n.S))
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            inputs = tuple(torch.randn(each).to(self.torch_dtype) for each in shapes)
            asked = Asked(n, self.option, self.causal).to(self.torch_dtype)
        return asked, inputs

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        asked, inputs = self._drawn()
        return ByTorch(asked), inputs

    def ours(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, ByTorch)
        return BySeqkern(model.asked)

    def oracle(self) -> tuple[nn.Module, tuple[Any, ...]]:
        model, inputs = self.build()
        # torch draws a dropout mask of its own, which nobody can ask for.
        return (BySeqkern(model.asked, "reference") if self.option == "dropout" else model), inputs  # type: ignore[arg-type]

    def plain(self) -> Row:
        return replace(self, option="")

    def rivals(self, mode: str) -> frozenset[str]:
        found = {TORCH}
        if self.option:
            found.add(PLAIN)
        if mode == INFERENCE and self.dtype == "float32" and self.option not in NOT_IN_ONNX:
            found.add(ONNX)
        if mode == INFERENCE and self.flex:
            found.add(FLEX)
        return frozenset(found)

    def pairs(self) -> float:
        """Queries times the keys that each sees; causal counts as half."""
        n = self.shape
        if self.option == "window":
            return float(sum(min(i + 1, WINDOW) for i in range(n.L)))
        if self.option == "varlen":  # of one sequence, as if all were alike
            return sum(length**2 for length in n.lengths()) / n.B / (2 if self.causal else 1)
        return n.L * n.S / (2 if self.causal else 1)

    def forward_flop(self) -> float:
        return 4.0 * self.B * self.H * self.pairs() * self.D

    def flop(self, mode: str) -> float:
        passes = {TRAINING: ATTENTION_TRAINING_FLOP, BACKWARD: ATTENTION_TRAINING_FLOP - 1}
        return self.forward_flop() * passes.get(mode, 1)

    def amount(self, mode: str) -> float:
        return (self.bytes_read(mode) or 0.0) / 1e9 if self.unit == BYTES else super().amount(mode)

    def bytes_read(self, mode: str) -> float | None:
        n = self.shape
        return 2.0 * n.B * n.kv * n.S * n.D * self.torch_dtype.itemsize if self.group == DECODE else None

    def bytes_held(self, mode: str) -> float | None:
        return self.bytes_read(mode)

    def sizes(self) -> dict[str, int]:
        n = self.shape
        return {"B": n.B, "H": n.H, "L": n.L, "S": n.S, "D": n.D, "causal": int(self.causal)}

    def target(self, mode: str) -> Target | None:
        if self.group == DECODE:
            return Target(None, read=0.8)
        if self.group == BF16:
            return Target(2.0, TORCH)
        if self.group == OPTION:
            allowed = self.forward_flop() / self.plain().forward_flop() * MOST.get(self.option, MOST[""])
            return Target(1 / allowed, PLAIN)
        if self.group != PEERS:
            return None
        if mode == TRAINING:
            return Target(2.2 if self.causal else 1.8, TORCH)
        ratio = (3.5 if self.L == 512 else 2.2) if self.causal else 2.0
        return Target(ratio, TORCH, and_peak=0.62 if self.L >= 512 else None)


@dataclass(frozen=True)
class SweepRow(AttentionRow):
    """A call of torch's own signature, which must not be slower than torch's."""

    suite = "sdpa-sweep"
    probed = False

    def ours(self, model: nn.Module) -> nn.Module:
        return ByDoor(self.causal)

    def rivals(self, mode: str) -> frozenset[str]:
        return frozenset({TORCH})

    def target(self, mode: str) -> Target | None:
        return Target(SLOWEST, TORCH)


def rows() -> tuple[AttentionRow, ...]:
    def row(
        group: str, shape: tuple[int, int, int, int], dtype: str = "float32", **more: Any
    ) -> AttentionRow:
        words = ["bf16" if dtype == "bfloat16" else "", more.get("option", "")]
        words += ["causal"] if more.get("causal") and more.get("option") != "window" else []
        name = " ".join(filter(None, [*words, ",".join(map(str, shape))]))
        return AttentionRow(name, group, dtype, *shape, **more)

    found = []
    for shape in ((1, 8, 512, 64), (2, 8, 2048, 64), (1, 16, 1024, 128)):
        found += [row(PEERS, shape, causal=causal, flex=shape[0] == 2) for causal in (False, True)]
    for option in ("mask", "bias", "dropout", "softcap", "alibi", "weights"):
        found.append(row(OPTION, (4, 8, 512, 64), option=option, flex=option in ("softcap", "alibi")))
    found.append(row(OPTION, (2, 8, 2048, 64), option="window", causal=True, flex=True))
    for shape in ((1, 8, 512, 64), (2, 8, 2048, 64)):
        found += [row(BF16, shape, dtype="bfloat16", causal=causal) for causal in (False, True)]
    for B, H, kv, S, D in (
        (1, 8, 8, 2048, 64),
        (16, 8, 8, 1024, 64),
        (1, 8, 8, 16384, 64),
        (1, 32, 8, 4096, 128),
        (4, 32, 8, 2048, 128),
    ):
        name = f"decode {B},{H if kv == H else f'{H}/{kv}'},{S},{D}"
        found.append(AttentionRow(name, DECODE, "float32", B, H, 1, D, S=S, kv=kv))
    for causal in (False, True):
        found += [row(LENGTHS, (1, 2, 1 << power, 64), causal=causal) for power in range(7, 15)]
    return tuple(found)


def sweep() -> tuple[SweepRow, ...]:
    """Every shape within the bound on FLOP, small ones in each of the batches."""
    found = []
    for (B, H, causal), L, S, D in product(SWEPT_BATCHES, SWEPT, SWEPT, SWEPT_HEADS):
        name = f"{'causal ' * causal}{B},{H},{L},{S},{D}"
        each = SweepRow(name, SWEEP, "float32", B, H, L, D, S=S, causal=causal)
        if 4.0 * B * H * L * S * D <= SWEPT_FLOP:
            found.append(each)
    return tuple(found)

"""The suite ``rnn``: recurrent layers and cells."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from seqkern.bench.rows import COMPILE, INFERENCE, ONNX, OTHER, PEERS, TORCH, Row
from seqkern.bench.targets import Target
from seqkern.spec import CELLS


@dataclass(frozen=True)
class RecurrentRow(Row):
    """A layer or a stack of them on ``[T, B, I]``, dense or packed, or one step of a cell module on ``[B, I]``."""

    suite = "rnn"

    module: str  #: RNN, LSTM, GRU, or the same with Cell
    B: int
    T: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    packed: bool = False

    @property
    def is_cell(self) -> bool:
        return self.module.endswith("Cell")

    @property
    def gates(self) -> int:
        kind = self.module.removesuffix("Cell").lower()
        return CELLS["rnn_tanh" if kind == "rnn" else kind].gates

    def lengths(self) -> Tensor:
        """Lengths of the packed sequences, even over 1 … T, the longest first."""
        return torch.linspace(self.T, 1, self.B, device="cpu").round().long()

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        options = {} if self.is_cell else {"num_layers": self.layers, "bidirectional": self.bidirectional}
        if self.proj:
            options["proj_size"] = self.proj
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = getattr(nn, self.module)(self.I, self.H, **options).to(self.torch_dtype)
            shape = (self.B, self.I) if self.is_cell else (self.T, self.B, self.I)
            x = torch.randn(shape).to(self.torch_dtype)
        return model, (pack_padded_sequence(x, self.lengths()) if self.packed else x,)

    def rivals(self, mode: str) -> frozenset[str]:
        in_onnx = not (self.packed or self.proj or self.is_cell) and self.layers == 1
        plain = in_onnx and mode == INFERENCE and self.dtype == "float32"
        return frozenset({TORCH, COMPILE, *([ONNX] if plain else [])})

    def depth(self) -> int:
        return self.layers

    def forward_flop(self) -> float:
        rows = int(self.lengths().sum()) if self.packed else self.B * self.T
        directions, out = 1 + self.bidirectional, self.proj or self.H
        widths = [self.I, *[directions * out] * (self.layers - 1)]
        per_row = sum(self.gates * self.H * (width + out) + self.H * self.proj for width in widths)
        return 2.0 * directions * per_row * rows

    def bytes_read(self, mode: str) -> float | None:
        if self.B != 1 or mode != INFERENCE or self.layers > 1 or self.bidirectional:
            return None
        out = self.proj or self.H
        each_step = self.gates * self.H * out + self.H * self.proj
        return float((self.T * each_step + self.gates * self.H * self.I) * self.torch_dtype.itemsize)

    def target(self, mode: str) -> Target | None:
        if self.group != PEERS:
            return None
        if mode == INFERENCE:
            return Target(1.25) if self.B == 1 else Target(1.05, or_peak=0.83)
        if self.module == "LSTM":
            return Target(1.25, TORCH, or_peak=0.80)
        return Target(6.0 if self.module == "GRU" and self.B == 1 else 2.5, TORCH, noted_peak=0.80)


class ByCells(nn.Module):
    """A layer of one direction as a loop over torch's cell module, on the layer's own weights."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.is_lstm = layer.mode == "LSTM"
        self.cell = getattr(nn, f"{layer.mode.partition('_')[0]}Cell")(layer.input_size, layer.hidden_size)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self.cell, name, getattr(layer, f"{name}_l0"))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        state, outputs = None, []
        for step in x.unbind(0):
            state = self.cell(step, state)
            outputs.append(state[0] if self.is_lstm else state)
        last = tuple(each[None] for each in state) if self.is_lstm else state[None]  # type: ignore[index, union-attr]
        return torch.stack(outputs), last


def rows() -> tuple[RecurrentRow, ...]:
    shapes = [  # B, T, I, H
        (1, 100, 128, 128),
        (1, 500, 256, 256),
        (32, 100, 128, 128),
        (32, 100, 512, 512),
        (64, 64, 1024, 1024),
    ]
    f32, bf16 = "float32", "bfloat16"
    found = []
    for module in ("LSTM", "GRU", "RNN"):
        for B, T, I, H in shapes:
            found.append(RecurrentRow(f"{module} {B},{T},{I},{H}", PEERS, f32, module, B, T, I, H))
    both_ways = {"layers": 2, "bidirectional": True, "packed": True}
    for module in ("LSTM", "GRU"):
        name = f"packed 2x bi-{module} 32,200,128"
        found.append(RecurrentRow(name, OTHER, f32, module, 32, 200, 128, 128, **both_ways))
    for module in ("LSTMCell", "GRUCell"):
        for B, H in ((1, 128), (1, 512), (16, 512), (64, 512)):
            found.append(RecurrentRow(f"{module} {B},{H}", OTHER, f32, module, B, 1, H, H))
    for module in ("LSTM", "GRU", "RNN"):
        for B in (1, 32):
            found.append(RecurrentRow(f"{module} {B},1,256,256", OTHER, f32, module, B, 1, 256, 256))
    for module, B, H in (("LSTM", 32, 512), ("GRU", 32, 512), ("GRU", 1, 128)):
        found.append(RecurrentRow(f"bf16 {module} {B},100,{H},{H}", OTHER, bf16, module, B, 100, H, H))
    found.append(
        RecurrentRow("LSTM 32,100,512,512 proj 128", OTHER, f32, "LSTM", 32, 100, 512, 512, proj=128)
    )
    return tuple(found)

"""What seqkern is timed against. A new peer is a class here and its name in `PEERS`."""

import importlib.util
import shutil
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from seqkern.bench import measure, onnx_peer
from seqkern.bench.attention import AttentionRow
from seqkern.bench.attention_models import ByFlex, ByKernel, ByTorch, ByVarlen
from seqkern.bench.measure import Timed
from seqkern.bench.place import CPU, Place
from seqkern.bench.recurrent import ByCells, RecurrentRow
from seqkern.bench.rows import (
    COMPILE,
    CUDNN,
    EFFICIENT,
    FLASH,
    FLEX,
    LOOP,
    MATH,
    ONNX,
    OURS,
    TORCH,
    VARLEN,
    Row,
)
from seqkern.bench.targets import PLAIN


class Peer(ABC):
    """Runs rows. ``first_call`` and ``peak_bytes`` of the last row that it prepared are None where unknown."""

    name: ClassVar[str]
    label: ClassVar[str]  #: in tables and pictures
    first_call: float | None = None
    peak_bytes: int | None = None

    def __init__(self, threads: int, place: Place = CPU) -> None:
        self.threads, self.place = threads, place

    @classmethod
    def missing(cls) -> str:
        """Why it cannot run on this machine, and the remedy; empty if it can."""
        return ""

    @abstractmethod
    def prepare(self, row: Row, mode: str) -> Timed:
        """The row ready to be timed; raises where it fails."""

    def ready(
        self, row: Row, mode: str, model: nn.Module, inputs: tuple[Any, ...], accelerated: bool | None = None
    ) -> Timed:
        """A model of the row's, its first call made; ``accelerated`` as in `Place.cost`."""
        call = measure.caller(model, inputs, mode)
        self.first_call, self.peak_bytes = self.place.cost(
            call, row, mode, accelerated=accelerated, threads=self.threads
        )
        return self.place.timed(call, mode, graphed=row.graphed)

    def close(self) -> None:  # noqa: B027  # most peers hold nothing
        pass


def without_compiler(label: str) -> str:
    """Why a peer that torch compiles cannot run here; empty if it can."""
    if shutil.which("g++") or shutil.which("clang++"):
        return ""
    return f"{label} is left out: it needs a C++ compiler, such as g++"


class Torch(Peer):
    name = label = TORCH

    def prepare(self, row: Row, mode: str) -> Timed:
        return self.ready(row, mode, *self.place.build(row), accelerated=False)


class Compiled(Peer):
    """``torch.compile(model)`` as a user calls it. Dynamo refuses torch.nn.{RNN, LSTM, GRU} and breaks the graph
    there, so for those it is torch's kernel again; the cell modules it compiles."""

    name, label = COMPILE, "torch.compile"

    @classmethod
    def missing(cls) -> str:
        return without_compiler(cls.label)

    def prepare(self, row: Row, mode: str) -> Timed:
        torch._dynamo.reset()
        model, inputs = self.place.build(row)
        return self.ready(row, mode, torch.compile(model), inputs)  # type: ignore[arg-type]

    def close(self) -> None:
        torch._dynamo.reset()


class Instead(Peer):
    """A peer that is another module than the row's, of the same results."""

    @abstractmethod
    def module(self, row: Row, model: nn.Module) -> nn.Module:
        """The module that stands for the row's."""

    def prepare(self, row: Row, mode: str) -> Timed:
        model, inputs = self.place.build(row)
        with self.place.drawing():
            stands = self.module(row, model)
        run = self.ready(row, mode, stands, inputs)
        found = measure.results(stands, inputs, mode)
        measure.compare(self.name, measure.results(model, inputs, mode), list(found.values()))
        return run


class Flex(Instead):
    """torch's FlexAttention, which is meant to be compiled."""

    name, label = FLEX, "FlexAttention"

    @classmethod
    def missing(cls) -> str:
        return without_compiler(cls.label)

    def module(self, row: Row, model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        assert isinstance(row, AttentionRow) and isinstance(model, ByTorch)
        return ByFlex(model.asked, row.shape)

    def close(self) -> None:
        torch._dynamo.reset()


class Kernel(Instead):
    """torch's attention, held to one of its kernels."""

    def module(self, row: Row, model: nn.Module) -> nn.Module:
        return ByKernel(model, self.name)


class Cudnn(Kernel):
    name, label = CUDNN, "torch, cuDNN"


class Flash(Kernel):
    name, label = FLASH, "torch, flash"


class Efficient(Kernel):
    name, label = EFFICIENT, "torch, efficient"


class Math(Kernel):
    name, label = MATH, "torch, math"


class Varlen(Instead):
    """torch's own attention of packed sequences, which only GPUs have."""

    name, label = VARLEN, "torch, varlen"

    @classmethod
    def missing(cls) -> str:
        if importlib.util.find_spec("torch.nn.attention.varlen"):
            return ""
        return f"{cls.label} is left out: torch {torch.__version__} has none; it needs 2.10"

    def module(self, row: Row, model: nn.Module) -> nn.Module:
        assert isinstance(model, ByTorch)
        return ByVarlen(model.asked)


class Loop(Instead):
    """A loop over torch's cell module, one call a step: what a user writes whose cell is not torch's."""

    name, label = LOOP, "torch, a loop of cells"

    def module(self, row: Row, model: nn.Module) -> nn.Module:
        assert isinstance(row, RecurrentRow) and isinstance(model, nn.RNNBase)
        return ByCells(model)


class OnnxRuntime(Peer):
    name, label = ONNX, "ONNX Runtime"

    def __init__(self, threads: int, place: Place = CPU) -> None:
        super().__init__(threads, place)
        self._server: onnx_peer.Server | None = None

    @classmethod
    def missing(cls) -> str:
        absent = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if not absent:
            return ""
        return f"ONNX Runtime is left out: no {' and no '.join(absent)} here; pip install 'seqkern[bench]'"

    def prepare(self, row: Row, mode: str) -> Timed:
        if self._server is None or self._server.closed:
            self._server = onnx_peer.Server(self.threads)
        self.first_call = self._server.ask(row)
        return self._server.ask

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


class Ours(Peer):
    """Not a peer, but timed as one: the accelerated model, past the gate."""

    name = label = OURS

    def prepare(self, row: Row, mode: str) -> Timed:
        model, inputs = self.place.build(row)
        with self.place.kernels():
            model = row.ours(model)
            measure.gate(row, mode, model, self.place.drawing)
            run = self.ready(row, mode, model, inputs, accelerated=True)

        def ours(calls: int) -> float:
            with self.place.kernels():
                return run(calls)

        return ours


class Plain(Peer):
    """Not a peer either: seqkern without the row's option, whose price is then known."""

    name, label = PLAIN, "seqkern, plain"

    def prepare(self, row: Row, mode: str) -> Timed:
        row = row.plain()
        model, inputs = self.place.build(row)
        with self.place.kernels():
            call = measure.caller(row.ours(model), inputs, mode)
            run = self.place.timed(call, mode, graphed=row.graphed)

        def plain(calls: int) -> float:
            with self.place.kernels():
                return run(calls)

        return plain


PEERS: dict[str, type[Peer]] = {
    each.name: each
    for each in (Torch, Cudnn, Flash, Efficient, Math, Varlen, Loop, Compiled, OnnxRuntime, Flex)
}
SUBJECTS: dict[str, type[Peer]] = PEERS | {each.name: each for each in (Ours, Plain)}

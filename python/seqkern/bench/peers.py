"""What seqkern is timed against. A new peer is a class here and its name in `PEERS`."""

import importlib.util
import shutil
from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from seqkern.bench import fresh, measure, onnx_peer
from seqkern.bench.attention import AttentionRow
from seqkern.bench.attention_models import ByFlex, ByTorch
from seqkern.bench.measure import Timed
from seqkern.bench.rows import COMPILE, FLEX, INFERENCE, ONNX, OURS, TORCH, Row
from seqkern.bench.targets import PLAIN


class Peer(ABC):
    """Runs rows. ``first_call`` and ``peak_bytes`` of the last row that it prepared are None where unknown."""

    name: ClassVar[str]
    label: ClassVar[str]  #: in tables and pictures
    first_call: float | None = None
    peak_bytes: int | None = None

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @classmethod
    def missing(cls) -> str:
        """Why it cannot run on this machine, and the remedy; empty if it can."""
        return ""

    @abstractmethod
    def prepare(self, row: Row, mode: str) -> Timed:
        """The row ready to be timed; raises where it fails."""

    def close(self) -> None:  # noqa: B027  # most peers hold nothing
        pass


def probed(row: Row, mode: str, *, accelerated: bool, threads: int) -> tuple[float | None, int | None]:
    """`fresh.probe` of the rows that ask for it."""
    return fresh.probe(row, mode, accelerated=accelerated, threads=threads) if row.probed else (None, None)


def without_compiler(label: str) -> str:
    """Why a peer that torch compiles cannot run here; empty if it can."""
    if shutil.which("g++") or shutil.which("clang++"):
        return ""
    return f"{label} is left out: it needs a C++ compiler, such as g++"


class Torch(Peer):
    name = label = TORCH

    def prepare(self, row: Row, mode: str) -> Timed:
        self.first_call, self.peak_bytes = probed(row, mode, accelerated=False, threads=self.threads)
        return measure.timed(measure.caller(*row.build(), mode), mode)


class Compiled(Peer):
    """``torch.compile(model)`` as a user calls it. Dynamo refuses torch.nn.{RNN, LSTM, GRU} and breaks the graph
    there, so for those it is torch's kernel again; the cell modules it compiles."""

    name, label = COMPILE, "torch.compile"

    @classmethod
    def missing(cls) -> str:
        return without_compiler(cls.label)

    def prepare(self, row: Row, mode: str) -> Timed:
        torch._dynamo.reset()
        model, inputs = row.build()
        run = measure.timed(measure.caller(torch.compile(model), inputs, mode), mode)  # type: ignore[arg-type]
        self.first_call = run(1)
        return run

    def close(self) -> None:
        torch._dynamo.reset()


class Flex(Peer):
    """torch's FlexAttention, which is meant to be compiled."""

    name, label = FLEX, "FlexAttention"

    @classmethod
    def missing(cls) -> str:
        return without_compiler(cls.label)

    def prepare(self, row: Row, mode: str) -> Timed:
        torch._dynamo.reset()
        assert isinstance(row, AttentionRow)
        model, inputs = row.build()
        assert isinstance(model, ByTorch) and mode == INFERENCE
        ours = ByFlex(model.asked, row.shape)
        call = measure.caller(ours, inputs, mode)
        run = measure.timed(call, mode)
        self.first_call = run(1)
        measure.compare(
            FLEX, measure.results(model, inputs, mode), list(measure.results(ours, inputs, mode).values())
        )
        return run

    def close(self) -> None:
        torch._dynamo.reset()


class OnnxRuntime(Peer):
    name, label = ONNX, "ONNX Runtime"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
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
        model, inputs = row.build()
        model = row.ours(model)
        measure.gate(row, mode, model)
        self.first_call, self.peak_bytes = probed(row, mode, accelerated=True, threads=self.threads)
        return measure.timed(measure.caller(model, inputs, mode), mode)


class Plain(Peer):
    """Not a peer either: seqkern without the row's option, whose price is then known."""

    name, label = PLAIN, "seqkern, plain"

    def prepare(self, row: Row, mode: str) -> Timed:
        row = row.plain()
        model, inputs = row.build()
        return measure.timed(measure.caller(row.ours(model), inputs, mode), mode)


PEERS: dict[str, type[Peer]] = {each.name: each for each in (Torch, Compiled, OnnxRuntime, Flex)}
SUBJECTS: dict[str, type[Peer]] = PEERS | {each.name: each for each in (Ours, Plain)}

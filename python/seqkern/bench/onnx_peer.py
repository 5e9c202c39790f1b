"""ONNX Runtime in a process of its own: its threads spin for work and would slow torch's in the same process."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from seqkern.bench import onnx_attention, onnx_recurrent
from seqkern.bench.measure import PeerFailed, compare, results
from seqkern.bench.rows import INFERENCE, Row
from seqkern.bench.rows import ONNX as NAME

ANSWER = 120  # seconds


def session(model: bytes, threads: int):
    """An inference session of a serialised model, with so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # once a run is over
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def graph(module: nn.Module) -> Any:
    """The room that knows a module's ONNX model, what it is fed, and what torch calls its results."""
    return onnx_recurrent if isinstance(module, nn.RNNBase) else onnx_attention


def _load(row: Row, threads: int) -> tuple[float, Callable[[], object]]:
    """Seconds until the first answer, and a call of the model, whose results have been compared with torch's."""
    module, inputs = row.build()
    of = graph(module)
    model, given = of.model(module, inputs), of.feeds(module, inputs)
    start = time.perf_counter()
    here = session(model, threads)
    found = here.run(None, given)
    first = time.perf_counter() - start
    compare(NAME, results(module, inputs, INFERENCE), of.outputs(found, module))
    return first, lambda: here.run(None, given)


def serve(connection: Connection, threads: int) -> None:
    """The process: a row loads it, a number of calls runs it; every answer is seconds, or a text where it failed."""
    torch.set_num_threads(1)  # torch only checks here, and must leave no threads behind
    call: Callable[[], object] = lambda: None  # noqa: E731
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        try:
            if isinstance(asked, Row):
                seconds, call = _load(asked, threads)
            else:
                start = time.perf_counter()
                for _ in range(asked):
                    call()
                seconds = time.perf_counter() - start
        except Exception as e:
            connection.send(f"{type(e).__name__}: {e}")
        else:
            connection.send(seconds)


class Server:
    """The process from outside."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, far = context.Pipe()
        self._process = context.Process(target=serve, args=(far, threads), daemon=True)
        self._process.start()
        far.close()

    def ask(self, what: Row | int) -> float:
        """Seconds. Raises PeerFailed where the process failed or gave no answer."""
        try:
            self._connection.send(what)
            if not self._connection.poll(ANSWER):
                raise EOFError
            answer = self._connection.recv()
        except (EOFError, OSError):
            self.close()
            raise PeerFailed(NAME, "its process ended or gave no answer") from None
        if isinstance(answer, str):
            raise PeerFailed(NAME, answer)
        return answer

    @property
    def closed(self) -> bool:
        return self._connection.closed

    def close(self) -> None:
        if self.closed:
            return
        self._connection.close()
        self._process.terminate()
        self._process.join()
        self._process.close()

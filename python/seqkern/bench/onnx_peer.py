"""ONNX Runtime in a process of its own: its threads spin for work and would slow torch's in the same process."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from seqkern.bench import recurrent_onnx
from seqkern.bench.measure import PeerFailed, results
from seqkern.bench.rows import INFERENCE, RecurrentRow, Row
from seqkern.testing import relative_rms

NAME = "onnxruntime"
WRONG = 1e-3  # relative RMS beyond which the model was built wrongly; its approximations stay below 1e-5
ANSWER = 120  # seconds


def serves(row: Row, mode: str) -> bool:
    plain = isinstance(row, RecurrentRow) and not (row.packed or row.proj or row.is_cell) and row.layers == 1
    return plain and mode == INFERENCE and row.dtype == "float32"


def session(layer: nn.RNNBase, threads: int):
    """An inference session of the layer, with so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # once a run is over
    return onnxruntime.InferenceSession(
        recurrent_onnx.model(layer), options, providers=["CPUExecutionProvider"]
    )


def outputs(found: Sequence[Any], layer: nn.RNNBase) -> list[torch.Tensor]:
    """What the session returned, in torch's layout: output, then the final states."""
    y, *states = map(torch.from_numpy, found)
    steps, _, batch, _ = y.shape
    return [y.transpose(1, 2).reshape(steps, batch, -1), *states]


def _load(row: Row, threads: int) -> tuple[float, Callable[[], object]]:
    """Seconds until the first answer, and a call of the model, whose results have been compared with torch's."""
    layer, (x,) = row.build()
    assert isinstance(layer, nn.RNNBase)
    given = {"x": x.numpy()}
    start = time.perf_counter()
    here = session(layer, threads)
    found = here.run(None, given)
    first = time.perf_counter() - start
    want = results(layer, (x,), INFERENCE)
    for (name, value), got in zip(want.items(), outputs(found, layer), strict=True):
        if not relative_rms(got, value) <= WRONG:
            raise ValueError(f"ONNX Runtime and torch differ by {relative_rms(got, value):.2g} in {name}")
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

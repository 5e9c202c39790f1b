"""A workload in a fresh process: what its first call costs and how much memory a call takes beyond its inputs.

The process is forked from one that has imported torch and run nothing, so imports are not counted; thread pools,
kernels chosen at run time and packed weights are.
"""

import ctypes
import multiprocessing
import re
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from seqkern import testing
from seqkern.bench import measure
from seqkern.bench.rows import INFERENCE, Row

ANSWER = 120  # seconds
# The first torch.autograd.grad of a process imports the last of these: 33 MB and half a second, of no kernel's making.
PRELOAD = ["seqkern.bench.fresh", "seqkern.nn", "seqkern.swap", "torch.fx.experimental.symbolic_shapes"]
PROC = Path("/proc/self")


def _status(key: str) -> int | None:
    """A line of /proc/self/status in bytes."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB$", (PROC / "status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _give_back() -> bool:
    """Returns freed heap to the system and forgets the peak; False where this system cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROC / "clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _cost(call: Callable[[], Any]) -> tuple[float, int | None]:
    """Seconds of the first call; bytes that it kept plus the peak of the second, whose code is in memory already."""
    before = _status("RssAnon")
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    if not _give_back():
        return seconds, None
    kept, rest = _status("RssAnon"), _status("VmRSS")
    call()
    peak = _status("VmHWM")
    if before is None or kept is None or rest is None or peak is None:
        return seconds, None
    return seconds, max(0, kept - before) + max(0, peak - rest)


def _run(connection: Connection, row: Row, mode: str, accelerated: bool, threads: int) -> None:
    model, inputs = row.build()
    if accelerated:
        model = row.ours(model)
    torch.set_num_threads(threads)
    call = measure.caller(model, inputs, mode)
    x = torch.zeros(1, requires_grad=True)
    torch.autograd.grad(x * 1, x, torch.ones(1))
    with testing.without_torchs_warnings(), torch.set_grad_enabled(mode != INFERENCE):
        connection.send(_cost(call))


def probe(row: Row, mode: str, *, accelerated: bool, threads: int) -> tuple[float | None, int | None]:
    """(seconds of the first call, bytes at the peak of a call beyond inputs and weights); None where unknown."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None, None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    near, far = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(far, row, mode, accelerated, threads), daemon=True)
    process.start()
    far.close()
    try:
        return near.recv() if near.poll(ANSWER) else (None, None)
    except EOFError:
        return None, None
    finally:
        near.close()
        process.terminate()
        process.join()
        process.close()

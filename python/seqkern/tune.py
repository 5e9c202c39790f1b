"""Times the configurations of the Triton kernels on the GPU at hand and keeps the best ones for later processes.

A choice is made for each kernel, cell, dtype and size that is tuned; `seqkern.kernels.tuning` finds it again in the
user's cache directory. Sizes that were not tuned go by the rules there.
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from seqkern.ops import _backend

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HIDDEN = (64, 128, 256, 512, 1024)
BATCH = (1, 16, 64)
Timer = Callable[[Callable[[], Any]], float]


class Work(NamedTuple):
    """A layer to tune for: one layer in one direction, without projection."""

    cell: str
    dtype: str
    H: int
    B: int
    T: int = 64


class Row(NamedTuple):
    """What was found for one kernel."""

    key: str
    config: tuple[int, ...]
    seconds: float
    by_rule: float  #: seconds of the configuration that the rules choose
    tried: int


def _kernels(module: str) -> Any:
    return import_module(f"seqkern.kernels.{module}")  # not at the top: it imports Triton


def why_not() -> str:
    """Why nothing can be tuned here; empty if it can."""
    if _backend.TRITON_MISSING:
        return _backend.TRITON_MISSING
    if not torch.cuda.is_available():
        built = "torch finds no CUDA device" if torch.version.cuda else "this torch was built without CUDA"
        return f"no GPU here ({built}, torch {torch.__version__}); nothing was timed"
    return ""


def on_gpu(run: Callable[[], Any], rounds: int = 20) -> float:
    """The median time of a call in seconds, by events on the GPU."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times)


def tune(
    works: Iterable[Work],
    device: torch.device | str = "cuda",
    timer: Timer = on_gpu,
    path: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Times every candidate of the kernels that the works run, and writes the best to the cache file.

    A candidate that does not compile or launch on this GPU is passed over.

    Args:
        works: what to tune for.
        device: where.
        timer: the seconds that a call takes.
        path: the cache file; by default that of `seqkern.kernels.tuning_cache`.
        say: is told of each row as it is found.

    Returns:
        a row for each kernel, in the order of the works.

    Raises:
        RuntimeError: not one candidate of a kernel runs.
    """
    cache = _kernels("tuning_cache")
    path = path or cache.cache_file()
    here = cache.machine()
    rows = []
    for work in works:
        for backward in (False, True):
            for whole in (True, False):
                row = _tune_one(work, backward, whole, torch.device(device), timer)
                if row is not None:
                    rows.append(row)
                    say(
                        f"{row.key}: {row.config}, {row.seconds * 1e6:.0f} us of {row.by_rule * 1e6:.0f} us by rule"
                    )
    cache.write(path, here, {row.key: row.config for row in rows})
    cache.measured.cache_clear()
    return rows


def _tune_one(work: Work, backward: bool, whole: bool, device: torch.device, timer: Timer) -> Row | None:
    tuning, cache = _kernels("tuning"), _kernels("tuning_cache")
    kernel = f"{'sequence' if whole else 'step'}_{'backward' if backward else 'forward'}"
    run, problem = _prepare(work, kernel, device)
    arch = tuning.arch_of(device)
    candidates = (tuning.sequence_candidates if whole else tuning.step_candidates)(arch, problem)
    if not candidates:
        return None
    found: list[tuple[float, tuple[int, ...]]] = []
    failed: Exception | None = None
    for candidate in _around(arch, problem, candidates):
        with cache.forced({problem.key: candidate}, steps=not whole):
            try:
                found.append((timer(run), tuple(candidate)))
            except Exception as e:
                # Triton raises a type of its own for each resource that runs out, some of them inside the driver
                failed = e
    if not found:
        raise RuntimeError(f"not one configuration of {problem.key} runs here") from failed
    by_rule = next((seconds for seconds, config in found if config == tuple(candidates[0])), float("nan"))
    seconds, config = min(found)
    return Row(problem.key, config, seconds, by_rule, len(found))


def _around(arch: int, problem: Any, candidates: list[Any]) -> list[Any]:
    """The candidates, and each with other numbers of warps and stages."""
    found = list(candidates)
    for c in candidates:
        found += [c._replace(warps=w, stages=s) for w in (4, 8) for s in (1, 2, 3, 4)]
    return list(dict.fromkeys(found))


def _prepare(work: Work, kernel: str, device: torch.device) -> tuple[Callable[[], Any], Any]:
    """A call that runs a kernel on random data, and what its configuration is chosen for."""
    rnn = _kernels("rnn")
    dtype, T, B, H = DTYPES[work.dtype], work.T, work.B, work.H
    gates = {"lstm": 4, "gru": 3}.get(work.cell, 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).mul_(H**-0.5).to(dtype)

    weights = [normal(gates * H, H), normal(gates * H, H), normal(gates * H), normal(gates * H), *[None] * 6]
    cx = normal(1, B, H) if work.cell == "lstm" else None
    tensors = [normal(T, B, H), None, normal(1, B, H), cx, *weights]
    problem = rnn.Layer(tensors[0], None, tuple(weights), work.cell).problem(kernel)
    if kernel.endswith("forward"):
        return lambda: rnn.forward(*tensors, work.cell, True), problem
    output, h_n, c_n, reserve = rnn.forward(*tensors, work.cell, True)
    return lambda: rnn.backward(output, h_n, c_n, output, reserve, *tensors, work.cell, True, True), problem

"""Times the configurations of the Triton kernels on the GPU at hand and keeps the best ones for later processes.

A choice is made for each kernel and kind of call that is tuned: cell, dtype and sizes of a recurrent layer; dtype,
head size and extras of attention. `seqkern.kernels.tuning_cache` finds it again in the user's cache directory. What was
not tuned goes by the rules in `seqkern.kernels.tuning` and `tuning_attention`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from seqkern.ops import _hardware
from seqkern.ops.attention import empty_gradients, empty_outputs
from seqkern.spec.attention import Options, Tensors

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HIDDEN = (64, 128, 256, 512, 1024)
BATCH = (1, 16, 64)
HEAD = (64, 128)
GROUP = (8,)
LENGTH = 2048
Timer = Callable[[Callable[[], Any]], float]


class Job(NamedTuple):
    """One kernel to choose a configuration for."""

    key: str
    candidates: list[tuple[int, ...]]  #: that of the rules first
    build: Callable[[], Callable[[], Any]]  #: with a configuration forced: the call that is timed
    steps: bool = False  #: whether a recurrent layer is to run step by step


class Recurrent(NamedTuple):
    """A layer to tune for: one layer in one direction, without projection."""

    cell: str
    dtype: str
    H: int
    B: int
    T: int = 64

    def jobs(self, device: torch.device) -> Iterator[Job]:
        tuning = _kernels("tuning")
        arch = tuning.arch_of(device)
        for backward, whole in product((False, True), (True, False)):
            kernel = f"{'sequence' if whole else 'step'}_{'backward' if backward else 'forward'}"
            run, problem = self._prepare(kernel, device)
            found = (tuning.sequence_candidates if whole else tuning.step_candidates)(arch, problem)
            if found:
                yield Job(problem.key, _around(found), lambda run=run: run, not whole)

    def _prepare(self, kernel: str, device: torch.device) -> tuple[Callable[[], Any], Any]:
        """A call that runs a kernel on random data, and what its configuration is chosen for."""
        rnn = _kernels("rnn")
        T, B, H = self.T, self.B, self.H
        gates = {"lstm": 4, "gru": 3}.get(self.cell, 1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).mul_(H**-0.5).to(DTYPES[self.dtype])

        weights = [
            normal(gates * H, H),
            normal(gates * H, H),
            normal(gates * H),
            normal(gates * H),
            *[None] * 6,
        ]
        cx = normal(1, B, H) if self.cell == "lstm" else None
        tensors = [normal(T, B, H), None, normal(1, B, H), cx, *weights]
        problem = rnn.Layer(tensors[0], None, tuple(weights), self.cell).problem(kernel)
        tensors.append(self.cell)
        if kernel.endswith("forward"):
            return lambda: rnn.forward(*tensors, True), problem
        output, h_n, c_n, reserve = rnn.forward(*tensors, True)
        return lambda: rnn.backward(output, h_n, c_n, output, reserve, *tensors, True, True), problem


class Attention(NamedTuple):
    """Causal attention to tune the forward and both backward kernels for, at one length that serves all."""

    dtype: str
    D: int
    extras: bool = False  #: a mask, a bias and dropout, all at once as the rules have them
    L: int = LENGTH  #: queries, and keys
    B: int = 8
    H: int = 16

    def jobs(self, device: torch.device) -> Iterator[Job]:
        sizes = (self.B, self.H, self.H, self.L, self.L, self.D)
        t, o = _attention_call(self.dtype, sizes, self.extras, device)
        for kernel in ("forward", "keys", "queries"):
            yield _attention_job(kernel, t, o)


class Decode(NamedTuple):
    """Attention of one query to tune decoding for: keys and values of 1 GiB at head size 128, in 16 bits."""

    dtype: str
    D: int
    extras: bool = False
    G: int = GROUP[0]  #: query heads to a key head
    S: int = 8192  #: keys
    B: int = 32
    H: int = 8  #: key heads

    def jobs(self, device: torch.device) -> Iterator[Job]:
        sizes = (self.B, self.H * self.G, self.H, 1, self.S, self.D)
        yield _attention_job("decode", *_attention_call(self.dtype, sizes, self.extras, device))


Work = Recurrent | Attention | Decode


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
    if _hardware.TRITON_MISSING:
        return _hardware.TRITON_MISSING
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
    """Times every candidate of the kernels that the works run, and writes each best to the cache file as it is found.

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
    for job in (job for work in works for job in work.jobs(torch.device(device))):
        row = _tune_one(job, timer)
        rows.append(row)
        cache.write(path, here, {row.key: row.config})
        cache.measured.cache_clear()
        say(f"{row.key}: {row.config}, {row.seconds * 1e6:.0f} us of {row.by_rule * 1e6:.0f} us by rule")
    return rows


def _tune_one(job: Job, timer: Timer) -> Row:
    cache = _kernels("tuning_cache")
    found: list[tuple[float, tuple[int, ...]]] = []
    failed: Exception | None = None
    for candidate in job.candidates:
        with cache.forced({job.key: candidate}, steps=job.steps):
            try:
                found.append((timer(job.build()), tuple(candidate)))
            except Exception as e:
                # Triton raises a type of its own for each resource that runs out, some of them inside the driver
                failed = e
    if not found:
        raise RuntimeError(f"not one configuration of {job.key} runs here") from failed
    rule = tuple(job.candidates[0])
    by_rule = next((seconds for seconds, config in found if config == rule), float("nan"))
    seconds, config = min(found)
    return Row(job.key, config, seconds, by_rule, len(found))


def _around(candidates: list[Any]) -> list[Any]:
    """The candidates, and each with other numbers of warps and stages."""
    found = list(candidates)
    for c in candidates:
        found += [c._replace(warps=w, stages=s) for w in (4, 8) for s in (1, 2, 3, 4)]
    return list(dict.fromkeys(found))


def _attention_call(
    dtype: str, sizes: tuple[int, ...], extras: bool, device: torch.device
) -> tuple[Tensors, Options]:
    """A call on random data, of sizes B, Hq, Hkv, L, S and D."""
    B, Hq, Hkv, L, S, D = sizes

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=DTYPES[dtype])

    t = Tensors(normal(B, Hq, L, D), normal(B, Hkv, S, D), normal(B, Hkv, S, D))
    causal = Options(D**-0.5, window_right=0, bottom_right=True)
    if not extras:
        return t, causal
    mask = torch.rand((B, 1, L, S), device=device) < 0.9
    seed = torch.tensor([1], device=device)
    return t._replace(mask=mask, bias=normal(1, 1, L, S), seed=seed), causal._replace(dropout_p=0.1)


def _attention_job(kernel: str, t: Tensors, o: Options) -> Job:
    """A kernel of attention on a call. Its time is that of what `_launches` returns."""
    tuning, launch = _kernels("tuning_attention"), _kernels("launch")
    shape = launch.prepare(t, o).shape

    def build() -> Callable[[], None]:
        made = _launches(kernel, t, o)

        def run() -> None:
            for each in made:
                launch.run(each)

        return run

    return Job(tuning.key(kernel, shape), tuning.candidates(kernel, shape), build)


def _launches(kernel: str, t: Tensors, o: Options) -> list[Any]:
    """A kernel of attention with those that always go along with it; a backward has made-up results of the forward."""
    output, lse, _ = empty_outputs(t, o)
    if kernel == "forward":
        return [_kernels("attention").forward_launch(t, o, output, lse)]
    if kernel == "decode":
        return _kernels("decode").decode_launches(t, o, output, lse)
    output.normal_()
    lse.fill_(math.log(t.key.shape[2]))  # near that of random scores, so that the weights are no infinities
    needs = (kernel == "queries", kernel == "keys", False, False, False)
    made = _kernels("attention_backward").backward_launches
    return made(t, o, output, None, output, lse, empty_gradients(t, needs), needs)[0]

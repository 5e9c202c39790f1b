"""Where a suite's rows run: what differs between a processor and a GPU in making, timing and probing them."""

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import seqkern
from seqkern.bench import ceilings, fresh, limits, measure, record
from seqkern.bench.ceilings import Ceilings
from seqkern.bench.measure import Timed
from seqkern.bench.rows import INFERENCE, Row

Cost = tuple[float | None, int | None]  #: seconds of the first call, bytes at the peak of one
MOST_CALLS = 100  # in a turn on a GPU: more say nothing about a median
DIRT = (
    1 << 30
)  # bytes that are written before each call on a GPU: many times its L2 cache, and 0.3 ms of an H200
WARM_UP = 3  # calls before a capture: they choose algorithms and make workspaces, which a capture must not


class DeviceLost(Exception):
    """The GPU answers no more in this process; the message says after what."""

    row: record.Record | None = None  #: of the row in which it happened


class Place:
    """This machine's processor."""

    name: ClassVar[str] = "cpu"
    settle: float = measure.SETTLE  #: seconds before a turn
    most_calls: int | None = None  #: in a turn

    def drawing(self) -> AbstractContextManager:
        """In the block new tensors and modules are made here."""
        return nullcontext()

    def build(self, row: Row) -> tuple[nn.Module, tuple[Any, ...]]:
        with self.drawing():
            return row.build()

    def kernels(self) -> AbstractContextManager:
        """In the block seqkern's kernels for this place run, whatever the choice would be."""
        return nullcontext()

    @contextmanager
    def rounding(self, dtype: str) -> Iterator[None]:
        """In the block float32 is multiplied as a row's dtype says: to TF32 if it is named "tf32", else exactly."""
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]

    def timed(self, call: Callable[[], Any], mode: str, *, graphed: bool) -> Timed:
        """The call ready to be timed; as a CUDA graph where there are any."""
        return measure.timed(call, mode)

    def cost(
        self, call: Callable[[], Any], row: Row, mode: str, *, accelerated: bool | None, threads: int
    ) -> Cost:
        """What a first call costs. ``accelerated`` says which of a row's models the call is of: with None, of neither
        as it is built."""
        if accelerated is not None:
            return (
                fresh.probe(row, mode, accelerated=accelerated, threads=threads)
                if row.probed
                else (None, None)
            )
        start = time.perf_counter()
        with torch.set_grad_enabled(mode != INFERENCE):
            call()
        return time.perf_counter() - start, None

    def limits(self) -> "limits.Limits | Ceilings":
        return limits.measure()

    def machine(self) -> dict[str, Any]:
        return record.machine()

    def versions(self) -> dict[str, str]:
        return record.versions()

    def recover(self, after: str) -> None:
        """Frees what a failed row left behind. Raises DeviceLost where nothing can run any more."""
        gc.collect()


class Gpu(Place):
    """The current GPU. Calls are timed one by one, by events on its stream, each with a cold L2 cache and after work
    that lasts longer than the processor takes to launch most of them: what a GPU does that has been kept busy.

    ``event``, ``wait`` and ``device`` are replaced where there is no GPU.
    """

    name = "cuda"
    settle = 0.0
    most_calls = MOST_CALLS

    def __init__(
        self,
        event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True),
        wait: Callable[[], None] = torch.cuda.synchronize,
        device: str = "cuda",
        dirt: int = DIRT,
    ) -> None:
        self.event, self.wait, self.device = event, wait, device
        self.dirt = torch.empty(dirt, dtype=torch.int8, device=device)

    def drawing(self) -> AbstractContextManager:
        return torch.device(self.device)

    def kernels(self) -> AbstractContextManager:
        return seqkern.backend("triton" if self.device == "cuda" else None)

    def timed(self, call: Callable[[], Any], mode: str, *, graphed: bool) -> Timed:
        run = self.captured(call, mode) if graphed else call
        return self.by_events(run, mode)

    def by_events(self, call: Callable[[], Any], mode: str) -> Timed:
        def run(calls: int) -> float:
            pairs = [(self.event(), self.event()) for _ in range(calls)]
            with torch.set_grad_enabled(mode != INFERENCE):
                for start, end in pairs:
                    self.flush()
                    start.record()
                    call()
                    end.record()
            self.wait()
            return calls * statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

        return run

    def flush(self) -> None:
        """Puts other data into the whole L2 cache; the processor meanwhile gets ahead with the launches."""
        self.dirt.zero_()

    def captured(self, call: Callable[[], dict[str, Tensor]], mode: str) -> Callable[[], None]:
        """The call as the replay of a CUDA graph, whose results have been compared with the call's."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.set_grad_enabled(mode != INFERENCE):
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    want = call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = call()
        graph.replay()
        measure.compare("the captured graph", want, list(kept.values()))

        def replay() -> None:
            _ = kept  # the results stay where the graph writes them
            graph.replay()

        return replay

    def cost(
        self, call: Callable[[], Any], row: Row, mode: str, *, accelerated: bool | None, threads: int
    ) -> Cost:
        with torch.set_grad_enabled(mode != INFERENCE):
            start = time.perf_counter()
            call()
            self.wait()
            seconds = time.perf_counter() - start
            if self.device != "cuda":
                return seconds, None
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            self.wait()
            return seconds, torch.cuda.max_memory_allocated() - before

    def limits(self) -> Ceilings:
        return ceilings.measure(self.device, lambda call: self.by_events(call, INFERENCE))

    def machine(self) -> dict[str, Any]:
        return record.machine() | gpu()

    def versions(self) -> dict[str, str]:
        found = record.versions() | {
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }
        return found | {"triton": metadata.version("triton")}

    def recover(self, after: str) -> None:
        super().recover(after)
        try:
            self.wait()
            torch.cuda.empty_cache()
        except Exception as e:  # whatever the driver says, of which torch makes several types
            raise DeviceLost(f"the GPU answers no more after {after}: {e}") from e


def gpu() -> dict[str, Any]:
    """The GPU, its driver and its clocks, as far as they can be asked for."""
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    found: dict[str, Any] = {
        "gpu": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory": about.total_memory,
        "l2": about.L2_cache_size,
    }
    return found | nvidia_smi()


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks in MHz, degrees and watts by the driver's own tool; empty where it is missing or silent."""
    asked = {
        "driver": "driver_version",
        "clock": "clocks.sm",
        "highest clock": "clocks.max.sm",
        "memory clock": "clocks.mem",
        "degrees": "temperature.gpu",
        "watts": "power.draw",
    }
    words = [f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    told = [each.strip() for each in done.stdout.strip().split(",")]
    return dict(zip(asked, told)) if len(told) == len(asked) else {}


CPU = Place()


def found(name: str) -> Place:
    """The place of a name. Raises ValueError where this machine lacks it."""
    if name == "cpu":
        return CPU
    if name != "cuda":
        raise ValueError(f"device is {name!r}, expected cpu or cuda")
    if not torch.cuda.is_available():
        built = "torch finds no CUDA device" if torch.version.cuda else "this torch was built without CUDA"
        raise ValueError(
            f"there is no GPU here ({built}, torch {torch.__version__}); --device cpu tries the rows"
        )
    return Gpu()

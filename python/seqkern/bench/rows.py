"""What every workload is: a model of torch's, inputs, how much work it is, what it is to reach."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from seqkern.bench.targets import Target

OURS = "seqkern"  # among the subjects
TORCH, COMPILE, ONNX, FLEX = "torch", "compile", "onnxruntime", "flex"  # the peers
LOOP, VARLEN = "loop", "varlen"
CUDNN, FLASH, EFFICIENT, MATH = (
    "cudnn",
    "flash",
    "efficient",
    "math",
)  # torch's attention, one kernel each
INFERENCE, TRAINING = MODES = ("inference", "training")
BACKWARD = "backward"  # the gradients alone
EVERY_MODE = (*MODES, BACKWARD)
PEERS, OTHER = "peers", "other"  # the rows whose peers' figures are known, and the rest
FLOP, TERAFLOP, BYTES, TOKENS = "GF/s", "TF/s", "GB/s", "tokens/s"  # what a row's speed is told in
TRAINING_FLOP = 3  # forward, gradient of the input and of the weights: a matmul of one size each


@dataclass(frozen=True)
class Row(ABC):
    """One workload: what every suite's rows have in common."""

    suite: ClassVar[str]
    probed: ClassVar[bool] = True  #: first call and memory are measured, on a processor in a process each
    partly_judged: ClassVar[bool] = (
        False  #: the oracle computes a part of the row, which is too large for float64
    )
    graphed: bool = field(default=False, kw_only=True)  #: every subject is replayed as a CUDA graph

    name: str
    group: str
    dtype: str

    @abstractmethod
    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """torch's module, in ``dtype`` and in training mode, and its inputs; the same numbers every time."""

    @abstractmethod
    def forward_flop(self) -> float:
        """Multiplications and additions of one forward."""

    @abstractmethod
    def rivals(self, mode: str) -> frozenset[str]:
        """The peers that the row is timed against where they are found, and `PLAIN` where it is held against it."""

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES

    @property
    def unit(self) -> str:
        return FLOP

    def ours(self, model: nn.Module) -> nn.Module:
        """seqkern's counterpart of what `build` made, with the same weights."""
        from seqkern.swap import accelerate

        return accelerate(copy.deepcopy(model))

    def plain(self) -> "Row":
        """The row without its option, for `PLAIN`."""
        raise ValueError(f"{self.name} has no option that could be left out")

    def oracle(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """The model whose results in float64 are right, and its inputs; of a part of them if `partly_judged`."""
        return self.build()

    def judged(self, name: str, result: torch.Tensor) -> torch.Tensor:
        """What of a result, or of the gradient sent back through it, the oracle computes."""
        return result

    def flop(self, mode: str) -> float:
        return self.forward_flop() * (TRAINING_FLOP if mode == TRAINING else 1)

    def amount(self, mode: str) -> float:
        """How much of its `unit` (per second) one call is."""
        return self.flop(mode) / (1e12 if self.unit == TERAFLOP else 1e9)

    def depth(self) -> int:
        """How many ops run one after another on what the last one rounded, for the tolerance."""
        return 1

    def bytes_read(self, mode: str) -> float | None:
        """Bytes that one call must read from a cache or from memory, where that is the limit; None elsewhere."""
        return None

    def bytes_held(self, mode: str) -> float | None:
        """How much of it is different: what the cache would have to hold. None for what each core's own does hold."""
        return None

    def sizes(self) -> dict[str, int]:
        """What a picture that is drawn over sizes needs."""
        return {}

    def target(self, mode: str) -> Target | None:
        return None

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

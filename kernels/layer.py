"""One call of a recurrent layer: its sizes, where the steps of its sequences lie, and its weights for the kernels."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkern.kernels import tuning
from seqkern.kernels.cells import CELLS
from seqkern.kernels.tuning import precision

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class Rows(NamedTuple):
    """Where the steps of a sequence lie."""

    T: int
    B: int
    N: int
    held: list[int] | None  # sequences of each step, where packed
    first: list[int] | None  # first row of each step
    starts: Tensor | None  # [T + 1] the same on the device
    last: Tensor | None  # [B] the row of each sequence's last step, on the device

    @staticmethod
    def of(input: Tensor, batch_sizes: Tensor | None) -> "Rows":
        if batch_sizes is None:
            T, B = input.shape[:2]
            return Rows(T, B, T * B, None, None, None, None)
        if input.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the lengths of a packed input are on the host and cannot be copied while a CUDA graph is captured; "
                "capture a padded input, or run this call under seqkern.backend('torch')"
            )
        held = batch_sizes.tolist()
        starts = torch.zeros(len(held) + 1, dtype=torch.int64)
        torch.cumsum(batch_sizes, 0, out=starts[1:])
        sequences = torch.arange(held[0])
        lengths = (batch_sizes > sequences[:, None]).sum(1)
        last = starts[lengths - 1] + sequences
        device = input.device
        first = starts.tolist()
        return Rows(len(held), held[0], first[-1], held, first, starts.to(device), last.to(device))

    def live(self, t: int) -> int:
        """Sequences of step t, none where it lies outside."""
        return 0 if not 0 <= t < self.T else self.B if self.held is None else self.held[t]

    def slice(self, t: int, count: int) -> slice:
        """The first rows of step t."""
        start = t * self.B if self.first is None else self.first[t]
        return slice(start, start + count)

    def ends(self, rows: Tensor, d: int) -> Tensor:
        """Of [N, ...], the row of each sequence's last step in the order of direction d."""
        if d == 1:
            return rows[: self.B]
        return rows[self.N - self.B :] if self.last is None else rows[self.last]

    def begins(self, rows: Tensor, d: int) -> Tensor:
        return self.ends(rows, 1 - d)

    def before(self, rows: Tensor, first: Tensor, d: int) -> Tensor:
        """For each row the one of the step before in the order of direction d, else the sequence's in ``first``."""
        if self.held is None:
            return torch.cat((first, rows[: self.N - self.B]) if d == 0 else (rows[self.B :], first))
        held = torch.tensor(self.held)
        index = torch.arange(self.N)  # into first, then rows
        if d == 0:
            index += self.B - torch.cat((held.new_tensor([self.B]), held[:-1])).repeat_interleave(held)
        else:
            starts = torch.repeat_interleave(torch.cumsum(held, 0) - held, held)
            b = index - starts
            there = b < torch.cat((held[1:], held.new_zeros(1))).repeat_interleave(held)
            index = torch.where(there, self.B + index + held.repeat_interleave(held), b)
        return torch.cat((first, rows))[index.to(rows.device)]


class Layer:
    """The sizes of a call, and its weights as the kernels read them."""

    def __init__(
        self, input: Tensor, batch_sizes: Tensor | None, weights: tuple[Tensor | None, ...], cell: str
    ) -> None:
        self.cell, self.name = CELLS[cell], cell
        self.step = input.dim() == 2 and batch_sizes is None
        self.rows = Rows.of(input[None] if self.step else input, batch_sizes)
        self.D = 1 if weights[5] is None else 2
        self.weights: list[Weights] = [tuple(weights[5 * d : 5 * d + 5]) for d in range(self.D)]  # type: ignore[misc]
        self.I, self.P = input.shape[-1], self.weights[0][1].shape[1]
        self.H = self.weights[0][1].shape[0] // self.cell.G
        self.dtype, self.device = input.dtype, input.device
        self.projects = self.weights[0][4] is not None
        self.biased = self.weights[0][2] is not None

    def problem(self, kernel: str) -> tuning.Problem:
        cores = self.dtype != torch.float32 or precision(self.dtype) == "tf32"
        c, sizes = self.cell, (self.rows.B, self.H, self.P, self.D)
        return tuning.Problem(kernel, self.name, c.G, c.R, c.HAS_C, self.dtype, cores, *sizes, self.projects)

    def config(self, kernel: str) -> tuning.Config | None:
        return tuning.choose(tuning.arch_of(self.device), self.problem(kernel))

    def persistent(self, kernel: str) -> tuning.Config | None:
        if self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        else:
            # The interpreter runs one program after another: none can wait for the next.
            alone = self.H <= 64 if self.cell.G == 1 else self.H <= 16 and kernel.endswith("forward")
            processors = self.rows.B * self.D * 4 if alone else 0
        return tuning.persistent_config(tuning.arch_of(self.device), processors, self.problem(kernel))

    def stacked(self, i: int) -> Tensor | None:
        """[D, ...] of weight i of both directions."""
        found = [w[i] for w in self.weights]
        if found[0] is None:
            return None
        return found[0].contiguous()[None] if self.D == 1 else torch.stack(found)  # type: ignore[arg-type]

    def joined(self, i: int) -> Tensor | None:
        """[D * rows, ...] of the same."""
        found = self.stacked(i)
        return None if found is None else found.flatten(0, 1)

    def padded(self, config: tuning.Config) -> tuple[Tensor, Tensor | None]:
        """The recurrent weights and the projection, zeros filling the tiles."""
        w, w_hr = self.stacked(1), self.stacked(4)
        assert w is not None
        across, down = config.BLOCK_K - self.P, config.BLOCK_H - self.H
        w = w.view(self.D, self.cell.G, self.H, self.P)
        if across or down:
            w = torch.nn.functional.pad(w, (0, across, 0, down))
            w_hr = None if w_hr is None else torch.nn.functional.pad(w_hr, (0, down, 0, across))
        return w, w_hr

    def spread(self, config: tuning.Config, backward: bool) -> Tensor:
        """The recurrent weights of a persistent kernel, zeros filling the tiles. Forward: [D, tiles of H, slots *
        BLOCK_H, depth], of each tile of units its rows gate by gate. Backward: [D, tiles of H, slots, slots * BLOCK_H,
        depth], of each larger tile of units and each gate the columns."""
        w, G, slots = self.stacked(1), self.cell.G, tuning.power(self.cell.G)
        assert w is not None
        w = w.view(self.D, G, self.H, self.H)
        if backward:
            w = w.mT
        block = slots * config.BLOCK_H if backward else config.BLOCK_H
        units, depth = tuning.tiled(self.H, block), tuning.tiled(self.H, config.BLOCK_K)
        pad = (0, depth - self.H, 0, units - self.H, 0, slots - G)
        w = torch.nn.functional.pad(w, pad) if any(pad) else w
        return w.reshape(self.D, slots, -1, block, depth).transpose(1, 2).contiguous()

    def constants(self, config: tuning.Config, backward: bool, depth: str) -> dict[str, Any]:
        c = self.cell
        found: dict[str, Any] = {"BWD": c.bwd} if backward else {"FWD": c.fwd}
        found |= {"G": c.G, "R": c.R, "APART": c.APART, "HAS_C": c.HAS_C, "PRECISION": precision(self.dtype)}
        return found | {"BLOCK_B": config.BLOCK_B, "BLOCK_H": config.BLOCK_H, depth: config.BLOCK_K}

    def on_device(self):
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def times(self, k: int) -> list[int]:
        """The step that each direction takes after k others."""
        return [k, self.rows.T - 1 - k][: self.D]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

"""Launchers of the recurrent kernels: implementations of ``seqkern::rnn_forward`` and ``seqkern::rnn_backward``.

Arguments, forms and results are those of the ops. A dense or packed call runs as one launch for all steps where the
weights fit on one multiprocessor or spread over many, else as one launch for each step. A dense call neither waits for
the GPU nor copies from the host, so that it can be captured in a CUDA graph; of a packed one the lengths are copied.

The reserve is [D, N, R, H] in float32, as the C++ kernels lay it out.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from seqkern.kernels import persistent, scan, step, tuning, tuning_cache
from seqkern.kernels.cells import CELLS
from seqkern.kernels.layer import Layer


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    config,
    **options: Any,
) -> None:
    kernel[grid](**arguments, **constants, num_warps=config.warps, num_stages=config.stages, **options)


@cache
def in_one_launch(cell: str, dtype: torch.dtype, device: torch.device, B: int, H: int, D: int) -> bool:
    """Whether all steps of a dense or packed call without a projection run in one launch, forward and backward."""
    c, arch = CELLS[cell], tuning.arch_of(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    with tuning_cache.forced({}):
        for way in ("forward", "backward"):
            p = tuning.Problem("", cell, c.G, c.R, c.HAS_C, dtype, dtype != torch.float32, B, H, H, D, False)
            whole, spread = (p._replace(kernel=f"{kind}_{way}") for kind in ("sequence", "persistent"))
            if not (tuning.choose(arch, whole) or tuning.persistent_config(arch, processors, spread)):
                return False
    return True


def tiles(n: int, block: int) -> int:
    return -(-n // block)


def forward(
    input: Tensor, batch_sizes: Tensor | None, hx: Tensor, cx: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``seqkern::rnn_forward``: output, h_n, c_n and the reserve."""
    *weights, cell, save = rest
    layer = Layer(input, batch_sizes, tuple(weights), cell)
    N, R, H = layer.rows.N, layer.cell.R, layer.H
    reserve = layer.empty(layer.D * N * R * H if save else 0, dtype=torch.float32)
    if N == 0:  # an empty batch
        states = [] if layer.step else hx.shape, [] if cx is None else cx.shape
        output = layer.empty(*input.shape[:-1], layer.D * layer.P)
        return output, *(layer.empty(*(shape or [0])) for shape in states), reserve
    kept = reserve if reserve.numel() else None
    with layer.on_device():
        if layer.step:
            return *_one_step(layer, input, hx, cx, kept), reserve
        x = _project_input(layer, input)
        c = None if cx is None else layer.empty(*cx.shape, dtype=torch.float32).copy_(cx)
        run, config = _whole_sequence, layer.config("sequence_forward")
        if config is None:
            run, config = _persistent, layer.persistent("persistent_forward")
        if config is None:
            run = _step_by_step
        output = run(layer, x, hx.contiguous(), c, kept, config)
        h_n = torch.stack(
            [layer.rows.ends(output[:, d * layer.P : (d + 1) * layer.P], d) for d in range(layer.D)]
        )
        c_n = layer.empty(0) if c is None else c.to(layer.dtype)
    return output.view(*input.shape[:-1], layer.D * layer.P), h_n, c_n, reserve


def _project_input(layer: Layer, input: Tensor) -> Tensor:
    """[N, D*G*H]: W_ih u + b_ih of both directions in one matmul."""
    u, w, b = input.reshape(layer.rows.N, layer.I), layer.joined(0), layer.joined(2)
    assert w is not None
    return torch.mm(u, w.t()) if b is None else torch.addmm(b, u, w.t())


def _one_step(layer: Layer, input: Tensor, hx: Tensor, cx: Tensor | None, reserve: Tensor | None):
    B, H, cell = layer.rows.B, layer.H, layer.cell
    config = layer.config("step_forward")
    assert config is not None
    w_ih, w_hh, b_ih, b_hh, w_hr = (None if w is None else w.contiguous() for w in layer.weights[0])
    assert w_ih is not None and w_hh is not None
    hx = hx.contiguous()
    h = layer.empty(B, H)
    c_n = layer.empty(0) if cx is None else layer.empty(B, H)
    _launch_step(
        layer,
        config,
        0,
        x=input.contiguous(),
        wih=w_ih,
        bih=b_ih,
        w=w_hh,
        b=b_hh,
        h=hx,
        c=hx if cell.APART else None if cx is None else cx.contiguous(),
        h_new=h,
        c_new=None if cx is None else c_n,
        reserve=reserve,
    )
    return h if w_hr is None else torch.mm(h, w_hr.t()), layer.empty(0), c_n


def _launch_step(
    layer: Layer,
    config: tuning.Config,
    k: int,
    *,
    x,
    w,
    b,
    h,
    c,
    h_new,
    c_new,
    reserve,
    wih=None,
    bih=None,
    out=None,
) -> None:
    rows = layer.rows
    arguments = {
        **{"p_x": x, "p_wih": wih, "p_bih": bih, "p_w": w, "p_b": b, "p_h": h, "p_c": c, "p_h_new": h_new},
        **{"p_c_new": c_new, "p_out": out, "p_reserve": reserve, "p_starts": rows.starts},
        **{"k": k, "T": rows.T, "B": rows.B, "I": layer.I, "H": layer.H, "P": layer.P},
    }
    live = max(rows.live(t) for t in layer.times(k))
    grid = (tiles(live, config.BLOCK_B), tiles(layer.H, config.BLOCK_H), layer.D)
    launch(step.step_forward, grid, arguments, layer.constants(config, False, "BLOCK_K"), config)


def _whole_sequence(
    layer: Layer, x: Tensor, hx: Tensor, c: Tensor | None, reserve: Tensor | None, config
) -> Tensor:
    rows, output = layer.rows, layer.empty(layer.rows.N, layer.D * layer.P)
    w, w_hr = layer.padded(config)
    arguments = {
        **{"p_x": x, "p_w": w, "p_b": layer.joined(3), "p_whr": w_hr, "p_h": hx, "p_c": c, "p_out": output},
        **{
            "p_reserve": reserve,
            "p_starts": rows.starts,
            "T": rows.T,
            "B": rows.B,
            "H": layer.H,
            "P": layer.P,
        },
    }
    grid = (tiles(rows.B, config.BLOCK_B), layer.D)
    launch(scan.sequence_forward, grid, arguments, layer.constants(config, False, "BLOCK_P"), config)
    return output


def _persistent(
    layer: Layer, x: Tensor, hx: Tensor, c: Tensor | None, reserve: Tensor | None, config
) -> Tensor:
    rows, D, H = layer.rows, layer.D, layer.H
    output = layer.empty(rows.N, D * H)
    ring = layer.empty(2, *hx.shape)
    ring[0] = hx
    w = layer.spread(config, False)
    arguments = {
        **{"p_x": x, "p_w": w, "p_b": layer.joined(3), "p_ring": ring, "p_c": c, "p_out": output},
        **{"p_reserve": reserve, "p_starts": rows.starts},
        **{"T": rows.T, "B": rows.B, "H": H},
    }
    _launch_persistent(layer, arguments, config, False)
    return output


def _launch_persistent(
    layer: Layer, arguments: dict[str, Any], config: tuning.Config, backward: bool
) -> None:
    tiles_b, slots = tiles(layer.rows.B, config.BLOCK_B), tuning.power(layer.cell.G)
    # In the backward as many programs share a tile of units as there are slots.
    units = tuning.tiled(layer.H, slots * config.BLOCK_H) if backward else layer.H
    grid = (tiles(units, config.BLOCK_H), tiles_b, layer.D)
    # A line of the cache for each counter.
    count = torch.zeros((layer.D, tiles_b, 1 + grid[0], 32), dtype=torch.int32, device=layer.device)
    constants = layer.constants(config, backward, "BLOCK_K")
    constants |= {"SLOTS": slots, "CHUNKS": tiles(layer.H, config.BLOCK_K)}
    kernel = persistent.persistent_backward if backward else persistent.persistent_forward
    launch(kernel, grid, {**arguments, "p_count": count}, constants, config, launch_cooperative_grid=True)


def _step_by_step(layer: Layer, x: Tensor, hx: Tensor, c: Tensor | None, reserve: Tensor | None, _) -> Tensor:
    rows, D, P = layer.rows, layer.D, layer.P
    config = layer.config("step_forward")
    assert config is not None
    output = layer.empty(rows.N, D * P)
    # h before and after a step, in turn. Both start as hx, from where a sequence of any length begins.
    h = hx.expand(2, *hx.shape).contiguous()
    state = hx.float().clone() if layer.cell.APART else c
    w, b = layer.joined(1), layer.joined(3)
    full = layer.empty(D, rows.B, layer.H) if layer.projects else None  # h before its projection
    for k in range(rows.T):
        old, new = h[k % 2], h[(k + 1) % 2]
        into = {"h_new": new, "out": output} if full is None else {"h_new": full}
        _launch_step(layer, config, k, x=x, w=w, b=b, h=old, c=state, c_new=state, reserve=reserve, **into)
        if full is None:
            continue
        for d, t in enumerate(layer.times(k)):
            live, w_hr = rows.live(t), layer.weights[d][4]
            assert w_hr is not None
            new[d, :live] = torch.mm(full[d, :live], w_hr.t())
            output[rows.slice(t, live), d * P : (d + 1) * P] = new[d, :live]
    return output


def backward(
    grad_output: Tensor, grad_h_n: Tensor, grad_c_n: Tensor, output: Tensor, reserve: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """``seqkern::rnn_backward``: the gradient of each floating-point argument, [0] for what is absent or not needed."""
    *tensors, cell, need_input, need_weights = rest
    input, batch_sizes, hx, cx, *weights = tensors
    layer = Layer(input, batch_sizes, tuple(weights), cell)
    needed = [input if need_input else None, hx, cx, *(weights if need_weights else [None] * len(weights))]
    if layer.rows.N == 0:
        return tuple(layer.empty(0) if t is None else torch.zeros_like(t) for t in needed)
    with layer.on_device():
        flow = Flow(layer, grad_output, grad_h_n, grad_c_n, output, reserve, hx, cx)
        config = None if layer.step else layer.config("sequence_backward")
        spread = None if config is not None or layer.step else layer.persistent("persistent_backward")
        if config is not None:
            flow.whole_sequence(config)
        elif spread is not None:
            flow.persistent(spread)
        else:
            flow.step_by_step()
        found = [flow.d_input() if need_input else None, flow.d_hx, flow.d_cx]
        for d in range(2):
            found += flow.d_weights(d, input) if need_weights and d < layer.D else [None] * 5
    return tuple(layer.empty(0) if t is None else t for t in found)


class Flow:
    """The gradients on their way back through a layer: of the pre-activations by the kernels, then the rest."""

    def __init__(self, layer: Layer, grad_output, grad_h_n, grad_c_n, output, reserve, hx, cx) -> None:
        N, B, D, H, P = layer.rows.N, layer.rows.B, layer.D, layer.H, layer.P
        self.layer, self.reserve = layer, reserve
        self.output = output.reshape(N, D * P).contiguous()
        self.hx = hx.reshape(D, B, P).contiguous()
        self.cx = None if cx is None else cx.reshape(D, B, H).contiguous()
        # Where projected, the gradient of the output grows into that of h in place.
        grad = grad_output.reshape(N, D * P)
        self.grad = grad.clone(memory_format=torch.contiguous_format) if layer.projects else grad.contiguous()
        wide = {"dtype": torch.float32, "device": layer.device}
        self.dh = torch.zeros((D, B, P), **wide)
        if not layer.step:
            self.dh.copy_(grad_h_n)
        self.dc = None if cx is None else torch.empty((D, B, H), **wide).copy_(grad_c_n.reshape(D, B, H))
        self.dx = layer.empty(N, D * layer.cell.G * H)
        self.dr = torch.empty_like(self.dx) if layer.cell.APART else self.dx

    def _arguments(self) -> dict[str, Any]:
        layer, rows = self.layer, self.layer.rows
        return {
            **{"p_g": self.grad, "p_h": self.hx, "p_c": self.cx, "p_out": self.output},
            **{
                "p_reserve": self.reserve if layer.cell.R else None,
                "p_dh": self.dh,
                "p_dc": self.dc,
                "p_dx": self.dx,
            },
            **{"p_dr": self.dr if layer.cell.APART else None, "p_starts": rows.starts},
            **{"T": rows.T, "B": rows.B, "H": layer.H},
        }

    def whole_sequence(self, config: tuning.Config) -> None:
        layer = self.layer
        w, w_hr = layer.padded(config)
        arguments = {**self._arguments(), "p_w": w, "p_whr": w_hr, "P": layer.P}
        grid = (tiles(layer.rows.B, config.BLOCK_B), layer.D)
        launch(scan.sequence_backward, grid, arguments, layer.constants(config, True, "BLOCK_P"), config)
        self.d_hx = self._state(self.dh)
        self.d_cx = None if self.dc is None else self._state(self.dc)

    def persistent(self, config: tuning.Config) -> None:
        layer, slots = self.layer, tuning.power(self.layer.cell.G)
        part = None  # what the gates add to the gradient of h
        if slots > 1:
            rows = (
                tuning.tiled(layer.rows.B, config.BLOCK_B)
                * slots
                * tuning.tiled(layer.H, slots * config.BLOCK_H)
            )
            part = layer.empty(layer.D * rows, dtype=torch.float32)
        arguments = {**self._arguments(), "p_w": layer.spread(config, True), "p_dr": self.dr, "p_part": part}
        _launch_persistent(layer, arguments, config, True)
        self._first_states()

    def step_by_step(self) -> None:
        layer, rows, P = self.layer, self.layer.rows, self.layer.P
        config = layer.config("step_backward")
        assert config is not None
        K = P if layer.projects else layer.cell.G * layer.H
        arguments = {**self._arguments(), "p_m": layer.joined(4 if layer.projects else 1), "K": K}
        arguments["p_v"] = self.grad if layer.projects else self.dr
        if layer.projects:
            arguments |= {"p_g": None, "p_out": None, "p_dh": None}
            for d in range(layer.D):
                self._end(self.grad, d, self.dh[d])
        constants = layer.constants(config, True, "BLOCK_K")
        for k in range(rows.T):
            times = layer.times(rows.T - 1 - k)
            for d, t in enumerate(times if layer.projects else ()):
                after = t - 1 if d else t + 1
                live = min(rows.live(after), rows.live(t))
                if live:
                    grad = self.grad[rows.slice(t, live), d * P : (d + 1) * P]
                    grad.addmm_(self._gates(self.dr, d)[rows.slice(after, live)], layer.weights[d][1])
            live = max(rows.live(t) for t in times)
            grid = (tiles(live, config.BLOCK_B), tiles(layer.H, config.BLOCK_H), layer.D)
            launch(step.step_backward, grid, {**arguments, "k": k}, constants, config)
        self._first_states()

    def _first_states(self) -> None:
        """The gradients of the first states: of h what came by the matmul, where APART with what passed it by."""
        layer, found = self.layer, []
        for d in range(layer.D):
            first = torch.mm(layer.rows.begins(self._gates(self.dr, d), d), layer.weights[d][1])
            found.append(first + self.dh[d] if layer.cell.APART else first)
        self.d_hx = self._state(torch.stack(found))
        self.d_cx = None if self.dc is None else self._state(self.dc)

    def _end(self, grad: Tensor, d: int, last: Tensor) -> None:
        """Adds the gradient of h_n to that of each sequence's last output."""
        layer, rows = self.layer, self.layer.rows
        columns = slice(d * layer.P, (d + 1) * layer.P)
        if d == 0 and rows.last is not None:
            grad[rows.last, columns] = (grad[rows.last, columns] + last).to(layer.dtype)
        else:
            rows.ends(grad, d)[:, columns].add_(last)

    def _state(self, t: Tensor) -> Tensor:
        t = t.to(self.layer.dtype)
        return t[0] if self.layer.step else t

    def _gates(self, t: Tensor, d: int) -> Tensor:
        width = self.layer.cell.G * self.layer.H
        return t[:, d * width : (d + 1) * width]

    def d_input(self) -> Tensor:
        layer = self.layer
        w = layer.joined(0)
        assert w is not None
        lead = (layer.rows.N,) if layer.step or layer.rows.held is not None else (layer.rows.T, layer.rows.B)
        return torch.mm(self.dx, w).view(*lead, layer.I)

    def d_weights(self, d: int, input: Tensor) -> list[Tensor | None]:
        """Of w_ih, w_hh, b_ih, b_hh and w_hr in direction d, each one matmul or one sum over all rows."""
        layer, N, H, P = self.layer, self.layer.rows.N, self.layer.H, self.layer.P
        dx, dr = self._gates(self.dx, d), self._gates(self.dr, d)
        own = self.output[:, d * P : (d + 1) * P]
        found: list[Tensor | None] = [
            torch.mm(dx.t(), input.reshape(N, layer.I)),
            torch.mm(dr.t(), layer.rows.before(own, self.hx[d], d)),
        ]
        found += [dx.sum(0), dr.sum(0)] if layer.biased else [None, None]
        if not layer.projects:
            return [*found, None]
        kept = self.reserve.view(layer.D, N, layer.cell.R, H)[d]
        full = (kept[:, 3] * kept[:, 4].tanh()).to(layer.dtype)  # h before its projection
        return [*found, torch.mm(self.grad[:, d * P : (d + 1) * P].t(), full)]

"""Recurrent layers and cells as pure functions of tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkern import spec
from seqkern.ops import _backend, _linear_backends, _torchs_own
from seqkern.ops._checks import check_cell, check_layers, check_state_pair, check_uniform
from seqkern.ops.rnn import direct_rnn

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]

_GATES = {name: cell.gates for name, cell in spec.CELLS.items()}
_NO_BACKWARD: tuple[None, ...] = (None,) * 5
_forward = torch.ops.seqkern.rnn_forward.default
# Past a Python function around each.
_step = torch.ops.seqkern.rnn_step.default._op if _backend.CPU_READY else None
_stack = torch.ops.seqkern.rnn_layers.default._op if _backend.CPU_READY else None
_FLAT = {2: (0, 1, None, None, None), 3: (0, 1, None, None, 2), 4: (0, 1, 2, 3, None), 5: (0, 1, 2, 3, 4)}

Weights = tuple[Tensor | None, ...]  # w_ih, w_hh, b_ih, b_hh, w_hr of one direction


def _call_op(tensors: Weights, cell: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, which keeps what a backward needs where a gradient is needed. In torch.jit.trace, whose check compares
    the graph with one made without gradients, it keeps nothing: a backward through a trace computes it anew."""
    if not _backend.is_looked_on():
        return direct_rnn(*tensors, cell, _backend.needs_grad(tensors))
    return _forward(*tensors, cell, _backend.expects_grad(tensors))


def _name(backend: str | None, op: str, tensors: Weights, packed: bool = False) -> str:
    if backend is None and not _backend.special and _backend.serves_cpu(tensors):
        return "torch" if _backend.torch_outruns(op, tensors) else "cpu"
    check_uniform(op, packed, tensors)
    return _backend.choose(_backend.Call(op, tensors), backend).name


def _short_step(
    cell: str,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """A step that the compiled kernels serve at once. (None, None): the long way finds out who serves it."""
    if not _step or not _backend.nobody_looks_on((input, hx, w_ih, w_hh), (cx, b_ih, b_hh)):
        return None, None
    try:
        return _step(input, hx, cx, w_ih, w_hh, b_ih, b_hh, cell)
    except NotImplementedError:  # a layout of which the dispatcher knows nothing here
        return None, None


def _short_layers(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`_short_step` for a stack of layers over a dense batch."""
    none = (None, None, None)
    plain = (
        type(weights) is list and type(num_layers) is int and type(bidirectional) is type(batch_first) is bool
    )
    if not _stack or not plain or not _backend.nobody_looks_on((input, *weights), (hx, cx)):
        return none
    if input.dtype is torch.bfloat16 and _linear_backends.BF16_TILES:
        return none  # whose kernel is the faster one goes by the sizes
    try:
        return _stack(input, hx, cx, weights, num_layers, bidirectional, batch_first, cell)
    except NotImplementedError:
        return none


def _cell(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    if backend is None and hx is not None:
        output, c_n = _short_step(cell, input, hx, cx, w_ih, w_hh, b_ih, b_hh)
        if output is not None:
            return output, c_n
    if (b_ih is None) != (b_hh is None):  # torch's kernels take one bias
        b_ih, b_hh = (torch.zeros_like(b) if a is None else a for a, b in ((b_ih, b_hh), (b_hh, b_ih)))  # type: ignore[arg-type]
    check_cell(cell, _GATES[cell], input, hx, cx, w_ih, w_hh, b_ih, b_hh)
    unbatched = input.dim() == 1
    if unbatched:
        input = input.unsqueeze(0)
        hx = None if hx is None else hx.unsqueeze(0)
        cx = None if cx is None else cx.unsqueeze(0)
    if hx is None:
        hx = input.new_zeros((input.shape[0], w_hh.shape[1]))
        cx = hx if cell == "lstm" else None
    tensors = (input, hx, cx, w_ih, w_hh, b_ih, b_hh)
    name = _name(backend, f"{cell}_cell", tensors)
    if name in _backend.BY_OPS:
        output, _, c_n, _ = _call_op((input, None, hx, cx, w_ih, w_hh, b_ih, b_hh, None, *_NO_BACKWARD), cell)
    elif name == "torch":
        kernel = getattr(torch._VF, f"{cell}_cell")  # type: ignore[attr-defined]
        found = _torchs_own.call(kernel, input, hx if cx is None else (hx, cx), w_ih, w_hh, b_ih, b_hh)
        output, c_n = (found, None) if cx is None else found
    else:
        output, *c = spec.step(cell, input, (hx,) if cx is None else (hx, cx), (w_ih, w_hh, b_ih, b_hh, None))
        c_n = c[0] if c else None
    if cx is None:
        return (output.squeeze(0) if unbatched else output), None
    assert c_n is not None
    return (output.squeeze(0), c_n.squeeze(0)) if unbatched else (output, c_n)


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    r"""One step of a simple recurrent network.

    .. math:: h' = \tanh(W_{ih} u + b_{ih} + W_{hh} h + b_{hh}) \quad\text{or}\quad \max(\ldots, 0)

    Args:
        input: [B, I] or [I].
        hx: h, [B, H] or [H]; zeros if None.
        w_ih, w_hh: [H, I] and [H, H].
        b_ih, b_hh: [H], or None.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        backend: forces one of `seqkern.ops._backend.BACKENDS` for this call.

    Returns:
        h', of the shape of ``hx``.

    Raises:
        ValueError: wrong rank, unknown nonlinearity or backend.
        RuntimeError: wrong sizes, dtypes or devices, or a forced backend that cannot serve.

    Source: Elman 1990, doi:10.1207/s15516709cog1402_1; the arguments are ``torch.rnn_tanh_cell``'s.

    >>> h = rnn_cell(torch.ones(2, 3), None, torch.zeros(4, 3), torch.zeros(4, 4), torch.ones(4), torch.zeros(4))
    >>> h.shape, round(h[0, 0].item(), 4)
    (torch.Size([2, 4]), 0.7616)
    """
    return _cell(_nonlinear(nonlinearity), input, hx, None, w_ih, w_hh, b_ih, b_hh, backend)[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of a long short-term memory.

    .. math::
        i, f, o &= \sigma(W_{ih} u + b_{ih} + W_{hh} h + b_{hh})_{i,f,o} \qquad
        g = \tanh(W_{ih} u + b_{ih} + W_{hh} h + b_{hh})_g \\
        c' &= f \odot c + i \odot g \qquad h' = o \odot \tanh(c')

    Args:
        input: [B, I] or [I].
        hx: (h, c), each [B, H] or [H]; zeros if None.
        w_ih, w_hh: [4*H, I] and [4*H, H], gate order i, f, g, o.
        b_ih, b_hh: [4*H], or None.
        backend: forces one of `seqkern.ops._backend.BACKENDS` for this call.

    Returns:
        (h', c'), of the shapes of ``hx``.

    Raises:
        ValueError: wrong rank or unknown backend.
        RuntimeError: wrong sizes, dtypes or devices, or a forced backend that cannot serve.

    Source: Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735; the arguments are ``torch.lstm_cell``'s.

    >>> h, c = lstm_cell(torch.ones(2, 3), None, torch.zeros(16, 3), torch.zeros(16, 4))
    >>> h.shape, c.shape
    (torch.Size([2, 4]), torch.Size([2, 4]))
    """
    h, c = check_state_pair(hx, RuntimeError)
    output, c_n = _cell("lstm", input, h, c, w_ih, w_hh, b_ih, b_hh, backend)
    assert c_n is not None
    return output, c_n


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""One step of a gated recurrent unit.

    .. math::
        r, z &= \sigma(W_{ih} u + b_{ih} + W_{hh} h + b_{hh})_{r,z} \\
        n &= \tanh((W_{ih} u + b_{ih})_n + r \odot (W_{hh} h + b_{hh})_n) \\
        h' &= (1 - z) \odot n + z \odot h

    Args:
        input: [B, I] or [I].
        hx: h, [B, H] or [H]; zeros if None.
        w_ih, w_hh: [3*H, I] and [3*H, H], gate order r, z, n.
        b_ih, b_hh: [3*H], or None.
        backend: forces one of `seqkern.ops._backend.BACKENDS` for this call.

    Returns:
        h', of the shape of ``hx``.

    Raises:
        ValueError: wrong rank or unknown backend.
        RuntimeError: wrong sizes, dtypes or devices, or a forced backend that cannot serve.

    Source: Cho et al. 2014, arXiv:1406.1078; the arguments are ``torch.gru_cell``'s.

    >>> h = gru_cell(torch.ones(3), torch.ones(4), torch.zeros(12, 3), torch.zeros(12, 4))
    >>> h
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    return _cell("gru", input, hx, None, w_ih, w_hh, b_ih, b_hh, backend)[0]


def _nonlinear(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity is {nonlinearity!r}, expected 'tanh' or 'relu'")
    return f"rnn_{nonlinearity}"


def _one_layer(
    name: str,
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    weights: Weights,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if name in _backend.BY_OPS:
        output, h_n, c_n, _ = _call_op((input, batch_sizes, hx, cx, *weights), cell)
        return output, h_n, c_n
    backward = None if weights[5] is None else weights[5:]
    return spec.layer(cell, input, batch_sizes, hx, cx, weights[:5], backward)


def _torch_layers(cell, input, batch_sizes, hx, cx, weights, num_layers, dropout, training, bidirectional):
    per_direction = len(weights) // (num_layers * (2 if bidirectional else 1))
    state = hx if cx is None else (hx, cx)
    options = (list(weights), per_direction >= 4, num_layers, dropout, training, bidirectional)
    kernel = getattr(torch._VF, cell)  # type: ignore[attr-defined]
    if batch_sizes is None:
        found = _torchs_own.call(kernel, input, state, *options, False)
    else:
        found = _torchs_own.call(kernel, input, batch_sizes, state, *options)
    return found if cx is not None else (*found, None)


def _cast_without_torch(
    cell: str, input: Tensor, w_hh: Tensor, batch_sizes: Tensor | None
) -> torch.dtype | None:
    """What autocast makes of an LSTM, where torch's own then finds no kernel for it on this processor and raises: of
    those that go to oneDNN, which are neither packed nor projected nor empty."""
    if cell != "lstm" or not input.is_cpu or not torch.is_autocast_enabled("cpu"):
        return None
    projected = w_hh.shape[0] != 4 * w_hh.shape[1]
    if batch_sizes is not None or projected or not input.numel() or not torch.backends.mkldnn.enabled:
        return None
    lower = torch.get_autocast_dtype("cpu")
    return lower if lower in _linear_backends.TERM_BY_TERM else None


def _layers(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    training: bool,
    batch_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if backend is None and batch_sizes is None and not (dropout and training and num_layers != 1):
        output, h_n, c_n = _short_layers(cell, input, hx, cx, weights, num_layers, bidirectional, batch_first)
        if output is not None:
            return output, h_n, c_n  # type: ignore[return-value]
    directions = 2 if bidirectional else 1
    check_layers(cell, _GATES[cell], input, hx, cx, weights, batch_sizes, num_layers, directions, batch_first)
    lower = _cast_without_torch(cell, input, weights[1], batch_sizes)
    if lower is not None:
        given = (None if t is None else t.to(lower) for t in (input, hx, cx, *weights))
        input, hx, cx, *weights = given  # type: ignore[assignment]
        with torch.autocast("cpu", enabled=False):
            return _layers(
                cell,
                input,
                hx,
                cx,
                weights,
                batch_sizes,
                num_layers,
                bidirectional,
                dropout,
                training,
                batch_first,
                backend,
            )
    unbatched = batch_sizes is None and input.dim() == 2
    if unbatched:
        input = input.unsqueeze(1)  # [T, 1, I]
        hx = None if hx is None else hx.unsqueeze(1)
        cx = None if cx is None else cx.unsqueeze(1)
    elif batch_first and batch_sizes is None:
        input = input.transpose(0, 1)
    per_direction = len(weights) // (num_layers * directions)
    if hx is None:
        # Not int(): torch.export follows a number that is read from a tensor only so.
        batch: Any = input.shape[1] if batch_sizes is None else batch_sizes[0].item()
        w_hh = weights[1]
        hx = input.new_zeros((num_layers * directions, batch, w_hh.shape[1]))
        if cell == "lstm":
            hidden = w_hh.shape[0] // 4
            cx = hx if hidden == w_hh.shape[1] else input.new_zeros((num_layers * directions, batch, hidden))
    name = _name(backend, cell, (input, hx, cx, *weights), batch_sizes is not None)
    device = input.device.type
    if name == "reference" and cell == "lstm" and torch.is_autocast_enabled(device):
        # torch casts all that an LSTM is given, and the matmuls alone of a GRU or RNN
        lower = torch.get_autocast_dtype(device)
        input, hx, cx, *weights = (t.to(lower) for t in (input, hx, cx, *weights))  # type: ignore[union-attr]
    if name == "torch":
        output, h_n, c_n = _torch_layers(
            cell, input, batch_sizes, hx, cx, weights, num_layers, dropout, training, bidirectional
        )
    else:
        output, h_n, c_n = input, [], []
        if batch_first and batch_sizes is None and not unbatched and _keeps_input(weights):
            output = input.contiguous()
        for layer in range(num_layers):
            if layer and dropout and training:
                output = torch.dropout(output, dropout, True)
            at = layer * directions
            flat: list[Tensor | None] = []
            for d in range(2):
                own = (
                    weights[(at + d) * per_direction : (at + d + 1) * per_direction] if d < directions else ()
                )
                flat += [None if not own or i is None else own[i] for i in _FLAT[per_direction]]
            h = hx if num_layers == 1 else hx[at : at + directions]
            c = cx if num_layers == 1 or cx is None else cx[at : at + directions]
            output, h, c = _one_layer(name, cell, output, batch_sizes, h, c, tuple(flat))
            h_n.append(h)
            c_n.append(c)
        h_n = h_n[0] if num_layers == 1 else torch.cat(h_n)
        c_n = None if cx is None else c_n[0] if num_layers == 1 else torch.cat(c_n)
    if unbatched:
        return output.squeeze(1), h_n.squeeze(1), None if c_n is None else c_n.squeeze(1)
    if batch_first and batch_sizes is None:
        output = _batch_first(cell, output)
    return output, h_n, c_n


def _keeps_input(weights: Sequence[Tensor]) -> bool:
    """Whether the gradient reads the input. Where its batch stands first torch saves a copy, and callers may write to
    the input, as by ``x += layer(x)``."""
    return not torch.compiler.is_compiling() and _backend.needs_grad(weights)


def _batch_first(cell: str, output: Tensor) -> Tensor:
    """[T, B, ..] as [B, T, ..]: of an LSTM a view, which nobody may write to in some circumstances, of the others the
    tensor itself, as torch gives them."""
    if cell == "lstm" or _backend.is_looked_on() or output._is_view():
        return output.transpose(0, 1)
    return output.transpose_(0, 1) if output.is_cpu else output.transpose(0, 1)  # cuDNN has saved it


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""A stack of long short-term memory layers over a sequence.

    .. math::
        i_t, f_t, o_t &= \sigma(W_{ih} u_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})_{i,f,o} \\
        g_t &= \tanh(W_{ih} u_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})_g \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \qquad h_t = W_{hr}\,(o_t \odot \tanh(c_t))

    Args:
        input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] for a single sequence, or packed [N, I] with
            ``batch_sizes``.
        hx: (h, c): [layers*D, B, P] and [layers*D, B, H], without B for a single sequence; zeros if None.
        weights: torch's flat list: for each layer and direction w_ih [4*H, I], w_hh [4*H, P], then b_ih and b_hh
            [4*H] where there are biases, then w_hr [P, H] where the layer projects. Gate order i, f, g, o.
        batch_sizes: how many sequences each step of a packed input holds: int64, on the CPU, non-increasing.
        dropout: probability of zeroing an output between layers, while ``training``.
        backend: forces one of `seqkern.ops._backend.BACKENDS` for this call.

    Returns:
        output in the layout of ``input`` with D*P features, and (h_n, c_n) in the layout of ``hx``.

    Raises:
        ValueError: wrong rank, a dtype that is not the weights', unknown backend.
        RuntimeError: wrong sizes, mixed devices, a sequence of length zero, a forced backend that cannot serve.

    Source: Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735; projection: Sak, Senior and Beaufays
    2014, arXiv:1402.1128.

    >>> m = torch.nn.LSTM(3, 4)
    >>> output, (h_n, c_n) = lstm(torch.ones(5, 2, 3), None, list(m.parameters()))
    >>> output.shape, torch.equal(output[-1], h_n[0])
    (torch.Size([5, 2, 4]), True)
    """
    h, c = check_state_pair(hx)
    options = (weights, batch_sizes, num_layers, bidirectional, dropout, training, batch_first, backend)
    output, h_n, c_n = _layers("lstm", input, h, c, *options)
    assert c_n is not None
    return output, (h_n, c_n)


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A stack of gated recurrent unit layers over a sequence.

    .. math::
        r_t, z_t &= \sigma(W_{ih} u_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})_{r,z} \\
        n_t &= \tanh((W_{ih} u_t + b_{ih})_n + r_t \odot (W_{hh} h_{t-1} + b_{hh})_n) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Arguments, shapes and errors are those of `lstm`, with one state h [layers*D, B, H], three gates in the order
    r, z, n, and no projection. Returns output and h_n.

    Source: Cho et al. 2014, arXiv:1406.1078.

    >>> m = torch.nn.GRU(3, 4, bidirectional=True)
    >>> output, h_n = gru(torch.ones(5, 2, 3), None, list(m.parameters()), bidirectional=True)
    >>> output.shape, h_n.shape
    (torch.Size([5, 2, 8]), torch.Size([2, 2, 4]))
    """
    options = (weights, batch_sizes, num_layers, bidirectional, dropout, training, batch_first, backend)
    output, h_n, _ = _layers("gru", input, hx, None, *options)
    return output, h_n


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    batch_sizes: Tensor | None = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A stack of simple recurrent layers over a sequence.

    .. math:: h_t = \tanh(W_{ih} u_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}) \quad\text{or}\quad \max(\ldots, 0)

    Arguments, shapes and errors are those of `lstm`, with one state h [layers*D, B, H], one gate, no projection, and
    ``nonlinearity`` ``"tanh"`` or ``"relu"``. Returns output and h_n.

    Source: Elman 1990, doi:10.1207/s15516709cog1402_1.

    >>> m = torch.nn.RNN(3, 4, nonlinearity="relu")
    >>> output, h_n = rnn(torch.ones(5, 3), None, list(m.parameters()), nonlinearity="relu")
    >>> output.shape, h_n.shape
    (torch.Size([5, 4]), torch.Size([1, 4]))
    """
    options = (weights, batch_sizes, num_layers, bidirectional, dropout, training, batch_first, backend)
    output, h_n, _ = _layers(_nonlinear(nonlinearity), input, hx, None, *options)
    return output, h_n

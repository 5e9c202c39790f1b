"""Recurrent layers as pure functions of tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkern.functional._recurrent import Weights, backend_name, call_op, rnn_of
from seqkern.ops import _backend, _hardware, _linear_backends, _surroundings, _torchs_own
from seqkern.ops._recurrent_checks import check_layers, check_state_pair
from seqkern.ops.rnn import run_spec

# Past a Python function around it.
_stack = torch.ops.seqkern.rnn_layers.default._op if _hardware.CPU_READY else None
_FLAT = {2: (0, 1, None, None, None), 3: (0, 1, None, None, 2), 4: (0, 1, 2, 3, None), 5: (0, 1, 2, 3, 4)}


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


def _one_layer(
    name: str,
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    weights: Weights,
) -> tuple[Tensor, Tensor, Tensor | None]:
    tensors = (input, batch_sizes, hx, cx, *weights)
    if name in _backend.BY_OPS:
        output, h_n, c_n, _ = call_op(tensors, cell)
        return output, h_n, c_n
    return run_spec(tensors, cell)  # type: ignore[return-value]  # a layer has h_n


def _our_layers(name, cell, input, batch_sizes, hx, cx, weights, num_layers, dropout, directions):
    per_direction = len(weights) // (num_layers * directions)
    output, h_n, c_n = input, [], []
    for layer in range(num_layers):
        if layer and dropout:
            output = torch.dropout(output, dropout, True)
        at = layer * directions
        flat: list[Tensor | None] = []
        for d in range(2):
            own = weights[(at + d) * per_direction : (at + d + 1) * per_direction] if d < directions else ()
            flat += [None if not own or i is None else own[i] for i in _FLAT[per_direction]]
        h = hx if num_layers == 1 else hx[at : at + directions]
        c = cx if num_layers == 1 or cx is None else cx[at : at + directions]
        output, h, c = _one_layer(name, cell, output, batch_sizes, h, c, tuple(flat))
        h_n.append(h)
        c_n.append(c)
    if num_layers == 1:
        return output, h_n[0], None if cx is None else c_n[0]
    return output, torch.cat(h_n), None if cx is None else torch.cat(c_n)


def _zero_states(
    cell: str, input: Tensor, batch_sizes: Tensor | None, w_hh: Tensor, count: int
) -> tuple[Tensor, Tensor | None]:
    # Not int(): torch.export follows a number that is read from a tensor only so.
    batch: Any = input.shape[1] if batch_sizes is None else batch_sizes[0].item()
    hx = input.new_zeros((count, batch, w_hh.shape[1]))
    if cell != "lstm":
        return hx, None
    hidden = w_hh.shape[0] // 4
    return hx, hx if hidden == w_hh.shape[1] else input.new_zeros((count, batch, hidden))


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
    check_layers(cell, input, hx, cx, weights, batch_sizes, num_layers, directions, batch_first)
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
    if hx is None:
        hx, cx = _zero_states(cell, input, batch_sizes, weights[1], num_layers * directions)
    name = backend_name(backend, cell, (input, hx, cx, *weights), batch_sizes is not None)
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
        if batch_first and batch_sizes is None and not unbatched and _keeps_input(weights):
            input = input.contiguous()
        drop = dropout if training else 0.0
        output, h_n, c_n = _our_layers(
            name, cell, input, batch_sizes, hx, cx, weights, num_layers, drop, directions
        )
    if unbatched:
        return output.squeeze(1), h_n.squeeze(1), None if c_n is None else c_n.squeeze(1)
    if batch_first and batch_sizes is None:
        output = _batch_first(cell, output)
    return output, h_n, c_n


def _keeps_input(weights: Sequence[Tensor]) -> bool:
    """Whether the gradient reads the input. Where its batch stands first torch saves a copy, and callers may write to
    the input, as by ``x += layer(x)``."""
    return not torch.compiler.is_compiling() and _surroundings.needs_grad(weights)


def _batch_first(cell: str, output: Tensor) -> Tensor:
    """[T, B, ..] as [B, T, ..]: of an LSTM a view, which nobody may write to in some circumstances, of the others the
    tensor itself, as torch gives them."""
    if cell == "lstm" or _surroundings.is_looked_on() or output._is_view():
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
        hx: (h, c): [layers*dirs, B, P] and [layers*dirs, B, H], without B for a single sequence; zeros if None.
        weights: torch's flat list: for each layer and direction w_ih [4*H, I], w_hh [4*H, P], then b_ih and b_hh
            [4*H] where there are biases, then w_hr [P, H] where the layer projects. Gate order i, f, g, o.
        batch_sizes: how many sequences each step of a packed input holds: int64, on the CPU, non-increasing.
        num_layers, bidirectional: how ``weights`` are grouped: ``num_layers`` layers of ``dirs`` = 2 directions, or 1.
        dropout, training: the probability of zeroing an output between layers, while ``training``.
        batch_first: whether a dense input, and the output, is [B, T, ...].
        backend: forces a backend for this call, before `seqkern.backend` does.

    Returns:
        output in the layout of ``input`` with dirs*P features, and (h_n, c_n) in the layout of ``hx``.

    T, B, I, H and P are steps, batch, input size, hidden size, and the size of h: H, or what the layer projects to.

    Raises:
        ValueError: wrong rank, a dtype that is not the weights' (both RuntimeError of packed input), unknown backend.
        RuntimeError: wrong sizes, mixed devices, a sequence of length zero, a forced backend that cannot serve.
        TypeError, AttributeError, IndexError: no tensors, or not two states, as torch's module raises them.

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

    Arguments, shapes and errors are those of `lstm`, with one state h [layers*dirs, B, H], three gates in the order
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

    Arguments, shapes and errors are those of `lstm`, with one state h [layers*dirs, B, H], one gate, no projection, and
    ``nonlinearity`` ``"tanh"`` or ``"relu"``. Returns output and h_n.

    Source: Elman 1990, doi:10.1207/s15516709cog1402_1.

    >>> m = torch.nn.RNN(3, 4, nonlinearity="relu")
    >>> output, h_n = rnn(torch.ones(5, 3), None, list(m.parameters()), nonlinearity="relu")
    >>> output.shape, h_n.shape
    (torch.Size([5, 4]), torch.Size([1, 4]))
    """
    options = (weights, batch_sizes, num_layers, bidirectional, dropout, training, batch_first, backend)
    output, h_n, _ = _layers(rnn_of(nonlinearity), input, hx, None, *options)
    return output, h_n

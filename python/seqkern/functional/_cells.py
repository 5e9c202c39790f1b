"""Recurrent cells as pure functions of tensors."""

import torch
from torch import Tensor

from seqkern.functional._recurrent import NO_BACKWARD, backend_name, call_op, rnn_of
from seqkern.ops import _backend, _hardware, _torchs_own
from seqkern.ops._recurrent_checks import check_cell, check_state_pair
from seqkern.ops.rnn import run_spec

# Past a Python function around it.
_step = torch.ops.seqkern.rnn_step.default._op if _hardware.CPU_READY else None


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
    check_cell(cell, input, hx, cx, w_ih, w_hh, b_ih, b_hh)
    unbatched = input.dim() == 1
    if unbatched:
        input = input.unsqueeze(0)
        hx = None if hx is None else hx.unsqueeze(0)
        cx = None if cx is None else cx.unsqueeze(0)
    if hx is None:
        hx = torch.zeros(input.shape[0], w_hh.shape[1], dtype=input.dtype, device=input.device)
        cx = hx if cell == "lstm" else None
    tensors = (input, hx, cx, w_ih, w_hh, b_ih, b_hh)
    with_lengths = (input, None, hx, cx, w_ih, w_hh, b_ih, b_hh, None, *NO_BACKWARD)
    name = backend_name(backend, f"{cell}_cell", tensors)
    if name in _backend.BY_OPS:
        output, _, c_n, _ = call_op(with_lengths, cell)
    elif name == "torch":
        kernel = getattr(torch._VF, f"{cell}_cell")  # type: ignore[attr-defined]
        found = _torchs_own.call(kernel, input, hx if cx is None else (hx, cx), w_ih, w_hh, b_ih, b_hh)
        output, c_n = (found, None) if cx is None else found
    else:
        output, _, c_n = run_spec(with_lengths, cell)
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
        backend: forces a backend for this call, before `seqkern.backend` does.

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
    return _cell(rnn_of(nonlinearity), input, hx, None, w_ih, w_hh, b_ih, b_hh, backend)[0]


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
        backend: forces a backend for this call, before `seqkern.backend` does.

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
        backend: forces a backend for this call, before `seqkern.backend` does.

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

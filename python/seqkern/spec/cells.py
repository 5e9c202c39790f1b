r"""One step of each recurrent cell, as a pointwise function of two pre-activations and the state.

.. math::
    x_t = W_{ih} u_t + b_{ih}, \qquad r_t = W_{hh} h_{t-1} + b_{hh}, \qquad
    \mathrm{step}(x_t, r_t, s_{t-1}) \to (s_t, \mathrm{reserve}_t)

The two pre-activations stay apart because GRU scales a part of :math:`r_t` by a gate before adding it. A step
knows nothing of time, layout or weights. The state is ``(h,)`` or ``(h, c)``; what a step hands back as reserve is
what its backward needs beyond the state, in the order in which the compiled kernels store it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Reserve = tuple[Tensor, ...]


class Cell(NamedTuple):
    """A step and the sizes that a scan needs to run it."""

    step: Callable[[Tensor, Tensor, State], tuple[State, Reserve]]
    gates: int  # rows of W_ih and W_hh are gates * H
    states: int  # tensors in the state: h, or h and c


def lstm(x: Tensor, r: Tensor, state: State) -> tuple[State, Reserve]:
    r"""Long short-term memory with a forget gate.

    .. math::
        i, f, o &= \sigma(x_{i,f,o} + r_{i,f,o}) \\
        g &= \tanh(x_g + r_g) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    Gate order ``i, f, g, o``. Source: Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735; forget gate
    from Gers, Schmidhuber and Cummins 2000, doi:10.1162/089976600300015015.
    """
    _, c = state
    i, f, g, o = (x + r).chunk(4, dim=-1)  # each [..., H]
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return (o * c.tanh(), c), (i, f, g, o, c)


def gru(x: Tensor, r: Tensor, state: State) -> tuple[State, Reserve]:
    r"""Gated recurrent unit, in the form whose reset gate acts after the recurrent matmul.

    .. math::
        r, z &= \sigma(x_{r,z} + r_{r,z}) \\
        n &= \tanh(x_n + r \odot r_n) \\
        h' &= (1 - z) \odot n + z \odot h

    Gate order ``r, z, n``. Source: Cho et al. 2014, arXiv:1406.1078, equation as in ``torch.nn.GRU`` (the "v3 reset
    after" variant, which lets all of :math:`W_{hh} h` be one matmul).
    """
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, dim=-1)  # each [..., H]
    r_r, r_z, r_n = r.chunk(3, dim=-1)
    reset, update = (x_r + r_r).sigmoid(), (x_z + r_z).sigmoid()
    new = (x_n + reset * r_n).tanh()
    return ((h - new) * update + new,), (reset, update, new, r_n)


def rnn_tanh(x: Tensor, r: Tensor, state: State) -> tuple[State, Reserve]:
    r"""Simple recurrent network: :math:`h' = \tanh(x + r)`.

    Source: Elman 1990, doi:10.1207/s15516709cog1402_1. Its backward needs nothing but the output.
    """
    return ((x + r).tanh(),), ()


def rnn_relu(x: Tensor, r: Tensor, state: State) -> tuple[State, Reserve]:
    r"""Simple recurrent network with a rectifier: :math:`h' = \max(x + r, 0)`.

    Source: Le, Jaitly and Hinton 2015, arXiv:1504.00941. Its backward needs nothing but the output.
    """
    return (torch.relu(x + r),), ()


CELLS: dict[str, Cell] = {
    "lstm": Cell(lstm, gates=4, states=2),
    "gru": Cell(gru, gates=3, states=1),
    "rnn_tanh": Cell(rnn_tanh, gates=1, states=1),
    "rnn_relu": Cell(rnn_relu, gates=1, states=1),
}

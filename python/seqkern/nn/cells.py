"""RNNCell, LSTMCell and GRUCell."""

import torch
from torch import Tensor

from seqkern import functional as F
from seqkern.nn._modules import leaf_of_fx


def _weights(cell: torch.nn.RNNCellBase) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    found = cell._parameters
    try:  # past Module.__getattr__, which would cost as much as a small step
        return found["weight_ih"], found["weight_hh"], found["bias_ih"], found["bias_hh"]  # type: ignore[return-value]
    except KeyError:  # a weight that is computed (parametrized, pruned, normalised) is an attribute
        return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


class RNNCell(torch.nn.RNNCell):
    r"""`torch.nn.RNNCell` on the kernels of this package: constructor, parameters, shapes and results are torch's.

    .. math:: h' = \tanh(W_{ih} u + b_{ih} + W_{hh} h + b_{hh})

    Args:
        input_size: I. hidden_size: H. bias: whether there are b_ih and b_hh.
        nonlinearity: ``"tanh"`` or ``"relu"``.

    Shapes: input [B, I] or [I], h [B, H] or [H] (zeros if not given) -> h'. Errors: see `functional.rnn_cell`.
    Source: Elman 1990, doi:10.1207/s15516709cog1402_1.

    >>> cell = RNNCell(3, 4)
    >>> cell(torch.randn(2, 3)).shape
    torch.Size([2, 4])
    """

    @leaf_of_fx
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}, expected 'tanh' or 'relu'")
        return F.rnn_cell(input, hx, *_weights(self), nonlinearity=self.nonlinearity)


class LSTMCell(torch.nn.LSTMCell):
    r"""`torch.nn.LSTMCell` on the kernels of this package: constructor, parameters, shapes and results are torch's.

    .. math::
        i, f, o &= \sigma(W_{ih} u + b_{ih} + W_{hh} h + b_{hh})_{i,f,o} \qquad
        g = \tanh(W_{ih} u + b_{ih} + W_{hh} h + b_{hh})_g \\
        c' &= f \odot c + i \odot g \qquad h' = o \odot \tanh(c')

    Args:
        input_size: I. hidden_size: H. bias: whether there are b_ih and b_hh.

    Shapes: input [B, I] or [I], (h, c) each [B, H] or [H] (zeros if not given) -> (h', c').
    Errors: see `functional.lstm_cell`. Source: Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735.

    >>> cell = LSTMCell(3, 4)
    >>> h, c = cell(torch.randn(2, 3))
    >>> h.shape, c.shape
    (torch.Size([2, 4]), torch.Size([2, 4]))
    """

    @leaf_of_fx
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return F.lstm_cell(input, hx, *_weights(self))


class GRUCell(torch.nn.GRUCell):
    r"""`torch.nn.GRUCell` on the kernels of this package: constructor, parameters, shapes and results are torch's.

    .. math::
        r, z &= \sigma(W_{ih} u + b_{ih} + W_{hh} h + b_{hh})_{r,z} \\
        n &= \tanh((W_{ih} u + b_{ih})_n + r \odot (W_{hh} h + b_{hh})_n) \\
        h' &= (1 - z) \odot n + z \odot h

    Args:
        input_size: I. hidden_size: H. bias: whether there are b_ih and b_hh.

    Shapes: input [B, I] or [I], h [B, H] or [H] (zeros if not given) -> h'. Errors: see `functional.gru_cell`.
    Source: Cho et al. 2014, arXiv:1406.1078.

    >>> cell = GRUCell(3, 4)
    >>> cell(torch.randn(3)).shape
    torch.Size([4])
    """

    @leaf_of_fx
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return F.gru_cell(input, hx, *_weights(self))

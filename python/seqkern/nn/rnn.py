"""RNN, LSTM and GRU.

They subclass `torch.nn.RNNBase` and not `torch.nn.LSTM`: torch.compile refuses every instance of torch.nn.RNN, LSTM
and GRU. So ``isinstance(m, torch.nn.LSTM)`` is False.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkern import functional as F
from seqkern.nn._modules import leaf_of_fx


def _permuted(state: Any, order: Tensor | None) -> Any:
    if order is None:
        return state
    if isinstance(state, Tensor):
        return state.index_select(1, order)
    return tuple(s.index_select(1, order) for s in state)


def _permuted_if_sound(state: Any, order: Tensor | None) -> Any:
    """A caller's state; of a wrong size it is left to the check that names it."""
    if order is None or state is None:
        return state
    if isinstance(state, Tensor):
        return _permuted(state, order) if state.dim() == 3 and state.shape[1] == order.shape[0] else state
    return tuple(_permuted_if_sound(s, order) for s in state)


class _Layers(torch.nn.RNNBase):
    """What the three share: weights, options and packed sequences in and out."""

    def _flat(self) -> list[Tensor]:
        """The weights as they are now, also where functional_call or a parametrization has put others in place."""
        found = self._parameters
        names = self._flat_weights_names
        return [found[name] if name in found else getattr(self, name) for name in names]  # type: ignore[misc]

    def _run(self, function, input, hx, **more):
        options = {
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "dropout": self.dropout,
            "training": self.training,
            **more,
        }
        if not isinstance(input, PackedSequence):
            return function(input, hx, self._flat(), batch_first=self.batch_first, **options)
        data, batch_sizes, order, back = input
        output, state = function(
            data, _permuted_if_sound(hx, order), self._flat(), batch_sizes=batch_sizes, **options
        )
        return PackedSequence(output, batch_sizes, order, back), _permuted(state, back)


class RNN(_Layers):
    r"""`torch.nn.RNN` on the kernels of this package: constructor, parameters, shapes and results are torch's.

    .. math:: h_t = \tanh(W_{ih} u_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Args:
        input_size: I. hidden_size: H. num_layers: how many layers are stacked.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.RNN.

    Shapes: input [T, B, I] ([B, T, I] with ``batch_first``, [T, I] for one sequence, or a PackedSequence), h
    [layers*D, B, H] (zeros if not given) -> output [T, B, D*H] in the layout of the input, h_n. Errors: see
    `functional.rnn`. Source: Elman 1990, doi:10.1207/s15516709cog1402_1.

    >>> rnn = RNN(3, 4, nonlinearity="relu")
    >>> output, h_n = rnn(torch.randn(5, 2, 3))
    >>> output.shape, h_n.shape
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            nonlinearity, args = args[3], (*args[:3], *args[4:])
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)

    @leaf_of_fx
    def forward(self, input, hx: Tensor | None = None):
        return self._run(F.rnn, input, hx, nonlinearity="tanh" if self.mode == "RNN_TANH" else "relu")


class LSTM(_Layers):
    r"""`torch.nn.LSTM` on the kernels of this package: constructor, parameters, shapes and results are torch's.

    .. math::
        i_t, f_t, o_t &= \sigma(W_{ih} u_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})_{i,f,o} \\
        g_t &= \tanh(W_{ih} u_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})_g \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \qquad h_t = W_{hr}\,(o_t \odot \tanh(c_t))

    Args:
        input_size: I. hidden_size: H. num_layers: how many layers are stacked.
        proj_size: P > 0 projects the output of each step with W_hr [P, H]; otherwise P = H and there is no W_hr.
        bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.LSTM.

    Shapes: input [T, B, I] ([B, T, I] with ``batch_first``, [T, I] for one sequence, or a PackedSequence), (h, c)
    [layers*D, B, P] and [layers*D, B, H] (zeros if not given) -> output [T, B, D*P] in the layout of the input,
    (h_n, c_n). Errors: see `functional.lstm`. Source: Hochreiter and Schmidhuber 1997,
    doi:10.1162/neco.1997.9.8.1735; projection: Sak, Senior and Beaufays 2014, arXiv:1402.1128.

    >>> lstm = LSTM(3, 4, num_layers=2, batch_first=True)
    >>> output, (h_n, c_n) = lstm(torch.randn(2, 5, 3))
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([2, 5, 4]), torch.Size([2, 2, 4]), torch.Size([2, 2, 4]))
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__("LSTM", *args, **kwargs)

    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    @leaf_of_fx
    def forward(self, input, hx: tuple[Tensor, Tensor] | None = None):
        return self._run(F.lstm, input, hx)


class GRU(_Layers):
    r"""`torch.nn.GRU` on the kernels of this package: constructor, parameters, shapes and results are torch's.

    .. math::
        r_t, z_t &= \sigma(W_{ih} u_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})_{r,z} \\
        n_t &= \tanh((W_{ih} u_t + b_{ih})_n + r_t \odot (W_{hh} h_{t-1} + b_{hh})_n) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Args:
        input_size: I. hidden_size: H. num_layers: how many layers are stacked.
        bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.GRU.

    Shapes: input [T, B, I] ([B, T, I] with ``batch_first``, [T, I] for one sequence, or a PackedSequence), h
    [layers*D, B, H] (zeros if not given) -> output [T, B, D*H] in the layout of the input, h_n. Errors: see
    `functional.gru`. Source: Cho et al. 2014, arXiv:1406.1078.

    >>> gru = GRU(3, 4, bidirectional=True)
    >>> output, h_n = gru(torch.nn.utils.rnn.pack_sequence([torch.randn(5, 3), torch.randn(2, 3)]))
    >>> output.data.shape, h_n.shape
    (torch.Size([7, 8]), torch.Size([2, 2, 4]))
    """

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    @leaf_of_fx
    def forward(self, input, hx: Tensor | None = None):
        return self._run(F.gru, input, hx)

"""Recurrent layers and cells, attention and linear layers, as pure functions of tensors."""

from seqkern.functional._attention import attention, scaled_dot_product_attention
from seqkern.functional._cells import gru_cell, lstm_cell, rnn_cell
from seqkern.functional._linear import linear
from seqkern.functional._rnn import gru, lstm, rnn

__all__ = [
    "attention",
    "gru",
    "gru_cell",
    "linear",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
]

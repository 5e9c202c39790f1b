"""Recurrent layers and cells, attention and linear layers, as pure functions of tensors."""

from seqkern.functional.attention import attention, scaled_dot_product_attention
from seqkern.functional.linear import linear
from seqkern.functional.rnn import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell

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

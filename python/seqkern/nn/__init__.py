"""Drop-in modules: torch.nn's names, constructors, state_dict and results; and a cache for decoding."""

from seqkern.nn.attention import MultiheadAttention
from seqkern.nn.cache import KVCache
from seqkern.nn.cells import GRUCell, LSTMCell, RNNCell
from seqkern.nn.linear import Linear
from seqkern.nn.rnn import GRU, LSTM, RNN
from seqkern.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "KVCache",
    "LSTMCell",
    "Linear",
    "MultiheadAttention",
    "RNNCell",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

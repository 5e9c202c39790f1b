"""Drop-in modules: torch.nn's names, constructors, state_dict and results."""

from seqkern.nn.cells import GRUCell, LSTMCell, RNNCell
from seqkern.nn.rnn import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

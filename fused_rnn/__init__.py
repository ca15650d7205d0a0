"""Drop-in torch.nn.LSTM, GRU and RNN with kernels of their own."""

from .convert import convert, to_torch
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .ops import empty_cache

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "convert",
    "empty_cache",
    "to_torch",
]

"""Drop-in torch.nn.LSTM, GRU and RNN with kernels of their own."""

from .convert import convert, to_torch
from .freeze import FrozenCell, FrozenLayer, freeze
from .functional import Regularisers, detach
from .modules import (
    GRU,
    LSTM,
    RNN,
    CoupledLSTM,
    CoupledLSTMCell,
    GRUCell,
    IndRNN,
    IndRNNCell,
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    LSTMCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
    RNNCell,
    init_forget_bias_,
)
from .ops import empty_cache
from .strategy import force_schedule, force_split

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CoupledLSTM",
    "CoupledLSTMCell",
    "FrozenCell",
    "FrozenLayer",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "RNNCell",
    "Regularisers",
    "convert",
    "detach",
    "empty_cache",
    "force_schedule",
    "force_split",
    "freeze",
    "init_forget_bias_",
    "to_torch",
]

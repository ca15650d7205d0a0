"""What a user's type checker knows of us: mypy reads this file with the package, pytest runs it.

A wrong call stands with an ignore, which `mypy --strict` does not accept where it is not needed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import fused_rnn

INPUT = torch.randn(4, 3, 5)


def test_layers() -> None:
    lstm = fused_rnn.LSTM(5, 7, 2, batch_first=True, zoneout=(0.1, 0.2), recompute=True)
    output, (h, c) = assert_type(lstm(INPUT), tuple[Tensor, tuple[Tensor, Tensor]])
    assert all(isinstance(tensor, Tensor) for tensor in (output, h, c))
    lengths, reset = torch.tensor([3, 2, 0, 1]), torch.zeros(4, 3, dtype=torch.bool)
    result = lstm(INPUT, (h, c), lengths=lengths, reset=reset, reset_to_initial=True)
    assert_type(result, tuple[Tensor, tuple[Tensor, Tensor]])
    with_states = lstm(INPUT, return_all_states=True)
    assert_type(with_states, tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]])
    assert len(with_states) == 3
    gru = fused_rnn.GRU(5, 7, reset_after=False)
    output, h = assert_type(gru(INPUT), tuple[Tensor, Tensor])
    assert all(isinstance(tensor, Tensor) for tensor in (output, h))
    assert_type(fused_rnn.RNN(5, 7, nonlinearity="relu")(INPUT), tuple[Tensor, Tensor])
    assert_type(fused_rnn.IndRNN(5, 7)(INPUT, h), tuple[Tensor, Tensor])
    for kind in (fused_rnn.PeepholeLSTM, fused_rnn.CoupledLSTM):
        assert_type(kind(5, 7)(INPUT), tuple[Tensor, tuple[Tensor, Tensor]])


def test_packed_sequences() -> None:
    packed = pack_sequence([torch.randn(3, 5), torch.randn(2, 5)])
    output, h = assert_type(fused_rnn.GRU(5, 7)(packed), tuple[PackedSequence, Tensor])
    assert isinstance(output, PackedSequence)
    assert isinstance(h, Tensor)


def test_cells() -> None:
    h, c = assert_type(fused_rnn.LSTMCell(5, 7)(INPUT[0]), tuple[Tensor, Tensor])
    assert all(isinstance(tensor, Tensor) for tensor in (h, c))
    assert_type(fused_rnn.PeepholeLSTMCell(5, 7)(INPUT[0], (h, c)), tuple[Tensor, Tensor])
    assert_type(fused_rnn.GRUCell(5, 7)(INPUT[0], h), Tensor)
    assert_type(fused_rnn.IndRNNCell(5, 7)(INPUT[0]), Tensor)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.LSTM(5, 7)
        self.head = nn.Linear(7, 1)

    def forward(self, input: Tensor) -> Tensor:
        output, (h, _) = self.rnn(input)
        assert_type(h, Tensor)
        result: Tensor = self.head(output)
        return result


class Louder(fused_rnn.GRU):
    """A subclass that calls what it extends."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        output, h = super().forward(input, hx)
        return 2 * output, h


def test_models() -> None:
    model = Model()
    assert_type(fused_rnn.convert(model), Model)
    assert_type(fused_rnn.to_torch(model), Model)
    assert_type(fused_rnn.freeze(model), nn.Module)
    assert Louder(5, 7)(INPUT)[0].shape == (4, 3, 7)


def test_functions() -> None:
    lstm = fused_rnn.LSTM(5, 7)
    _, state = lstm(INPUT)
    assert_type(fused_rnn.detach(state), tuple[Tensor, Tensor])
    fused_rnn.init_forget_bias_(lstm, 1.0)
    lstm.regularisers = fused_rnn.Regularisers(weight_dropout=0.2)
    with fused_rnn.force_split("none"):
        lstm(INPUT)
    fused_rnn.empty_cache()
    assert isinstance(fused_rnn.__version__, str)


def test_wrong_calls_are_seen_before_they_run() -> None:
    lstm, gru = fused_rnn.LSTM(5, 7), fused_rnn.GRU(5, 7)
    h = torch.zeros(1, 3, 7)
    with pytest.raises(IndexError):
        lstm(INPUT, h)  # type: ignore[call-overload]
    with pytest.raises(AttributeError):
        gru(INPUT, (h, h))  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        gru(INPUT, length=4)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        fused_rnn.LSTMCell(5, 7)(INPUT[0], h[0])  # type: ignore[arg-type]

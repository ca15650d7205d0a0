"""Building layers and cells: signatures, checks in torch.nn's order and words, parameters, init."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from layers import CELLS, KINDS, assert_same_complaint, make
from torch import nn

import fused_rnn

LAYERS = ("LSTM", "GRU", "RNN")

# Arguments that torch.nn refuses in every layer, several at once where the order of checks shows.
REFUSED: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((5,), {}),
    ((5, 7), {"foo": 1}),
    ((5, 7), {"dropout": "a"}),
    ((5, 7), {"dropout": "0.5"}),
    ((5, 7), {"dropout": None}),
    ((5, 7), {"dropout": True}),
    ((5, 7), {"dropout": -0.1}),
    ((5, 7), {"dropout": 1.1}),
    ((5, 7), {"dropout": float("nan")}),
    ((5, 7), {"bias": 1}),
    ((5, 7), {"bias": None}),
    ((5, 7), {"batch_first": 0}),
    ((5, 7), {"batch_first": "yes"}),
    ((5.0, 7), {}),
    (("5", 7), {}),
    ((np.int64(5), 7), {}),
    ((0, 7), {}),
    ((-1, 7), {}),
    ((5, 7.0), {}),
    ((5, np.int32(7)), {}),
    ((5, 0), {}),
    ((5, -7), {}),
    ((5, 7, 0), {}),
    ((5, 7, -2), {}),
    ((5, 7, 2.5), {}),
    ((5, 7, "2"), {}),
    ((5, 7), {"dtype": torch.int64}),
    ((5, 7), {"device": "nowhere"}),
    ((0, 0, 0), {"dropout": 2, "bias": 1, "batch_first": 1}),
    ((0, 0, 0), {"bias": 1, "batch_first": 1}),
    ((0, 0, 0), {"batch_first": 1}),
    ((0, 0.5, 0), {}),
    ((0.5, 0.5, 0), {}),
    ((5, 0, 0), {}),
]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("sizes", "options"), REFUSED, ids=str)
def test_refused_as_torch_refuses(name: str, sizes: Any, options: Any) -> None:
    assert_same_complaint(lambda library: getattr(library, name)(*sizes, **options))


@pytest.mark.parametrize(
    "build",
    [
        lambda lib: lib.LSTM(5, 7, proj_size=-1),
        lambda lib: lib.LSTM(5, 7, proj_size=7),
        lambda lib: lib.LSTM(5, 7, proj_size=8),
        lambda lib: lib.LSTM(5, 7, proj_size=2.5),
        lambda lib: lib.LSTM(5, 7, 0, proj_size=-1),
        lambda lib: lib.GRU(5, 7, proj_size=3),
        lambda lib: lib.GRU(5, 7, proj_size=0),
        lambda lib: lib.GRU(5, 7, proj_size=3, dropout=7),
        lambda lib: lib.RNN(5, 7, proj_size=3),
        lambda lib: lib.RNN(5, 7, proj_size=3, nonlinearity="x"),
        lambda lib: lib.RNN(5, 7, nonlinearity="x"),
        lambda lib: lib.RNN(5, 7, 1, "x"),
        lambda lib: lib.RNN(5, 7, 1, True),
        lambda lib: lib.RNN(5, 7, nonlinearity="x", dropout=7),
        lambda lib: lib.RNN(5, 7, nonlinearity=None),
        lambda lib: lib.RNN(5, 7, 1, "relu", nonlinearity="tanh"),
        lambda lib: lib.RNN(5, 7, 1, "relu", True, False, 0.0, False, -1),
    ],
    ids=lambda build: inspect.getsource(build).strip().removeprefix("lambda lib: "),
)
def test_refused_by_one_kind(build: Callable[[ModuleType], object]) -> None:
    assert_same_complaint(build)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [((), {}), ((5,), {}), ((5, -7), {}), ((-5, 7), {}), ((5, "7"), {}), ((5, 7), {"foo": 1})],
    ids=str,
)
def test_cells_refuse_as_torch_refuses(name: str, sizes: Any, options: Any) -> None:
    assert_same_complaint(lambda library: getattr(library, name)(*sizes, **options))


@pytest.mark.parametrize("sizes", [(5, 7, 1), (5, 7)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_on_one_layer_warns_as_torch_warns(name: str, sizes: Any) -> None:
    caught = []
    for library in (nn, fused_rnn):
        with warnings.catch_warnings(record=True) as log:
            warnings.simplefilter("always")
            getattr(library, name)(*sizes, dropout=0.5)
        caught.append([(w.category, str(w.message), w.filename) for w in log])
    assert len(caught[0]) == 1
    assert caught[1][0][:2] == caught[0][0][:2]
    assert len(caught[1]) == 1


# Arguments that torch.nn accepts, unusual ones too.
ACCEPTED: list[Callable[[ModuleType], nn.Module]] = [
    lambda lib: lib.LSTM(5, 7),
    lambda lib: lib.LSTM(input_size=5, hidden_size=7),
    lambda lib: lib.LSTM(True, 7),
    lambda lib: lib.LSTM(5, 7, 2, False, True, 0.25, True, 3),
    lambda lib: lib.LSTM(5, 7, bidirectional=1),
    lambda lib: lib.LSTM(5, 7, 2, dropout=1),
    lambda lib: lib.LSTM(5, 7, dtype=torch.float64),
    lambda lib: lib.LSTM(5, 7, device="meta", dtype=torch.bfloat16),
    lambda lib: lib.LSTM(5, 7, dtype=torch.complex64),
    lambda lib: lib.LSTM(5, 7, 3, bidirectional=True, proj_size=2),
    lambda lib: lib.GRU(5, 7, 2, False),
    lambda lib: lib.GRU(5, 7, 2, True, True, 0.5, True),
    lambda lib: lib.GRU(5, 7, dtype=torch.float16),
    lambda lib: lib.RNN(5, 7),
    lambda lib: lib.RNN(5, 7, 2, "relu", False),
    lambda lib: lib.RNN(5, 7, 2, "tanh", True, True),
    lambda lib: lib.RNN(5, 7, nonlinearity="relu", num_layers=2, bidirectional=True),
    lambda lib: lib.LSTMCell(5, 7),
    lambda lib: lib.LSTMCell(5, 7, False),
    lambda lib: lib.LSTMCell(5, 7, "yes"),
    lambda lib: lib.LSTMCell(0, 0),
    lambda lib: lib.GRUCell(input_size=5, hidden_size=7, bias=True, dtype=torch.float64),
    lambda lib: lib.RNNCell(5, 7),
    lambda lib: lib.RNNCell(5, 7, "relu"),
    lambda lib: lib.RNNCell(5, 7, False, "relu"),
    lambda lib: lib.RNNCell(5, 7, nonlinearity="relu"),
    lambda lib: lib.RNNCell(5, 7, nonlinearity="x"),
    lambda lib: lib.RNNCell(5, 7, device="meta"),
]
each_accepted = pytest.mark.parametrize(
    "build",
    ACCEPTED,
    ids=lambda build: inspect.getsource(build).strip().removeprefix("lambda lib: "),
)


@each_accepted
def test_same_parameters_from_the_same_seed(build: Callable[[ModuleType], nn.Module]) -> None:
    torch.manual_seed(3)
    ours = build(fused_rnn)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    theirs = build(nn)
    assert torch.equal(state, torch.get_rng_state())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours._parameters) == list(theirs._parameters)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), name
        assert a.requires_grad
        assert a.is_meta or torch.equal(a, b), name


@each_accepted
def test_same_words_and_attributes(build: Callable[[ModuleType], nn.Module]) -> None:
    ours, theirs = build(fused_rnn), build(nn)
    assert repr(ours) == repr(theirs)
    for name, value in vars(theirs).items():
        if name.startswith("_"):
            continue
        assert getattr(ours, name) == value, name
        assert type(getattr(ours, name)) is type(value), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_lists_of_weights(kind: str) -> None:
    ours, theirs = (make(library, kind, 5, 7, 2, bidirectional=True) for library in (fused_rnn, nn))
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights
    assert ours.__constants__ == theirs.__constants__
    for name, weight in zip(ours._flat_weights_names, ours._flat_weights, strict=True):
        assert weight is getattr(ours, name)
    assert [[id(w) for w in ws] for ws in ours.all_weights] == [
        [id(getattr(ours, name)) for name in names] for names in ours._all_weights
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_absent_biases_are_no_parameters_of_layers(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, bias=False)
    assert not any("bias" in name for name in layer._parameters)
    assert not hasattr(layer, "bias_ih_l0")


@pytest.mark.parametrize("name", CELLS)
def test_absent_biases_are_none_in_cells(name: str) -> None:
    cell = getattr(fused_rnn, name)(5, 7, bias=False)
    assert cell.bias_ih is None
    assert cell.bias_hh is None
    assert list(cell._parameters) == ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


@pytest.mark.parametrize("kind", KINDS)
def test_default_dtype_and_device(kind: str) -> None:
    torch.set_default_dtype(torch.float64)
    assert make(fused_rnn, kind, 5, 7).weight_ih_l0.dtype == torch.float64
    with torch.device("meta"):
        assert make(fused_rnn, kind, 5, 7).weight_hh_l0.is_meta


def test_skip_init() -> None:
    """Works for cells; layers have no `device` in their signature, as in torch."""
    for name in CELLS:
        cell = nn.utils.skip_init(getattr(fused_rnn, name), 5, 7)
        assert cell.weight_ih.shape == getattr(nn, name)(5, 7).weight_ih.shape
    for name in LAYERS:
        with pytest.raises(RuntimeError, match="device"):
            nn.utils.skip_init(getattr(fused_rnn, name), 5, 7)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_reset_parameters_draws_as_torch_draws(name: str) -> None:
    ours, theirs = getattr(fused_rnn, name)(5, 7), getattr(nn, name)(5, 7)
    torch.manual_seed(9)
    ours.reset_parameters()
    torch.manual_seed(9)
    theirs.reset_parameters()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() <= 7**-0.5


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_class_names_and_kinship(name: str) -> None:
    ours, theirs = getattr(fused_rnn, name), getattr(nn, name)
    assert ours.__name__ == name
    base = nn.RNNBase if name in LAYERS else nn.modules.rnn.RNNCellBase
    assert issubclass(ours, base)
    # Dynamo breaks the graph at instances of torch's own three layers.
    assert not (name in LAYERS and issubclass(ours, theirs))


def test_copies_are_independent() -> None:
    layer = fused_rnn.LSTM(5, 7)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight_hh_l0.zero_()
    assert layer.weight_hh_l0.abs().sum() > 0

"""Dropout between layers: torch's masks from torch's generator, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import KINDS, flatten, make, state_for, twins
from scans import FLOATS
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn

each_kind = pytest.mark.parametrize("kind", KINDS)


def halves(layer: Any) -> list[Any]:
    """The two layers of a layer, one by one."""
    width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    ones = []
    for k, size in enumerate((layer.input_size, width)):
        one = make(fused_rnn, kind_of(layer), size, layer.hidden_size, **options_of(layer))
        weights = {name: w for name, w in layer.state_dict().items() if f"_l{k}" in name}
        one.load_state_dict({name.replace(f"_l{k}", "_l0"): w for name, w in weights.items()})
        ones.append(one)
    return ones


def drop(output: Any, p: float) -> Any:
    if isinstance(output, PackedSequence):
        return output._replace(data=F.dropout(output.data, p))
    return F.dropout(output, p)


def kind_of(layer: Any) -> str:
    return {"LSTM": "LSTMP" if layer.proj_size else "LSTM", "RNN_TANH": "RNN"}.get(
        layer.mode, layer.mode
    )


def options_of(layer: Any) -> dict[str, Any]:
    return {"bidirectional": layer.bidirectional, "dtype": layer.weight_hh_l0.dtype}


@each_kind
@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_mask_is_that_of_f_dropout(kind: str, form: str, dtype: torch.dtype) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, dropout=0.4, bidirectional=True, dtype=dtype)
    if form == "packed":
        rows = [torch.randn(n, 5).to(dtype) for n in (2, 4, 3)]
        input: Any = pack_sequence(rows, enforce_sorted=False)
    else:
        input = torch.randn(4, 3, 5).to(dtype)
    torch.manual_seed(11)
    ours = flatten(layer(input))[0]
    state = torch.get_rng_state()
    lower, upper = halves(layer)
    torch.manual_seed(11)
    theirs = upper(drop(lower(input)[0], 0.4))
    assert torch.equal(ours, flatten(theirs)[0])
    assert torch.equal(state, torch.get_rng_state())


@each_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_same_seed_gives_what_torch_gives(kind: str, batch_first: bool) -> None:
    ours, theirs = twins(kind, 5, 7, 3, dropout=0.5, bidirectional=True, batch_first=batch_first)
    input = torch.randn(4, 3, 5)
    hx = state_for(ours, 4 if batch_first else 3)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(11)
        outputs = flatten(layer(input, hx))
        sum(output.sum() for output in outputs).backward()
        gradients = [parameter.grad for parameter in layer.parameters()]
        results.append([*outputs, *gradients, torch.get_rng_state()])
    torch.testing.assert_close(*results)


@each_kind
def test_inference_drops_as_training_does(kind: str) -> None:
    """With train mode on and no gradient wanted."""
    layer = make(fused_rnn, kind, 5, 7, 2, dropout=0.5)
    input = torch.randn(4, 3, 5)
    torch.manual_seed(11)
    with_grad = layer(input)[0]
    torch.manual_seed(11)
    with torch.no_grad():
        without = layer(input)[0]
    assert torch.equal(with_grad, without)


@each_kind
def test_eval_drops_nothing_and_draws_nothing(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, dropout=0.5).eval()
    input = torch.randn(4, 3, 5)
    before = torch.get_rng_state()
    output = layer(input)[0]
    assert torch.equal(before, torch.get_rng_state())
    layer.dropout = 0.0
    assert torch.equal(output, layer.train()(input)[0])


@each_kind
def test_the_probability_is_read_at_each_call(kind: str) -> None:
    ours, theirs = twins(kind, 5, 7, 2)
    input = torch.randn(4, 3, 5)
    for p in (0.0, 0.3, 1.0):
        outputs = []
        for layer in (ours, theirs):
            layer.dropout = p
            torch.manual_seed(11)
            outputs.append(flatten(layer(input)))
        torch.testing.assert_close(*outputs)


@each_kind
def test_everything_dropped_leaves_the_biases(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, dropout=1.0)
    one, other = (layer(torch.randn(4, 3, 5))[0] for _ in range(2))
    assert torch.equal(one, other)


@each_kind
def test_one_layer_drops_nothing(kind: str) -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        layer = make(fused_rnn, kind, 5, 7, dropout=0.5)
    input = torch.randn(4, 3, 5)
    before = torch.get_rng_state()
    assert torch.equal(layer(input)[0], layer.eval()(input)[0])
    assert torch.equal(before, torch.get_rng_state())

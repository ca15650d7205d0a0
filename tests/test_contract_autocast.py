"""Autocast on CPU gives the dtypes that torch.nn gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import CELLS, KINDS, flatten, make, state_for, twins
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fused_rnn

each_kind = pytest.mark.parametrize("kind", KINDS)
LOW = [torch.bfloat16, torch.float16]


@each_kind
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("low_input", [False, True])
@pytest.mark.parametrize("low", LOW, ids=str)
def test_layers(kind: str, low: torch.dtype, low_input: bool, with_state: bool) -> None:
    ours, theirs = twins(kind, 5, 7, 2)
    input = torch.randn(4, 3, 5).to(low if low_input else torch.float32)
    hx = state_for(ours, 3) if with_state else None
    with torch.autocast("cpu", low):
        outputs = flatten(ours(input, hx))
        try:
            expected = flatten(theirs(input, hx))
        except RuntimeError:  # torch's LSTM under float16 with float32 input
            expected = None
    if expected is not None:
        # torch's c_n under a projection stays float32, unlike without one.
        compared = 2 if kind == "LSTMP" else 3
        assert [t.dtype for t in outputs[:compared]] == [t.dtype for t in expected[:compared]]
        for mine, yours in zip(outputs, expected, strict=True):
            torch.testing.assert_close(mine.float(), yours.float(), rtol=5e-2, atol=5e-2)
    sum(output.float().sum() for output in outputs).backward()
    for parameter in ours.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("low_input", [False, True])
@pytest.mark.parametrize("low", LOW, ids=str)
def test_cells(name: str, low: torch.dtype, low_input: bool, with_state: bool) -> None:
    ours, theirs = getattr(fused_rnn, name)(5, 7), getattr(nn, name)(5, 7)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(3, 5).to(low if low_input else torch.float32)
    state = torch.randn(3, 7)
    hx = None if not with_state else (state, state) if name == "LSTMCell" else state
    with torch.autocast("cpu", low):
        outputs, expected = flatten(ours(input, hx)), flatten(theirs(input, hx))
    assert [t.dtype for t in outputs] == [t.dtype for t in expected]
    torch.testing.assert_close(outputs, expected, rtol=5e-2, atol=5e-2)
    sum(output.float().sum() for output in outputs).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in ours.parameters())


@each_kind
@pytest.mark.parametrize("low", LOW, ids=str)
def test_packed_sequences(kind: str, low: torch.dtype) -> None:
    ours, theirs = twins(kind, 5, 7)
    input = pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    with torch.autocast("cpu", low):
        mine, yours = (flatten(layer(input))[0] for layer in (ours, theirs))
    assert mine.dtype == yours.dtype
    torch.testing.assert_close(mine, yours, rtol=5e-2, atol=5e-2)


@each_kind
def test_dtype_of_the_input_is_not_checked(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    input = torch.randn(4, 3, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(input)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="does not match weight dtype"):
        layer(input)


@each_kind
def test_a_disabled_region_is_float32(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    input = torch.randn(4, 3, 5)
    expected = layer(input)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(layer(input)[0], expected)


@each_kind
def test_float64_layers_are_left_alone(kind: str) -> None:
    results: list[Any] = []
    for layer in twins(kind, 5, 7, dtype=torch.float64):
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(1)
            try:
                results.append(layer(torch.randn(4, 3, 5, dtype=torch.float64))[0].dtype)
            except RuntimeError as error:
                results.append(type(error))
    assert results[0] == results[1]

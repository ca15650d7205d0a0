"""The module floor: every layer against its torch.nn twin, outputs, states and all gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import KINDS, judge_layer, state_for, twins
from scans import FLOATS
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

FORMS = ("time_first", "batch_first", "sorted", "unsorted", "unbatched")
T, B, I, H = 4, 5, 6, 17


def make_input(form: str, T: int, B: int, I: int, dtype: torch.dtype) -> Tensor | PackedSequence:
    if form == "unbatched":
        return torch.randn(T, I).to(dtype)
    if form == "batch_first":
        return torch.randn(B, T, I).to(dtype)
    input = torch.randn(T, B, I).to(dtype)
    if form == "time_first":
        return input
    lengths = torch.randint(1, T + 1, (B,))
    lengths[B // 2] = T
    if form == "sorted":
        lengths = lengths.sort(descending=True).values
    return pack_padded_sequence(input, lengths, enforce_sorted=form == "sorted")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(
    kind: str, layers: int, directions: int, bias: bool, form: str, dtype: torch.dtype
) -> None:
    ours, theirs = twins(
        kind,
        I,
        H,
        layers,
        bias=bias,
        bidirectional=directions == 2,
        batch_first=form == "batch_first",
        dtype=dtype,
    )
    batch = () if form == "unbatched" else (B,)
    judge_layer(ours, theirs, lambda: (make_input(form, T, B, I, dtype), state_for(theirs, *batch)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_without_hx(kind: str, form: str) -> None:
    ours, theirs = twins(kind, I, H, 2, bidirectional=True, batch_first=form == "batch_first")
    judge_layer(ours, theirs, lambda: (make_input(form, T, B, I, torch.float32), None))


@st.composite
def layers_and_inputs(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "kind": draw(st.sampled_from(sorted(KINDS))),
        "form": draw(st.sampled_from(FORMS)),
        "sizes": (draw(st.integers(1, 9)), draw(st.integers(3, 20)), draw(st.integers(1, 40))),
        "hidden_size": draw(st.integers(4, 60)),
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "with_state": draw(st.booleans()),
        "dtype": draw(st.sampled_from(FLOATS)),
        "seed": draw(st.integers(0, 99)),
    }


@given(layers_and_inputs())
def test_accuracy_of_any_shape(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    T, B, I = case["sizes"]
    ours, theirs = twins(
        case["kind"],
        I,
        case["hidden_size"],
        case["num_layers"],
        bias=case["bias"],
        bidirectional=case["bidirectional"],
        batch_first=case["form"] == "batch_first",
        dtype=case["dtype"],
    )
    batch = () if case["form"] == "unbatched" else (B,)

    def question() -> tuple[Any, Any]:
        hx = state_for(theirs, *batch) if case["with_state"] else None
        return make_input(case["form"], T, B, I, case["dtype"]), hx

    judge_layer(ours, theirs, question)


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences_stay_accurate(kind: str) -> None:
    ours, theirs = twins(kind, 8, 33)
    judge_layer(ours, theirs, lambda: (torch.randn(200, 4, 8), state_for(theirs, 4)))


@pytest.mark.parametrize(
    ("form", "layers"), itertools.product(FORMS, (1, 2)), ids=lambda value: str(value)
)
@pytest.mark.parametrize("kind", KINDS)
def test_inference_gives_what_training_gives(kind: str, form: str, layers: int) -> None:
    layer, _ = twins(kind, I, H, layers, bidirectional=True, batch_first=form == "batch_first")
    input = make_input(form, T, B, I, torch.float32)
    trained = layer(input)
    with torch.no_grad():
        inferred = layer(input)
    with torch.inference_mode():
        in_mode = layer(input)
    torch.testing.assert_close(inferred, trained, rtol=0, atol=0)
    torch.testing.assert_close(in_mode, trained, rtol=0, atol=0)

"""Packed sequences: the same objects come back, rows keep their states, nothing is padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import CELLS, KINDS, assert_same_complaint, flatten, judge_layer, make, state_for, twins
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import fused_rnn

each_kind = pytest.mark.parametrize("kind", KINDS)


def pack(*lengths: int, width: int = 5, sort: bool = False, **options: Any) -> PackedSequence:
    return pack_sequence([torch.randn(n, width, **options) for n in lengths], enforce_sorted=sort)


@each_kind
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "unsorted"])
def test_the_output_carries_the_same_objects(kind: str, sort: bool) -> None:
    layer = make(fused_rnn, kind, 5, 7, bidirectional=True)
    input = pack(4, 4, 2, 1, sort=True) if sort else pack(2, 4, 1, 4)
    output, _ = layer(input)
    assert type(output) is PackedSequence
    assert output.batch_sizes is input.batch_sizes
    assert output.sorted_indices is input.sorted_indices
    assert output.unsorted_indices is input.unsorted_indices
    assert output.data.is_contiguous()
    assert (output.sorted_indices is None) == sort


@each_kind
def test_each_row_is_what_it_is_alone(kind: str) -> None:
    """Forward and reverse direction begin and end with the row's own length."""
    layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True)
    rows = [torch.randn(n, 5) for n in (2, 6, 1, 6, 3)]
    hx = state_for(layer, len(rows))
    output, ends = layer(pack_sequence(rows, enforce_sorted=False), hx)
    padded, lengths = pad_packed_sequence(output)
    assert lengths.tolist() == [2, 6, 1, 6, 3]
    for k, row in enumerate(rows):
        mine = [t[:, k] for t in flatten(hx)]
        alone, alone_ends = layer(row, tuple(mine) if layer.mode == "LSTM" else mine[0])
        torch.testing.assert_close(padded[: len(row), k], alone)
        for a, b in zip(flatten(ends), flatten(alone_ends), strict=True):
            torch.testing.assert_close(a[:, k], b)


@each_kind
def test_batch_first_of_the_module_is_ignored(kind: str) -> None:
    ours, _ = twins(kind, 5, 7, batch_first=True)
    same = make(fused_rnn, kind, 5, 7)
    same.load_state_dict(ours.state_dict())
    input = pack(2, 4, 3)
    assert all(map(torch.equal, flatten(ours(input)), flatten(same(input))))


@each_kind
@pytest.mark.parametrize("lengths", [(1,), (9,), (4, 4, 4), (1, 1, 1, 1), (9, 1, 1)], ids=str)
def test_accuracy_of_unusual_lengths(kind: str, lengths: tuple[int, ...]) -> None:
    ours, theirs = twins(kind, 5, 19, 2, bidirectional=True)
    judge_layer(ours, theirs, lambda: (pack(*lengths), state_for(theirs, len(lengths))))


@each_kind
def test_equal_lengths_give_what_a_plain_batch_gives(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True)
    input = torch.randn(4, 3, 5)
    output, ends = layer(pack_padded_sequence(input, [4, 4, 4]))
    plain, plain_ends = layer(input)
    torch.testing.assert_close(output.data, plain.flatten(0, 1))
    torch.testing.assert_close(ends, plain_ends)


@each_kind
def test_padding_and_unpadding_around_the_layer(kind: str) -> None:
    ours, theirs = twins(kind, 5, 7, batch_first=True)
    input, lengths = torch.randn(3, 6, 5), torch.tensor([2, 5, 3])
    results = []
    for layer in (ours, theirs):
        packed = pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False)
        output, _ = layer(packed)
        results.append(pad_packed_sequence(output, batch_first=True, total_length=6)[0])
    assert results[0].shape == (3, 6, ours.proj_size or 7)
    torch.testing.assert_close(*results)


@each_kind
def test_frozen_weights_still_pass_gradients_to_the_input(kind: str) -> None:
    ours, theirs = twins(kind, 5, 7)
    gradients = []
    input = pack(2, 4, 3)
    for layer in (ours.requires_grad_(False), theirs.requires_grad_(False)):
        data = input.data.clone().requires_grad_()
        layer(input._replace(data=data))[0].data.sum().backward()
        gradients.append(data.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["GRU", "RNN"])
@pytest.mark.parametrize(
    "call",
    [
        lambda layer: layer(pack(4, width=6)),
        lambda layer: layer(pack_sequence([torch.randn(4, 5, 1)])),
        lambda layer: layer(pack(4, dtype=torch.float64)),
        lambda layer: layer(pack(4, width=6, dtype=torch.float64)),
        lambda layer: layer(pack(4, sort=True), torch.zeros(1, 2, 7)),
        lambda layer: layer(pack(4, sort=True), torch.zeros(1, 7)),
        lambda layer: layer(pack(4, sort=True), torch.zeros(2, 1, 7)),
        lambda layer: layer(pack(4, 3, sort=True), torch.zeros(1, 1, 7)),
        lambda layer: layer(pack(4, 3, sort=True), torch.zeros(1, 2, 8)),
        lambda layer: layer(pack(4, 3), torch.zeros(2, 2, 7)),
        lambda layer: layer(pack(4, 3), (torch.zeros(1, 2, 7),)),
        lambda layer: layer(pack(4, device="meta")),
        lambda layer: layer(pack(4, sort=True), torch.zeros(1, 1, 7, device="meta")),
    ],
)
def test_refused_as_torch_refuses(name: str, call: Any) -> None:
    assert_same_complaint(lambda library: call(getattr(library, name)(5, 7)))


@pytest.mark.parametrize(
    "call",
    [
        lambda layer: layer(pack(4, 3, width=6)),
        lambda layer: layer(pack(4, width=6)),
        lambda layer: layer(pack_sequence([torch.randn(4, 5, 1)])),
        lambda layer: layer(pack(4, 3, sort=True), (torch.zeros(1, 1, 7),) * 2),
        lambda layer: layer(pack(4, 3, sort=True), (torch.zeros(1, 3, 7),) * 2),
        lambda layer: layer(pack(4, sort=True), (torch.zeros(1, 1, 8),) * 2),
        lambda layer: layer(pack(4, sort=True), (torch.zeros(2, 1, 7),) * 2),
        lambda layer: layer(pack(4, sort=True), (torch.zeros(1, 7),) * 2),
    ],
)
def test_lstm_refuses_what_torch_reads_beyond_its_memory_for(call: Any) -> None:
    """torch.nn.LSTM checks nothing here: some calls run on foreign memory. Ours all raise."""
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        call(fused_rnn.LSTM(5, 7))


def test_lstm_of_another_dtype_is_refused() -> None:
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        fused_rnn.LSTM(5, 7)(pack(4, 3, dtype=torch.float64))


@each_kind
def test_more_states_than_rows(kind: str) -> None:
    """torch quirk: with sorting indices the first rows are taken."""
    ours, theirs = twins(kind, 5, 7)
    input, hx = pack(2, 4), state_for(theirs, 3)
    torch.testing.assert_close(flatten(ours(input, hx)), flatten(theirs(input, hx)))


@pytest.mark.parametrize("name", CELLS)
def test_cells_refuse_packed_sequences(name: str) -> None:
    assert_same_complaint(lambda library: getattr(library, name)(5, 7)(pack(4)))


@each_kind
def test_a_packed_sequence_of_float64(kind: str) -> None:
    ours, theirs = twins(kind, 5, 19, dtype=torch.float64)
    judge_layer(ours, theirs, lambda: (pack(3, 5, 1, dtype=torch.float64), None))


@each_kind
def test_moved_packed_sequences(kind: str) -> None:
    """`.to(dtype)`, as data-parallel wrappers do, keeps what the layer needs."""
    layer = make(fused_rnn, kind, 5, 7, dtype=torch.float64)
    output, _ = layer(pack(2, 4).to(torch.float64))
    assert output.data.dtype == torch.float64
    assert isinstance(nn.Sequential(layer)(pack(2, 4).double())[0], PackedSequence)

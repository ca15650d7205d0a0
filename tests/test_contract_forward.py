"""Calling layers: what they return, and what they say when they are called wrongly."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from layers import KINDS, assert_same_complaint, flatten, make, state_for, twins
from torch import Tensor, nn

import fused_rnn

LAYERS = ("LSTM", "GRU", "RNN")
each_kind = pytest.mark.parametrize("kind", KINDS)


def source(value: Callable[..., Any]) -> str:
    return inspect.getsource(value).strip().split(": ", 1)[1]


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def h(layer: nn.RNNBase, *shape: int, **options: Any) -> Any:
    """A state of this shape in the form that the layer takes."""
    state = zeros(*shape, **options)
    return (state, state.clone()) if layer.mode == "LSTM" else state


@each_kind
def test_arguments_may_be_keywords(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    input, hx = torch.randn(4, 3, 5), state_for(layer, 3)
    expected = flatten(layer(input, hx))
    for result in (layer(input=input, hx=hx), layer(hx=hx, input=input), layer(input, hx=hx)):
        assert all(map(torch.equal, flatten(result), expected))


@each_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_what_is_returned(kind: str, batch_first: bool) -> None:
    ours, theirs = twins(kind, 5, 7, 2, bidirectional=True, batch_first=batch_first)
    for shape in ((4, 3, 5), (4, 5)):
        input = torch.randn(shape)
        mine, yours = ours(input), theirs(input)
        assert type(mine) is tuple
        assert type(mine[1]) is type(yours[1])
        for a, b in zip(flatten(mine), flatten(yours), strict=True):
            assert type(a) is Tensor
            assert a.shape == b.shape
            assert a.is_contiguous()
            assert a.requires_grad
            assert not a.is_leaf
        storages = [tensor.untyped_storage().data_ptr() for tensor in (input, *flatten(mine))]
        assert len(set(storages)) == len(storages)


@each_kind
def test_no_grad_gives_no_graph(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    with torch.no_grad():
        assert not any(t.requires_grad or t.grad_fn for t in flatten(layer(torch.randn(4, 3, 5))))


@each_kind
def test_unbatched_is_a_batch_of_one(kind: str) -> None:
    for batch_first in (False, True):
        layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True, batch_first=batch_first)
        input, hx = torch.randn(4, 5), state_for(layer)
        one = 0 if batch_first else 1
        batched = [t.unsqueeze(1) for t in flatten(hx)]
        output, *ends = flatten(
            layer(input.unsqueeze(one), tuple(batched) if layer.mode == "LSTM" else batched[0])
        )
        expected = [output.squeeze(one), *(end.squeeze(1) for end in ends)]
        assert all(map(torch.equal, flatten(layer(input, hx)), expected))


@each_kind
def test_a_batch_of_none(kind: str) -> None:
    ours, theirs = twins(kind, 5, 7, 2, bidirectional=True)
    mine, yours = flatten(ours(zeros(4, 0, 5))), flatten(theirs(zeros(4, 0, 5)))
    assert [t.shape for t in mine] == [t.shape for t in yours]
    sum(t.sum() for t in mine).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ours.parameters())


# Calls that every layer refuses; `layer` is LSTM(5, 7), GRU(5, 7) or RNN(5, 7).
REFUSED: list[Callable[[nn.RNNBase], object]] = [
    lambda layer: layer(),
    lambda layer: layer(None),
    lambda layer: layer([1.0]),
    lambda layer: layer(zeros(5)),
    lambda layer: layer(zeros(2, 4, 3, 5)),
    lambda layer: layer(zeros(())),
    lambda layer: layer(zeros(4, 3, 6)),
    lambda layer: layer(zeros(4, 6)),
    lambda layer: layer(zeros(4, 3, 0)),
    lambda layer: layer(zeros(0, 3, 5)),
    lambda layer: layer(zeros(0, 5)),
    lambda layer: layer(zeros(4, 3, 5, dtype=torch.float64)),
    lambda layer: layer(zeros(4, 3, 5, dtype=torch.int64)),
    lambda layer: layer(zeros(4, 3, 6, dtype=torch.float64)),
    lambda layer: layer(zeros(4, 3, 5, device="meta")),
    lambda layer: layer(zeros(4, 3, 5), h(layer, 1, 3, 7, device="meta")),
    lambda layer: layer(zeros(4, 3, 5), h(layer, 1, 4, 7)),
    lambda layer: layer(zeros(4, 3, 5), h(layer, 1, 1, 7)),
    lambda layer: layer(zeros(4, 3, 5), h(layer, 2, 3, 7)),
    lambda layer: layer(zeros(4, 3, 5), h(layer, 1, 3, 8)),
    lambda layer: layer(zeros(4, 3, 5), h(layer, 3, 7)),
    lambda layer: layer(zeros(4, 3, 5), h(layer, 7)),
    lambda layer: layer(zeros(4, 3, 5), h(layer, 1, 1, 3, 7)),
    lambda layer: layer(zeros(4, 5), h(layer, 1, 1, 7)),
    lambda layer: layer(zeros(4, 5), h(layer, 1, 8)),
    lambda layer: layer(zeros(4, 5), h(layer, 2, 7)),
    lambda layer: layer(zeros(4, 3, 6), h(layer, 3, 7)),
    lambda layer: layer(zeros(4, 3, 6), h(layer, 1, 4, 7)),
    lambda layer: layer(zeros(4, 3, 5, dtype=torch.float64), h(layer, 3, 7)),
    lambda layer: layer(zeros(4, 3, 5, dtype=torch.float64), h(layer, 1, 4, 7)),
    lambda layer: layer(zeros(4, 3, 5), "state"),
    lambda layer: layer(zeros(4, 3, 5), (zeros(1, 3, 7),)),
    lambda layer: layer(zeros(4, 3, 5), (None, None)),
    lambda layer: layer(zeros(4, 3, 5), 3.0),
    lambda layer: layer(zeros(4, 3, 5), state=zeros(1, 3, 7)),
]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("call", REFUSED, ids=source)
def test_refused_as_torch_refuses(name: str, call: Callable[[nn.RNNBase], object]) -> None:
    assert_same_complaint(lambda library: call(getattr(library, name)(5, 7)))


REFUSED_BY_ONE_KIND: list[Callable[[ModuleType], object]] = [
    lambda lib: lib.LSTM(5, 7)(zeros(4, 3, 5), zeros(1, 3, 7)),
    lambda lib: lib.LSTM(5, 7)(zeros(4, 3, 5), zeros(2, 1, 3, 7)[:1]),
    lambda lib: lib.LSTM(5, 7)(zeros(4, 3, 5), [zeros(1, 3, 7)] * 3),
    lambda lib: lib.LSTM(5, 7)(zeros(4, 3, 5), (zeros(1, 3, 7), zeros(1, 4, 7))),
    lambda lib: lib.LSTM(5, 7)(zeros(4, 3, 5), (zeros(1, 3, 7), zeros(3, 7))),
    lambda lib: lib.LSTM(5, 7)(zeros(4, 3, 5), (zeros(3, 7), zeros(1, 3, 7))),
    lambda lib: lib.LSTM(5, 7)(zeros(4, 5), (zeros(1, 7), zeros(1, 1, 7))),
    lambda lib: lib.LSTM(5, 7)(zeros(4, 5), (zeros(1, 7), zeros(1, 8))),
    lambda lib: lib.LSTM(5, 7)(zeros(4, 3, 5), (zeros(1, 3, 7), None)),
    lambda lib: lib.LSTM(5, 7, proj_size=3)(zeros(4, 3, 5), (zeros(1, 3, 7), zeros(1, 3, 7))),
    lambda lib: lib.LSTM(5, 7, proj_size=3)(zeros(4, 3, 5), (zeros(1, 3, 3), zeros(1, 3, 3))),
    lambda lib: lib.LSTM(5, 7, 2, bidirectional=True)(
        zeros(4, 3, 5), (zeros(2, 3, 7), zeros(4, 3, 7))
    ),
    lambda lib: lib.LSTM(5, 7, batch_first=True)(zeros(3, 4, 5), (zeros(1, 4, 7), zeros(1, 4, 7))),
    lambda lib: lib.LSTM(5, 7, batch_first=True)(zeros(3, 0, 5)),
    lambda lib: lib.LSTM(5, 7, device="meta")(zeros(4, 3, 5)),
    lambda lib: lib.GRU(5, 7)(zeros(4, 3, 5), [zeros(1, 3, 7)]),
    lambda lib: lib.GRU(5, 7)(zeros(4, 3, 5), (zeros(1, 3, 7), zeros(1, 3, 7))),
    lambda lib: lib.GRU(5, 7, batch_first=True)(zeros(3, 0, 5)),
    lambda lib: lib.RNN(5, 7)(zeros(4, 3, 5), (zeros(1, 3, 7),)),
    lambda lib: lib.RNN(5, 7, nonlinearity="relu", batch_first=True)(
        zeros(3, 4, 5), zeros(1, 4, 7)
    ),
]


@pytest.mark.parametrize("call", REFUSED_BY_ONE_KIND, ids=source)
def test_refused_by_one_kind(call: Callable[[ModuleType], object]) -> None:
    assert_same_complaint(call)


@each_kind
def test_states_of_another_dtype_are_refused(kind: str) -> None:
    """torch's words depend on its backend here; ours name the argument."""
    layer = make(fused_rnn, kind, 5, 7)
    hx = state_for(make(nn, kind, 5, 7, dtype=torch.float64), 3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"h0.*dtype"):
            layer(torch.randn(4, 3, 5), hx)


@each_kind
def test_weights_of_another_dtype_are_refused(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.double())
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"weight_hh.*dtype"):
            layer(torch.randn(4, 3, 5))


def test_lstm_takes_lists_and_tuples() -> None:
    layer = fused_rnn.LSTM(5, 7)
    input, (h0, c0) = torch.randn(4, 3, 5), state_for(layer, 3)
    expected = flatten(layer(input, (h0, c0)))
    assert all(map(torch.equal, flatten(layer(input, [h0, c0])), expected))


@each_kind
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_layers_run(kind: str, dtype: torch.dtype) -> None:
    if kind == "RNN_RELU":
        pytest.skip("relu has no complex form in torch")
    ours, theirs = twins(kind, 5, 7, dtype=dtype)
    input = torch.randn(4, 3, 5, dtype=dtype)
    torch.testing.assert_close(ours(input), theirs(input))


@each_kind
def test_integer_layers_cannot_be_built_by_casting(kind: str) -> None:
    assert_same_complaint(lambda library: make(library, kind, 5, 7).to(torch.int64))


@each_kind
def test_meta_layers_give_meta_results(kind: str) -> None:
    ours, theirs = (
        make(library, kind, 5, 7, 2, bidirectional=True, batch_first=True).to("meta")
        for library in (fused_rnn, nn)
    )
    input = torch.randn(3, 4, 5, device="meta")
    for mine, yours in zip(flatten(ours(input)), flatten(theirs(input)), strict=True):
        assert mine.is_meta
        assert mine.shape == yours.shape
        assert mine.is_contiguous()


@each_kind
def test_arguments_are_never_written(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True)
    input, hx = torch.randn(4, 3, 5), state_for(layer, 3)
    given = [input, *flatten(hx), *layer.parameters()]
    before = [(tensor._version, tensor.detach().clone()) for tensor in given]
    flatten(layer(input, hx))[0].sum().backward()
    with torch.no_grad():
        layer(input, hx)
    for tensor, (version, copy) in zip(given, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, copy)


@each_kind
def test_no_random_number_is_drawn_without_dropout(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2)
    before = torch.get_rng_state()
    layer(torch.randn(4, 3, 5, generator=torch.Generator()))
    assert torch.equal(before, torch.get_rng_state())


@each_kind
def test_non_contiguous_input_and_state(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, batch_first=True)
    input, hx = torch.randn(5, 4, 3).permute(2, 1, 0), state_for(layer, 3)
    strided = [torch.stack([t, t], -1)[..., 0] for t in flatten(hx)]
    result = layer(input, tuple(strided) if layer.mode == "LSTM" else strided[0])
    assert all(map(torch.equal, flatten(result), flatten(layer(input.contiguous(), hx))))

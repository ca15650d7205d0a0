"""The layers as nodes of ONNX: what `torch.onnx.export` records in the place of our ops.

A layer, both directions of it, is one LSTM, GRU or RNN node where ONNX has its cell. Elsewhere each
direction is a Scan over one step of the reference: IndRNN, a projection, `reset=`, zoneout outside
training, c of every step. Time and batch may be dynamic in either.

`torch.onnx.export(model, ...)` needs nothing from here. A program that torch.export has made holds
our ops, and `decompositions` replaces them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .reference import Controls, States, Weights

if TYPE_CHECKING:
    from .functional import Result, _Call


class _Operator(NamedTuple):
    """How ONNX has a cell."""

    name: str
    order: tuple[int, ...]  # of our gates in its rows
    attributes: dict[str, int]
    activation: str = ""  # for every direction, where it is not the default


_OPERATORS = {
    "lstm": _Operator("LSTM", (0, 3, 1, 2), {}),  # i o f c
    "peephole_lstm": _Operator("LSTM", (0, 3, 1, 2), {}),
    "coupled_lstm": _Operator("LSTM", (), {"input_forget": 1}),  # see _rows
    "gru": _Operator("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z r h
    "gru_reset_before": _Operator("GRU", (1, 0, 2), {"linear_before_reset": 0}),
    "rnn_tanh": _Operator("RNN", (0,), {}),
    "rnn_relu": _Operator("RNN", (0,), {}, "Relu"),
}


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Our ops as nodes of ONNX, for a program that torch.export has made::

        program = torch.export.export(model, (input,))
        program = program.run_decompositions(fused_rnn.onnx.decompositions())
        torch.onnx.export(program, f="model.onnx")

    The program that comes out can be exported, but no longer run.
    """
    from . import ops

    if not ops.available:
        return {}
    named: Any = torch.ops.fused_rnn
    return {
        named.rnn.default: _rnn,
        ops.inference: lambda *args: _rnn(*args)[:3],
        ops.inference_controlled: _rnn,
    }


def _rnn(*args: Any) -> tuple[Tensor, ...]:
    """The op `rnn`, whose results are never None."""
    from .functional import _Call, _layer_by_layer, _reference

    controls = Controls(*args[9:18])
    call = _Call(*args[:9])._replace(controls=controls)
    every: Any = None
    if call.batch_sizes is None and call.input.dim() == 2:  # a step
        output, h_n, c_n, _ = _reference(call)
    else:
        # all_c is of one layer
        output, h_n, c_n, every = _layer_by_layer(call, layer, 0.0, False, controls.all_c)
    empty = output.new_empty(0)
    all_c = empty if every is None else every[1][0]
    return output, h_n, empty if c_n is None else c_n, all_c


def layer(call: _Call) -> Result:
    """One layer of `functional.rnn`.

    Raises:
        RuntimeError: ONNX cannot be told.
    """
    controls = call.controls or Controls()
    if call.batch_sizes is not None:
        raise RuntimeError(
            "ONNX has no packed sequences: give the layer a padded batch and `lengths=`"
        )
    masks = (controls.zoneout_mask, controls.h_mask, controls.candidate_mask)
    if any(mask is not None for mask in masks):
        raise RuntimeError(
            "ONNX has no zoneout, recurrent_dropout and candidate_dropout in training: call "
            "model.eval() before the export"
        )
    scans = reference.split_weights(call.cell, call.weights, 2 if call.bidirectional else 1)
    if call.batch_first:
        reset = controls.reset
        call = call._replace(
            input=call.input.transpose(0, 1),
            controls=controls._replace(reset=None if reset is None else reset.t()),
        )
    plain = controls.reset is None and not controls.zoned and not controls.all_c
    run = _node if plain and call.cell in _OPERATORS and scans[0].hr is None else _scans
    output, h_n, c_n, every_c = run(call, scans)
    if call.batch_first:
        output = output.transpose(0, 1)
        every_c = None if every_c is None else every_c.transpose(0, 1)
    return output, h_n, c_n, every_c


def _node(call: _Call, scans: list[Weights]) -> Result:
    operator = _OPERATORS[call.cell]
    T, B, _ = call.input.shape
    H, D = scans[0].units, len(scans)
    has_c = reference.CELLS[call.cell].states > 1
    rows = functools.partial(_rows, call.cell)
    lengths = None if call.controls is None else call.controls.lengths
    inputs: list[Tensor | None] = [
        call.input,
        torch.stack([rows(w.ih) for w in scans]),
        torch.stack([rows(w.hh) for w in scans]),
        None
        if scans[0].bias_ih is None
        else torch.stack([torch.cat([rows(w.bias_ih), rows(w.bias_hh)]) for w in scans]),
        None if lengths is None else lengths.to(torch.int32),
        call.h0,
    ]
    if has_c:
        inputs.append(call.c0)
        if scans[0].diag is not None:  # ours are i, f, o
            inputs.append(torch.stack([_permute(w.diag, (0, 2, 1)) for w in scans]))
    attributes: dict[str, Any] = {
        **operator.attributes,
        "hidden_size": H,
        "direction": "bidirectional" if D == 2 else "forward",
    }
    if operator.activation:
        attributes["activations"] = [operator.activation] * D
    states = 2 if has_c else 1
    y, *ends = torch.onnx.ops.symbolic_multi_out(
        operator.name,
        inputs,
        attributes,
        dtypes=[call.input.dtype] * (1 + states),
        shapes=[(T, D, B, H), *[(D, B, H)] * states],
    )
    if lengths is not None:  # of a sequence without steps ONNX Runtime says zero
        steps = lengths.unsqueeze(-1)
        ends = [
            end if state is None else torch.where(steps > 0, end, state)
            for end, state in zip(ends, (call.h0, call.c0), strict=False)
        ]
    output = y.transpose(1, 2).flatten(2)
    return output, ends[0], ends[1] if has_c else None, None


def _rows(cell: str, weight: Tensor | None) -> Tensor:
    """A weight or bias with its rows as ONNX has them."""
    assert weight is not None
    if cell != "coupled_lstm":
        return _permute(weight, _OPERATORS[cell].order)
    # There f = 1 - i, here i = 1 - f: its i is sigmoid(-f), and its own f is not read.
    H = weight.shape[0] // 3
    f, g, o = (weight[k * H : (k + 1) * H] for k in range(3))
    return torch.cat([-f, o, f, g])


def _permute(weight: Tensor | None, order: Sequence[int]) -> Tensor:
    assert weight is not None
    if list(order) == sorted(order):
        return weight
    H = weight.shape[0] // len(order)  # slices, which the exporter can fold; chunks it cannot
    return torch.cat([weight[k * H : (k + 1) * H] for k in order])


def _scans(call: _Call, scans: list[Weights]) -> Result:
    controls = call.controls or Controls()
    T, B, _ = call.input.shape
    initial = reference.initial_states(call.cell, call.input, B, call.h0, call.c0, scans)
    active = reset = None
    if controls.lengths is not None:  # [T, B]
        active = torch.arange(T).unsqueeze(1) < controls.lengths
    if controls.reset is not None:  # of what lies beyond the length, nothing
        reset = controls.reset if active is None else controls.reset & active
    outputs, ends = [], []
    for k, weights in enumerate(scans):
        reverse = k == 1
        begins = reset
        if reset is not None and reverse:  # walking backwards, it acts after its step
            begins = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
        x = reference.input_product(reference.CELLS[call.cell], call.input, weights)
        sequences = [s for s in (x, begins, active) if s is not None]
        states = tuple(state[k] for state in initial)
        every, last = _scan(call.cell, weights, controls, states, sequences, reverse)
        outputs.append(every)
        ends.append(last)
    every = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
    h_n, *c_n = (torch.stack(parts) for parts in zip(*ends, strict=True))
    return every[0], h_n, c_n[0] if c_n else None, every[1] if controls.all_c else None


def _scan(
    cell: str,
    weights: Weights,
    controls: Controls,
    initial: States,
    sequences: Sequence[Tensor],  # gates, and where there are: reset, active
    reverse: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The states of every step, and the last ones."""
    count = len(initial)
    # What a step reads is an input of its graph, and no input may be another's alias. Without
    # gradients: torch would split the graph into forward and backward first.
    initial = tuple(s.detach() for s in initial)
    sequences = [s.detach().flip(0) if reverse else s.detach() for s in sequences]
    given = [weights.hh, weights.bias_hh, weights.hr, weights.diag, *(s.clone() for s in initial)]
    present = tuple(t.detach() for t in given if t is not None)

    def step(*tensors: Tensor) -> list[Tensor]:
        before, (x, *masks) = tensors[:count], tensors[count : count + len(sequences)]
        rest = iter(tensors[count + len(sequences) :])
        hh, bias_hh, hr, diag, *fresh = (t if t is None else next(rest) for t in given)
        own = weights._replace(hh=hh, bias_hh=bias_hh, hr=hr, diag=diag)
        start: Any = tuple(fresh)
        one = reference._Scan(
            reference.CELLS[cell], own, reverse, controls, start, None, None, None, None
        )
        states = before if controls.reset is None else one.begin(masks[0], before)
        states = shown = one.step(0, x, states)
        if controls.lengths is not None:
            where = masks[-1].unsqueeze(-1)
            shown = tuple(torch.where(where, s, torch.zeros_like(s)) for s in states)
            pairs = zip(states, before, strict=True)
            states = tuple(torch.where(where, new, old) for new, old in pairs)
        return [*states, *(s.clone() for s in shown)]

    results = torch.ops.higher_order.scan(step, initial, sequences, present)
    every = [s.flip(0) if reverse else s for s in results[count:]]
    return every, list(results[:count])

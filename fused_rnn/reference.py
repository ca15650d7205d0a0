"""Every cell in a few lines of torch, and the loop over time.

The plainest program that computes what the kernels compute. Tests take it for the truth, and it
serves where only plain torch can: torch.func, forward-mode AD, derivatives of derivatives. Hence
nothing is written in place, and nothing but `batch_sizes` decides what is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

States = tuple[Tensor, ...]


class Cell(NamedTuple):
    """One unit at one time step.

    `step(x, h, prev)` gives the states after. x, h: pre-activations [B, G*H] from the input and
    from the previous h, biases included; prev: the states before, h first, each [B, H].
    """

    step: Callable[[Tensor, Tensor, States], States]
    states: int


def _lstm(x: Tensor, h: Tensor, prev: States) -> States:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * prev[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, prev: States) -> States:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return ((1 - z) * n + z * prev[0],)


def _rnn_tanh(x: Tensor, h: Tensor, prev: States) -> States:
    return ((x + h).tanh(),)


def _rnn_relu(x: Tensor, h: Tensor, prev: States) -> States:
    return ((x + h).relu(),)


CELLS = {
    "lstm": Cell(_lstm, states=2),
    "gru": Cell(_gru, states=1),
    "rnn_tanh": Cell(_rnn_tanh, states=1),
    "rnn_relu": Cell(_rnn_relu, states=1),
}


class Weights(NamedTuple):
    """Parameters of one layer and direction."""

    ih: Tensor  # [G*H, I]
    hh: Tensor  # [G*H, R]
    bias_ih: Tensor | None  # [G*H]
    bias_hh: Tensor | None  # [G*H]
    hr: Tensor | None  # [R, H], the projection


def split_weights(weights: Sequence[Tensor], num_scans: int) -> list[Weights]:
    """torch's flat list by layer and direction."""
    count, rest = divmod(len(weights), num_scans)
    if rest or count not in (2, 3, 4, 5):
        raise RuntimeError(
            "weights: expected 2, 3, 4 or 5 tensors for every layer and direction, of which there "
            f"are {num_scans}, got {len(weights)} tensors"
        )
    scans = []
    for k in range(0, len(weights), count):
        own = weights[k : k + count]
        bias_ih, bias_hh = own[2:4] if count >= 4 else (None, None)
        scans.append(Weights(own[0], own[1], bias_ih, bias_hh, own[-1] if count % 2 else None))
    return scans


def initial_states(
    cell: str, input: Tensor, B: int, h0: Tensor | None, c0: Tensor | None, scans: list[Weights]
) -> list[Tensor]:
    """The states before the first step, [L*D, B, R] and [L*D, B, H]; zeros for None."""
    R = scans[0].hh.shape[1]
    H = R if scans[0].hr is None else scans[0].hr.shape[1]
    return [
        input.new_zeros(len(scans), B, size) if state is None else state
        for state, size in ((h0, R), (c0, H))[: CELLS[cell].states]
    ]


def _scan(
    cell: Cell, gates_x: Sequence[Tensor], initial: States, weights: Weights, reverse: bool
) -> tuple[list[Tensor], States]:
    """h of every step in the order of time, and the last states of every sequence.

    gates_x: for every step [B_t, G*H], B_t sequences being active; initial: [B, R], [B, H].
    """
    outputs = []
    ended: list[States] = []
    states = tuple(s[: gates_x[-1].shape[0]] for s in initial) if reverse else initial
    for x in reversed(gates_x) if reverse else gates_x:
        active, before = x.shape[0], states[0].shape[0]
        if active < before:  # forwards, the shortest sequences end first
            ended.append(tuple(s[active:] for s in states))
            states = tuple(s[:active] for s in states)
        elif active > before:  # backwards, they start last
            joining = (s[before:active] for s in initial)
            states = tuple(map(torch.cat, zip(states, joining, strict=True)))
        states = cell.step(x, F.linear(states[0], weights.hh, weights.bias_hh), states)
        if weights.hr is not None:
            states = (F.linear(states[0], weights.hr), *states[1:])
        outputs.append(states[0])
    if ended:
        states = tuple(map(torch.cat, zip(states, *reversed(ended), strict=True)))
    return outputs[::-1] if reverse else outputs, states


def rnn(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A stack of recurrent layers in plain torch. Arguments and results: `functional.rnn`.

    As in the ops, [B, I] without `batch_sizes` is one step: states have no leading dimension.
    """
    if batch_sizes is None and input.dim() == 2:
        h0, c0 = (None if state is None else state.unsqueeze(0) for state in (h0, c0))
        output, _, c = rnn(
            cell,
            *(input.unsqueeze(0), None, h0, c0, weights),
            num_layers=num_layers,
            bidirectional=bidirectional,
            batch_first=False,
        )
        return output.squeeze(0), input.new_empty(0), None if c is None else c.squeeze(0)
    directions = 2 if bidirectional else 1
    scans = split_weights(weights, num_layers * directions)
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    x = input.transpose(0, 1) if batch_first and sizes is None else input  # [T, B, I] or [N, I]

    B = x.shape[1] if sizes is None else sizes[0]
    initial = initial_states(cell, x, B, h0, c0, scans)
    last: list[States] = []
    for layer in range(num_layers):
        if layer > 0:
            x = F.dropout(x, dropout, training)
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            gates_x = F.linear(x, scans[k].ih, scans[k].bias_ih)
            steps = gates_x.unbind() if sizes is None else torch.split(gates_x, sizes)
            states = tuple(state[k] for state in initial)
            h, states = _scan(CELLS[cell], steps, states, scans[k], reverse=direction == 1)
            outputs.append(torch.stack(h) if sizes is None else torch.cat(h))
            last.append(states)
        x = torch.cat(outputs, -1)
    h_n, *c_n = map(torch.stack, zip(*last, strict=True))
    output = x.transpose(0, 1).contiguous() if batch_first and sizes is None else x
    return output, h_n, c_n[0] if c_n else None

"""Every cell in a few lines of torch, and the loop over time.

The plainest program that computes what the kernels compute. Tests take it for the truth, and it
serves where only plain torch can: torch.func, forward-mode AD, derivatives of derivatives. Hence
nothing is written in place, and nothing but `batch_sizes` decides what is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

States = tuple[Tensor, ...]


class Cell(NamedTuple):
    """One unit at one time step.

    `step(x, h, w, prev)` gives the states after. x, h: pre-activations [B, G*H] from the input and
    from the previous h, biases included; w: recurrent weights [P*H] of the units to themselves;
    prev: the states before, h first, each [B, H].

    Where there is an `operand`, W_hh is multiplied by h for the first gates only, and by
    `operand(x, h, prev)`, h being what these gates get, for the others.
    """

    step: Callable[[Tensor, Tensor, Tensor | None, States], States]
    states: int
    gates: int
    diagonals: int = 0
    recurrent: bool = True
    operand: Callable[[Tensor, Tensor, States], Tensor] | None = None
    first_gates: int = 0


def _lstm(x: Tensor, h: Tensor, w: Tensor | None, prev: States) -> States:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * prev[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _peephole_lstm(x: Tensor, h: Tensor, w: Tensor | None, prev: States) -> States:
    assert w is not None
    i, f, g, o = (x + h).chunk(4, -1)
    wi, wf, wo = w.chunk(3)
    c = (f + wf * prev[1]).sigmoid() * prev[1] + (i + wi * prev[1]).sigmoid() * g.tanh()
    return (o + wo * c).sigmoid() * c.tanh(), c


def _coupled_lstm(x: Tensor, h: Tensor, w: Tensor | None, prev: States) -> States:
    f, g, o = (x + h).chunk(3, -1)
    c = f.sigmoid() * prev[1] + (1 - f.sigmoid()) * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, w: Tensor | None, prev: States) -> States:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return ((1 - z) * n + z * prev[0],)


def _gru_reset_before(x: Tensor, h: Tensor, w: Tensor | None, prev: States) -> States:
    _, z, n = (x + h).chunk(3, -1)
    return ((1 - z.sigmoid()) * n.tanh() + z.sigmoid() * prev[0],)


def _reset_h(x: Tensor, h: Tensor, prev: States) -> Tensor:
    size = prev[0].shape[-1]
    return (x[..., :size] + h[..., :size]).sigmoid() * prev[0]


def _rnn_tanh(x: Tensor, h: Tensor, w: Tensor | None, prev: States) -> States:
    return ((x + h).tanh(),)


def _rnn_relu(x: Tensor, h: Tensor, w: Tensor | None, prev: States) -> States:
    return ((x + h).relu(),)


def _indrnn_tanh(x: Tensor, h: Tensor, w: Tensor | None, prev: States) -> States:
    assert w is not None
    return ((x + h + w * prev[0]).tanh(),)


def _indrnn_relu(x: Tensor, h: Tensor, w: Tensor | None, prev: States) -> States:
    assert w is not None
    return ((x + h + w * prev[0]).relu(),)


CELLS = {
    "lstm": Cell(_lstm, states=2, gates=4),
    "peephole_lstm": Cell(_peephole_lstm, states=2, gates=4, diagonals=3),
    "coupled_lstm": Cell(_coupled_lstm, states=2, gates=3),
    "gru": Cell(_gru, states=1, gates=3),
    "gru_reset_before": Cell(_gru_reset_before, states=1, gates=3, operand=_reset_h, first_gates=2),
    "rnn_tanh": Cell(_rnn_tanh, states=1, gates=1),
    "rnn_relu": Cell(_rnn_relu, states=1, gates=1),
    "indrnn_tanh": Cell(_indrnn_tanh, states=1, gates=1, diagonals=1, recurrent=False),
    "indrnn_relu": Cell(_indrnn_relu, states=1, gates=1, diagonals=1, recurrent=False),
}


class Weights(NamedTuple):
    """Parameters of one layer and direction."""

    ih: Tensor  # [G*H, I]
    hh: Tensor | None  # [G*H, R]
    bias_ih: Tensor | None  # [G*H]
    bias_hh: Tensor | None  # [G*H]
    hr: Tensor | None  # [R, H], the projection
    diag: Tensor | None  # [P*H], recurrent weights of units to themselves

    @property
    def units(self) -> int:
        """H."""
        last = self.hr if self.hr is not None else self.hh if self.hh is not None else self.diag
        assert last is not None
        return last.shape[-1]

    @property
    def features(self) -> int:
        """R, the features of h."""
        return self.units if self.hr is None else self.hr.shape[0]


def split_weights(cell: str, weights: Sequence[Tensor], num_scans: int) -> list[Weights]:
    """The flat list of the ops by layer and direction."""
    facts = CELLS[cell]
    # With weight_hh the diagonals are one tensor more, else they are in its place.
    extra = 1 if facts.diagonals and facts.recurrent else 0
    count, rest = divmod(len(weights), num_scans)
    if rest or not 2 <= count - extra <= 5:
        few, many = 2 + extra, 5 + extra
        raise RuntimeError(
            f"weights: expected {few} to {many} tensors for every layer and direction, of which "
            f"there are {num_scans}, got {len(weights)} tensors"
        )
    scans = []
    for k in range(0, len(weights), count):
        own = list(weights[k : k + count])
        diag = own.pop() if extra else None if facts.recurrent else own[1]
        hh = own[1] if facts.recurrent else None
        bias_ih, bias_hh = own[2:4] if len(own) >= 4 else (None, None)
        hr = own[-1] if len(own) % 2 else None
        scans.append(Weights(own[0], hh, bias_ih, bias_hh, hr, diag))
    return scans


def initial_states(
    cell: str, input: Tensor, B: int, h0: Tensor | None, c0: Tensor | None, scans: list[Weights]
) -> list[Tensor]:
    """The states before the first step, [L*D, B, R] and [L*D, B, H]; zeros for None."""
    sizes = scans[0].features, scans[0].units
    return [
        input.new_zeros(len(scans), B, size) if state is None else state
        for state, size in list(zip((h0, c0), sizes, strict=True))[: CELLS[cell].states]
    ]


def _pre_activations(cell: Cell, x: Tensor, prev: States, w: Weights) -> Tensor:
    """[B, G*H] from the previous h."""
    if w.hh is None:
        return torch.zeros_like(x) if w.bias_hh is None else w.bias_hh
    if cell.operand is None:
        return F.linear(prev[0], w.hh, w.bias_hh)
    rows = cell.first_gates * w.units
    bias = None if w.bias_hh is None else (w.bias_hh[:rows], w.bias_hh[rows:])
    first = F.linear(prev[0], w.hh[:rows], bias and bias[0])
    operand = cell.operand(x, first, prev)
    return torch.cat([first, F.linear(operand, w.hh[rows:], bias and bias[1])], -1)


def _scan(
    cell: Cell,
    gates_x: Sequence[Tensor],
    initial: States,
    weights: Weights,
    reverse: bool,
    reset: Sequence[Tensor] | None,
    reset_to_initial: bool,
) -> tuple[list[Tensor], States]:
    """h of every step in the order of time, and the last states of every sequence.

    gates_x: for every step [B_t, G*H], B_t sequences being active; initial: [B, R], [B, H]; reset:
    for every step [B_t].
    """
    outputs = []
    ended: list[States] = []
    T = len(gates_x)
    states = tuple(s[: gates_x[-1].shape[0]] for s in initial) if reverse else initial
    for t in range(T - 1, -1, -1) if reverse else range(T):
        x = gates_x[t]
        active, before = x.shape[0], states[0].shape[0]
        if active < before:  # forwards, the shortest sequences end first
            ended.append(tuple(s[active:] for s in states))
            states = tuple(s[:active] for s in states)
        # A new sequence begins with a reset, and backwards in time with the step before it.
        begins = None if reset is None or t + reverse == T else reset[t + reverse]
        if begins is not None:
            fresh = [
                s[: begins.shape[0]] if reset_to_initial else torch.zeros_like(s[:1])
                for s in initial
            ]
            begins = begins[:active].unsqueeze(-1)
            states = tuple(
                torch.where(begins, new[:active], s) for new, s in zip(fresh, states, strict=True)
            )
        if active > before:  # backwards, they start last
            joining = (s[before:active] for s in initial)
            states = tuple(map(torch.cat, zip(states, joining, strict=True)))
        states = cell.step(x, _pre_activations(cell, x, states, weights), weights.diag, states)
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
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to_initial: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A stack of recurrent layers in plain torch. Arguments and results: `functional.rnn`.

    As in the ops, [B, I] without `batch_sizes` is one step: states have no leading dimension.
    """
    options: dict[str, Any] = {
        "num_layers": num_layers,
        "bidirectional": bidirectional,
        "reset_to_initial": reset_to_initial,
        "dropout": dropout,
        "training": training,
    }
    if batch_sizes is None and input.dim() == 2:
        h0, c0 = (None if state is None else state.unsqueeze(0) for state in (h0, c0))
        output, _, c = rnn(
            cell,
            *(input.unsqueeze(0), None, h0, c0, weights),
            batch_first=False,
            **options,
        )
        return output.squeeze(0), input.new_empty(0), None if c is None else c.squeeze(0)
    if lengths is not None and len(lengths):  # a batch of none is padded with nothing
        return _padded_rnn(
            cell, input, lengths, reset, h0, c0, weights, batch_first=batch_first, **options
        )
    directions = 2 if bidirectional else 1
    scans = split_weights(cell, weights, num_layers * directions)
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    if batch_first and sizes is None:  # [T, B, I] or [N, I]
        x, reset = input.transpose(0, 1), None if reset is None else reset.t()
    else:
        x = input
    resets = None
    if reset is not None:
        resets = reset.unbind() if sizes is None else torch.split(reset, sizes)

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
            h, states = _scan(
                CELLS[cell], steps, states, scans[k], direction == 1, resets, reset_to_initial
            )
            outputs.append(torch.stack(h) if sizes is None else torch.cat(h))
            last.append(states)
        x = torch.cat(outputs, -1)
    h_n, *c_n = map(torch.stack, zip(*last, strict=True))
    output = x.transpose(0, 1).contiguous() if batch_first and sizes is None else x
    return output, h_n, c_n[0] if c_n else None


def _padded_rnn(
    cell: str,
    input: Tensor,
    lengths: Tensor,
    reset: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    reset_to_initial: bool,
    dropout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Layer by layer, and in each every sequence by itself, as long as it is."""
    x = input.transpose(0, 1) if batch_first else input  # [T, B, I]
    resets = reset.t() if batch_first and reset is not None else reset
    directions = 2 if bidirectional else 1
    scans = split_weights(cell, weights, num_layers * directions)
    T, B = x.shape[:2]
    initial = initial_states(cell, x, B, h0, c0, scans)
    count = len(weights) // num_layers
    last: list[States] = []
    for layer in range(num_layers):
        if layer > 0:
            x = F.dropout(x, dropout, training)
        outputs, ends = [], []
        for b, length in enumerate(lengths.tolist()):
            if not 0 <= length <= T:
                raise RuntimeError(
                    f"lengths must be between 0 and T = {T}, got {length} for sequence {b}"
                )
            states = [s[layer * directions : (layer + 1) * directions, b : b + 1] for s in initial]
            output = x.new_zeros(0, 1, directions * scans[0].features)
            if length:
                output, *after = rnn(
                    cell,
                    x[:length, b : b + 1],
                    None,
                    states[0],
                    states[1] if len(states) > 1 else None,
                    weights[layer * count : (layer + 1) * count],
                    num_layers=1,
                    bidirectional=bidirectional,
                    batch_first=False,
                    reset=None if resets is None else resets[:length, b : b + 1],
                    reset_to_initial=reset_to_initial,
                )
                states = [state for state in after if state is not None]
            outputs.append(F.pad(output, (0, 0, 0, 0, 0, T - length)))
            ends.append(states)
        x = torch.cat(outputs, 1)
        last.append(tuple(torch.cat(parts, 1) for parts in zip(*ends, strict=True)))
    h_n, *c_n = (torch.cat(parts) for parts in zip(*last, strict=True))
    output = x.transpose(0, 1).contiguous() if batch_first else x
    return output, h_n, c_n[0] if c_n else None

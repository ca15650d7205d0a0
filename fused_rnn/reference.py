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
# output, h_n, c_n for cells with c, and c of every step where it was asked for.
Result = tuple[Tensor, Tensor, Tensor | None, Any]


class Cell(NamedTuple):
    """One unit at one time step.

    `step(x, h, w, prev)` gives the states after. x, h: pre-activations [B, G*H] from the input and
    from the previous h, biases included; w: recurrent weights [P*H] of the units to themselves;
    prev: the states before, h first, each [B, H].

    Where there is an `operand`, W_hh is multiplied by h for the first gates only, and by
    `operand(x, h, prev)`, h being what these gates get, for the others.

    With `norm_gates` both products are normalised before the biases are added, so many gates
    together, and the others together. A `normed_operand` is not multiplied but normalised, and
    appended to h.
    """

    step: Callable[[Tensor, Tensor, Tensor | None, States], States]
    states: int
    gates: int
    diagonals: int = 0
    recurrent: bool = True
    operand: Callable[[Tensor, Tensor, States], Tensor] | None = None
    first_gates: int = 0
    norm_gates: int = 0
    normed_operand: bool = False

    @property
    def two_products(self) -> bool:
        return self.operand is not None and not self.normed_operand

    @property
    def gains(self) -> int:
        """Of the gates from x, of those from h, gain and shift of the operand."""
        return 2 * self.gates + 2 * self.normed_operand if self.norm_gates else 0

    @property
    def unit_weights(self) -> int:
        """Parameters of a unit besides its rows of the matrices and the biases."""
        return self.diagonals + self.gains

    @property
    def unit_weight_name(self) -> str:
        return "norm" if self.norm_gates else "weight_ch"


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


def _normed_cell_state(x: Tensor, h: Tensor, prev: States) -> Tensor:
    return _lstm(x, h, None, prev)[1]


def _layer_norm_lstm(x: Tensor, h: Tensor, w: Tensor | None, prev: States) -> States:
    size = x.shape[-1]
    h, normed = h[..., :size], h[..., size:]
    o = (x + h).chunk(4, -1)[3]
    return o.sigmoid() * normed.tanh(), _normed_cell_state(x, h, prev)


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
    "layer_norm_lstm": Cell(
        _layer_norm_lstm,
        states=2,
        gates=4,
        operand=_normed_cell_state,
        first_gates=4,
        norm_gates=4,
        normed_operand=True,
    ),
    "gru": Cell(_gru, states=1, gates=3),
    "layer_norm_gru": Cell(_gru, states=1, gates=3, norm_gates=2),
    "gru_reset_before": Cell(_gru_reset_before, states=1, gates=3, operand=_reset_h, first_gates=2),
    "rnn_tanh": Cell(_rnn_tanh, states=1, gates=1),
    "rnn_relu": Cell(_rnn_relu, states=1, gates=1),
    "indrnn_tanh": Cell(_indrnn_tanh, states=1, gates=1, diagonals=1, recurrent=False),
    "indrnn_relu": Cell(_indrnn_relu, states=1, gates=1, diagonals=1, recurrent=False),
}


class Controls(NamedTuple):
    """What torch.nn cannot be asked for: the last arguments of the ops called `controlled`."""

    lengths: Tensor | None = None  # [B] int64: steps of each sequence of a padded batch
    reset: Tensor | None = None  # bool, like the input without features: a new sequence begins
    reset_to_initial: bool = False  # with h0 and c0 instead of zeros
    zoneout_mask: Tensor | None = None  # [L*D, N, S*H] bool: these states stay what they were
    zoneout_h: float = 0.0  # without a mask, the share of h and c that does
    zoneout_c: float = 0.0
    h_mask: Tensor | None = None  # [L*D, B, R]: what h is multiplied by for W_hh
    all_c: bool = False  # c of every step in the place of c_n, like the output

    @property
    def any(self) -> bool:
        """Whether they differ from the defaults."""
        given = self.lengths is not None or self.reset is not None or self.h_mask is not None
        return given or self.zoned or self.all_c

    def to(self, dtype: torch.dtype) -> Controls:
        return self._replace(h_mask=None if self.h_mask is None else self.h_mask.to(dtype))

    @property
    def zoned(self) -> bool:
        return self.zoneout_mask is not None or bool(self.zoneout_h or self.zoneout_c)

    def narrow(self, time: int, first: int, steps: int, T: int) -> Controls:
        """For the steps [first, first + steps) of T, in dimension `time` of the input."""
        lengths, reset, mask = self.lengths, self.reset, self.zoneout_mask
        if mask is not None:
            mask = mask.view(mask.shape[0], T, -1, mask.shape[-1])[:, first : first + steps]
        return self._replace(
            lengths=None if lengths is None else (lengths - first).clamp(0, steps),
            reset=None if reset is None else reset.narrow(time, first, steps),
            zoneout_mask=None if mask is None else mask.flatten(1, 2),
        )

    def masks(self) -> tuple[Tensor | None, ...]:
        return self.lengths, self.reset, self.zoneout_mask, self.h_mask

    def with_masks(
        self,
        lengths: Tensor | None,
        reset: Tensor | None,
        zoneout_mask: Tensor | None,
        h_mask: Tensor | None,
    ) -> Controls:
        shares = self.zoneout_h, self.zoneout_c
        return Controls(
            lengths, reset, self.reset_to_initial, zoneout_mask, *shares, h_mask, self.all_c
        )


class Weights(NamedTuple):
    """Parameters of one layer and direction."""

    ih: Tensor  # [G*H, I]
    hh: Tensor | None  # [G*H, R]
    bias_ih: Tensor | None  # [G*H]
    bias_hh: Tensor | None  # [G*H]
    hr: Tensor | None  # [R, H], the projection
    diag: Tensor | None  # [P*H], recurrent weights of units to themselves, and gains

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
    extra = 1 if facts.unit_weights and facts.recurrent else 0
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


def _sizes_of_gains(cell: Cell, w: Weights) -> list[int]:
    gates = cell.gates * w.units
    return [gates, gates, *[w.units] * (2 * cell.normed_operand)]


def _normalise(cell: Cell, product: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """[B, G*H], some gates together."""
    H = product.shape[-1] // cell.gates
    sizes = [gates * H for gates in (cell.norm_gates, cell.gates - cell.norm_gates) if gates]
    biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
    parts = zip(torch.split(product, sizes, -1), torch.split(gain, sizes), biases, strict=True)
    return torch.cat([F.layer_norm(x, x.shape[-1:], g, b) for x, g, b in parts], -1)


def input_product(cell: Cell, x: Tensor, w: Weights) -> Tensor:
    """[..., G*H] from the input."""
    if not cell.norm_gates:
        return F.linear(x, w.ih, w.bias_ih)
    assert w.diag is not None
    gain = torch.split(w.diag, _sizes_of_gains(cell, w))[0]
    return _normalise(cell, F.linear(x, w.ih), gain, w.bias_ih)


def _pre_activations(cell: Cell, x: Tensor, prev: States, w: Weights) -> Tensor:
    """[B, G*H] from the previous h."""
    if w.hh is None:
        return torch.zeros_like(x) if w.bias_hh is None else w.bias_hh
    if cell.norm_gates:
        assert w.diag is not None
        _, gain, *of_operand = torch.split(w.diag, _sizes_of_gains(cell, w))
        h = _normalise(cell, F.linear(prev[0], w.hh), gain, w.bias_hh)
        if cell.operand is None:
            return h
        operand = cell.operand(x, h, prev)
        gain, shift = of_operand
        return torch.cat([h, F.layer_norm(operand, operand.shape[-1:], gain, shift)], -1)
    if cell.operand is None:
        return F.linear(prev[0], w.hh, w.bias_hh)
    rows = cell.first_gates * w.units
    bias = None if w.bias_hh is None else (w.bias_hh[:rows], w.bias_hh[rows:])
    first = F.linear(prev[0], w.hh[:rows], bias and bias[0])
    operand = cell.operand(x, first, prev)
    return torch.cat([first, F.linear(operand, w.hh[rows:], bias and bias[1])], -1)


class _Scan(NamedTuple):
    """One layer and direction: its parameters, and what the controls say about it.

    Lists have an entry for every step; B_t sequences are active at step t.
    """

    cell: Cell
    weights: Weights
    reverse: bool
    controls: Controls
    initial: States  # [B, R], [B, H]
    reset: Sequence[Tensor] | None  # [B_t]
    zoneout_mask: Sequence[Tensor] | None  # [B_t, S*H]
    h_mask: Tensor | None  # [B, R]

    def run(self, gates_x: Sequence[Tensor]) -> tuple[list[States], States]:
        """The states after every step, in the order of time, and the last ones of every sequence.

        gates_x: [B_t, G*H]
        """
        outputs = []
        ended: list[States] = []
        T, initial, reverse = len(gates_x), self.initial, self.reverse
        states = tuple(s[: gates_x[-1].shape[0]] for s in initial) if reverse else initial
        for t in range(T - 1, -1, -1) if reverse else range(T):
            active, before = gates_x[t].shape[0], states[0].shape[0]
            if active < before:  # forwards, the shortest sequences end first
                ended.append(tuple(s[active:] for s in states))
                states = tuple(s[:active] for s in states)
            # A new sequence begins with a reset, and backwards in time with the step before it.
            if self.reset is not None and t + reverse < T:
                states = self.begin(self.reset[t + reverse][: states[0].shape[0]], states)
            if active > before:  # backwards, they start last
                joining = (s[before:active] for s in initial)
                states = tuple(map(torch.cat, zip(states, joining, strict=True)))
            states = self.step(t, gates_x[t], states)
            outputs.append(states)
        if ended:
            states = tuple(map(torch.cat, zip(states, *reversed(ended), strict=True)))
        return outputs[::-1] if reverse else outputs, states

    def begin(self, reset: Tensor, states: States) -> States:
        fresh = (
            s[: reset.shape[0]] if self.controls.reset_to_initial else torch.zeros_like(s[:1])
            for s in self.initial
        )
        where = reset.unsqueeze(-1)
        return tuple(torch.where(where, new, s) for new, s in zip(fresh, states, strict=True))

    def step(self, t: int, x: Tensor, prev: States) -> States:
        seen = prev
        if self.h_mask is not None:
            seen = (prev[0] * self.h_mask[: prev[0].shape[0]], *prev[1:])
        h = _pre_activations(self.cell, x, seen, self.weights)
        states = self.cell.step(x, h, self.weights.diag, prev)
        if self.weights.hr is not None:
            states = (F.linear(states[0], self.weights.hr), *states[1:])
        if not self.controls.zoned:
            return states
        if self.zoneout_mask is not None:
            masks = self.zoneout_mask[t].chunk(len(states), -1)
            return tuple(map(torch.where, masks, prev, states))
        shares = self.controls.zoneout_h, self.controls.zoneout_c
        return tuple(
            share * old + (1 - share) * new
            for share, old, new in zip(shares, prev, states, strict=False)
        )


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
    controls: Controls = Controls(),  # noqa: B008, it is immutable
    dropout: float = 0.0,
    training: bool = False,
) -> Result:
    """A stack of recurrent layers in plain torch. Arguments and results: `functional.rnn`.

    As in the ops, [B, I] without `batch_sizes` is one step: states have no leading dimension.
    """
    options: dict[str, Any] = {
        "num_layers": num_layers,
        "bidirectional": bidirectional,
        "dropout": dropout,
        "training": training,
    }
    if batch_sizes is None and input.dim() == 2:
        h0, c0, h_mask = (None if s is None else s.unsqueeze(0) for s in (h0, c0, controls.h_mask))
        output, _, c, _ = rnn(
            cell,
            *(input.unsqueeze(0), None, h0, c0, weights),
            batch_first=False,
            controls=controls._replace(h_mask=h_mask),
            **options,
        )
        return output.squeeze(0), input.new_empty(0), None if c is None else c.squeeze(0), None
    # A batch of none is padded with nothing.
    if controls.lengths is not None and len(controls.lengths):
        return _padded_rnn(
            cell, input, h0, c0, weights, batch_first=batch_first, controls=controls, **options
        )
    directions = 2 if bidirectional else 1
    scans = split_weights(cell, weights, num_layers * directions)
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    transposed = batch_first and sizes is None
    x = input.transpose(0, 1) if transposed else input  # [T, B, I] or [N, I]

    def steps(rows: Tensor) -> Sequence[Tensor]:
        return rows.unbind() if sizes is None else torch.split(rows, sizes)

    reset = controls.reset
    resets = None if reset is None else steps(reset.t() if transposed else reset)
    B = x.shape[1] if sizes is None else sizes[0]
    initial = initial_states(cell, x, B, h0, c0, scans)
    last: list[States] = []
    every_c = []
    for layer in range(num_layers):
        if layer > 0:
            x = F.dropout(x, dropout, training)
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            mask, h_mask = controls.zoneout_mask, controls.h_mask
            scan = _Scan(
                CELLS[cell],
                scans[k],
                k % directions == 1,
                controls,
                tuple(state[k] for state in initial),
                resets,
                None if mask is None else steps(mask[k].view(*x.shape[:-1], -1)),
                None if h_mask is None else h_mask[k],
            )
            every, states = scan.run(steps(input_product(CELLS[cell], x, scans[k])))
            join = torch.stack if sizes is None else torch.cat
            outputs.append(join([after[0] for after in every]))
            if controls.all_c:
                every_c.append(join([after[1] for after in every]))
            last.append(states)
        x = torch.cat(outputs, -1)
    h_n, *c_n = map(torch.stack, zip(*last, strict=True))
    output = x.transpose(0, 1).contiguous() if transposed else x
    all_c = None
    if controls.all_c:  # there is one layer
        all_c = torch.cat(every_c, -1)
        all_c = all_c.transpose(0, 1).contiguous() if transposed else all_c
    return output, h_n, c_n[0] if c_n else None, all_c


def _padded_rnn(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    controls: Controls,
    dropout: float,
    training: bool,
) -> Result:
    """Layer by layer, and in each every sequence by itself, as long as it is."""
    x = input.transpose(0, 1) if batch_first else input  # [T, B, I]
    resets, mask, h_mask = controls.reset, controls.zoneout_mask, controls.h_mask
    if batch_first and resets is not None:
        resets = resets.t()
    directions = 2 if bidirectional else 1
    scans = split_weights(cell, weights, num_layers * directions)
    T, B = x.shape[:2]
    if mask is not None:
        mask = mask.view(len(scans), T, B, -1)
    initial = initial_states(cell, x, B, h0, c0, scans)
    count = len(weights) // num_layers
    last: list[States] = []
    every_c = []
    assert controls.lengths is not None
    for layer in range(num_layers):
        if layer > 0:
            x = F.dropout(x, dropout, training)
        planes = slice(layer * directions, (layer + 1) * directions)
        outputs, ends = [], []
        for b, length in enumerate(controls.lengths.tolist()):
            if not 0 <= length <= T:
                raise RuntimeError(
                    f"lengths must be between 0 and T = {T}, got {length} for sequence {b}"
                )
            states = [s[planes, b : b + 1] for s in initial]
            output = x.new_zeros(0, 1, directions * scans[0].features)
            all_c = x.new_zeros(0, 1, directions * scans[0].units) if controls.all_c else None
            if length:
                output, h, c, all_c = rnn(
                    cell,
                    x[:length, b : b + 1],
                    None,
                    states[0],
                    states[1] if len(states) > 1 else None,
                    weights[layer * count : (layer + 1) * count],
                    num_layers=1,
                    bidirectional=bidirectional,
                    batch_first=False,
                    controls=controls._replace(
                        lengths=None,
                        reset=None if resets is None else resets[:length, b : b + 1],
                        zoneout_mask=None if mask is None else mask[planes, :length, b],
                        h_mask=None if h_mask is None else h_mask[planes, b : b + 1],
                    ),
                )
                states = [state for state in (h, c) if state is not None]
            outputs.append(F.pad(output, (0, 0, 0, 0, 0, T - length)))
            if all_c is not None:
                every_c.append(F.pad(all_c, (0, 0, 0, 0, 0, T - length)))
            ends.append(states)
        x = torch.cat(outputs, 1)
        last.append(tuple(torch.cat(parts, 1) for parts in zip(*ends, strict=True)))
    h_n, *c_n = (torch.cat(parts) for parts in zip(*last, strict=True))

    def laid_out(rows: Tensor) -> Tensor:
        return rows.transpose(0, 1).contiguous() if batch_first else rows

    padded_c = laid_out(torch.cat(every_c, 1)) if every_c else None
    return laid_out(x), h_n, c_n[0] if c_n else None, padded_c

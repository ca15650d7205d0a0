"""The module floor of what acts on the recurrence in training; all states; computing again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import flatten
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import Regularisers

T, B, I, H = 7, 4, 5, 6
LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": fused_rnn.LSTM,
    "PeepholeLSTM": fused_rnn.PeepholeLSTM,
    "CoupledLSTM": fused_rnn.CoupledLSTM,
    "LayerNormLSTM": fused_rnn.LayerNormLSTM,
    "LayerNormGRU": fused_rnn.LayerNormGRU,
    "GRU": fused_rnn.GRU,
    "GRU reset before": lambda *a, **k: fused_rnn.GRU(*a, reset_after=False, **k),
    "RNN": fused_rnn.RNN,
    "IndRNN": fused_rnn.IndRNN,
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def allowed(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Where a unit sees no other, nothing hides h; a simple network has no candidate."""
    refused = {"IndRNN": ("recurrent_dropout", "candidate_dropout"), "RNN": ("candidate_dropout",)}
    return {name: value for name, value in options.items() if name not in refused.get(kind, ())}


def twin(layer: nn.RNNBase) -> nn.RNNBase:
    """The layer of torch.nn with the same weights."""
    plain = getattr(nn, type(layer).__name__)(
        *(layer.input_size, layer.hidden_size, layer.num_layers),
        dropout=layer.dropout,
        bidirectional=layer.bidirectional,
        batch_first=layer.batch_first,
        dtype=layer.weight_ih_l0.dtype,
    )
    plain.load_state_dict(layer.state_dict())
    plain.train(layer.training)
    return plain  # type: ignore[no-any-return]


def by_steps(
    layer: nn.RNNBase, x: Tensor, change: Callable[[int, Any, Any], Any], see: Any = None
) -> tuple[Tensor, Any]:
    """torch.nn's cell in a loop; `change(t, before, after)` of the states, h as W_hh sees it."""
    name = type(layer).__name__
    cell = getattr(nn, f"{name}Cell")(layer.input_size, layer.hidden_size, dtype=x.dtype)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    h = x.new_zeros(x.shape[1], layer.hidden_size)
    states = (h, h) if name == "LSTM" else (h,)
    outputs = []
    for t, row in enumerate(x):
        seen = states if see is None else (states[0] * see, *states[1:])
        after = cell(row, seen if name == "LSTM" else seen[0])
        states = change(t, states, after if isinstance(after, tuple) else (after,))
        outputs.append(states[0])
    last = tuple(state.unsqueeze(0) for state in states)
    return torch.stack(outputs), last


def assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(flatten(ours), flatten(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_zoneout_outside_training_is_the_expectation(kind: str) -> None:
    layer = LAYERS[kind](I, H, zoneout=(0.2, 0.5), dtype=torch.float64).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)

    def blend(t: int, before: Any, after: Any) -> Any:
        shares = (0.2, 0.5)
        return tuple(p * b + (1 - p) * a for p, b, a in zip(shares, before, after, strict=False))

    assert_close(layer(x), by_steps(layer, x, blend))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_zoneout_in_training_keeps_whole_units(kind: str) -> None:
    layer = LAYERS[kind](I, H, zoneout=(0.3, 0.6), dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    states = 2 if kind == "LSTM" else 1
    torch.manual_seed(3)
    ours = layer(x)
    torch.manual_seed(3)
    mask = torch.empty(1, T * B, states, H, dtype=torch.bool)
    for state, share in enumerate((0.3, 0.6)[:states]):
        mask[:, :, state].bernoulli_(share)
    masks = mask.view(T, B, states, H).unbind(2)

    def keep(t: int, before: Any, after: Any) -> Any:
        return tuple(torch.where(m[t], b, a) for m, b, a in zip(masks, before, after, strict=True))

    assert_close(ours, by_steps(layer, x, keep))


@each_layer
def test_the_rate_of_zoneout(kind: str) -> None:
    layer = LAYERS[kind](I, 40, zoneout=(0.25, 0.75))
    _, _, every = layer(torch.randn(50, 20, I), return_all_states=True)
    states = every if isinstance(every, tuple) else (every,)
    for sequence, rate in zip(states, (0.25, 0.75), strict=False):
        kept = (sequence[0, 1:] == sequence[0, :-1]).double().mean().item()
        # A dead relu stays what it was by itself.
        assert rate - 0.02 < kept < (1.0 if kind == "IndRNN" else rate + 0.02)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_dropout_is_one_mask_for_all_steps(kind: str) -> None:
    layer = LAYERS[kind](I, H, recurrent_dropout=0.4, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.manual_seed(5)
    ours = layer(x)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(1, B, H, dtype=torch.float64), 0.4)[0]
    if kind == "GRU":  # the state itself, which z keeps, is not masked: the cell in two halves
        ih, hh, b_ih, b_hh = (p.detach() for p in layer.parameters())
        h, outputs = x.new_zeros(B, H), []
        for row in x:
            xr, xz, xn = F.linear(row, ih, b_ih).chunk(3, -1)
            hr, hz, hn = F.linear(h * mask, hh, b_hh).chunk(3, -1)
            z = (xz + hz).sigmoid()
            h = (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h
            outputs.append(h)
        return assert_close(ours[0], torch.stack(outputs))
    assert_close(ours, by_steps(layer, x, lambda t, before, after: after, mask))


@pytest.mark.parametrize("kind", ["LSTM", "CoupledLSTM", "GRU", "GRU reset before"])
def test_candidate_dropout_keeps_what_is_remembered(kind: str) -> None:
    """One mask of what is added to the memory, for all steps; with a mask of h beside it."""
    rates = {"recurrent_dropout": 0.4, "candidate_dropout": 0.5}
    layer = LAYERS[kind](I, H, **rates, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.manual_seed(5)
    ours = layer(x)[0]
    torch.manual_seed(5)
    ones = torch.ones(1, B, H, dtype=torch.float64)
    h_mask, m = F.dropout(ones, 0.4)[0], F.dropout(ones, 0.5)[0]
    ih, hh, b_ih, b_hh = (p.detach() for p in layer.parameters())
    h, c, outputs = x.new_zeros(B, H), x.new_zeros(B, H), []
    for row in x:
        gx, gh = F.linear(row, ih, b_ih), F.linear(h * h_mask, hh, b_hh)
        if kind == "LSTM":
            i, f, g, o = (gx + gh).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * (m * g.tanh())
            h = o.sigmoid() * c.tanh()
        elif kind == "CoupledLSTM":
            f, g, o = (gx + gh).chunk(3, -1)
            c = f.sigmoid() * c + (1 - f.sigmoid()) * (m * g.tanh())
            h = o.sigmoid() * c.tanh()
        else:
            (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
            r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
            if kind == "GRU reset before":
                hn = F.linear(r * (h * h_mask), hh[2 * H :], b_hh[2 * H :])
                r = torch.ones_like(r)
            h = (1 - z) * (m * (xn + r * hn).tanh()) + z * h
        outputs.append(h)
    assert_close(ours, torch.stack(outputs))


def test_a_unit_whose_candidate_never_enters_forgets_and_adds_nothing() -> None:
    """The mask is there for all steps, so c decays from c0 by the forget gate alone."""
    layer = fused_rnn.LSTM(I, H, candidate_dropout=1.0, dtype=torch.float64)
    x, h0 = torch.randn(T, B, I, dtype=torch.float64), torch.zeros(1, B, H, dtype=torch.float64)
    c0 = torch.ones_like(h0)
    c = layer(x, (h0, c0), return_all_states=True)[2][1][0]
    assert (c > 0).all()
    assert (c[1:] < c[:-1]).all()
    assert (layer(x)[0] == 0).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "PeepholeLSTM", "LayerNormLSTM"])
def test_zoneout_of_a_projected_layer_keeps_what_is_projected(kind: str, training: bool) -> None:
    """h is W_hr m, of proj_size features; c has the units. By the cell without zoneout, a step a
    call."""
    R, rates = 2, (0.3, 0.6)
    layer = LAYERS[kind](I, H, proj_size=R, zoneout=rates, dtype=torch.float64)
    plain = LAYERS[kind](I, H, proj_size=R, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    layer.train(training)
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.manual_seed(3)
    ours = layer(x)
    torch.manual_seed(3)
    mask = torch.empty(1, T * B, R + H, dtype=torch.bool)
    mask[..., :R].bernoulli_(rates[0])
    mask[..., R:].bernoulli_(rates[1])
    masks = mask.view(T, B, -1).split([R, H], -1)
    states: Any = x.new_zeros(1, B, R), x.new_zeros(1, B, H)
    outputs = []
    for t, row in enumerate(x):
        after = plain(row.unsqueeze(0), states)[1]
        states = tuple(
            torch.where(m[t], old, new) if training else rate * old + (1 - rate) * new
            for m, rate, old, new in zip(masks, rates, states, after, strict=True)
        )
        outputs.append(states[0][0])
    assert_close(ours, (torch.stack(outputs), states))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_weight_dropout_is_dropout_of_the_recurrent_weights(kind: str) -> None:
    layer = LAYERS[kind](I, H, 2, weight_dropout=0.5, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.manual_seed(7)
    ours = layer(x)
    plain = twin(layer)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "weight_hh" in name:
                parameter.copy_(F.dropout(parameter, 0.5))
    assert_close(ours, plain(x))


@pytest.mark.parametrize("packed", [False, True])
def test_variational_dropout_is_one_mask_for_all_steps(packed: bool) -> None:
    layer = fused_rnn.GRU(I, H, 2, dropout=0.5, variational=True, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([T, 5, 5, 2])
    torch.manual_seed(9)
    ours = layer(pack_padded_sequence(x, lengths) if packed else x)[0]
    torch.manual_seed(9)
    mask = F.dropout(torch.ones(1, B, H, dtype=torch.float64), 0.5)
    plain = twin(layer)
    lower, upper = nn.GRU(I, H, dtype=torch.float64), nn.GRU(H, H, dtype=torch.float64)
    state = plain.state_dict()
    lower.load_state_dict({k: v for k, v in state.items() if k.endswith("l0")})
    upper.load_state_dict({k[:-1] + "0": v for k, v in state.items() if k.endswith("l1")})
    middle = lower(x)[0] * mask
    theirs = upper(pack_padded_sequence(middle, lengths) if packed else middle)[0]
    assert_close(ours, theirs)


@each_layer
def test_without_training_only_zoneout_acts(kind: str) -> None:
    rates = ("dropout", "weight_dropout", "recurrent_dropout", "candidate_dropout")
    options: dict[str, Any] = {"variational": True, **dict.fromkeys(rates, 0.5)}
    layer = LAYERS[kind](I, H, 2, **options).eval()
    x = torch.randn(T, B, I)
    plain = LAYERS[kind](I, H, 2).eval()
    plain.load_state_dict(layer.state_dict())
    for ours, theirs in zip(flatten(layer(x)), flatten(plain(x)), strict=True):
        assert torch.equal(ours, theirs)


REGULARISED: dict[str, dict[str, Any]] = {
    "zoneout": {"zoneout": (0.2, 0.5)},
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "candidate_dropout": {"candidate_dropout": 0.3},
    "everything": {
        "zoneout": 0.2,
        "recurrent_dropout": 0.3,
        "candidate_dropout": 0.3,
        "weight_dropout": 0.3,
        "variational": True,
        "dropout": 0.3,
    },
}


@pytest.mark.parametrize("options", REGULARISED.values(), ids=REGULARISED)
@each_layer
def test_gradients_of_regularised_layers(kind: str, options: dict[str, Any]) -> None:
    options = allowed(kind, options)
    if kind == "IndRNN":
        options["nonlinearity"] = "tanh"
    layer = LAYERS[kind](2, 3, 2, dtype=torch.float64, **options)

    def call(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        named = dict(zip((name for name, _ in layer.named_parameters()), weights, strict=True))
        result = torch.func.functional_call(layer, named, (x,), {"return_all_states": True})
        return tuple(flatten(result))

    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)
    if kind in ("LSTM", "GRU reset before"):
        assert torch.autograd.gradgradcheck(lambda x: call(x, *layer.parameters())[0], (x,))


@pytest.mark.parametrize("options", REGULARISED.values(), ids=REGULARISED)
def test_the_same_seed_gives_the_same_bits_with_any_number_of_threads(
    options: dict[str, Any],
) -> None:
    layer = fused_rnn.LSTM(8, 40, 2, bidirectional=True, **options)
    x = torch.randn(20, 12, 8)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(4)
        layer.zero_grad()
        output = layer(x)[0]
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in layer.parameters())])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize("options", REGULARISED.values(), ids=REGULARISED)
def test_regularised_layers_compile_to_one_graph(options: dict[str, Any]) -> None:
    layer = fused_rnn.LSTM(I, H, 2, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output, _, every = compiled(torch.randn(T, B, I), return_all_states=True)
    (output.sum() + every[1].sum()).backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_converted_layer_takes_regularisers() -> None:
    layer = fused_rnn.convert(nn.LSTM(I, H))
    x = torch.randn(T, B, I)
    plain = layer(x)[0]
    layer.regularisers = Regularisers(zoneout_h=0.5)
    assert not torch.equal(layer(x)[0], plain)
    layer.regularisers = None
    assert torch.equal(layer(x)[0], plain)


def test_regularised_layers_say_so() -> None:
    layer = fused_rnn.LSTM(I, H, zoneout=0.1, candidate_dropout=0.2, recompute=True)
    words = "zoneout_h=0.1, zoneout_c=0.1, candidate_dropout=0.2, recompute=True"
    assert repr(layer) == f"LSTM({I}, {H}, {words})"


@pytest.mark.parametrize(
    "name", ["zoneout", "recurrent_dropout", "candidate_dropout", "weight_dropout"]
)
@pytest.mark.parametrize("rate", [-0.1, 1.5, math.nan])
def test_a_rate_that_is_no_probability_raises(name: str, rate: float) -> None:
    with pytest.raises(
        ValueError, match=rf"{name} should be a number in range \[0, 1\], got {rate}"
    ):
        fused_rnn.GRU(I, H, **{name: rate})


@pytest.mark.parametrize("rates", [(0.1,), (0.1, 0.2, 0.3), (0.1, 2.0)])
def test_zoneout_is_one_rate_or_two(rates: Any) -> None:
    with pytest.raises(ValueError, match=r"unpack|got 2.0"):
        fused_rnn.LSTM(I, H, zoneout=rates)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (
            "IndRNN",
            "recurrent_dropout",
            "units of h from W_hh, which indrnn_relu does not have",
        ),
        ("IndRNN", "candidate_dropout", "indrnn_relu has none: use zoneout"),
        ("RNN", "candidate_dropout", "rnn_tanh has none: use recurrent_dropout"),
    ],
)
def test_what_a_cell_has_no_place_for_raises(kind: str, name: str, words: str) -> None:
    """In training: outside, nothing would act."""
    layer = LAYERS[kind](I, H, **{name: 0.1})
    with pytest.raises(ValueError, match=words):
        layer(torch.randn(T, B, I))
    layer.eval()(torch.randn(T, B, I))


# All states


@pytest.mark.parametrize("layout", ["dense", "batch_first", "unbatched", "packed", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_all_states_are_those_of_every_layer(layout: str, bidirectional: bool) -> None:
    """Against torch.nn stopped after every step, of which the states are the last ones."""
    first = layout == "batch_first"
    layer = fused_rnn.LSTM(
        I, H, 2, bidirectional=bidirectional, batch_first=first, dtype=torch.float64
    )
    D = 2 if bidirectional else 1
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([T, 5, 5, 2])
    given: Any = x.transpose(0, 1) if first else x[:, 0] if layout == "unbatched" else x
    options: dict[str, Any] = {"return_all_states": True}
    if layout == "packed":
        given = pack_padded_sequence(x, lengths)
    elif layout == "lengths":
        options["lengths"] = lengths
    output, (h_n, c_n), (h, c) = layer(given, **options)
    assert torch.equal(h[-1], flatten(output)[0])
    if layout == "unbatched":
        h, c, h_n, c_n = h.unsqueeze(2), c.unsqueeze(2), h_n.unsqueeze(1), c_n.unsqueeze(1)
    elif first:
        h, c = h.transpose(1, 2), c.transpose(1, 2)
    steps = lengths if layout in ("packed", "lengths") else torch.full((h_n.shape[1],), T)
    for b, last in enumerate(steps.tolist()):
        if layout == "packed":
            sizes = given.batch_sizes.tolist()
            rows = [sum(sizes[:t]) + b for t in range(last)]
            every_h, every_c = h[:, rows], c[:, rows]
        else:
            every_h, every_c = h[:, :last, b], c[:, :last, b]
        for k in range(2):
            for d in range(D):
                end, units = (-1, 0)[d], slice(d * H, (d + 1) * H)
                assert torch.equal(every_h[k, end, units], h_n[k * D + d, b])
                assert torch.equal(every_c[k, end, units], c_n[k * D + d, b])
        if not bidirectional:  # the states at any step are the last ones of what is before it
            _, (h_3, c_3) = twin(layer)(x[:2] if not first else x.transpose(0, 1)[:, :2])
            assert_close((every_h[:, 1], every_c[:, 1]), (h_3[:, b], c_3[:, b]))


def test_all_states_of_a_cell_without_c_are_h() -> None:
    layer = fused_rnn.GRU(I, H, 3)
    output, h_n, h = layer(torch.randn(T, B, I), return_all_states=True)
    assert h.shape == (3, T, B, H)
    assert torch.equal(h[-1], output)
    assert torch.equal(h[:, -1], h_n)


def test_the_gradient_of_all_states_is_that_of_their_steps() -> None:
    layer = fused_rnn.LSTM(I, H, 2, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    _, _, (_, c) = layer(x, return_all_states=True)
    seed = torch.randn(2, B, H, dtype=torch.float64)
    (ours,) = torch.autograd.grad((c[:, 2] * seed).sum(), x)
    _, (_, c_n) = twin(layer)(x[:3])
    (theirs,) = torch.autograd.grad((c_n * seed).sum(), x)
    assert_close(ours, theirs)


# Computing again


RECOMPUTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "two layers": ({"num_layers": 2, "dropout": 0.3}, {}),
    "batch_first": ({"batch_first": True}, {}),
    "bidirectional": ({"num_layers": 2, "bidirectional": True}, {}),
    "lengths": ({}, {"lengths": torch.tensor([700, 3, 0, 300])}),
    "reset": ({"num_layers": 2}, {"reset": torch.rand(700, 4) < 0.01}),
    "initial": ({}, {"reset": torch.rand(700, 4) < 0.01, "reset_to_initial": True}),
    "masks": (
        {"zoneout": 0.2, "recurrent_dropout": 0.3, "candidate_dropout": 0.3},
        {"return_all_states": True},
    ),
}


@pytest.mark.parametrize(("options", "arguments"), RECOMPUTED.values(), ids=RECOMPUTED)
def test_recomputing_changes_no_number_but_by_rounding(
    options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    layer = fused_rnn.LSTM(I, H, dtype=torch.float64, **options)
    x = torch.randn(700, 4, I, dtype=torch.float64)  # several segments
    if layer.batch_first:
        x = x.transpose(0, 1)

    def results() -> list[Tensor]:
        torch.manual_seed(6)
        leaf = x.detach().requires_grad_()
        outputs = flatten(layer(leaf, **arguments))
        loss = sum((output.sin().sum() for output in outputs), torch.zeros(()))
        gradients = torch.autograd.grad(loss, (leaf, *layer.parameters()))
        return [*(output.detach() for output in outputs), *gradients]

    expected = results()
    layer.recompute = True
    assert_close(results(), expected)


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward call keeps for backward, each tensor's memory once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(storages.values())


def test_recomputing_keeps_the_states_between_segments() -> None:
    layer = fused_rnn.LSTM(I, H)
    x = torch.randn(1000, 16, I, requires_grad=True)
    everything = kept(layer, x)
    layer.recompute = True
    # The input and the weights are there anyway; of six values per unit and step nothing is.
    least = sum(t.untyped_storage().nbytes() for t in (x, *layer.parameters()))
    assert everything > least + 6 * 1000 * 16 * H * 4
    assert kept(layer, x) < least + 1000 * 16 * H * 4 // 10


# The bias of the forget gate


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (lambda: fused_rnn.LSTM(I, H, 2, bidirectional=True), slice(H, 2 * H)),
        (lambda: fused_rnn.PeepholeLSTMCell(I, H), slice(H, 2 * H)),
        (lambda: nn.LSTM(I, H), slice(H, 2 * H)),
        (lambda: fused_rnn.CoupledLSTM(I, H), slice(0, H)),
    ],
)
def test_the_bias_of_the_forget_gate(make: Callable[[], nn.Module], rows: slice) -> None:
    layer = make()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    fused_rnn.init_forget_bias_(layer, 2.0)
    for name, parameter in layer.named_parameters():
        if name.startswith("bias_"):
            value = 2.0 if name.startswith("bias_ih") else 0.0
            assert (parameter[rows] == value).all()
            before[name][rows] = value
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (fused_rnn.GRU(I, H), "a forget gate is in an LSTM, got GRU"),
        (fused_rnn.LSTM(I, H, bias=False), "the layer has no bias"),
    ],
)
def test_what_has_no_forget_bias_raises(layer: nn.Module, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        fused_rnn.init_forget_bias_(layer)

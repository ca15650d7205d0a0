"""lengths= and reset=, in every layer: padded batches, and sequences that begin inside a batch."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from judge import Tensors, judge_draws
from layers import (
    BEYOND,
    KINDS,
    complaint,
    flatten,
    has_deciding_kink,
    make,
    map_tensors,
    precise,
    run,
    state_for,
    twins,
)
from scans import FLOATS
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import ops

T, B, I, H = 7, 5, 6, 17
LENGTHS = (3, 7, 1, 7, 4)
Hx = Any
Call = Callable[[Any, Hx], Any]

each_kind = pytest.mark.parametrize("kind", KINDS)
every_kind = pytest.mark.parametrize("kind", [*KINDS, *BEYOND])
each_structure = pytest.mark.parametrize(
    "structure",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 3, "batch_first": True, "bias": False},
        {"bidirectional": True, "batch_first": True},
    ],
    ids=str,
)


def question(layer: nn.RNNBase, state: bool = True) -> tuple[Tensor, Hx]:
    shape = (B, T, I) if layer.batch_first else (T, B, I)
    input = torch.randn(shape).to(layer.weight_ih_l0.dtype)
    return input, state_for(layer, B) if state else None


def resets(layer: nn.RNNBase, probability: float = 0.3) -> Tensor:
    """At the first step of some sequences, at the last of others, and at steps in a row."""
    mask = torch.rand(T, B) < probability
    mask[0, :2], mask[-1, 1:3], mask[2:4, 0] = True, True, True
    return mask.t() if layer.batch_first else mask


def judge_calls(
    ours: nn.RNNBase, theirs: nn.RNNBase, wrap: Callable[[nn.RNNBase], Call], **controls: Any
) -> None:
    """Judge `ours` with `controls` against what `wrap` makes of torch.nn's layer."""
    dtype = theirs.weight_ih_l0.dtype
    double = copy.deepcopy(theirs).double()

    def draw() -> tuple[Tensors, Tensors, Tensors]:
        input, hx = question(theirs)
        if has_deciding_kink(theirs):
            input, hx = map_tensors(Tensor.abs, (input, hx))
        fused = functools.partial(ours, **controls)
        wide = map_tensors(Tensor.double, (input, hx))
        return (
            run(fused, dict(ours.named_parameters()), input, hx, dtype),
            run(wrap(theirs), dict(theirs.named_parameters()), input, hx, dtype),
            run(wrap(double), dict(double.named_parameters()), *wide, dtype),
        )

    judge_draws(draw)


# What torch.nn does instead


def by_packing(layer: nn.RNNBase, lengths: Any) -> Call:
    def call(input: Tensor, hx: Hx) -> Any:
        packed = pack_padded_sequence(input, lengths, layer.batch_first, enforce_sorted=False)
        output, ends = layer(packed, hx)
        return pad_packed_sequence(output, layer.batch_first, total_length=T)[0], ends

    return call


def by_segments(
    layer: nn.RNNBase, reset: Tensor, to_initial: bool = False, lengths: Any = (T,) * B
) -> Call:
    """Each sequence of the batch is cut where it is reset, and each piece is a call."""
    directions = 2 if layer.bidirectional else 1
    mask = reset.t() if layer.batch_first else reset

    def call(input: Tensor, hx: Hx) -> Any:
        x = input.transpose(0, 1) if layer.batch_first else input
        initial = flatten(hx)
        outputs, ends = [], []
        for b, length in enumerate(lengths):
            own = [state[:, b : b + 1] for state in initial]
            cuts = [0, *(t for t in range(1, length) if mask[t, b]), length]
            pieces, states = [], []
            for begin, end in itertools.pairwise(cuts):
                if begin == end:  # a sequence of no steps
                    continue
                # Its own initial states are met by the first piece, and backwards by the last.
                keeps = begin == 0 and not mask[0, b], end == length
                factor = torch.tensor(
                    [to_initial or keeps[k % directions] for k in range(len(own[0]))]
                )
                start = tuple(s * factor.view(-1, 1, 1).to(s.dtype) for s in own)
                piece = x[begin:end, b : b + 1]
                piece = piece.transpose(0, 1) if layer.batch_first else piece
                output, after = layer(piece, start if len(start) > 1 else start[0])
                pieces.append(output.transpose(0, 1) if layer.batch_first else output)
                states.append(flatten(after))
            if states:
                first, last = states[0], states[-1]
                own = [
                    torch.stack([(z if k % directions == 0 else a)[k] for k in range(len(z))])
                    for a, z in zip(first, last, strict=True)
                ]
            features = directions * (layer.proj_size or layer.hidden_size)
            pieces.append(x.new_zeros(T - length, 1, features))
            outputs.append(torch.cat(pieces))
            ends.append(own)
        output = torch.cat(outputs, 1)
        states = [torch.cat(parts, 1) for parts in zip(*ends, strict=True)]
        output = output.transpose(0, 1) if layer.batch_first else output
        return output, tuple(states) if len(states) > 1 else states[0]

    return call


def by_steps(layer: nn.RNNBase, reset: Tensor, to_initial: bool = False) -> Call:
    """The loop that everybody writes, for one direction."""

    def call(input: Tensor, hx: Hx) -> Any:
        initial = states = flatten(hx)
        outputs = []
        for x, begins in zip(input, reset, strict=True):
            begins = begins.view(1, -1, 1)
            fresh = initial if to_initial else [torch.zeros_like(state) for state in states]
            states = [torch.where(begins, f, s) for f, s in zip(fresh, states, strict=True)]
            output, after = layer(x[None], tuple(states) if len(states) > 1 else states[0])
            states = flatten(after)
            outputs.append(output)
        return torch.cat(outputs), tuple(states) if len(states) > 1 else states[0]

    return call


# lengths


@each_kind
@each_structure
def test_lengths_are_what_packing_is(kind: str, structure: dict[str, Any]) -> None:
    ours, theirs = twins(kind, I, H, **structure)
    judge_calls(
        ours, theirs, lambda layer: by_packing(layer, LENGTHS), lengths=torch.tensor(LENGTHS)
    )


@each_kind
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_lengths_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = twins(kind, I, H, bidirectional=True, dtype=dtype)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    judge_calls(ours, theirs, lambda layer: by_packing(layer, LENGTHS), lengths=lengths)


@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("state", [True, False], ids=["hx", "no hx"])
def test_sequences_of_no_steps(kind: str, batch_first: bool, state: bool) -> None:
    """Their output is zero, their states and their gradients pass through."""
    layer = make(fused_rnn, kind, I, H, 2, bidirectional=True, batch_first=batch_first)
    input, hx = question(layer, state)
    lengths = torch.tensor((0, 3, 0, 7, 0))
    some = torch.tensor((1, 3))
    leaves = map_tensors(lambda t: t.clone().requires_grad_(), (input, hx))
    output, ends = layer(*leaves, lengths=lengths)
    dim = 0 if batch_first else 1
    shorter = map_tensors(lambda s: s[:, some], hx)
    rest, rest_ends = layer(input.index_select(dim, some), shorter, lengths=lengths[some])
    torch.testing.assert_close(output.index_select(dim, some), rest)
    none = torch.tensor((0, 2, 4))
    assert not output.index_select(dim, none).any()
    for end, rest_end in zip(flatten(ends), flatten(rest_ends), strict=True):
        torch.testing.assert_close(end[:, some], rest_end)
    if not state:
        assert not any(end[:, none].any() for end in flatten(ends))
        return
    for end, start in zip(flatten(ends), flatten(hx), strict=True):
        assert torch.equal(end[:, none], start[:, none])
    seeds = [torch.randn_like(end) for end in flatten(ends)]
    states = flatten(leaves[1])
    d_input, *d_states = torch.autograd.grad(flatten(ends), [leaves[0], *states], seeds)
    assert not d_input.index_select(dim, none).any()
    for d_state, seed in zip(d_states, seeds, strict=True):
        assert torch.equal(d_state[:, none], seed[:, none])


@every_kind
def test_what_is_beyond_the_length_is_not_read(kind: str) -> None:
    layer = make(fused_rnn, kind, I, H, 2, bidirectional=True)
    (input, hx), lengths = question(layer), torch.tensor(LENGTHS)
    spoiled = input.masked_fill((torch.arange(T)[:, None] >= lengths)[..., None], float("nan"))
    leaf = spoiled.clone().requires_grad_()
    found = flatten(layer(leaf, hx, lengths=lengths))
    assert all(map(torch.equal, found, flatten(layer(input, hx, lengths=lengths))))
    gradients = torch.autograd.grad(sum(t.sum() for t in found), [leaf, *layer.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][spoiled.isnan()].any()


@every_kind
def test_full_lengths_are_no_lengths(kind: str) -> None:
    layer = make(fused_rnn, kind, I, H, 2, bidirectional=True)
    input, hx = question(layer)
    found = layer(input, hx, lengths=torch.full((B,), T))
    torch.testing.assert_close(flatten(found), flatten(layer(input, hx)))


@every_kind
def test_lengths_of_a_batch_of_none(kind: str) -> None:
    layer = make(fused_rnn, kind, I, H, 2, bidirectional=True)
    output, ends = layer(torch.randn(T, 0, I), lengths=torch.zeros(0, dtype=torch.int64))
    assert output.shape == (T, 0, 2 * (layer.proj_size or H))
    assert all(end.shape[:2] == (4, 0) for end in flatten(ends))


# reset


@each_kind
@each_structure
@pytest.mark.parametrize("to_initial", [False, True], ids=["zero", "initial"])
def test_a_reset_begins_a_new_sequence(
    kind: str, structure: dict[str, Any], to_initial: bool
) -> None:
    ours, theirs = twins(kind, I, H, **structure)
    mask = resets(theirs)
    judge_calls(
        ours,
        theirs,
        lambda layer: by_segments(layer, mask, to_initial),
        reset=mask,
        reset_to_initial=to_initial,
    )


@each_kind
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("to_initial", [False, True], ids=["zero", "initial"])
def test_resets_are_the_loop_that_zeroes_the_states(
    kind: str, layers: int, to_initial: bool
) -> None:
    ours, theirs = twins(kind, I, H, layers)
    mask = resets(theirs)
    judge_calls(
        ours,
        theirs,
        lambda layer: by_steps(layer, mask, to_initial),
        reset=mask,
        reset_to_initial=to_initial,
    )


@each_kind
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_resets_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = twins(kind, I, H, bidirectional=True, dtype=dtype)
    mask = resets(theirs)
    judge_calls(ours, theirs, lambda layer: by_segments(layer, mask), reset=mask.to(dtype))


@each_kind
@each_structure
@pytest.mark.parametrize("to_initial", [False, True], ids=["zero", "initial"])
def test_resets_and_lengths_together(
    kind: str, structure: dict[str, Any], to_initial: bool
) -> None:
    ours, theirs = twins(kind, I, H, **structure)
    mask = resets(theirs)
    judge_calls(
        ours,
        theirs,
        lambda layer: by_segments(layer, mask, to_initial, LENGTHS),
        reset=mask,
        reset_to_initial=to_initial,
        lengths=torch.tensor(LENGTHS),
    )


@pytest.mark.parametrize("kind", BEYOND)
@each_structure
@pytest.mark.parametrize("lengths", [(T,) * B, LENGTHS, (0, 2, 0, 7, 1)], ids=str)
def test_layers_beyond_torch_run_in_segments(
    kind: str, structure: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    """The pieces are calls of the layer itself, without resets and lengths."""
    layer = make(fused_rnn, kind, I, H, dtype=precise(kind), **structure)
    parameters, mask = dict(layer.named_parameters()), resets(layer)
    input, hx = question(layer)
    controls = {"reset": mask, "lengths": torch.tensor(lengths)}
    found = run(functools.partial(layer, **controls), parameters, input, hx, input.dtype)
    by_pieces = by_segments(layer, mask, lengths=lengths)
    torch.testing.assert_close(found, run(by_pieces, parameters, input, hx, input.dtype))


@every_kind
def test_a_mask_is_true_where_it_is_not_zero(kind: str) -> None:
    layer = make(fused_rnn, kind, I, H, bidirectional=True)
    input, hx = question(layer)
    mask = resets(layer)
    expected = flatten(layer(input, hx, reset=mask))
    strided = torch.stack((mask, ~mask), -1)[..., 0]
    for same in (mask.float(), mask.double() * -0.5, mask.int() * 3, mask.bfloat16(), strided):
        assert all(map(torch.equal, flatten(layer(input, hx, reset=same)), expected))
    nothing = flatten(layer(input, hx, reset=torch.zeros(T, B)))
    assert all(map(torch.equal, nothing, flatten(layer(input, hx))))
    assert not torch.equal(nothing[0], expected[0])


@every_kind
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("to_initial", [False, True], ids=["zero", "initial"])
def test_resets_of_a_packed_input(kind: str, sort: bool, to_initial: bool) -> None:
    layer = make(fused_rnn, kind, I, H, 2, bidirectional=True)
    (input, hx), mask = question(layer), resets(layer)
    lengths = sorted(LENGTHS, reverse=True) if sort else LENGTHS
    packed, packed_mask = (
        pack_padded_sequence(t, lengths, enforce_sorted=sort) for t in (input, mask)
    )
    options = {"reset_to_initial": to_initial}
    expected, ends = layer(input, hx, lengths=torch.tensor(lengths), reset=mask, **options)
    for given in (packed_mask, packed_mask.data, packed_mask.to(torch.float32)):
        output, packed_ends = layer(packed, hx, reset=given, **options)
        torch.testing.assert_close(pad_packed_sequence(output, total_length=T)[0], expected)
        torch.testing.assert_close(flatten(packed_ends), flatten(ends))


@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_of_an_unbatched_input(kind: str, batch_first: bool) -> None:
    layer = make(fused_rnn, kind, I, H, 2, batch_first=batch_first, bidirectional=True)
    input, hx = torch.randn(T, I), state_for(layer)
    mask = torch.tensor([0, 0, 1, 0, 1, 1, 0])
    found = layer(input, hx, reset=mask)
    dim = 0 if batch_first else 1
    batched = layer(
        input.unsqueeze(dim), map_tensors(lambda s: s.unsqueeze(1), hx), reset=mask.unsqueeze(dim)
    )
    assert torch.equal(found[0], batched[0].squeeze(dim))
    for a, b in zip(flatten(found[1]), flatten(batched[1]), strict=True):
        assert torch.equal(a, b.squeeze(1))


@every_kind
def test_no_gradient_crosses_a_reset(kind: str) -> None:
    layer = make(fused_rnn, kind, I, H, 2)
    input, hx = question(layer)
    mask = torch.zeros(T, B)
    mask[4] = 1
    leaves = map_tensors(lambda t: t.clone().requires_grad_(), (input, hx))
    output, _ = layer(*leaves, reset=mask)
    d_input, *d_hx = torch.autograd.grad(output[4:].sum(), [leaves[0], *flatten(leaves[1])])
    assert not d_input[:4].any()
    assert d_input[4:].all()
    assert not any(d.any() for d in d_hx)


# Both, with the rest of the layer


@every_kind
@pytest.mark.parametrize("controlled", ["reset", "lengths", "both"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_draws_the_masks_of_torch(kind: str, controlled: str, batch_first: bool) -> None:
    """Against layers one by one, torch.nn's where it has them, with F.dropout between them."""
    options = {"bidirectional": True, "batch_first": batch_first, "dtype": precise(kind)}
    ours = make(fused_rnn, kind, I, H, 2, dropout=0.4, **options)
    (input, hx), mask = question(ours), resets(ours)
    lengths = LENGTHS if controlled != "reset" else (T,) * B
    if controlled == "lengths":
        mask = torch.zeros_like(mask)
    controls = {"reset": mask, "lengths": torch.tensor(lengths)}
    if controlled != "both":
        controls = {controlled: controls[controlled]}
    torch.manual_seed(3)
    found = ours(input, hx, **controls)

    library = nn if kind in KINDS else fused_rnn
    layers = [make(library, kind, n, H, **options) for n in (I, 2 * (ours.proj_size or H))]
    for k, layer in enumerate(layers):
        own = {n: p for n, p in ours.named_parameters() if f"_l{k}" in n}
        layer.load_state_dict({n.replace(f"_l{k}", "_l0"): p for n, p in own.items()})
    torch.manual_seed(3)
    x, ends = input, []
    for k, layer in enumerate(layers):
        if k:
            major = x.transpose(0, 1).contiguous() if batch_first else x
            x = F.dropout(major, 0.4)
            x = x.transpose(0, 1) if batch_first else x
        start = map_tensors(lambda s, k=k: s[2 * k : 2 * k + 2], hx)
        x, after = by_segments(layer, mask, lengths=lengths)(x, start)
        ends.append(flatten(after))
    torch.testing.assert_close(found[0], x)
    for end, parts in zip(flatten(found[1]), zip(*ends, strict=True), strict=True):
        torch.testing.assert_close(end, torch.cat(parts))


CONTROLS: dict[str, Callable[[], dict[str, Any]]] = {
    "lengths": lambda: {"lengths": torch.tensor((2, 0, 4))},
    "reset": lambda: {"reset": torch.rand(4, 3) < 0.4},
    "to initial": lambda: {"reset": torch.rand(4, 3) < 0.4, "reset_to_initial": True},
    "both": lambda: {"lengths": torch.tensor((2, 4, 3)), "reset": torch.rand(4, 3) < 0.4},
}
each_control = pytest.mark.parametrize("control", CONTROLS)


def small(kind: str, control: str, **options: Any) -> tuple[nn.RNNBase, Any, list[Tensor]]:
    """A layer, its outputs as a function of all it depends on, and these leaves."""
    layer = make(fused_rnn, kind, 2, 4, **{"dtype": torch.float64, **options})
    controls = CONTROLS[control]()
    names = [name for name, _ in layer.named_parameters()]
    input = torch.randn(4, 3, 2, dtype=layer.weight_ih_l0.dtype)
    leaves = [input, *flatten(state_for(layer, 3)), *layer.parameters()]
    count = len(leaves) - len(names)

    def function(input: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, weights = rest[: count - 1], dict(zip(names, rest[count - 1 :], strict=True))
        hx = states if len(states) > 1 else states[0]
        return tuple(
            flatten(torch.func.functional_call(layer, weights, (input, hx), dict(controls)))
        )

    return layer, function, [leaf.detach().requires_grad_() for leaf in leaves]


@every_kind
@pytest.mark.parametrize("control", ["to initial", "both"])
def test_gradcheck(kind: str, control: str) -> None:
    _, function, leaves = small(kind, control, bidirectional=control != "both")
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if control == "both":
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@every_kind
@each_control
def test_forward_mode(kind: str, control: str) -> None:
    _, function, leaves = small(kind, control, num_layers=2)
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    _, forward = torch.func.jvp(function, tuple(leaves), tuple(tangents))
    for k, output in enumerate(function(*leaves)):
        cotangent = torch.randn_like(output)
        gradients = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        reverse = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
        torch.testing.assert_close((forward[k] * cotangent).sum(), reverse)


@every_kind
def test_vmap_over_inputs_and_masks(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True)
    inputs, masks = torch.randn(6, 4, 5), torch.rand(6, 4) < 0.4
    found = torch.vmap(lambda x, m: layer(x, reset=m)[0])(inputs, masks)
    alone = [layer(x, reset=m)[0] for x, m in zip(inputs, masks, strict=True)]
    torch.testing.assert_close(found, torch.stack(alone))


def test_lengths_are_not_mapped_over() -> None:
    layer, inputs = fused_rnn.GRU(2, 4), torch.randn(2, 4, 3, 2)
    lengths = torch.tensor([[1, 4, 2], [3, 0, 4]])
    with pytest.raises(RuntimeError, match=r"torch\.vmap cannot map over them: map"):
        torch.vmap(lambda x, n: layer(x, lengths=n)[0])(inputs, lengths)


@every_kind
@each_control
def test_gradients_per_sample(kind: str, control: str) -> None:
    layer, _, _ = small(kind, control, dtype=torch.float32)
    controls = CONTROLS[control]()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    inputs = torch.randn(2, 4, 3, 2)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        output, _ = torch.func.functional_call(layer, weights, (x,), controls)
        return output.square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
    for k, x in enumerate(inputs):
        layer.zero_grad()
        layer(x, **controls)[0].square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][k], parameter.grad)


@every_kind
@each_control
def test_without_the_library_the_numbers_are_the_same(
    kind: str, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = precise(kind)
    layer = make(fused_rnn, kind, 2, 4, 2, bidirectional=True, dropout=0.3, dtype=dtype)
    input, hx = torch.randn(4, 3, 2, dtype=dtype), state_for(layer, 3)
    controls = CONTROLS[control]()

    def everything() -> Tensors:
        torch.manual_seed(2)  # of the dropout
        called = functools.partial(layer, **controls)
        return run(called, dict(layer.named_parameters()), input, hx, dtype)

    fused = everything()
    monkeypatch.setattr(ops, "available", False)
    torch.testing.assert_close(fused, everything())


@every_kind
@each_control
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kind: str, control: str, low: torch.dtype) -> None:
    layer = make(fused_rnn, kind, 2, 4, 2)
    input, controls = torch.randn(4, 3, 2), CONTROLS[control]()
    with torch.autocast("cpu", low):
        output = layer(input, **controls)[0]
        assert output.dtype == layer(input)[0].dtype
    cast = copy.deepcopy(layer).to(output.dtype)
    assert torch.equal(output, cast(input.to(output.dtype), **controls)[0])
    output.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


class Model(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = layer

    def forward(self, input: Tensor, **controls: Any) -> Any:
        return self.rnn(input, **controls)


@pytest.mark.parametrize(
    ("kind", "control"),
    [
        ("LSTM", "lengths"),
        ("PEEPHOLEP", "both"),
        ("GRU_BEFORE", "to initial"),
        ("INDRNN", "reset"),
    ],
)
def test_compile_gives_one_graph_that_trains(kind: str, control: str) -> None:
    """In stacks of two directions; test_contract_compile.py has one layer with every control."""
    torch._dynamo.reset()
    layer = make(fused_rnn, kind, 2, 4, 2, bidirectional=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    input, controls = torch.randn(4, 3, 2), CONTROLS[control]()
    parameters = dict(layer.named_parameters())
    for _ in range(2):
        plain, traced = (
            run(functools.partial(f, **controls), parameters, input, None, torch.float32)
            for f in (layer, compiled)
        )
        torch.testing.assert_close(traced, plain)
        controls = CONTROLS[control]() | {k: v for k, v in controls.items() if k == "lengths"}
    with torch.no_grad():
        found = flatten(compiled(input, **controls))
    torch.testing.assert_close(found, flatten(layer(input, **controls)))


@pytest.mark.parametrize("kind", ["LSTM", "PEEPHOLE", "GRU_BEFORE"])
@pytest.mark.parametrize("control", ["lengths", "reset", "both"])
def test_export(kind: str, control: str) -> None:
    model = Model(make(fused_rnn, kind, 2, 4, 2, bidirectional=True)).eval()
    input, controls = torch.randn(4, 3, 2), CONTROLS[control]()
    program = torch.export.export(model, (input,), controls)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    others = CONTROLS[control]()
    if control != "reset":
        others["lengths"] = torch.tensor((1, 4, 0))
    for exported in (program, torch.export.load(file)):
        found = exported.module()(input, **others)
        torch.testing.assert_close(flatten(found), flatten(model(input, **others)))


@pytest.mark.parametrize("lengths", [(0, 0, 0), (), (2, 0, 4)], ids=str)
def test_the_log_survives_batches_without_a_step(
    lengths: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """A plan for no steps divided by zero."""
    with caplog.at_level(logging.DEBUG, "fused_rnn"):
        layer = fused_rnn.LSTM(5, 7)
        layer(torch.randn(4, len(lengths), 5), lengths=torch.tensor(lengths, dtype=torch.int64))
    assert caplog.records[0].getMessage() == "lstm: fused"
    assert len(caplog.records) == (3 if any(lengths) else 1)


# What is refused


def packed(*lengths: int) -> Any:
    return pack_padded_sequence(torch.zeros(4, 3, 5), lengths, enforce_sorted=False)


def mask_of(*lengths: int) -> Any:
    return pack_padded_sequence(torch.zeros(4, 3), lengths, enforce_sorted=False)


INPUT = torch.zeros(4, 3, 5)
REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "list": (INPUT, {"lengths": [1, 2, 3]}, TypeError, "lengths must be a Tensor, got list"),
    "float": (
        INPUT,
        {"lengths": torch.ones(3)},
        TypeError,
        "lengths must be integers, got torch.float32",
    ),
    "bool": (
        INPUT,
        {"lengths": torch.ones(3).bool()},
        TypeError,
        "lengths must be integers, got torch.bool",
    ),
    "few": (
        INPUT,
        {"lengths": torch.tensor([4, 4])},
        RuntimeError,
        "lengths must have shape [B] = (3,), got (2,)",
    ),
    "2-D": (
        INPUT,
        {"lengths": torch.ones(3, 1).long()},
        RuntimeError,
        "lengths must have shape [B] = (3,), got (3, 1)",
    ),
    "long": (
        INPUT,
        {"lengths": torch.tensor([1, 5, 4])},
        RuntimeError,
        "lengths must be between 0 and T = 4, got 5 for sequence 1",
    ),
    "negative": (
        INPUT,
        {"lengths": torch.tensor([1, 4, -1])},
        RuntimeError,
        "lengths must be between 0 and T = 4, got -1 for sequence 2",
    ),
    "unbatched": (
        INPUT[:, 0],
        {"lengths": torch.tensor([4])},
        ValueError,
        "lengths belong to a batch, got an unbatched input",
    ),
    "packed": (
        packed(4, 2, 3),
        {"lengths": torch.tensor([4, 2, 3])},
        ValueError,
        "lengths belong to a padded input, got a packed one",
    ),
    "mask of lists": (
        INPUT,
        {"reset": [[0] * 3] * 4},
        TypeError,
        "reset must be a Tensor, got list",
    ),
    "a number": (INPUT, {"reset": 0}, TypeError, "reset must be a Tensor, got int"),
    "transposed": (
        INPUT,
        {"reset": torch.zeros(3, 4)},
        RuntimeError,
        "reset must have shape [T, B] = (4, 3), got (3, 4)",
    ),
    "broadcast": (
        INPUT,
        {"reset": torch.zeros(4, 1)},
        RuntimeError,
        "reset must have shape [T, B] = (4, 3), got (4, 1)",
    ),
    "with features": (
        INPUT,
        {"reset": torch.zeros(4, 3, 1)},
        RuntimeError,
        "reset must have shape [T, B] = (4, 3), got (4, 3, 1)",
    ),
    "mask of a batch": (
        INPUT[:, 0],
        {"reset": torch.zeros(4, 1)},
        RuntimeError,
        "reset must have shape [T] = (4,), got (4, 1)",
    ),
    "packed mask": (
        INPUT,
        {"reset": mask_of(4, 2, 3)},
        TypeError,
        "reset must be a Tensor, got PackedSequence",
    ),
    "mask in another order": (
        packed(4, 2, 3),
        {"reset": mask_of(4, 3, 2)},
        ValueError,
        "reset must be packed like input: other lengths or another order",
    ),
    "mask of other lengths": (
        packed(4, 2, 3),
        {"reset": mask_of(4, 1, 4)},
        ValueError,
        "reset must be packed like input: other lengths or another order",
    ),
    "padded mask": (
        packed(4, 2, 3),
        {"reset": torch.zeros(4, 3)},
        RuntimeError,
        "reset must have shape [N] = (9,), got (4, 3)",
    ),
    "packed and a list": (
        packed(4, 2, 3),
        {"reset": [0]},
        TypeError,
        "reset must be a Tensor or a PackedSequence, got list",
    ),
}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "COUPLED"])
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("available", [True, False], ids=["fused", "reference"])
def test_refused(kind: str, case: str, available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "available", available)
    input, controls, error, words = REFUSED[case]
    kind_of_error, message = complaint(lambda: make(fused_rnn, kind, 5, 7)(input, **controls))
    assert (kind_of_error, message.removeprefix("fused_rnn: ")) == (error, words)


def test_refused_with_batch_first() -> None:
    layer = fused_rnn.GRU(5, 7, batch_first=True)
    error, words = complaint(lambda: layer(torch.zeros(3, 4, 5), reset=torch.zeros(4, 3)))
    assert (error, words) == (RuntimeError, "reset must have shape [B, T] = (3, 4), got (4, 3)")


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "PeepholeLSTM", "LayerNormGRU", "IndRNN"])
def test_controls_go_by_keyword(name: str) -> None:
    layer = getattr(fused_rnn, name)(5, 7)
    with pytest.raises(TypeError, match="positional argument"):
        layer(INPUT, None, torch.tensor([4, 4, 4]))
    with pytest.raises(TypeError, match="unexpected keyword argument 'length'"):
        layer(INPUT, length=torch.tensor([4, 4, 4]))

"""The scan floor: `torch.ops.fused_rnn.*` for every registered cell, without modules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scans import (
    FLOATS,
    Arguments,
    arguments_of_backward,
    assert_same,
    backward,
    by_ops,
    by_reference,
    by_torch,
    differentiate,
    everything,
    judge_scan,
    make_arguments,
    norms,
    one_sided,
    packed,
    seeds_for,
)
from torch import Tensor

import fused_rnn

ops = torch.ops.fused_rnn
CELLS = sorted(fused_rnn._C.cells())
RAGGED = (5, 5, 3, 1, 1)
PADDED = (3, 5, 2, 0, 5)
each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
# The scans call a cell by pointer, so what depends on the structure or on the storage type does not
# on the cell: all cells in float32, in all types those that differ in products, states and weights.
# Once for every instruction set, one cell in all types is enough.
TYPED_CELLS = ("lstm", "gru_reset_before", "peephole_lstm")
CELLS_AND_DTYPES = [
    (cell, dtype)
    for cell in CELLS
    for dtype in FLOATS
    if dtype == torch.float32 or cell in TYPED_CELLS
]


def slow_marks(cell: str, dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    return [] if dtype == torch.float32 or cell == "lstm" else [pytest.mark.slow]


each_cell_and_dtype = pytest.mark.parametrize(
    ("cell", "dtype"),
    [pytest.param(*both, marks=slow_marks(*both)) for both in CELLS_AND_DTYPES],
    ids=str,
)


def describe(options: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "") for value in options.values())


def each_with(options: Callable[[bool], list[dict[str, Any]]]) -> pytest.MarkDecorator:
    """Cells and types, with all options where it is the first of them, and thinned out elsewhere:
    the structure is that of the scan, which calls the cell by pointer."""
    return pytest.mark.parametrize(
        ("cell", "dtype", "options"),
        [
            pytest.param(*both, each, marks=slow_marks(*both))
            for both in CELLS_AND_DTYPES
            for each in options(both != ("lstm", torch.float32))
        ],
        ids=lambda value: describe(value) if isinstance(value, dict) else str(value),
    )


def has_c(cell: str) -> bool:
    return fused_rnn._C.cells()[cell]["states"] > 1


# Every remainder of the tiles: H around the vector of 16, B around the rows of a tile.
SIZES = [
    # T, B, I, H
    (1, 1, 1, 1),
    (2, 1, 3, 1),
    (3, 2, 1, 7),
    (5, 3, 6, 7),
    (1, 5, 8, 16),
    (3, 8, 16, 16),
    (2, 13, 17, 17),
    (3, 1, 40, 17),
    (3, 5, 2, 33),
    (1, 1, 33, 33),
    (50, 2, 3, 33),
    (2, 64, 5, 33),
    (3, 13, 10, 150),
    (2, 2, 150, 150),
    (1, 8, 65, 150),
    (50, 1, 4, 48),
    (4, 100, 7, 20),
    # One row over several panels of every cell, and a last row of K that has no other beside it.
    (20, 1, 129, 151),
    # Rows are packed and not the weights, full vectors of them and not.
    (1, 16, 33, 70),
    (4, 30, 9, 150),
    (16, 1, 300, 150),
]


@each_cell_and_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_accuracy_of_every_size(cell: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    judge_scan(cell, *sizes, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_of_many_units(dtype: torch.dtype) -> None:
    """In backward, sums over K in pieces on every instruction set."""
    judge_scan("lstm", 2, 14, 5, 515, dtype=dtype)


def structures(thin: bool = False) -> list[dict[str, Any]]:
    """Every three of these choices; thin: every two, and every layout with one layer and many."""
    layouts = ({}, {"batch_first": True}, {"batch_sizes": RAGGED}, {"lengths": PADDED})
    options = []
    for deep, two_ways, k in itertools.product((0, 1), (0, 1), range(4)):
        bias = deep ^ k >> 1 if thin else (deep + two_ways + k) % 2
        if not thin or two_ways == (deep + k) % 2:
            choice = {"layers": (1, 4)[deep], "bidirectional": bool(two_ways), "bias": not bias}
            options.append(choice | layouts[k])
    return options


@each_with(structures)
def test_accuracy_of_every_structure(
    cell: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    judge_scan(cell, 5, 5, 6, 19, dtype=dtype, **options)


def resets(thin: bool = False) -> list[dict[str, Any]]:
    """Thin: every layout with both probabilities and both kinds."""
    layouts = (
        {},
        {"batch_first": True, "layers": 2},
        {"batch_sizes": RAGGED, "bidirectional": True},
        {"lengths": PADDED, "bidirectional": True, "state": False},
        {"lengths": PADDED, "batch_first": True, "layers": 2, "bidirectional": True},
    )
    return [
        {"reset": (0.3, 1.0)[always], "reset_to_initial": bool(to_initial), **layout}
        for always, to_initial, (k, layout) in itertools.product((0, 1), (0, 1), enumerate(layouts))
        if not thin or to_initial == (always + k) % 2
    ]


@each_with(resets)
def test_accuracy_with_resets(cell: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    judge_scan(cell, 5, 5, 6, 19, dtype=dtype, **options)


def regularised(thin: bool = False) -> list[dict[str, Any]]:
    """Thin: every layout with a mask of zoneout, one of h and one of the candidate, together or
    not."""
    layouts: tuple[dict[str, Any], ...] = (
        {},
        {"batch_first": True, "layers": 2},
        {"batch_sizes": RAGGED, "layers": 2, "bidirectional": True},
        {"lengths": PADDED, "bidirectional": True, "reset": 0.3},
    )
    return [
        {
            "zoneout": zoneout,
            "h_mask": h_mask,
            "candidate_mask": (j < 2) == (k < 2),
            "all_c": layout.get("layers", 1) == 1,
            **layout,
        }
        for (j, (zoneout, h_mask)), (k, layout) in itertools.product(
            enumerate((("shares", False), ("mask", False), ("", True), ("mask", True))),
            enumerate(layouts),
        )
        if not thin or (j % 3 == 0) == (k % 2 == 0)
    ]


def without_refused(cell: str, options: dict[str, Any]) -> dict[str, Any]:
    """Where there is no W_hh or no candidate, there is nothing to mask."""
    facts = fused_rnn._C.cells()[cell]
    there = {"h_mask": facts["recurrent"], "candidate_mask": facts["candidate"]}
    return {name: value if there.get(name, True) else False for name, value in options.items()}


@each_with(regularised)
def test_accuracy_with_masks_of_the_states(
    cell: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    options = without_refused(cell, options)
    judge_scan(cell, 5, 5, 6, 19, dtype=dtype, **options)


def projected(thin: bool) -> list[dict[str, Any]]:
    return [*structures(thin), *resets(thin), *regularised(True)]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(dtype, each) for dtype in FLOATS for each in projected(dtype != torch.float32)],
    ids=lambda value: describe(value) if isinstance(value, dict) else str(value),
)
def test_accuracy_with_projection(options: dict[str, Any], dtype: torch.dtype) -> None:
    judge_scan("lstm", 5, 5, 6, 19, proj=5, dtype=dtype, **options)


def test_thinned_options_hold_what_they_promise() -> None:
    def choices(options: dict[str, Any]) -> list[Any]:
        layout = {
            k: v for k, v in options.items() if k in ("batch_first", "batch_sizes", "lengths")
        }
        return [str(layout), *(options[k] for k in ("layers", "bidirectional", "bias"))]

    def met(every: list[dict[str, Any]], count: int) -> set[Any]:
        return {
            (places, tuple(choices(options)[place] for place in places))
            for options in every
            for places in itertools.combinations(range(4), count)
        }

    assert len(met(structures(), 3)) == 3 * 4 * 2 * 2 + 2 * 2 * 2
    assert met(structures(True), 2) == met(structures(), 2)
    layouts = len({str(sorted(o)) + str(o.get("state")) for o in resets()})
    for key in ("reset", "reset_to_initial"):
        pairs = {(o[key], str(o | {"reset": 0, "reset_to_initial": 0})) for o in resets(True)}
        assert len(pairs) == 2 * layouts
    without = {"zoneout": 0, "h_mask": 0, "candidate_mask": 0}
    for chosen in (
        lambda o: o["zoneout"] == "mask",
        lambda o: o["h_mask"],
        lambda o: o["candidate_mask"],
    ):
        assert len({str(o | without) for o in regularised(True) if chosen(o)}) == 4


@st.composite
def questions(draw: st.DrawFn) -> tuple[str, tuple[int, ...], dict[str, Any]]:
    cell = draw(st.sampled_from(CELLS))
    H = draw(st.integers(1, 70))
    options: dict[str, Any] = {
        "layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "state": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    if cell == "lstm" and H > 1 and draw(st.booleans()):
        options["proj"] = draw(st.integers(1, H - 1))
    T, B, I = draw(st.integers(1, 8)), draw(st.integers(1, 20)), draw(st.integers(1, 40))
    layout = draw(st.sampled_from(("dense", "packed", "padded")))
    if layout == "packed":
        sizes = draw(st.lists(st.integers(1, B), min_size=T, max_size=T))
        options["batch_sizes"] = sorted(sizes, reverse=True)
    elif layout == "padded":
        options["lengths"] = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    if draw(st.booleans()):
        options["reset"] = draw(st.sampled_from((0.1, 0.5)))
        options["reset_to_initial"] = draw(st.booleans())
    return cell, (T, B, I, H), options


@given(questions(), st.sampled_from(FLOATS))
def test_accuracy_of_any_shape(question: Any, dtype: torch.dtype) -> None:
    cell, sizes, options = question
    judge_scan(cell, *sizes, dtype=dtype, **options)


@each_cell
def test_reference_agrees_with_torch_in_float64(cell: str) -> None:
    """The oracle is judged where torch.nn knows the cell; elsewhere it is all there is."""
    if not hasattr(torch._VF, cell):
        pytest.skip("torch does not have this cell")
    for options in structures():
        if "lengths" in options:
            continue
        for proj in (0, 4) if cell == "lstm" else (0,):
            args = make_arguments(cell, 4, 5, 6, 9, proj=proj, dtype=torch.float64, **options)
            ours = differentiate(by_reference, args, torch.float64)
            theirs = differentiate(by_torch, args, torch.float64)
            for name, tensor in ours.items():
                torch.testing.assert_close(tensor, theirs[name], rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@each_cell
def test_reference_is_differentiable_twice(cell: str) -> None:
    args = make_arguments(cell, 3, 1, 2, 2, bidirectional=True, reset=0.3, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in args.tensors().values()]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        replaced = iter(tensors)
        return by_reference(args.map(lambda _: next(replaced)))

    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves, fast_mode=True)


@each_cell_and_dtype
@pytest.mark.parametrize("options", structures()[::5], ids=describe)
def test_forward_returns_what_inference_returns(
    cell: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    args = make_arguments(cell, 5, 5, 6, 19, dtype=dtype, **options)
    assert_same(list(ops.forward(*args.given()))[:-1], list(ops.inference(*args.given())))


@each_dtype
@each_cell
@pytest.mark.parametrize("batch_sizes", [None, RAGGED], ids=["even", "ragged"])
def test_shapes_and_layouts(
    cell: str, batch_sizes: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    T, B, H, L, D = 5, 5, 19, 2, 2
    args = make_arguments(
        cell, T, B, 6, H, layers=L, bidirectional=True, batch_sizes=batch_sizes, dtype=dtype
    )
    output, h_n, c_n, saved = ops.forward(*args.given())
    N = args.input.shape[0] if batch_sizes else T * B
    assert output.shape == ((N, D * H) if batch_sizes else (T, B, D * H))
    assert h_n.shape == (L * D, B, H)
    assert c_n.shape == ((L * D, B, H) if has_c(cell) else (0,))
    numbers = fused_rnn._C.cells()[cell]
    raw = 2 * numbers["gates"] if numbers["norm_gates"] else 0
    assert saved.shape == (L * D, N, (numbers["states"] + numbers["saved"] + raw) * 32)
    assert saved.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gradients = backward(args, seeds_for((output, h_n, c_n)), saved)
    states = [args.h0, args.c0 if has_c(cell) else torch.empty(0)]
    for tensor, like in zip(gradients, [args.input, *states, *args.weights], strict=True):
        assert tensor.shape == like.shape
    for tensor in (output, h_n, c_n, *gradients):
        assert tensor.is_contiguous()
        assert tensor.dtype == dtype
    storages = [t.untyped_storage().data_ptr() for t in (*args.tensors().values(), output, h_n)]
    assert len(set(storages)) == len(storages)


@each_cell
def test_output_of_batch_first_is_contiguous(cell: str) -> None:
    args = make_arguments(cell, 4, 3, 5, 7, batch_first=True)
    output = by_ops(args)[0]
    assert output.shape == (3, 4, 7)
    assert output.is_contiguous()
    time_first = args._replace(input=args.input.transpose(0, 1), batch_first=False)
    assert torch.equal(output, by_ops(time_first)[0].transpose(0, 1))


@each_cell
@pytest.mark.parametrize("options", structures()[::5], ids=describe)
def test_no_state_means_zeros(cell: str, options: dict[str, Any]) -> None:
    args = make_arguments(cell, 5, 5, 6, 19, state=False, **options)
    zeros = make_arguments(cell, 5, 5, 6, 19, **options)
    zeros = args._replace(
        h0=torch.zeros_like(zeros.h0), c0=torch.zeros_like(zeros.c0) if has_c(cell) else None
    )
    *outputs, saved = ops.forward(*args.given())
    *expected, saved_of_zeros = ops.forward(*zeros.given())
    assert_same(outputs, expected)
    seeds, needs = seeds_for(tuple(outputs)), (True, False, True)
    assert_same(backward(args, seeds, saved, needs), backward(zeros, seeds, saved_of_zeros, needs))


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def strided(tensor: Tensor) -> Tensor:
    wide = torch.full((*tensor.shape, 3), float("nan"), dtype=tensor.dtype)
    wide[..., 1] = tensor
    return wide[..., 1]


def unaligned(tensor: Tensor) -> Tensor:
    """One element beyond an aligned address."""
    storage = torch.full((tensor.numel() + 1,), float("nan"), dtype=tensor.dtype)
    storage[1:] = tensor.flatten()
    return storage[1:].view(tensor.shape)


@each_cell_and_dtype
@pytest.mark.parametrize("batch_sizes", [None, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("relay", [transposed, strided, unaligned])
def test_layout_of_arguments_does_not_matter(
    cell: str, relay: Any, batch_sizes: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    args = make_arguments(
        cell, 5, 4, 6, 19, layers=2, bidirectional=True, batch_sizes=batch_sizes, dtype=dtype
    )
    assert_same(everything(args.map(relay)), everything(args))


@each_cell
def test_expanded_arguments(cell: str) -> None:
    """Strides of zero in the input, the states and the gradients."""
    args = make_arguments(cell, 5, 1, 6, 19)
    wide = args._replace(
        input=args.input.expand(5, 4, 6),
        h0=args.h0.expand(1, 4, 19),
        c0=args.c0.expand(1, 4, 19) if has_c(cell) else None,
    )
    dense = wide.map(Tensor.contiguous)
    assert_same(list(ops.inference(*wide.given())), list(ops.inference(*dense.given())))
    *outputs, saved = ops.forward(*dense.given())
    ones = [torch.ones(()).expand(t.shape) if t.numel() else None for t in outputs]
    full = [None if one is None else one.contiguous() for one in ones]
    assert_same(backward(wide, ones, saved), backward(dense, full, saved))


@each_cell
def test_arguments_are_never_written(cell: str) -> None:
    args = make_arguments(cell, 5, 5, 6, 19, layers=2, bidirectional=True, batch_sizes=RAGGED)
    before = args.map(Tensor.clone)
    *outputs, saved = ops.forward(*args.given())
    ops.inference(*args.given())
    seeds, kept = seeds_for(tuple(outputs)), saved.clone()
    given = [*args.tensors().values(), args.batch_sizes, saved, *filter_none(seeds)]
    versions = [tensor._version for tensor in given]
    copies = [tensor.clone() for tensor in filter_none(seeds)]
    backward(args, seeds, saved)
    assert versions == [tensor._version for tensor in given]
    assert_same(list(args.tensors().values()), list(before.tensors().values()))
    assert_same([saved, *filter_none(seeds)], [kept, *copies])
    assert args.batch_sizes.tolist() == list(RAGGED)


def filter_none(tensors: list[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


@each_cell
def test_backward_may_be_repeated(cell: str) -> None:
    args = make_arguments(cell, 5, 5, 6, 19, layers=2)
    *outputs, saved = ops.forward(*args.given())
    seeds = seeds_for(tuple(outputs))
    assert_same(backward(args, seeds, saved), backward(args, seeds, saved))


@each_cell
def test_backward_does_not_read_the_outputs(cell: str) -> None:
    args = make_arguments(cell, 5, 5, 6, 19, layers=2)
    *outputs, saved = ops.forward(*args.given())
    seeds = seeds_for(tuple(outputs))
    expected = backward(args, seeds, saved)
    for output in outputs:
        output.zero_()
    assert_same(backward(args, seeds, saved), expected)


@each_cell
@pytest.mark.parametrize("absent", range(1, 8))
def test_absent_output_gradients_are_zeros(cell: str, absent: int) -> None:
    args = make_arguments(cell, 5, 5, 6, 19, layers=2, bidirectional=True)
    *outputs, saved = ops.forward(*args.given())
    full = seeds_for(tuple(outputs))
    missing = [bool(absent >> k & 1) for k in range(3)]
    none = [None if gone else seed for seed, gone in zip(full, missing, strict=True)]
    zero = [
        torch.zeros_like(seed) if gone and seed is not None else seed
        for seed, gone in zip(full, missing, strict=True)
    ]
    assert_same(backward(args, none, saved), backward(args, zero, saved))


@each_cell
@pytest.mark.parametrize("batch_sizes", [None, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_only_the_needed_gradients_are_made(
    cell: str, needs: tuple[bool, bool, bool], batch_sizes: tuple[int, ...] | None
) -> None:
    args = make_arguments(cell, 5, 5, 6, 19, layers=2, bidirectional=True, batch_sizes=batch_sizes)
    *outputs, saved = ops.forward(*args.given())
    seeds = seeds_for(tuple(outputs))
    full = backward(args, seeds, saved)
    part = backward(args, seeds, saved, needs)
    wanted = [needs[0], needs[1], needs[1], *[needs[2]] * len(args.weights)]
    if not needs[2]:
        assert sum(tensor.numel() for tensor in part[3:]) == 0
        full, part, wanted = full[:3], part[:3], wanted[:3]
    empty = torch.empty(0)
    assert_same(part, [t if want else empty for t, want in zip(full, wanted, strict=True)])


# Sizes for every way to share the work: sequences, units, directions, one thread alone.
SHARED = [
    ((20, 64, 8, 40), {}),
    ((20, 1, 8, 256), {}),
    ((20, 3, 8, 300), {}),
    ((10, 6, 8, 250), {"bidirectional": True}),
    ((10, 13, 30, 70), {"layers": 2, "bidirectional": True, "batch_first": True}),
    ((0, 0, 30, 150), {"batch_sizes": (13, 13, 9, 9, 4, 4, 1, 1), "bidirectional": True}),
    ((2, 2, 3, 4), {}),
    ((9, 700, 34, 15), {}),  # several blocks of sequences
    ((0, 0, 4, 5), {"batch_sizes": (600, 590, 300, 2, 2, 1), "bidirectional": True}),
    ((80, 1, 8, 40), {"layers": 3}),
    ((1, 64, 30, 250), {}),  # rows are packed, not weights
    ((4, 29, 8, 70), {"layers": 2, "bidirectional": True}),
    ((20, 3, 300, 150), {}),
]
# The same ways with what acts on the states between the steps.
SHARED_CONTROLS = [
    (
        (20, 3, 8, 300),
        {
            "lengths": (7, 20, 0),
            "reset": 0.2,
            "zoneout": "mask",
            "candidate_mask": True,
            "all_c": True,
        },
    ),
    (
        (10, 6, 8, 250),
        {"bidirectional": True, "reset": 0.2, "reset_to_initial": True, "h_mask": True},
    ),
    ((20, 64, 8, 40), {"reset": 0.2, "zoneout": "shares", "h_mask": True}),
    (
        (4, 30, 8, 70),
        {
            "lengths": (3, 4, 0, 4, 2) * 6,
            "reset": 0.2,
            "zoneout": "mask",
            "h_mask": True,
            "candidate_mask": True,
            "all_c": True,
        },
    ),
    ((80, 1, 8, 40), {"layers": 3, "reset": 0.1, "h_mask": True, "candidate_mask": True}),
]


@pytest.mark.parametrize("cell", [c for c in CELLS if fused_rnn._C.cells()[c]["recurrent"]])
def test_the_sizes_above_share_the_work_in_every_way(cell: str) -> None:
    ways = set()
    for (T, B, I, H), options in SHARED:
        lengths = options.get("batch_sizes")
        steps, rows = (len(lengths), lengths[0]) if lengths else (T, B)
        directions = 2 if options.get("bidirectional") else 1
        for threads in (2, 5):
            plan = fused_rnn._C.strategy(
                *(cell, steps, rows, I, H),
                layers=options.get("layers", 1),
                directions=directions,
                threads=threads,
            )
            ways.add((plan["split"], plan["threads"] > 1, plan["blocks"] > 1))
    assert ways >= {
        ("none", False, False),
        ("none", True, False),
        ("rows", True, False),
        ("rows", True, True),
        ("layers", True, False),
    }
    assert any(split == "units" for split, *_ in ways)


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [*((cell, torch.float32) for cell in CELLS), ("lstm", torch.bfloat16), ("gru", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("sizes", "options"), SHARED + SHARED_CONTROLS, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(
    cell: str, sizes: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    options = without_refused(cell, options)
    args = make_arguments(cell, *sizes, dtype=dtype, **options)
    torch.set_num_threads(1)
    expected = everything(args)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_same(everything(args), expected)
        assert_same(list(ops.inference(*args.given())), expected[: 4 if args.controls.any else 3])


@each_cell_and_dtype
@pytest.mark.parametrize("options", structures()[::5] + resets(True)[::3], ids=describe)
def test_weights_packed_before_give_the_bits_of_those_packed_in_the_call(
    cell: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    projections = (0, 5) if cell == "lstm" else (0,)
    for proj in projections:
        args = make_arguments(cell, 5, 5, 6, 19, proj=proj, dtype=dtype, **options)
        assert_same(list(ops.frozen(*packed(args))), list(ops.inference(*args.given())))


@each_cell_and_dtype
@pytest.mark.parametrize("sizes", [sizes for sizes in SIZES if sizes[0] * sizes[1] < 8], ids=str)
def test_few_rows_read_weights_packed_before(
    cell: str, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """As the same rows among many, for which a call packs them: alone it would read them as they
    are, adding up in another order."""
    args = make_arguments(cell, *sizes, dtype=dtype)

    def among_many(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat(1, 65, 1)

    many = args._replace(
        input=among_many(args.input), h0=among_many(args.h0), c0=among_many(args.c0)
    )
    B = sizes[1]
    expected = [result[:, :B] for result in ops.inference(*many.given()) if result.numel()]
    found = [result for result in ops.frozen(*packed(args)) if result.numel()]
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_has_the_same_bits_in_every_batch_of_a_frozen_layer(
    cell: str, dtype: torch.dtype
) -> None:
    for proj in (0, 193) if cell == "lstm" else (0,):
        args = make_arguments(cell, 2, 40, 3, 200, proj=proj, dtype=dtype)
        expected = [result for result in ops.frozen(*packed(args)) if result.numel()]
        for B in (1, 2, 7, 8, 9, 12, 13, 17, 18, 19):
            first = args.map(lambda t, B=B: t[:, :B].contiguous() if t.dim() == 3 else t)
            found = [result for result in ops.frozen(*packed(first)) if result.numel()]
            assert_same(found, [result[:, :B] for result in expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_weights_packed_before_are_as_small_as_their_type(cell: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and fused_rnn._C.isa() == "baseline":
        pytest.skip("they are widened where there is no instruction for it")
    weights = make_arguments(cell, 1, 1, 64, 64, bias=False).weights

    def size(dtype: torch.dtype) -> int:
        return ops.pack(cell, [w.to(dtype) for w in weights], 1, False)[0].numel()

    # Biases and diagonals are float32 in both.
    vectors = 4 * 8 * 64 + 256
    assert size(dtype) - vectors <= (size(torch.float32) - vectors) / 2 + vectors


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [
        *((cell, torch.float32) for cell in CELLS),
        ("lstm", torch.float64),
        ("rnn_tanh", torch.float64),
        ("lstm", torch.bfloat16),
        ("gru", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("H", [16, 19, 48, 150, 250])
def test_frozen_results_do_not_depend_on_threads_and_splits(
    cell: str, dtype: torch.dtype, H: int
) -> None:
    """Panels are those of all units: members of any number and size meet the same ones."""
    args = make_arguments(cell, 9, 2, 5, H, layers=2, bidirectional=H == 48, dtype=dtype)
    torch.set_num_threads(1)
    expected = list(ops.frozen(*packed(args)))
    # A panel of a cell with one gate has up to 64 units.
    splits = [None, "none", "rows"] + ["units"] * (H > 64) + ["layers"] * (not args.bidirectional)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for split in splits:
            if split == "none" or not (args.bidirectional and threads < 4 and split):
                with fused_rnn.force_split(split):
                    assert_same(list(ops.frozen(*packed(args))), expected)


@each_cell
@pytest.mark.parametrize("B", [65, 131, 290])
def test_threads_that_share_units_meet_more_rows_than_the_cell_takes_at_once(
    cell: str, B: int
) -> None:
    """Threads that share rows meet at most 64, whose products are one block."""
    args = make_arguments(cell, 3, B, 5, 40)
    torch.set_num_threads(2)
    with fused_rnn.force_split("rows"):
        expected = everything(args)
    with fused_rnn.force_split("units"):
        assert_same(everything(args), expected)


@each_cell
@pytest.mark.parametrize(("sizes", "options"), SHARED, ids=str)
def test_repeated_calls_agree_bit_for_bit(
    cell: str, sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    args = make_arguments(cell, *sizes, **options)
    expected = everything(args)
    for _ in range(3):
        assert_same(everything(args), expected)


@each_dtype
@each_cell
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_batch_of_none(cell: str, batch_first: bool, dtype: torch.dtype) -> None:
    args = make_arguments(cell, 4, 0, 5, 7, layers=2, batch_first=batch_first, dtype=dtype)
    results = everything(args)
    assert results[0].shape == ((0, 4, 7) if batch_first else (4, 0, 7))
    assert results[1].shape == (2, 0, 7)
    for gradient, weight in zip(results[6:], args.weights, strict=True):
        assert torch.equal(gradient, torch.zeros_like(weight))


@each_cell
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["input", "h0"])
def test_what_is_not_finite_propagates_as_in_torch(cell: str, where: str, value: float) -> None:
    args = make_arguments(cell, 4, 3, 5, 19, layers=2)
    tensor = args.tensors()[where]
    tensor[-1, 1, 2] = value
    for ours, theirs in zip(by_ops(args), by_torch(args), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [*((cell, torch.float32) for cell in CELLS), *(("lstm", dtype) for dtype in FLOATS[1:])],
    ids=str,
)
def test_nan_stays_in_its_row(cell: str, dtype: torch.dtype) -> None:
    # Odd sizes: bfloat16 is multiplied in pairs, and the last of a row has no other.
    clean = make_arguments(cell, 4, 13, 5, 19, layers=2, bidirectional=True, dtype=dtype)
    dirty = clean.map(Tensor.clone)
    dirty.input[1, 6] = float("nan")
    others = [row for row in range(13) if row != 6]
    expected, found = everything(clean), everything(dirty)
    for k in (0, 1, 2, 3, 4, 5):  # outputs, then the gradients of input and states
        if expected[k].numel():
            assert_same([found[k][:, others]], [expected[k][:, others]])
    assert found[0][:, 6].isnan().any()


@each_cell
def test_nan_stays_behind_in_time(cell: str) -> None:
    clean = make_arguments(cell, 6, 4, 5, 19)
    dirty = clean.map(Tensor.clone)
    dirty.input[3] = float("nan")
    found = by_ops(dirty)[0]
    assert_same([found[:3]], [by_ops(clean)[0][:3]])
    assert found[3:].isnan().all()


@each_cell_and_dtype
@pytest.mark.parametrize("value", [1e3, -1e3])
def test_saturated_gates(cell: str, value: float, dtype: torch.dtype) -> None:
    def saturate(args: Arguments) -> Arguments:
        # With rows of one sign no gate is left between: its error would be that of its sum.
        weights = [one_sided(weight, 19) for weight in args.weights]
        return args._replace(input=torch.full_like(args.input, value), weights=weights)

    judge_scan(cell, 4, 3, 5, 19, dtype=dtype, change=saturate)


def test_every_float16_number_passes_through() -> None:
    """Those below the smallest normal, too: as floats they are not small."""
    numbers = torch.arange(0x7C01, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
    ones, zeros = torch.ones_like(numbers[:1]), torch.zeros_like(numbers[:1])
    output, *_ = ops.inference(
        "rnn_relu", numbers, None, zeros.expand_as(numbers), None, [ones, zeros], 1, False, False
    )
    assert torch.equal(output, numbers)


def scaled(cell: str, scale: float) -> Arguments:
    """A question without biases whose answer is as small as the states and the input."""
    # A norm multiplies by 1/sqrt(eps) what the products have lost, at every step.
    args = make_arguments(cell, 1 if norms(cell) else 4, 3, 5, 19, bias=False)
    args = args._replace(h0=args.h0 * scale, input=args.input * scale)
    return args._replace(c0=args.c0 * scale if has_c(cell) else None)


@each_cell
@pytest.mark.parametrize("scale", [1e-30, 1e-34])
def test_tiny_numbers(cell: str, scale: float) -> None:
    """Small, not lost."""
    args = scaled(cell, scale)
    exact = by_reference(args.map(Tensor.double))
    smallest = torch.finfo(torch.float32).smallest_normal * (316 if norms(cell) else 1)
    for ours, truth in zip(by_ops(args), exact, strict=True):
        assert truth.abs().max() > 100 * smallest
        atol = max(1e-6 * scale, 20 * smallest)
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=atol)


@each_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_numbers_below_the_smallest_normal_are_zero(
    cell: str, dtype: torch.dtype, threads: int
) -> None:
    args = scaled(cell, 1.0).map(lambda t: t.to(dtype))
    tiny = torch.finfo(dtype).smallest_normal / 16
    states = args.h0, args.c0, args.input
    assert all((t * tiny).abs().max() < torch.finfo(dtype).tiny for t in states if t is not None)

    def times(factor: float) -> list[Tensor]:
        h0, c0, input = (None if t is None else t * factor for t in states)
        return everything(args._replace(h0=h0, c0=c0, input=input))

    torch.set_num_threads(threads)
    with fused_rnn.force_split("none" if threads == 1 else "units"):
        assert_same(times(tiny), times(0.0))
    # Outside the kernels they are what they were.
    assert torch.tensor(tiny, dtype=dtype) * 1 == tiny > 0


def test_cell_name_is_checked() -> None:
    args = make_arguments("lstm")
    with pytest.raises(RuntimeError, match="lstmm"):
        ops.inference(*args._replace(cell="lstmm").given())


def replace_weight(args: Arguments, k: int, weight: Tensor) -> Arguments:
    return args._replace(weights=[*args.weights[:k], weight, *args.weights[k + 1 :]])


def batch_sizes(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(sizes, dtype=dtype)


# name of the argument that the message must name -> what is done to sound arguments
MISUSES: list[tuple[str, str, Any]] = [
    *[
        (name, f"{name} of another dtype", lambda a, w=where: cast(a, w, torch.float64))
        for name, where in [("h0", "h0"), ("c0", "c0"), ("weight_ih", 0), ("weight_hh", 1),
                            ("bias_ih", 2), ("bias_hh", 7)]
    ],
    ("input", "integer input", lambda a: a.map(lambda t: t.to(torch.int64))),
    ("input", "complex input", lambda a: a.map(lambda t: t.to(torch.complex64))),
    ("input", "input of one dimension", lambda a: a._replace(input=a.input[0, 0])),
    ("input", "input of four dimensions", lambda a: a._replace(input=a.input[None])),
    ("weight_ih", "input too wide", lambda a: a._replace(input=torch.randn(5, 3, 8))),
    ("weight_ih", "input too narrow", lambda a: a._replace(input=torch.randn(5, 3, 4))),
    ("h0", "h0 with too few rows", lambda a: a._replace(h0=a.h0[:, :2])),
    ("h0", "h0 with too many rows", lambda a: a._replace(h0=torch.randn(2, 4, 7))),
    ("h0", "h0 with too few layers", lambda a: a._replace(h0=a.h0[:1])),
    ("h0", "h0 too narrow", lambda a: a._replace(h0=a.h0[..., :6])),
    ("h0", "h0 of two dimensions", lambda a: a._replace(h0=a.h0[0])),
    ("c0", "c0 with too few rows", lambda a: a._replace(c0=a.c0[:, :2])),
    ("c0", "c0 too narrow", lambda a: a._replace(c0=a.c0[..., :6])),
    ("weight", "no weights", lambda a: a._replace(weights=[])),
    ("weight", "one weight too few", lambda a: a._replace(weights=a.weights[:-1])),
    ("weight", "one weight too many", lambda a: a._replace(weights=[*a.weights, a.weights[0]])),
    ("weight", "weights of one layer only", lambda a: a._replace(num_layers=1)),
    ("weight", "a second direction without weights", lambda a: a._replace(bidirectional=True)),
    ("num_layers", "no layers", lambda a: a._replace(num_layers=0)),
    ("num_layers", "fewer than no layers", lambda a: a._replace(num_layers=-1)),
    ("weight_ih", "weight_ih short of a row", lambda a: replace_weight(a, 0, a.weights[0][:-1])),
    ("weight_hh", "weight_hh short of a row", lambda a: replace_weight(a, 1, a.weights[1][:-1])),
    ("weight_hh", "weight_hh too wide", lambda a: replace_weight(a, 1, torch.randn(28, 8))),
    ("bias_ih", "bias too short", lambda a: replace_weight(a, 2, a.weights[2][:-1])),
    ("bias_hh", "bias of two dimensions", lambda a: replace_weight(a, 3, a.weights[3][None])),
    ("weight_ih", "second layer of another width", lambda a: replace_weight(a, 4, a.weights[0])),
    ("weight_hh", "weight of no dimension", lambda a: replace_weight(a, 1, torch.tensor(1.0))),
    ("input", "a packed input of three dimensions",
     lambda a: a._replace(batch_sizes=batch_sizes(3, 2))),
]  # fmt: skip

PACKED_MISUSES: list[tuple[str, Any]] = [
    ("growing", batch_sizes(2, 3)),
    ("sum too small", batch_sizes(3, 1)),
    ("sum too large", batch_sizes(3, 3)),
    ("int32", batch_sizes(3, 2, dtype=torch.int32)),
    ("float", batch_sizes(3, 2, dtype=torch.float32)),
    ("two dimensions", batch_sizes(3, 2)[None]),
    ("negative", batch_sizes(6, -1)),
    ("huge", batch_sizes(2**62, 2**62)),
    ("none", batch_sizes()),
]


def cast(args: Arguments, where: str | int, dtype: torch.dtype) -> Arguments:
    if isinstance(where, int):
        return replace_weight(args, where, args.weights[where].to(dtype))
    return args._replace(**{where: getattr(args, where).to(dtype)})


@pytest.mark.parametrize("op", ["inference", "forward"])
@pytest.mark.parametrize(("name", "misuse"), [(n, m) for n, _, m in MISUSES],
                         ids=[words for _, words, _ in MISUSES])  # fmt: skip
def test_misuse_raises_and_names_the_argument(op: str, name: str, misuse: Any) -> None:
    args = misuse(make_arguments("lstm", 5, 3, 6, 7, layers=2))
    with pytest.raises(RuntimeError) as error:
        getattr(ops, op)(*args.given())
    assert name in str(error.value)
    assert "fused_rnn" in str(error.value)


@pytest.mark.parametrize("op", ["inference", "forward"])
@pytest.mark.parametrize("sizes", [s for _, s in PACKED_MISUSES],
                         ids=[words for words, _ in PACKED_MISUSES])  # fmt: skip
def test_wrong_batch_sizes_raise(op: str, sizes: Tensor) -> None:
    args = make_arguments("gru", 0, 0, 6, 7, batch_sizes=(3, 2))
    with pytest.raises(RuntimeError, match=r"batch_sizes|sequence length"):
        getattr(ops, op)(*args._replace(batch_sizes=sizes))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not has_c(cell)])
def test_a_cell_with_one_state_refuses_c0(cell: str) -> None:
    args = make_arguments(cell)
    with pytest.raises(RuntimeError, match="c0"):
        ops.inference(*args._replace(c0=args.h0).given())


@pytest.mark.parametrize("op", ["inference", "forward"])
def test_no_time_steps_raise(op: str) -> None:
    args = make_arguments("lstm", 0, 3, 6, 7)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        getattr(ops, op)(*args.given())


def spoil_backward(k: int, tensor: Tensor | None) -> Any:
    """A call of backward whose k-th of d_output, d_h_n, d_c_n, saved is `tensor`."""
    args = make_arguments("lstm", 5, 3, 6, 7, layers=2)
    *outputs, saved = ops.forward(*args.given())
    given = [*seeds_for(tuple(outputs)), saved]
    given[k] = tensor
    return backward(args, given[:3], given[3])


@pytest.mark.parametrize(
    ("k", "name", "tensor"),
    [
        (0, "d_output", torch.randn(5, 3, 8)),
        (0, "d_output", torch.randn(3, 5, 7)),
        (0, "d_output", torch.randn(5, 3, 7).double()),
        (1, "d_h_n", torch.randn(1, 3, 7)),
        (1, "d_h_n", torch.randn(2, 3, 7).bfloat16()),
        (2, "d_c_n", torch.randn(2, 2, 7)),
        (2, "d_c_n", torch.randn(2, 3, 7).double()),
        (3, "saved", torch.randn(2, 14, 96)),
        (3, "saved", torch.randn(2, 15, 80)),
        (3, "saved", torch.randn(2, 15, 96).double()),
        (3, "saved", torch.randn(0)),
    ],
    ids=lambda value: f"{tuple(value.shape)}{value.dtype}" if isinstance(value, Tensor) else value,
)
def test_misuse_of_backward_raises(k: int, name: str, tensor: Tensor) -> None:
    with pytest.raises(RuntimeError) as error:
        spoil_backward(k, tensor)
    assert name in str(error.value)


def spoil(blocks: list[Tensor], at: int) -> list[Tensor]:
    """The last block with another byte."""
    last = blocks[-1].clone()
    last[at] += 1
    return [*blocks[:-1], last]


# The tag is layout, isa, cell, dtype (16, 16, 32, 16 characters), I, H, R, projected.
@pytest.mark.parametrize(
    ("words", "misuse"),
    [
        ("layout", lambda blocks: spoil(blocks, 0)),
        ("instruction set", lambda blocks: spoil(blocks, 16)),
        ("cell", lambda blocks: spoil(blocks, 32)),
        ("dtype", lambda blocks: spoil(blocks, 64)),
        ("I = 8, but this call needs 7", lambda blocks: spoil(blocks, 80)),
        ("H = 8", lambda blocks: spoil(blocks, 88)),
        ("R = 8", lambda blocks: spoil(blocks, 96)),
        ("projection", lambda blocks: spoil(blocks, 104)),
        ("bytes", lambda blocks: [blocks[0], blocks[1][:-64]]),
        ("not what", lambda blocks: [blocks[0], blocks[1][:50]]),
        ("not what", lambda blocks: [blocks[0].float(), blocks[1]]),
        ("not what", lambda blocks: [blocks[0].view(-1, 1), blocks[1]]),
        ("I = 6, but this call needs 7", lambda blocks: [blocks[0], blocks[0]]),
        ("one tensor for each of 2", lambda blocks: blocks[:1]),
        ("one tensor for each of 2", lambda blocks: []),
    ],
)
def test_other_packed_weights_raise(words: str, misuse: Any) -> None:
    before, blocks, after = (lambda f: (f[:5], f[5], f[6:]))(
        packed(make_arguments("gru", 5, 3, 6, 7, layers=2))
    )
    with pytest.raises(RuntimeError, match=words):
        ops.frozen(*before, misuse(blocks), *after)


def test_packed_weights_of_another_call_raise() -> None:
    args = make_arguments("gru", 5, 3, 6, 7)
    frozen = packed(args)
    for words, change in [
        ("cell gru, but this call needs rnn_relu", {0: "rnn_relu"}),
        ("dtype float32, but", {1: args.input.bfloat16(), 3: None}),
        ("I = 6, but this call needs 5", {1: args.input[..., 1:]}),
        ("H = 7, but this call needs 6", {6: 6, 3: None}),
        ("R = 7, but this call needs 2", {7: 2, 3: None}),
        ("greater than zero", {6: 0}),
        ("greater than zero", {7: -1}),
        ("h0", {3: torch.randn(1, 3, 8)}),
    ]:
        changed = [change.get(k, argument) for k, argument in enumerate(frozen)]
        with pytest.raises(RuntimeError, match=words):
            ops.frozen(*changed)


@pytest.mark.parametrize("weights", [[torch.randn(3)], [torch.randn(3, 3)]])
def test_pack_checks_its_weights(weights: list[Tensor]) -> None:
    with pytest.raises(RuntimeError, match="weight"):
        ops.pack("gru", weights, 1, False)


@pytest.mark.parametrize("name", ["input", "h0", "c0", "weights[1]"])
def test_other_devices_raise(name: str) -> None:
    """A tensor without memory among those that have some must not be read."""
    args = make_arguments("lstm")
    if name == "weights[1]":
        args = replace_weight(args, 1, args.weights[1].to("meta"))
    else:
        args = args._replace(**{name: getattr(args, name).to("meta")})
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.inference(*args.given())[0].sum().item()


OPCHECKS: list[dict[str, Any]] = [
    {"layers": 2},
    {"layers": 2, "batch_sizes": RAGGED},
    {"layers": 2, "batch_first": True},
    # Full lengths, because `saved` has rows that nobody writes for shorter ones.
    {
        "lengths": (5,) * 5,
        "reset": 0.3,
        "zoneout": "mask",
        "h_mask": True,
        "candidate_mask": True,
        "all_c": True,
    },
]


OPCHECKED = [*(("lstm", options) for options in OPCHECKS), ("gru", OPCHECKS[1])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "options"),
    [*OPCHECKED, *((cell, OPCHECKS[-1]) for cell in CELLS if cell != "lstm")],
    ids=str,
)
def test_opcheck(cell: str, options: dict[str, Any]) -> None:
    """All of it for a cell with two states and for one with one. What another has of its own are
    numbers of weights and slots of `saved`: it is asked for shapes and aliases only."""
    args = make_arguments(cell, 5, 5, 4, 19, bidirectional=True, **without_refused(cell, options))
    tests = ("test_schema", "test_faketensor")
    if (cell, options) in OPCHECKED:
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    overload = "controlled" if args.controls.any else "default"

    def check(op: Any, arguments: tuple[Any, ...]) -> None:
        torch.library.opcheck(op, arguments, test_utils=tests)

    check(getattr(ops.inference, overload), args.given())
    check(getattr(ops.forward, overload), args.given())
    check(ops.pack.default, (cell, args.weights, args.num_layers, True))
    check(getattr(ops.frozen, overload), packed(args))
    *outputs, saved = ops.forward(*args.given())
    for needs in ((True, True, True), (True, False, False)):
        arguments = arguments_of_backward(args, seeds_for(tuple(outputs)), saved, needs)
        check(getattr(ops.backward, overload), arguments)

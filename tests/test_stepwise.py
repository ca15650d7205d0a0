"""The scan floor of the CUDA kernels: executed on the host, and with `-m gpu` on a GPU.

What test_scan.py asks of the CPU's scans, in fewer words: kernels and schedule know no storage type
but where they load and store, and no structure but by the pointers they are given.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from judge import Tensors, judge_draws
from layers import BEYOND, KINDS, flatten, judged_steps, make, map_tensors, oracle, run, twins
from scans import (
    FLOATS,
    Arguments,
    Backend,
    assert_same,
    backward,
    everything,
    judge_scan,
    make_arguments,
    norms,
    ops,
    seeds_for,
    to_cpu,
)
from test_scan import (
    CELLS,
    PADDED,
    RAGGED,
    TYPED_CELLS,
    describe,
    has_c,
    strided,
    transposed,
    unaligned,
    without_refused,
)
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn

pytestmark = pytest.mark.usefixtures("backend")
each_cell = pytest.mark.parametrize("cell", CELLS)
NORMED = [cell for cell in CELLS if norms(cell)]
LOW = [dtype for dtype in FLOATS if dtype != torch.float32]

SIZES = [
    # T, B, I, H: units around the width of a block and of its warps, rows around its height
    (1, 1, 1, 1),
    (5, 3, 6, 7),
    (2, 9, 33, 16),
    (3, 8, 4, 40),
    (3, 5, 2, 33),
    (2, 2, 3, 130),
    (30, 1, 4, 21),
]
OPTIONS: list[dict[str, Any]] = [
    {"bias": False, "state": False},
    {"layers": 3, "batch_first": True},
    {"layers": 2, "bidirectional": True},
    {"layers": 3, "bidirectional": True, "batch_sizes": RAGGED},
    {"layers": 2, "bidirectional": True, "lengths": PADDED, "batch_first": True},
    {"reset": 0.3},
    {"reset": 0.4, "reset_to_initial": True, "bidirectional": True, "batch_first": True},
    {"reset": 0.3, "batch_sizes": RAGGED, "bidirectional": True, "layers": 2},
    {"reset": 0.3, "reset_to_initial": True, "lengths": PADDED, "bidirectional": True},
    {"zoneout": "shares", "candidate_mask": True, "all_c": True},
    {"zoneout": "mask", "h_mask": True, "lengths": PADDED, "bidirectional": True, "all_c": True},
    {
        "zoneout": "mask",
        "h_mask": True,
        "candidate_mask": True,
        "batch_sizes": RAGGED,
        "layers": 2,
        "reset": 0.3,
    },
    {"h_mask": True, "candidate_mask": True, "reset": 0.3, "bidirectional": True, "layers": 2},
]


@contextmanager
def setting(name: str, value: int, backend: Backend) -> Iterator[None]:
    """`chunk_bytes`, `fused_rows` or `schedule`: of all calls, by its number in persistent.h."""
    path = fused_rnn._C.__file__
    if backend.name == "emu":
        path = next(p for p in torch.ops.loaded_libraries if p.endswith("_emu.so"))
    change = getattr(ctypes.CDLL(path), f"fused_rnn_{name}")
    change.argtypes, change.restype = [ctypes.c_int64], ctypes.c_int64
    before = change(value)
    try:
        yield
    finally:
        change(before)


@pytest.fixture(params=[True, False], ids=["fused", "library"])
def products(request: pytest.FixtureRequest, backend: Backend) -> Iterator[None]:
    """The recurrent products of few rows in our kernels, or by the library as those of many."""
    cell = request.node.callspec.params.get("cell", "lstm")
    if not request.param and (cell in ("gru_reset_before", *NORMED) or cell.startswith("indrnn")):
        pytest.skip("they are the library's, or there are none")
    with setting("fused_rows", 8 if request.param else 0, backend):
        yield


each_product = pytest.mark.usefixtures("products")


@each_cell
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_accuracy_of_sizes(cell: str, sizes: tuple[int, ...]) -> None:
    judge_scan(cell, *sizes, dtype=torch.float32)


@each_product
@each_cell
@pytest.mark.parametrize("options", OPTIONS, ids=describe)
def test_accuracy_of_structures(cell: str, options: dict[str, Any]) -> None:
    judge_scan(cell, 5, 5, 6, 19, dtype=torch.float32, **without_refused(cell, options))


@pytest.mark.parametrize("cell", NORMED)
def test_accuracy_of_rows_wider_than_their_block(cell: str) -> None:
    """So that a thread has several units, and some one more than others."""
    judge_scan(cell, 2, 2, 3, 530, dtype=torch.float32)


@pytest.fixture
def persistent(backend: Backend) -> Iterator[None]:
    """All steps of a layer and direction in one launch."""
    with setting("schedule", 1, backend):
        yield


each_persistent = pytest.mark.parametrize("cell", ["lstm", "gru"])


@pytest.mark.usefixtures("persistent")
@each_persistent
@pytest.mark.parametrize(
    ("sizes", "dtype", "options"),
    [
        # Fewer rows than are multiplied at a time, and more.
        ((5, 3, 6, 32), torch.float32, {}),
        ((1, 1, 1, 16), torch.float32, {"bias": False, "state": False}),
        ((3, 18, 5, 16), torch.float32, {"bidirectional": True, "layers": 2}),
        ((4, 9, 5, 48), torch.bfloat16, {"layers": 2, "batch_first": True}),
        ((3, 18, 5, 16), torch.float16, {"bidirectional": True}),
        # Parts of k that are not whole, more of them than a warp loads at once, and two stages.
        ((3, 2, 3, 24), torch.bfloat16, {}),
        ((2, 2, 3, 264), torch.float16, {}),
        # In emulation d_input is the host's matrix product, which on some processors (Zen 3) adds
        # up term by term where there are fewer columns than a vector has.
        ((2, 2, 9, 136), torch.float32, {}),
        # Groups of blocks, the last one with fewer sequences.
        ((2, 20, 3, 8), torch.bfloat16, {"bidirectional": True}),
    ],
    ids=str,
)
def test_accuracy_of_the_persistent_schedule(
    cell: str, sizes: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    judge_scan(cell, *sizes, dtype=dtype, **options)


@pytest.mark.usefixtures("persistent")
@each_persistent
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_accuracy_of_persistent_chunks(cell: str, steps: int, backend: Backend) -> None:
    """A launch for each chunk of steps, of odd and even numbers of them."""
    B, H = 3, 32
    gates = fused_rnn._C.cells()[cell]["gates"]
    with setting("chunk_bytes", steps * B * gates * H * 4, backend):
        judge_scan(cell, 5, B, 4, H, dtype=torch.float32, bidirectional=True)


@pytest.mark.usefixtures("persistent")
@each_persistent
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_persistent_steps_take_no_nan_for_what_has_not_arrived(
    cell: str, dtype: torch.dtype, backend: Backend
) -> None:
    """Memory is filled with the one whose bits are all ones before the launch."""
    args = make_arguments(cell, 4, 3, 4, 16, dtype=dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    args.h0.view(bits)[0, 1] = -1
    args.input.view(bits)[2, 0] = -1
    *outputs, saved = ops.forward(*args.on(backend.device).given())
    output = outputs[0].cpu()
    assert output[:, 1].isnan().all()
    assert output[2:, 0].isnan().all()
    assert output[:, 2].isfinite().all()
    seeds = seeds_for((*outputs[:3],))
    seeds[0].view(bits)[3, 2] = -1
    gradient = backward(args.on(backend.device), seeds, saved)[0].cpu()
    assert gradient[:, 1:].isnan().all()


@each_persistent
@pytest.mark.parametrize(("H", "expected"), [(16, 1), (20, 0)])
def test_a_schedule_is_chosen(cell: str, H: int, expected: int, backend: Backend) -> None:
    """Where nothing is forced: the two differ in how they add up."""
    args = make_arguments(cell, 5, 3, 4, H)
    found = everything(args)
    with setting("schedule", expected, backend):
        assert_same(everything(args), found)


@pytest.mark.usefixtures("persistent")
@each_persistent
def test_persistent_inference_is_forward(cell: str, backend: Backend) -> None:
    args = make_arguments(cell, 5, 3, 4, 32, layers=2, batch_first=True).on(backend.device)
    assert_same(list(ops.inference(*args.given())), list(ops.forward(*args.given())[:3]))


@pytest.mark.usefixtures("persistent")
@pytest.mark.parametrize(
    ("cell", "options", "why"),
    [
        ("rnn_tanh", {}, "no kernel for this cell"),
        ("lstm", {"dtype": torch.float64}, "no kernel for float64"),
        ("lstm", {"proj": 4}, "h is projected"),
        ("gru", {"batch_sizes": RAGGED}, "lengths of their own"),
        ("gru", {"B": 5, "lengths": PADDED}, "lengths of their own"),
        ("gru", {"reset": 0.3}, "need a kernel per step"),
        ("lstm", {"zoneout": "shares"}, "need a kernel per step"),
        ("lstm", {"h_mask": True}, "need a kernel per step"),
        ("gru", {"candidate_mask": True}, "need a kernel per step"),
        ("lstm", {"all_c": True}, "need a kernel per step"),
        ("lstm", {"H": 20}, "no multiple of 8"),
        ("lstm", {"H": 2048, "T": 1, "B": 1, "I": 1}, "do not fit"),
    ],
    ids=str,
)
def test_what_cannot_be_persistent_says_why(
    cell: str, options: dict[str, Any], why: str, backend: Backend
) -> None:
    args = make_arguments(cell, **({"H": 16} | options)).on(backend.device)
    with pytest.raises(RuntimeError, match=f"'persistent' is forced, but .*{why}"):
        ops.inference(*args.given())


def large(args: Arguments) -> Arguments:
    return args._replace(input=args.input * 1e4, h0=args.h0 * 1e4)


def level(args: Arguments) -> Arguments:
    """Products of x and h that are zeros in every other row: a norm has nothing to divide by."""
    input, h0 = args.input.clone(), args.h0.clone()
    input[:, ::2] = h0[:, ::2] = 0
    return args._replace(input=input, h0=h0)


@pytest.mark.parametrize("change", [large, level])
@pytest.mark.parametrize("cell", NORMED)
def test_accuracy_of_extreme_rows(cell: str, change: Callable[[Arguments], Arguments]) -> None:
    judge_scan(cell, 3, 4, 5, 19, dtype=torch.float32, change=change)


def ids(value: Any) -> str:
    return describe(value) if isinstance(value, dict) else str(value)


@each_product
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        *(("lstm", options) for options in OPTIONS),
        *(("layer_norm_lstm", OPTIONS[k]) for k in (4, 11)),
    ],
    ids=ids,
)
def test_accuracy_with_projection(cell: str, options: dict[str, Any]) -> None:
    judge_scan(cell, 5, 5, 6, 19, proj=5, dtype=torch.float32, **options)


@each_product
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        *itertools.product(TYPED_CELLS, OPTIONS[3::4]),
        *itertools.product(NORMED, OPTIONS[11:12]),
        ("lstm", OPTIONS[4] | {"proj": 5}),
    ],
    ids=ids,
)
def test_accuracy_of_types(cell: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    judge_scan(cell, 5, 5, 6, 19, dtype=dtype, **without_refused(cell, options))


CHUNKED = OPTIONS[2], OPTIONS[3], OPTIONS[4], OPTIONS[8]


@pytest.mark.parametrize(
    ("cell", "options", "dtype"),
    [
        *itertools.product(
            ("lstm", "gru", "gru_reset_before", "indrnn_tanh"), CHUNKED, (torch.float32,)
        ),
        *itertools.product(("lstm",), CHUNKED, (torch.bfloat16,)),
        *itertools.product(NORMED, OPTIONS[3:4], (torch.float32,)),
    ],
    ids=ids,
)
def test_accuracy_chunk_by_chunk(
    cell: str, options: dict[str, Any], dtype: torch.dtype, backend: Backend
) -> None:
    """Two steps at a time, and one."""
    row = fused_rnn._C.cells()[cell]["gates"] * 19 * 4
    for steps in (2, 1):
        with setting("chunk_bytes", steps * 5 * row, backend):
            judge_scan(cell, 5, 5, 6, 19, dtype=dtype, **options)
            if cell == "lstm":
                judge_scan(cell, 5, 5, 6, 19, dtype=dtype, proj=5, **options)


@each_cell
def test_a_single_step(cell: str, backend: Backend) -> None:
    """[B, I] is what T = 1 is."""
    args = make_arguments(cell, 1, 3, 6, 19).on(backend.device)
    step = args._replace(input=args.input[0], h0=args.h0[0], c0=args.c0[0] if has_c(cell) else None)
    output, h_n, c_n, *_ = whole = everything(args)
    h, nothing, c, *_ = parts = everything(step)
    assert nothing.numel() == 0
    assert_same([h, c], [h_n[0], c_n[0] if has_c(cell) else c_n])
    # Its one output has one gradient, where T = 1 has two.
    assert [p.shape for p in parts[6:]] == [w.shape for w in whole[6:]]
    assert torch.equal(output[0], h)


@each_cell
@pytest.mark.parametrize("options", OPTIONS[1::3], ids=describe)
def test_calls_agree_bit_for_bit(cell: str, options: dict[str, Any], backend: Backend) -> None:
    """Again and again, and without what is saved; close on other layouts of the same numbers."""
    args = make_arguments(cell, 5, 5, 6, 19, **without_refused(cell, options)).on(backend.device)
    before = args.map(Tensor.clone)
    expected = everything(args)
    assert_same(everything(args), expected)
    count = 4 if args.controls.any else 3
    assert_same(list(ops.inference(*args.given())), expected[:count])
    for relay in (transposed, strided, unaligned):  # a library's product may take another way
        for ours, theirs in zip(everything(args.map(relay)), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert_same(list(args.tensors().values()), list(before.tensors().values()))


@each_cell
def test_backward_may_be_repeated_and_reads_no_outputs(cell: str, backend: Backend) -> None:
    args = make_arguments(cell, 5, 5, 6, 19, layers=2, bidirectional=True).on(backend.device)
    *outputs, saved = ops.forward(*args.given())
    seeds, kept = seeds_for(tuple(outputs)), saved.clone()
    expected = backward(args, seeds, saved)
    for output in outputs:
        output.zero_()
    assert_same([*backward(args, seeds, saved), saved], [*expected, kept])


@each_cell
@pytest.mark.parametrize("absent", [1, 2, 4, 7])
def test_absent_output_gradients_are_zeros(cell: str, absent: int, backend: Backend) -> None:
    args = make_arguments(cell, 5, 5, 6, 19, layers=2, bidirectional=True, lengths=PADDED)
    args = args.on(backend.device)
    *outputs, saved = ops.forward(*args.given())
    full = [*seeds_for((*outputs[:3],))]
    gone = [bool(absent >> k & 1) for k in range(3)]
    none = [None if g else seed for g, seed in zip(gone, full, strict=True)]
    zero = [
        torch.zeros_like(seed) if g and seed is not None else seed
        for g, seed in zip(gone, full, strict=True)
    ]
    assert_same(backward(args, none, saved), backward(args, zero, saved))


@each_cell
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1::2], ids=str)
def test_only_the_needed_gradients_are_made(
    cell: str, needs: tuple[bool, bool, bool], backend: Backend
) -> None:
    args = make_arguments(cell, 5, 5, 6, 19, layers=2, bidirectional=True, reset=0.3)
    args = args.on(backend.device)
    *outputs, saved = ops.forward(*args.given())
    seeds = seeds_for((*outputs[:3],))
    full, part = backward(args, seeds, saved), backward(args, seeds, saved, needs)
    wanted = [needs[0], needs[1], needs[1], *[needs[2]] * len(args.weights)]
    nothing = args.input.new_empty(0)
    assert_same(part, [t if want else nothing for t, want in zip(full, wanted, strict=True)])


@each_cell
@pytest.mark.parametrize("lengths", [(), (0, 0, 0)], ids=["no rows", "no steps"])
def test_a_batch_of_none(cell: str, lengths: tuple[int, ...], backend: Backend) -> None:
    args = make_arguments(cell, 4, len(lengths), 5, 7, layers=2, lengths=lengths)
    args = args.on(backend.device)
    results = everything(args)
    assert_same([results[0]], [args.input.new_zeros(4, len(lengths), 7)])
    assert_same([results[1]], [args.h0])
    for gradient, weight in zip(results[-len(args.weights) :], args.weights, strict=True):
        assert torch.equal(gradient, torch.zeros_like(weight))


@each_cell
def test_nan_stays_in_its_row(cell: str, backend: Backend) -> None:
    clean = make_arguments(cell, 4, 13, 5, 19, layers=2, bidirectional=True)
    dirty = clean.map(Tensor.clone)
    dirty.input[1, 6] = float("nan")
    others = [row for row in range(13) if row != 6]
    expected, found = to_cpu(everything(clean)), to_cpu(everything(dirty))
    for ours, theirs in zip(found[:6], expected[:6], strict=True):  # of outputs, input and states
        if theirs.numel():
            torch.testing.assert_close(ours[:, others], theirs[:, others])
    assert found[0][:, 6].isnan().any()


@pytest.mark.parametrize("kind", [*KINDS, *BEYOND])
def test_layers(kind: str, backend: Backend) -> None:
    """The module floor, with several layers, directions and a batch that is packed."""
    if backend.name == "cuda":
        pytest.skip("tests/test_gpu.py does")
    options = {"num_layers": 2, "bidirectional": True}
    ours = make(fused_rnn, kind, 6, 9, **options)
    theirs = ours
    if kind in KINDS:
        ours, theirs = twins(kind, 6, 9, **options)
    with torch.no_grad():  # gains below one: see scans.make_arguments
        for name, weight in theirs.named_parameters():
            if name.startswith("norm"):
                weight.mul_(0.5)
    double = copy.deepcopy(theirs).double()
    plain = theirs if kind in KINDS else oracle(theirs)

    def draw(pack: bool) -> tuple[Tensors, Tensors, Tensors]:
        T = judged_steps(kind, 7)
        x: Any = torch.randn(T, 4, 6)
        if pack:
            lengths = torch.tensor([2, 7, 5, 1]).clamp(max=T)
            x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        single, wide = dict(theirs.named_parameters()), dict(double.named_parameters())
        fused = run(ours, dict(ours.named_parameters()), x, None, torch.float32)
        exact = run(oracle(double), wide, map_tensors(Tensor.double, x), None, torch.float32)
        return fused, run(plain, single, x, None, torch.float32), exact

    for pack in (False, True):
        judge_draws(functools.partial(draw, pack))


def test_layers_in_training(backend: Backend) -> None:
    """What is around the scan asks it for the same: dropout, all states, computing again."""
    rates = {"dropout": 0.4, "zoneout": 0.1, "recurrent_dropout": 0.2, "candidate_dropout": 0.2}
    layer = fused_rnn.LSTM(6, 9, num_layers=2, **rates)
    layer.to(backend.device)
    x = torch.randn(30, 4, 6, device=backend.device)
    lengths, reset = torch.tensor([3, 30, 11, 0]), torch.rand(30, 4) < 0.1

    def results(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        found = flatten(layer(x, lengths=lengths, reset=reset, **options))
        gradients = torch.autograd.grad([t.square().sum() for t in found[:3]], layer.parameters())
        return [*found[:3], *gradients]

    expected = results()
    again = results(return_all_states=True)
    layer.recompute = True
    for ours in (again, results()):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_other_devices_raise(backend: Backend) -> None:
    args: Arguments = make_arguments("lstm").on(backend.device)
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.inference(*args._replace(h0=args.h0.to("meta")).given())[0].sum().item()

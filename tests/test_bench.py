"""The benchmark: its shapes, that it times only what agrees, and what it writes and concludes."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import runpy
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from time import process_time, sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn import _C, ops, strategy
from fused_rnn.bench import __main__ as cli
from fused_rnn.bench import conditions, gpu_peers, measure, memory, peers, report, roof, sides, work
from fused_rnn.bench.measure import TORCH, DisagreementError, Result
from fused_rnn.bench.shapes import CELLS, GRID, PROGRAMS, SUITES, Shape

ENVIRONMENT = report.Environment(
    "A Machine, 2 CPUs", "2.13.0", "0.1.0", "avx2", "2026-01-02T03:04:05", "bench 'x, y'"
)
SHAPE = Shape("tiny", "LSTM", 4, 3, 5, 6)
TINY = (
    SHAPE,
    Shape("tiny", "GRU", 4, 3, 5, 6, L=2, D=2, batch_first=True, strided=True, dropout=0.5),
    Shape("tiny", "RNN", 6, 3, 5, 6, packed=True, state=True),
    Shape("tiny", "LSTM", 1, 2, 5, 6, L=2, state=True),
    Shape("tiny", "LSTMCell", 1, 2, 5, 6, state=True),
    Shape("tiny", "GRUCell", 1, 2, 5, 6),
)


def test_rates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what `machine` has put in their place
    for rate in (_C.tile_rate, lambda threads: _C.stream_rate(2**18, threads)):
        assert rate(1) > 0
        assert rate(2) > 0
        with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
            rate(0)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of known speed: 100 GFLOP/s a thread, and 64 GB/s up to 64 KiB, 16 beyond."""
    monkeypatch.setattr(_C, "tile_rate", lambda threads: 100.0 * threads, raising=False)
    stream_rate = lambda size, threads: (64.0 if size <= 2**16 else 16.0) * threads  # noqa: E731
    monkeypatch.setattr(_C, "stream_rate", stream_rate, raising=False)
    for rate in (roof.tile_rate, roof._stream_rate):
        rate.cache_clear()
    yield
    for rate in (roof.tile_rate, roof._stream_rate):
        rate.cache_clear()


def result(speedup: float, **changes: Any) -> Result:
    """A measurement of 10 ms against torch.nn's 10 ms * speedup."""
    spread = {"q25": 0.9 * speedup, "q75": 1.1 * speedup}
    spread |= {"best_ms": 8.0, "peer_best_ms": 8.0 * speedup}
    r = Result(
        SHAPE,
        "training",
        1,
        "float32",
        TORCH,
        10 * speedup,
        10.0,
        speedup,
        0,
        0,
        7,
        1e-7,
        1e-6,
        2.5,
    )
    return dataclasses.replace(r, **spread | changes)


def write(path: Path, results: Iterable[report.Record]) -> str:
    with path.open("w", encoding="utf-8") as file:
        results = list(results)
        writer = report.Writer(file, ENVIRONMENT, type(results[0]))
        for r in results:
            writer.write(r)
    return str(path)


@pytest.mark.parametrize("suite", SUITES)
def test_shapes_are_told_apart_by_their_labels_and_can_be_built(suite: str) -> None:
    shapes = SUITES[suite]
    assert len({shape.label for shape in shapes}) == len(shapes)
    for shape in shapes:
        assert shape.family in CELLS
        assert issubclass(getattr(fused_rnn, shape.cell), torch.nn.Module)
        assert min(shape.T, shape.B, shape.I, shape.H, shape.L) >= 1
        assert shape.D in (1, 2)
        assert not (shape.strided and shape.packed)
        if shape.cell.endswith("Cell"):
            assert (shape.T, shape.L, shape.D) == (1, 1, 1)
            assert not any((shape.packed, shape.strided, shape.batch_first))


def test_suites_hold_what_they_promise() -> None:
    sizes = {(s.cell, s.B, s.H) for s in GRID if s.name == "grid" and s.T == 50}
    assert sizes == set(product(CELLS, (1, 8, 32, 64), (64, 128, 256, 512, 1024)))
    for kind in ("cost of a call", "one step", "ragged"):
        assert {s.cell for s in GRID if s.name == kind} == set(CELLS)
    assert {s.name for s in PROGRAMS} <= {s.name for s in SUITES["quick"]}
    assert set(SUITES["quick"]) < set(SUITES["all"])


@pytest.mark.parametrize("mode", [*work.MODES, work.FROZEN])
@pytest.mark.parametrize("shape", TINY, ids=lambda shape: f"{shape.cell} {shape.sizes}")
def test_every_kind_of_shape_is_measured(shape: Shape, mode: str) -> None:
    r = measure.measure(shape, mode, "float32", budget=0.01)
    assert r.pairs >= sides.LEAST_PAIRS
    assert 0 < r.q25 <= r.speedup <= r.q75
    assert min(r.peer_ms, r.fused_ms) > 0
    assert r.max_rel_diff < 1e-5
    assert r.threads == torch.get_num_threads()


@pytest.mark.parametrize("dtype", work.DTYPES)
def test_every_dtype_is_measured(dtype: str) -> None:
    assert measure.measure(SHAPE, "training", dtype, budget=0.01).dtype == dtype


def test_inputs_are_as_the_shape_says() -> None:
    strided = work._arguments(TINY[1], torch.float32, training=True)
    assert strided.leaf.shape == (3, 4, 5)
    assert not strided.leaf.is_contiguous()
    assert strided.input is strided.leaf
    assert strided.leaf.is_leaf

    ragged = Shape("ragged", "LSTM", 50, 20, 3, 4, packed=True, state=True)
    packed = work._arguments(ragged, torch.float32, training=False)
    assert isinstance(packed.input, PackedSequence)
    assert len(packed.input.batch_sizes) == 50
    assert 0.3 < len(packed.leaf) / (50 * 20) < 0.7
    assert len(packed.d_output) == len(packed.leaf)
    assert [tensor.shape for tensor in packed.hx] == [(1, 20, 4)] * 2


def lstm_that(spoil: Any) -> SimpleNamespace:
    class LSTM(fused_rnn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            output, state = super().forward(input, hx)
            return spoil(output, state)

    return SimpleNamespace(LSTM=LSTM)


def with_gradient_of_half(output: torch.Tensor, state: Any) -> Any:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient / 2)
    return output, state


@pytest.mark.parametrize(
    ("spoil", "modes"),
    [
        (lambda output, state: (output * 1.001, state), work.MODES),
        (lambda output, state: (output, (state[0], state[1] + 0.01)), work.MODES),
        (lambda output, state: (output * float("nan"), state), work.MODES),
        (lambda output, state: (output[:-1], state), ("inference",)),
        (with_gradient_of_half, ("training",)),
    ],
    ids=["output", "cell state", "nan", "length", "gradient"],
)
def test_a_wrong_layer_is_not_timed(
    spoil: Any, modes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "alternate", lambda *_, **__: pytest.fail("was timed"))
    for mode in modes:
        with pytest.raises(DisagreementError, match=f"tiny: LSTM T4 B3 I5 H6, {mode}"):
            measure.measure(SHAPE, mode, "float32", 0.0, lstm_that(spoil))


def test_the_two_sides_take_turns() -> None:
    calls: list[str] = []

    def side(name: str, seconds: float) -> Any:
        return lambda: calls.append(name) or seconds

    times = sides._rounds([side("torch", 2.0), side("fused", 1.0)], 0.0, at_least=3)
    assert calls == ["torch", "fused"] * 3
    assert times == [(2.0, 1.0)] * 3


class Watched:
    """Stands for a tensor; who has its array can be known."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def numpy(self) -> Any:
        return self.array


KINDS = (
    {},
    {"L": 2, "D": 2, "batch_first": True, "strided": True, "state": True},
    {"packed": True, "state": True},
    {"packed": True, "batch_first": True, "D": 2},
    {"batch_first": True},
)
ONNX_SHAPES = (
    *(Shape("tiny", cell, 4, 3, 5, 6, **kind) for cell in CELLS for kind in KINDS),
    *(Shape("tiny", f"{cell}Cell", 1, 2, 5, 6, state=cell != "GRU") for cell in CELLS),
)


@pytest.mark.parametrize("peer", peers.BUILDERS)
def test_the_arrays_of_a_peer_live_as_long_as_its_timer(
    peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", peer):
        pytest.importorskip(package)
    arrays: list[weakref.ref[Any]] = []
    case = peers._case

    def watched(shape: Shape) -> Any:
        model, inputs, outputs = case(shape)
        own = {name: Watched(tensor.numpy().copy()) for name, tensor in inputs.items()}
        arrays.extend(weakref.ref(tensor.array) for tensor in own.values())
        return model, own, outputs

    monkeypatch.setattr(peers, "_case", watched)
    timer, _ = peers.BUILDERS[peer](Shape("tiny", "LSTM", 4, 3, 5, 6, state=True), 1)
    gc.collect()
    assert len(arrays) == 3
    assert all(array() is not None for array in arrays)
    del timer
    gc.collect()
    assert all(array() is None for array in arrays)


@pytest.mark.parametrize("peer", peers.BUILDERS)
@pytest.mark.parametrize("shape", ONNX_SHAPES, ids=lambda shape: f"{shape.cell} {shape.sizes}")
def test_a_peer_computes_what_we_do(shape: Shape, peer: str) -> None:
    for package in ("onnx", peer):
        pytest.importorskip(package)
    timer, theirs = peers.BUILDERS[peer](shape, 1)
    _, ours = peers.ours(shape, "inference", "float32", 1)
    assert measure._agree(ours, theirs, shape, "inference", "float32", peer)[1] < 1e-5
    assert timer() > 0


def test_the_frozen_layer_is_what_is_timed() -> None:
    for shape in TINY:
        ours, _ = work.make(fused_rnn, shape, work.FROZEN, "float32")
        theirs, _ = work.make(torch.nn, shape, work.FROZEN, "float32")
        assert isinstance(ours, fused_rnn.FrozenLayer | fused_rnn.FrozenCell)
        assert type(theirs) is getattr(torch.nn, shape.cell)


def test_a_peer_is_measured_in_a_process_of_its_own() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    jobs = measure.jobs(TINY[2:4], [*work.MODES, work.FROZEN], ["onnxruntime"])
    assert [mode for _, mode, _ in jobs] == ["inference", "frozen"] * 2
    for (shape, *_), r in zip(jobs, measure.measure_all(jobs, [2], "float32", 0.01), strict=True):
        assert isinstance(r, Result)
        assert (r.shape, r.threads, r.peer) == (shape, 2, "onnxruntime")
        assert r.pairs >= sides.LEAST_PAIRS
        assert min(r.peer_ms, r.fused_ms) > 0


def process_and_threads(threads: int) -> Any:
    found = torch.tensor([os.getpid(), torch.get_num_threads(), threads])
    return (lambda: 1e-3), [found]


def test_a_side_has_a_process_and_its_number_of_threads() -> None:
    with closing(sides.Side(3)) as side:
        (found,) = side.load(process_and_threads)
        assert found[1:].tolist() == [3, 3]
        assert int(found[0]) != os.getpid()
        assert sides.take_turns([side, side], 0.0) == [(1e-3, 1e-3)] * sides.LEAST_PAIRS


def test_a_turn_is_the_mean_of_its_calls_after_one_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter([100.0, 1.0, 2.0, 6.0])
    monkeypatch.setattr(sides, "_timer", lambda: next(seconds))
    assert sides._time(3) == 3.0


def spinning(threads: int) -> tuple[Any, list[torch.Tensor]]:
    """A program whose threads spin on after a call; its timer tells the processor time it had."""

    def spin() -> None:
        while True:
            pass

    threading.Thread(target=spin, daemon=True).start()
    return process_time, []


def test_a_side_stands_still_between_its_turns() -> None:
    with closing(sides.Side(1)) as side:
        side.load(spinning)
        before = side.timer()()
        sleep(0.3)
        assert side.timer()() - before < 0.15


class HereAndWrong(sides.Side):
    """A side without a process, which errs when it is a peer."""

    def __init__(self, threads: int) -> None: ...

    def close(self) -> None: ...

    def load(self, build: Any, *arguments: Any) -> list[torch.Tensor]:
        if build is peers.ours:
            return build(*arguments, 1)[1]
        return [result + 0.01 for result in peers.ours(*arguments, "inference", "float32", 1)[1]]


def test_a_peer_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "Side", HereAndWrong)
    monkeypatch.setattr(sides, "take_turns", lambda *_: pytest.fail("was timed"))
    jobs = measure.jobs([SHAPE], ["inference"], ["openvino"])
    (outcome,) = measure.measure_all(jobs, [1], "float32", 0.0)
    assert isinstance(outcome, DisagreementError)
    assert "fused_rnn and openvino differ" in str(outcome)


@pytest.mark.parametrize("mode", ["training", "frozen"])
@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.label)
def test_low_precision_is_compared_with_the_same_numbers_in_float32(
    shape: Shape, mode: str
) -> None:
    found = measure.measure(shape, mode, "bfloat16", 0.0, peer=measure.FLOAT32)
    assert (found.peer, found.dtype) == ("float32", "bfloat16")
    assert 0 < found.max_rel_diff < 0.02


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--peer openvino --dtype float64", "openvino is measured in float32 only"),
        ("--peer onnxruntime --mode training", "onnxruntime can be measured in inference only"),
        ("--peer onnxruntime --suite conditions", "conditions are compared with torch's only"),
        ("--peer float32 --dtype float64", "float32 is what low precision is compared with"),
        ("--peer float32", "float32 is what low precision is compared with, not float32"),
        ("--mode frozen --memory", "not measured of frozen layers"),
        ("--peer onnxruntime --memory", "memory and conditions are compared with torch's only"),
        ("--suite conditions --filter busy --threads 1", "matters to two threads or more"),
        ("--peer haste", "haste runs on a GPU: --device cuda"),
    ],
)
def test_what_a_peer_cannot_do_is_said(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "missing", lambda _: [])
    assert cli.main(words.split()) == 2
    assert sentence in capsys.readouterr().out


class StandIn(torch.nn.Module):
    """Haste's layers, as its documentation has them, with torch's inside."""

    def __init__(self, input_size: int, hidden_size: int, batch_first: bool = False) -> None:
        super().__init__()
        self.layer = getattr(torch.nn, type(self).__name__)(
            input_size, hidden_size, batch_first=batch_first
        )

    def from_native_weights(self, *weights: Tensor) -> None:
        for parameter, weight in zip(self.layer.parameters(), weights, strict=True):
            parameter.copy_(weight)

    def forward(self, input: Tensor) -> Any:
        return self.layer(input)


def flashrnn(Wx: Tensor, R: Tensor, b: Tensor, *, function: str, dtype: str) -> Any:
    """FlashRNN's function, as its documentation has it."""
    assert Wx.dtype == R.dtype == b.dtype == getattr(torch, dtype)
    y = c = torch.zeros_like(Wx[:, 0, 0])  # [B, 1, H]
    steps = []
    for x in Wx.unbind(1):
        Ry = torch.einsum("bhp,ghdp->bghd", y, R)
        if function == "lstm":
            i, f, g, o = (x + Ry + b).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            y = o.sigmoid() * c.tanh()
        else:
            n, r, z = (Ry + b[:3]).unbind(1)
            r, z = (x[:, 0] + r).sigmoid(), (x[:, 1] + z).sigmoid()
            y = z * y + (1 - z) * (x[:, 2] + b[3] + r * n).tanh()
        steps.append(torch.stack((y, c)[: 2 if function == "lstm" else 1]))
    states = torch.stack(steps, 2)
    return states, states[:, :, -1:]


@pytest.mark.parametrize("mode", work.MODES)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("peer", gpu_peers.LIBRARIES)
def test_libraries_for_a_gpu_are_compared(
    peer: str, cell: str, batch_first: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, against stand-ins: whether the weights go where they belong."""
    layers = {name: type(name, (StandIn,), {}) for name in ("LSTM", "GRU")}
    monkeypatch.setitem(sys.modules, "haste_pytorch", SimpleNamespace(**layers))
    monkeypatch.setitem(sys.modules, "flashrnn", SimpleNamespace(flashrnn=flashrnn))
    shape = Shape("tiny", cell, 4, 3, 5, 6, batch_first=batch_first)
    assert gpu_peers.can(shape)
    assert measure.measure(shape, mode, "float32", 0.01, peer=peer).max_rel_diff < 1e-6


def test_what_libraries_for_a_gpu_cannot_do() -> None:
    ordinary = Shape("a", "LSTM", 4, 3, 5, 6)
    others = ({"cell": "RNN"}, {"cell": "GRUCell"}, {"L": 2}, {"D": 2}, {"packed": True})
    shapes = [ordinary, *(dataclasses.replace(ordinary, **other) for other in others)]
    assert [gpu_peers.can(shape) for shape in shapes] == [True] + 5 * [False]
    assert measure.jobs(shapes, work.MODES, ["haste"]) == [
        (ordinary, mode, "haste") for mode in work.MODES
    ]
    assert "package flashrnn, which is not installed" in str(
        gpu_peers.obstacle("flashrnn", "float32")
    )


def test_a_dtype_that_a_library_for_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers.importlib.util, "find_spec", lambda _: object())
    assert gpu_peers.obstacle("haste", "bfloat16") == "haste has float32, float64, not bfloat16"
    assert gpu_peers.obstacle("flashrnn", "bfloat16") is None


def test_a_missing_peer_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    assert cli.main(["--peer", "torch", "openvino"]) == 2
    assert (
        "openvino needs onnx and openvino: pip install 'fused_rnn[bench]'"
        in capsys.readouterr().out
    )


def die(*_: Any) -> None:
    os._exit(1)


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        (Shape("gpu", "LSTM", 8, 4, 64, 64), "bfloat16", "persistent"),
        (Shape("gpu", "GRU", 8, 4, 64, 64, L=2, D=2), "float16", "persistent"),
        (Shape("gpu", "GRU", 8, 4, 64, 64), "float64", "stepwise"),
        (Shape("gpu", "LSTM", 8, 4, 64, 64, packed=True), "bfloat16", "stepwise"),
        (Shape("gpu", "RNN", 8, 4, 64, 64), "bfloat16", "stepwise"),
        (Shape("gpu", "LSTM", 8, 4, 64, 2048), "bfloat16", "stepwise"),
    ],
)
def test_a_row_says_which_schedule_it_had(
    shape: Shape, dtype: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be persistent is stepwise instead of an error, and its row says so."""
    monkeypatch.setattr(strategy, "gpu_sizes", lambda gpu: (132, 227 * 1024))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    forced = []

    def measured(*arguments: Any, **options: Any) -> Result:
        forced.append(strategy.forced_schedule())
        return result(2.0)

    monkeypatch.setattr(measure, "measure", measured)
    arguments = TORCH, shape, "inference", dtype, 0.1, "cuda"
    row = measure._outcome(*arguments, "persistent")
    assert isinstance(row, Result)
    assert row.schedule == taken
    assert taken in report.details([row])[0].rows[0][0]
    monkeypatch.setattr(ops, "cudnn_first", True)
    default = measure._outcome(*arguments, None)
    assert isinstance(default, Result)
    assert default.schedule == taken.replace("stepwise", "cuDNN")
    assert forced == [taken, None]  # by default nothing is forced


def test_a_schedule_is_for_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--schedule", "persistent", "--out", str(tmp_path)]) == 2
    assert "--device cuda" in capsys.readouterr().out


def test_a_crash_names_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_outcome", die)
    with pytest.raises(RuntimeError, match=f"the process died in {SHAPE.label}, training"):
        list(measure.measure_all([(SHAPE, "training", TORCH)], [1], "float32", 0.0))


def test_csv_comes_back_as_it_was_written(tmp_path: Path) -> None:
    results = [result(1.5), result(2.5, shape=TINY[1], threads=2, mode="inference")]
    path = write(tmp_path / "x.csv", results)
    assert report.read(Path(path)) == (ENVIRONMENT, results)


OLD_FILE = """\
name,cell,T,B,I,H,L,D,batch_first,packed,strided,state,dropout,mode,threads,dtype,torch_ms,\
fused_ms,speedup,q25,q75,pairs,max_abs_diff,max_rel_diff,machine,torch,fused_rnn,isa,date,command
tiny,LSTM,4,3,5,6,1,1,False,False,False,False,0.0,training,1,float32,20.0,10.0,2.0,1.8,2.2,7,\
1e-07,1e-06,"A Machine, 2 CPUs",2.13.0,0.1.0,avx2,2026-01-02T03:04:05,"bench 'x, y'"
"""


def test_a_file_from_before_there_were_peers_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text(OLD_FILE, encoding="utf-8")
    environment, (old,) = report.read(path)
    assert environment == ENVIRONMENT
    later = {"roof_ms": 2.5, "best_ms": 8.0, "peer_best_ms": 16.0}
    assert dataclasses.replace(old, **later) == result(2.0)
    (table,) = report.measurements([old])
    assert table.rows == [(SHAPE.label, "20", "10", "2.00x [1.80-2.20]", "-", "-")]
    (table,) = report.measurements([result(2.0)])
    assert table.header[-2:] == ("torch.nn of the roof", "fused_rnn of the roof")
    assert table.rows[0][-2:] == ("16%", "31%")


def test_every_peer_has_its_tables_and_panels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = [result(2.0), result(0.5, mode="inference", peer="onnxruntime")]
    path = write(tmp_path / "x.csv", results)
    assert cli.main(["--load", path]) == 0
    page = (tmp_path / "x.md").read_text(encoding="utf-8")
    assert "# fused_rnn against torch.nn and onnxruntime, 2026-01-02" in page
    assert "### inference, 1 thread, against onnxruntime" in page
    assert "### training, 1 thread, against torch.nn" in page
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("name,cell\nx,LSTM\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no file of this benchmark"):
        report.read(path)


def test_the_versions_of_peers_are_kept() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    environment = report.Environment.here("bench", "Box", [TORCH, "onnxruntime"])
    assert environment.peers == f"onnxruntime {onnxruntime.__version__}"
    assert environment.versions.endswith(f", {environment.peers}")
    assert report.Environment.here("bench", "Box", [TORCH]).peers == ""


def test_summary_has_the_geometric_mean_and_the_worst_shape() -> None:
    other = dataclasses.replace(SHAPE, B=7)
    gru = dataclasses.replace(SHAPE, cell="GRU")
    results = [result(1.0), result(4.0, shape=other), result(3.0, shape=gru)]
    results += [result(0.5, peer="onnxruntime")]
    table = report.summary(results)
    assert table.title == "Speed-up over torch.nn and onnxruntime"
    assert table.rows == [
        ("LSTM", "training", "1", TORCH, "2", "2.00x", "1.00x", SHAPE.label),
        ("GRU", "training", "1", TORCH, "1", "3.00x", "3.00x", gru.label),
        ("LSTM", "training", "1", "onnxruntime", "1", "0.50x", "0.50x", SHAPE.label),
    ]


# What has to be done at least, by hand: 2 N G H (I + H) flops; 4 bytes of W_hh at every step.
ROOFS = (
    # many rows: the tile. 2 * 640 * 4 * 32 * (16 + 32) flops at 100 GFLOP/s
    (Shape("x", "LSTM", 10, 64, 16, 32), 1, 2 * 640 * 4 * 32 * 48 / 100e9, 3),
    # one sequence: W_hh is 4 * 64 * 64 * 4 bytes, 64 KiB, at 64 GB/s, and at 128 with two threads
    (Shape("x", "LSTM", 10, 1, 16, 64), 1, 10 * 65536 / 64e9, None),
    (Shape("x", "LSTM", 10, 1, 16, 64), 2, 10 * 65536 / 128e9, None),
    # one step: W_ih is read too, and both are beyond 64 KiB; dW takes as long as one reading
    (Shape("x", "GRU", 1, 1, 128, 128), 1, 3 * 128 * 256 * 4 / 16e9, 3),
    # two layers, two directions, ragged: a sum, the second layer with 2 * 32 inputs
    (
        Shape("x", "RNN", 50, 40, 16, 32, L=2, D=2, packed=True),
        1,
        2 * Shape("x", "RNN", 50, 40, 16, 32, packed=True).rows * 32 * 2 * (48 + 96) / 100e9,
        3,
    ),
)


@pytest.mark.parametrize(("shape", "threads", "seconds", "training"), ROOFS)
def test_roof(shape: Shape, threads: int, seconds: float, training: float | None) -> None:
    assert roof.bound_ms(shape, "inference", threads) == pytest.approx(1e3 * seconds)
    if training is None:  # twice the stream, and dW at the rate of the tile or as it is written
        product = 2 * 10 * 4 * 64 * (16 + 64) / (100e9 * threads)
        written = 4 * 64 * (16 + 64) * 4 / (64e9 * threads)
        training = 2 + max(product, written) / seconds
    expected = pytest.approx(1e3 * seconds * training)
    assert roof.bound_ms(shape, "training", threads) == expected


def test_rates_are_measured_once_and_with_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def rate(*arguments: int) -> float:
        asked.append((*arguments, torch.get_num_threads()))
        return 1.0

    monkeypatch.setattr(_C, "tile_rate", rate)
    monkeypatch.setattr(_C, "stream_rate", rate)
    for _ in range(2):
        roof.tile_rate(3)
        for size in (5, 40_000, 65_535, 65_536):
            roof.stream_rate(size, 2)
    assert asked == [(3, 3), (2**14, 2, 2), (2**15, 2, 2), (2**16, 2, 2)]
    assert torch.get_num_threads() == 1


def test_only_float32_has_a_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(
        _: str, pairs: Any, threads: int, dtype: str, budget: float, *__: str | None
    ) -> Iterator[Result]:
        for pair in pairs:
            yield dataclasses.replace(measure.measure(*pair, dtype, budget), threads=threads)

    monkeypatch.setattr(measure, "_in_one_process", here)
    job = (SHAPE, "inference", TORCH)
    for count, known in enumerate(measure.measure_all([job], [1, 2], "float32", 0.0), start=1):
        assert isinstance(known, Result)
        assert known.threads == count
        assert 0 < known.best_ms <= known.fused_ms
        assert known.of_roof == roof.bound_ms(SHAPE, "inference", count) / known.best_ms
        assert known.peer_of_roof == known.roof_ms / known.peer_best_ms
    (unknown,) = measure.measure_all([job], [1], "float64", 0.0)
    assert isinstance(unknown, Result)
    assert math.isnan(unknown.roof_ms)


CONDITIONS = (
    Shape("values", "GRU", 4, 3, 5, 6, packed=True, state=True),
    Shape("values", "LSTM", 4, 3, 5, 6, state=True),
    Shape("ragged", "LSTM", 6, 4, 5, 6, packed=True),
    Shape("reset", "RNN", 6, 4, 5, 6),
    Shape("recompute", "GRU", 6, 4, 5, 6),
    *(Shape("cell", cell, 6, 4, 5, 6) for cell in conditions.BEYOND),
)


@pytest.mark.parametrize("mode", work.MODES)
@pytest.mark.parametrize("shape", CONDITIONS, ids=lambda shape: shape.label)
def test_every_condition_is_measured(shape: Shape, mode: str) -> None:
    jobs = conditions.jobs([shape], [mode], [1])
    if shape.name == "recompute" and mode == "inference":
        assert not jobs
        return
    cases = {"values": conditions.VALUES, "cell": conditions.BEYOND[shape.cell]}
    expected = list(cases.get(shape.name, [shape.name]))
    assert jobs == [conditions.Job(1, shape, mode, case) for case in expected]
    for job in jobs if shape.name == "cell" else jobs[:1]:
        r = conditions.measure(job, "float32", 0.0)
        assert (r.shape, r.mode, r.threads, r.case) == (shape, mode, 1, job.case)
        assert r.pairs >= sides.LEAST_PAIRS
        assert 0 < r.q25 <= r.ratio <= r.q75
        assert min(r.ms, r.base_ms) > 0
        # torch.nn has neither.
        assert math.isnan(r.torch_ratio) == (shape.name in conditions.ONLY_OURS)


def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers and arguments that are going to be timed, as they come."""
    found: list[Any] = []

    def timer(layer: Any, arguments: Any) -> Any:
        found.append((layer, arguments))
        return lambda: 1.0

    monkeypatch.setattr(work, "timer", timer)
    return found


@pytest.mark.parametrize(
    ("case", "holds"),
    [
        ("saturated", lambda x: x.abs().mean() > 1e3),
        ("denormal", lambda x: 0 < x.abs().max() < torch.finfo(torch.float32).tiny),
        ("zero", lambda x: not x.any()),
        ("NaN", lambda x: x.isnan().all()),
    ],
)
@pytest.mark.parametrize("mode", work.MODES)
def test_values_are_what_they_are_called(
    case: str, holds: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = timed(monkeypatch)
    shape = dataclasses.replace(SHAPE, name="values", state=True)
    conditions.measure(conditions.Job(1, shape, mode, case), "float32", 0.0)
    assert [type(layer) for layer, _ in found] == [fused_rnn.LSTM] * 2 + [torch.nn.LSTM] * 2
    for (layer, disturbed), (_, ordinary) in (found[:2], found[2:]):
        for tensor in (disturbed.input, disturbed.d_output, *disturbed.hx):
            assert holds(tensor)
        assert 0.1 < ordinary.input.abs().mean() < 10
        if case == "denormal":  # so are torch.nn's output and gradients, and ours are zero
            for value in work.evaluate(layer, disturbed)[:2]:
                assert value.abs().max() < 1e-37
                assert value.any() == isinstance(layer, torch.nn.LSTM)


def test_resets_and_cells_are_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed(monkeypatch)
    shape = Shape("reset", "LSTM", 50, 8, 5, 6)
    conditions.measure(conditions.Job(1, shape, "inference", "reset"), "float32", 0.0)
    (_, disturbed), (_, ordinary) = found
    assert 0 < disturbed.controls["reset"].float().mean() < 0.1
    assert not ordinary.controls
    found.clear()
    recompute = dataclasses.replace(shape, name="recompute")
    conditions.measure(conditions.Job(1, recompute, "training", "recompute"), "float32", 0.0)
    assert [layer.recompute for layer, _ in found] == [True, False]
    found.clear()
    shape = dataclasses.replace(shape, name="cell", cell="GRU")
    conditions.measure(conditions.Job(1, shape, "inference", "CoupledLSTM"), "float32", 0.0)
    assert [type(layer) for layer, _ in found] == [fused_rnn.CoupledLSTM, fused_rnn.GRU]


def test_ragged_is_compared_with_as_many_dense_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed(monkeypatch)
    shape = Shape("ragged", "GRU", 50, 20, 5, 6, packed=True)
    r = conditions.measure(conditions.Job(1, shape, "inference", "ragged"), "float32", 0.0)
    (_, ragged), (_, dense) = found[:2]
    steps, sequences, _ = dense.input.shape
    assert sequences == 20
    assert abs(steps * 20 - shape.rows) <= 10
    assert len(ragged.leaf) == shape.rows
    # Both take a second: per row, the ragged one takes as much less as it has rows more.
    assert r.ratio == pytest.approx(steps * 20 / shape.rows)


def test_busy_is_n_threads_over_one_among_spinning_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Side:
        def __init__(self, threads: int) -> None:
            self.threads = threads

        def load(self, build: Any, library: str, *arguments: Any) -> None:
            build(library, *arguments, self.threads)
            self.loaded = library, self.threads

        def close(self) -> None:
            pass

    def take_turns(found: list[Any], budget: float) -> list[tuple[float, ...]]:
        spinning = children() - before
        assert len(spinning) == len(os.sched_getaffinity(0))
        both = ("fused_rnn", 2), ("fused_rnn", 1), ("torch.nn", 2), ("torch.nn", 1)
        assert tuple(side.loaded for side in found) == both
        return [(6.0, 2.0, 8.0, 1.0)] * 5

    monkeypatch.setattr(sides, "Side", Side)
    monkeypatch.setattr(sides, "take_turns", take_turns)
    before = children()
    shape = dataclasses.replace(SHAPE, name="busy")
    jobs = conditions.jobs([shape], ["training"], [1, 2])
    (r,) = conditions.measure_all(jobs, "float32", 0.0)
    assert (r.threads, r.case, r.ratio, r.torch_ratio, r.limit) == (2, "busy", 3.0, 8.0, 1.5)
    assert children() == before


def children() -> set[str]:
    pid = os.getpid()
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split())


def condition(ratio: float, **changes: Any) -> conditions.Condition:
    shape = dataclasses.replace(SHAPE, name="values")
    r = conditions.Condition(
        shape, "training", 1, "float32", "NaN", 10.0, 10 * ratio, ratio, ratio, ratio, 1.1, 7
    )
    return dataclasses.replace(r, **changes)


def test_conditions_are_written_read_and_shown_with_their_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ragged = dataclasses.replace(SHAPE, name="ragged")
    records = [condition(1.2), condition(1.4), condition(1.2, shape=ragged, case="ragged")]
    path = write(tmp_path / "x.csv", records)
    assert report.read(Path(path)) == (ENVIRONMENT, records)
    values, ragged_table = report.details(records)
    assert values.title.endswith("at most 1.3x")
    assert [row[6:] for row in values.rows] == [
        ("1.20x [1.20-1.20]", "", "1.10x"),
        ("1.40x [1.40-1.40]", "exceeded", "1.10x"),
    ]
    assert [row[7] for row in ragged_table.rows] == ["exceeded"]
    assert cli.main(["--load", path, "--fail-if-slower", "1"]) == 0
    assert "exceeded" in capsys.readouterr().out
    assert "# fused_rnn under conditions" in (tmp_path / "x.md").read_text(encoding="utf-8")
    assert not (tmp_path / "x.png").exists()


def test_conditions_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(jobs: Any, threads: int, dtype: str, budget: float) -> Any:
        return (conditions.measure(job, dtype, budget) for job in jobs)

    monkeypatch.setattr(conditions, "_disturbed", here)
    words = "--suite conditions --filter ragged.*LSTM.*B32 --budget 0.01 --threads 1 --out".split()
    assert cli.main([*words, str(tmp_path)]) == 0
    assert "2/2" in capsys.readouterr().out
    (path,) = tmp_path.glob("*-conditions-filtered.csv")
    records = report.read(path)[1]
    assert [(r.shape.name, r.mode) for r in records] == list(product(["ragged"], work.MODES))


class Hungry(torch.nn.RNN):
    """Takes 8 MiB more while it works, and gives them back."""

    def forward(self, *arguments: Any) -> Any:
        torch.ones(2 * 2**20 if self.hidden_size == 6 else 1)
        return super().forward(*arguments)


def test_memory_is_the_peak_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(work.LIBRARIES, "torch.nn", SimpleNamespace(RNN=Hungry))
    shape = Shape("tiny", "RNN", 4, 3, 5, 6)
    assert 7.5 < memory.growth("torch.nn", shape, "float32") < 10
    # A gradient of 4 MiB for W_hh, and little else; what was there before does not count, nor
    # does what an earlier step left in our cache.
    wide = Shape("wide", "RNN", 1, 1, 1, 1024)
    for _ in range(2):
        assert 3.5 < memory.growth("fused_rnn", wide, "float32") < 14
    # Gates and states of every step, 24 MiB, or states of some of them.
    saving, recompute = (
        memory.growth("fused_rnn", Shape(name, "LSTM", 500, 32, 8, 64), "float32")
        for name in ("grid", "recompute")
    )
    assert recompute < saving - 10


def test_memory_from_the_command_line_in_fresh_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Process:
        def __init__(self, threads: int) -> None:
            self.threads = threads

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, function: Any, library: str, shape: Shape, dtype: str) -> Any:
            assert function is memory.growth
            asked.append((self, library, shape.cell, self.threads))
            return SimpleNamespace(result=lambda: 4.0 if library == "torch.nn" else 3.0)

    monkeypatch.setattr(sides, "process", Process)
    words = "--memory --filter cost.*(LSTM|GRU) --threads 1 2 --out".split()
    assert cli.main([*words, str(tmp_path)]) == 0
    assert "4/4" in capsys.readouterr().out
    assert len({id(process) for process, *_ in asked}) == 8
    both = product((1, 2), ("LSTM", "GRU"), ("fused_rnn", "torch.nn"))
    assert [tuple(what) for _, *what in asked] == [(lib, cell, n) for n, cell, lib in both]

    (path,) = tmp_path.glob("*-quick-memory-filtered.csv")
    records = report.read(path)[1]
    assert [(r.threads, r.shape.cell) for r in records] == list(product((1, 2), ("LSTM", "GRU")))
    one, two = report.details(records)
    assert one.title == "Peak memory of a training step, 1 thread"
    assert two.rows[0] == ("cost of a call: LSTM T1 B1 I8 H8", "4.0", "3.0", "0.75")
    assert "# memory of fused_rnn and torch.nn" in path.with_suffix(".md").read_text("utf-8")


def test_comparison_pairs_equal_measurements_only() -> None:
    new = [result(2.0, fused_ms=5.0), result(2.0, threads=2), result(2.0, shape=TINY[1])]
    new += [result(2.0, peer="openvino")]
    old = [result(1.0, fused_ms=20.0), result(1.0, mode="inference"), result(1.0, dtype="float64")]
    table = report.comparison(new, old)
    assert table.rows == [
        (SHAPE.label, "training", "1", TORCH, "20", "5", "4.00x", "1.00x", "2.00x")
    ]
    assert table.title.startswith("1 measurements in common")
    assert "4.00x" in table.title


@pytest.mark.parametrize(("limit", "status"), [("1.0", 1), ("0.8", 0), ("0.79", 0)])
def test_fail_if_slower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str, status: int
) -> None:
    new = write(tmp_path / "new.csv", [result(2.0), result(0.8, shape=TINY[1])])
    old = write(tmp_path / "old.csv", [result(1.0, fused_ms=30.0)])
    assert cli.main(["--load", new, "--compare", old, "--fail-if-slower", limit]) == status
    out = capsys.readouterr().out
    assert ("below 1x: 0.80x [0.72-0.88] tiny: GRU" in out) == bool(status)
    assert "change 3.00x" in out


def test_different_results_are_told_and_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = [result(2.0), DisagreementError("this row is wrong")]
    monkeypatch.setattr(measure, "measure_all", lambda *_: iter(outcomes))
    argv = ["--out", str(tmp_path), "--threads", "1", "--machine", "My (own) machine"]
    assert cli.main(argv) == 1
    assert "DIFFERENT RESULTS, not timed: this row is wrong" in capsys.readouterr().out
    (page,) = tmp_path.glob("*-my-own-machine-quick.md")
    assert "- this row is wrong" in page.read_text(encoding="utf-8")
    assert len(report.read(page.with_suffix(".csv"))[1]) == 1


def test_from_the_command_line_to_csv_page_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--filter cost.*(LSTM|GRU) --budget 0.01 --threads 2 --machine Box --out".split()
    assert cli.main([*words, str(tmp_path)]) == 0
    assert "4/4" in capsys.readouterr().out

    (path,) = tmp_path.glob("*-box-quick-filtered.csv")
    environment, results = report.read(path)
    assert environment.machine == "Box"
    assert "--filter 'cost.*(LSTM|GRU)'" in environment.command
    measured = {(r.shape.cell, r.mode, r.threads) for r in results}
    assert measured == set(product(("LSTM", "GRU"), work.MODES, [2]))
    assert all(0 < r.of_roof < 1 for r in results)
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert page.count("cost of a call: GRU T1 B1 I8 H8") >= 4
    assert f"({path.with_suffix('.png').name})" in page
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_part_of_a_suite_does_not_take_its_file() -> None:
    def name(*words: str) -> str:
        return cli.selection(cli.parser().parse_args(words))

    assert name() == "quick"
    assert name("--suite", "all", "--mode", "inference", "training") == "all"
    assert name("--cell", "gru", "--mode", "training") == "quick-gru-training"
    assert name("--mode", "inference", "frozen") == "quick-inference-frozen"
    assert name("--dtype", "bfloat16", "--filter", "x") == "quick-bfloat16-filtered"
    assert name("--peer", "torch", "openvino") == "quick-torch.nn-openvino"


def test_list_prints_the_selected_labels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--list", "--suite", "programs", "--cell", "gru", "--filter", "OCR"]
    monkeypatch.setattr(sys, "argv", ["python -m fused_rnn.bench", *words])
    monkeypatch.delitem(sys.modules, "fused_rnn.bench.__main__")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("fused_rnn.bench", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        "line OCR: GRU T160 B1 I192 H128 D2 batch_first strided",
        "line OCR: GRU T160 B24 I192 H128 D2 batch_first strided",
    ]


def test_a_run_of_nothing_is_not_a_success(tmp_path: Path) -> None:
    argv = ["--filter", "no such shape", "--out", str(tmp_path)]
    assert cli.main([*argv, "--fail-if-slower", "1"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_path_is_noticed_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measure_all", lambda *_: pytest.fail("was measured"))
    with pytest.raises(FileNotFoundError):
        cli.main(["--compare", str(tmp_path / "nowhere.csv"), "--out", str(tmp_path)])


def test_without_matplotlib_there_is_all_but_the_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write(tmp_path / "x.csv", [result(2.0)])
    assert cli.main(["--load", path]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.csv", "x.md"]
    assert "png" not in (tmp_path / "x.md").read_text(encoding="utf-8")


def test_without_rich_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delitem(sys.modules, "fused_rnn.bench.__main__")
    with pytest.raises(SystemExit, match=r"pip install 'fused_rnn\[bench\]'"):
        runpy.run_module("fused_rnn.bench")

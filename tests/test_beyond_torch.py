"""Layers and cells that torch.nn does not have: values by ONNX Runtime, manners by torch.nn's."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from judge import Tensors, judge_draws
from layers import (
    BEYOND,
    KINDS,
    complaint,
    flatten,
    judged_steps,
    make,
    map_tensors,
    oracle,
    precise,
    run,
    state_for,
)
from scans import FLOATS, name_outputs, one_sided
from test_contract_cells import REFUSED as REFUSED_BY_CELLS
from test_contract_cells import source
from test_contract_construction import REFUSED
from test_modules import FORMS, make_input
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn import ops

T, B, I, H = 7, 5, 6, 17
INPUT = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1))

each_kind = pytest.mark.parametrize("kind", BEYOND)
# Classes, and those of torch.nn whose manners they have.
LIKE = {
    "PeepholeLSTM": "LSTM",
    "CoupledLSTM": "LSTM",
    "LayerNormLSTM": "LSTM",
    "LayerNormGRU": "GRU",
    "IndRNN": "RNN",
}
each_class = pytest.mark.parametrize("name", LIKE)
# Cells, their options, and how their layers are made.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "PEEPHOLE": ("PeepholeLSTMCell", {}),
    "COUPLED": ("CoupledLSTMCell", {}),
    "LN": ("LayerNormLSTMCell", {}),
    "LN_GRU": ("LayerNormGRUCell", {}),
    "GRU_BEFORE": ("GRUCell", {"reset_after": False}),
    "INDRNN": ("IndRNNCell", {}),
    "INDRNN_TANH": ("IndRNNCell", {"nonlinearity": "tanh"}),
}
each_cell = pytest.mark.parametrize("kind", CELLS)


def make_cell(kind: str, *sizes: int, **options: Any) -> nn.RNNCellBase:
    name, fixed = CELLS[kind]
    cell: nn.RNNCellBase = getattr(fused_rnn, name)(*sizes, **fixed, **options)
    return cell


# Values


class ByOnnxRuntime:
    """One layer as a node of ONNX: the operator, its attributes, its weights from ours."""

    OPERATOR: dict[str, tuple[str, dict[str, int]]] = {  # noqa: RUF012
        "LSTM": ("LSTM", {}),
        "PEEPHOLE": ("LSTM", {}),
        "COUPLED": ("LSTM", {"input_forget": 1}),
        "GRU": ("GRU", {"linear_before_reset": 1}),
        "GRU_BEFORE": ("GRU", {"linear_before_reset": 0}),
    }

    def __init__(self, kind: str, layer: nn.RNNBase) -> None:
        self.onnx = pytest.importorskip("onnx")
        self.runtime = pytest.importorskip("onnxruntime")
        self.kind, self.layer = kind, layer
        self.states = ("h", "c") if layer.mode == "LSTM" else ("h",)

    def rows(self, weight: Tensor) -> Tensor:
        """In ONNX's order: i o f c, or z r h."""
        gates = weight.detach().chunk(3 if self.kind in ("COUPLED", "GRU", "GRU_BEFORE") else 4)
        if self.kind == "COUPLED":
            f, g, o = gates  # f = 1 - i in ONNX, hence i = sigmoid(-f); its own f is not read
            return torch.cat([-f, o, torch.full_like(f, 9.0), g])
        order = (1, 0, 2) if self.layer.mode == "GRU" else (0, 3, 1, 2)
        return torch.cat([gates[k] for k in order])

    def weights(self) -> Tensors:
        scans = [
            {name.partition("_l0")[0]: getattr(self.layer, name) for name in names}
            for names in self.layer._all_weights
        ]
        rows = [{n: self.rows(w) for n, w in scan.items() if n != "weight_ch"} for scan in scans]
        found = {
            "W": torch.stack([scan["weight_ih"] for scan in rows]),
            "R": torch.stack([scan["weight_hh"] for scan in rows]),
        }
        if self.layer.bias:
            biases = [torch.cat([scan["bias_ih"], scan["bias_hh"]]) for scan in rows]
            found["B"] = torch.stack(biases)
        if self.kind == "PEEPHOLE":
            peepholes = [scan["weight_ch"].detach().chunk(3) for scan in scans]
            found["P"] = torch.stack([torch.cat([i, o, f]) for i, f, o in peepholes])
        return found

    def __call__(self, input: Tensor, hx: Any, lengths: Tensor | None = None) -> Any:
        helper, numpy_helper, kinds = (
            self.onnx.helper,
            self.onnx.numpy_helper,
            self.onnx.TensorProto,
        )
        operator, attributes = self.OPERATOR[self.kind]
        weights = self.weights()
        feeds = {"X": input}
        if lengths is not None:
            feeds["sequence_lens"] = lengths.to(torch.int32)
        feeds |= {f"initial_{s}": t for s, t in zip(self.states, flatten(hx), strict=False)}
        names = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"]
        given = [name if name in feeds or name in weights else "" for name in names]
        results = ["Y", *(f"Y_{state}" for state in self.states)]
        node = helper.make_node(
            operator,
            given[: 6 if operator == "GRU" else 8],
            results,
            hidden_size=self.layer.hidden_size,
            direction="bidirectional" if self.layer.bidirectional else "forward",
            **attributes,
        )

        graph = helper.make_graph(
            [node],
            "layer",
            [
                helper.make_tensor_value_info(
                    name, kinds.INT32 if name == "sequence_lens" else kinds.FLOAT, tuple(t.shape)
                )
                for name, t in feeds.items()
            ],
            [helper.make_tensor_value_info(name, kinds.FLOAT, None) for name in results],
            [numpy_helper.from_array(t.numpy(), name) for name, t in weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = 1
        session = self.runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        found = session.run(results, {name: t.numpy() for name, t in feeds.items()})
        y, *ends = map(torch.from_numpy, found)  # y [T, D, B, H]
        return y.transpose(1, 2).flatten(2), tuple(ends)


@pytest.mark.parametrize("kind", ByOnnxRuntime.OPERATOR)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("state", [True, False], ids=["hx", "no hx"])
@pytest.mark.parametrize("lengths", [None, (3, 7, 1, 7, 4)], ids=str)
def test_values_are_those_of_onnxruntime(
    kind: str, directions: int, bias: bool, state: bool, lengths: tuple[int, ...] | None
) -> None:
    layer = make(fused_rnn, kind, I, H, bias=bias, bidirectional=directions == 2)
    double = copy.deepcopy(layer).double()
    by_onnxruntime = ByOnnxRuntime(kind, layer)
    controls = {} if lengths is None else {"lengths": torch.tensor(lengths)}

    @torch.no_grad()
    def draw() -> tuple[Tensors, Tensors, Tensors]:
        input, hx = torch.randn(T, B, I), state_for(layer, B) if state else ()
        ours = flatten(layer(input, hx or None if isinstance(hx, tuple) else hx, **controls))
        theirs = flatten(by_onnxruntime(input, hx, **controls))
        # They agree with each other, and not only as badly with the third.
        torch.testing.assert_close(ours, theirs)
        wide = map_tensors(Tensor.double, (input, hx if state else None))
        exact = flatten(oracle(double, **controls)(*wide))
        return name_outputs(ours), name_outputs(theirs), name_outputs(exact)

    judge_draws(draw)


class StepByStep(nn.Module):
    """A layer with layer normalisation by torch.nn's own: Linear and LayerNorm, as in the paper."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.H, self.D = layer.hidden_size, 2 if layer.bidirectional else 1
        self.lstm = isinstance(layer, fused_rnn.LayerNormLSTM)
        groups = [4 * self.H] if self.lstm else [2 * self.H, self.H]
        self.scans = nn.ModuleList()
        for names in layer._all_weights:
            w_ih, w_hh, b_ih, b_hh, gains = (getattr(layer, name) for name in names)
            gain_x, gain_h, *of_c = torch.split(gains, [sum(groups)] * 2 + [self.H] * 2 * self.lstm)
            scan = nn.ModuleDict({"x": self.linear(w_ih), "h": self.linear(w_hh)})
            for side, gain, bias in (("x", gain_x, b_ih), ("h", gain_h, b_hh)):
                parts = zip(torch.split(gain, groups), torch.split(bias, groups), strict=True)
                scan[f"norm {side}"] = nn.ModuleList(self.norm(g, b) for g, b in parts)
            if of_c:
                scan["norm c"] = self.norm(*of_c)
            self.scans.append(scan)

    @staticmethod
    def linear(weight: Tensor) -> nn.Linear:
        module = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
        module.weight = nn.Parameter(weight.detach().clone())
        return module

    @staticmethod
    def norm(gain: Tensor, shift: Tensor) -> nn.LayerNorm:
        module = nn.LayerNorm(len(gain), dtype=gain.dtype)
        module.weight = nn.Parameter(gain.detach().clone())
        module.bias = nn.Parameter(shift.detach().clone())
        return module

    def step(self, scan: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x, h_gates = scan["x"](x), scan["h"](h)
        if self.lstm:
            gates = scan["norm x"][0](x) + scan["norm h"][0](h_gates)
            i, f, g, o = gates.split(self.H, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * scan["norm c"](c).tanh(), c
        sizes = [2 * self.H, self.H]
        x_rz, x_n = (n(a) for n, a in zip(scan["norm x"], x.split(sizes, -1), strict=True))
        h_rz, h_n = (n(a) for n, a in zip(scan["norm h"], h_gates.split(sizes, -1), strict=True))
        r, z = (x_rz + h_rz).sigmoid().chunk(2, -1)
        return (1 - z) * (x_n + r * h_n).tanh() + z * h, c

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        ends = []
        for k in range(0, len(self.scans), self.D):
            outputs = []
            for d in range(self.D):
                h = c = x.new_zeros(x.shape[1], self.H)
                every = []
                for step in x.flip(0) if d else x:
                    h, c = self.step(self.scans[k + d], step, h, c)
                    every.append(h)
                outputs.append(torch.stack(every[::-1] if d else every))
                ends.append((h, c) if self.lstm else (h,))
            x = torch.cat(outputs, -1)
        return x, *map(torch.stack, zip(*ends, strict=True))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("name", ["LayerNormLSTM", "LayerNormGRU"])
def test_layer_norm_is_that_of_torch(name: str, bidirectional: bool) -> None:
    """Values and the gradient of the input, by layers that are not ours."""
    layer = getattr(fused_rnn, name)(I, H, 2, bidirectional=bidirectional)
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.1 * torch.randn_like(weight)
    plain, double = StepByStep(layer), StepByStep(copy.deepcopy(layer).double())

    def results(module: nn.Module, input: Tensor, seeds: list[Tensor]) -> Tensors:
        input = input.detach().requires_grad_()
        found = flatten(module(input))
        total = sum((s.to(f.dtype) * f).sum() for s, f in zip(seeds, found, strict=True))
        (gradient,) = torch.autograd.grad(total, input)
        return name_outputs([f.detach() for f in found]) | {"d_input": gradient}

    def draw() -> tuple[Tensors, Tensors, Tensors]:
        input = torch.randn(T, B, I)
        seeds = [torch.randn_like(value) for value in flatten(layer(input))]
        return (
            results(layer, input, seeds),
            results(plain, input, seeds),
            results(double, input.double(), seeds),
        )

    judge_draws(draw)


# Every form in float32, every other type in two.
FORMS_AND_DTYPES = [
    *((form, torch.float32) for form in FORMS),
    *(
        (FORMS[(2 * k + j) % len(FORMS)], dtype)
        for k, dtype in enumerate(FLOATS[1:])
        for j in (0, 1)
    ),
]


@each_kind
@pytest.mark.parametrize(("form", "dtype"), FORMS_AND_DTYPES, ids=str)
def test_accuracy(kind: str, form: str, dtype: torch.dtype) -> None:
    """Against the reference in the same precision; the scan floor has it for every structure."""
    if kind.startswith("LN") and dtype == torch.float64:
        pytest.skip("the reference is the oracle itself, whose every rounding a norm makes much of")
    options = {"bidirectional": True, "batch_first": form == "batch_first", "dtype": dtype}
    layer = make(fused_rnn, kind, I, H, 2, **options)
    with torch.no_grad():  # gains below one: see scans.make_arguments
        for name, weight in layer.named_parameters():
            if name.startswith("norm"):
                weight.mul_(0.5)
    kink = kind == "INDRNN" and dtype.itemsize == 2
    if kink:  # no rounding decides its side: see layers.has_deciding_kink
        with torch.no_grad():
            for weight in layer.parameters():
                weight.copy_(one_sided(weight, H))
    double = copy.deepcopy(layer).double()
    batch = () if form == "unbatched" else (B,)
    steps = judged_steps(kind, T)

    def draw() -> tuple[Tensors, Tensors, Tensors]:
        input, hx = make_input(form, steps, B, I, dtype), state_for(layer, *batch)
        if kink:
            input, hx = map_tensors(Tensor.abs, (input, hx))
        parameters = dict(layer.named_parameters())
        wide = map_tensors(Tensor.double, (input, hx))
        return (
            run(layer, parameters, input, hx, dtype),
            run(oracle(layer), parameters, input, hx, dtype),
            run(oracle(double), dict(double.named_parameters()), *wide, dtype),
        )

    judge_draws(draw)


@each_cell
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("batch", [(5,), (1,), ()], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["hx", "no hx"])
def test_a_cell_is_a_layer_of_one_step(
    kind: str, bias: bool, batch: tuple[int, ...], state: bool
) -> None:
    cell, layer = make_cell(kind, I, H, bias=bias), make(fused_rnn, kind, I, H, bias=bias)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    input = torch.randn(1, *batch, I)
    hx = state_for(layer, *batch) if state else None

    def by_cell(input: Tensor, hx: Any) -> Any:
        ends = cell(input[0], map_tensors(lambda s: s[0], hx))
        h = ends if isinstance(ends, Tensor) else ends[0]
        return h[None], map_tensors(lambda s: s[None], ends)

    found = run(by_cell, dict(cell.named_parameters()), input, hx, input.dtype)
    expected = run(layer, dict(layer.named_parameters()), input, hx, input.dtype)
    torch.testing.assert_close(found, {n.removesuffix("_l0"): t for n, t in expected.items()})


@each_cell
def test_a_loop_of_cells_is_a_layer(kind: str) -> None:
    cell, layer = make_cell(kind, 5, 7), make(fused_rnn, kind, 5, 7)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    hx, outputs = None, []
    for step in INPUT:
        hx = cell(step, hx)
        outputs.append(hx if isinstance(hx, Tensor) else hx[0])
    torch.testing.assert_close(torch.stack(outputs), layer(INPUT)[0])


# Construction


@each_class
@pytest.mark.parametrize(("sizes", "options"), REFUSED, ids=str)
def test_refused_as_torch_refuses(name: str, sizes: Any, options: Any) -> None:
    theirs = complaint(lambda: getattr(nn, LIKE[name])(*sizes, **options))
    assert complaint(lambda: getattr(fused_rnn, name)(*sizes, **options)) == theirs


PROJECTION = "proj_size argument is only supported for LSTM, not"


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda f: f.PeepholeLSTM(5, 7, proj_size=7), ValueError, "proj_size has to be smaller"),
        (lambda f: f.PeepholeLSTM(5, 7, proj_size=-1), ValueError, "should be a positive integer"),
        (lambda f: f.CoupledLSTM(5, 7, proj_size=3), ValueError, f"{PROJECTION} CoupledLSTM"),
        (
            lambda f: f.CoupledLSTM(5, 7, 1, True, False, 0.0, False, 3),
            ValueError,
            f"{PROJECTION} CoupledLSTM",
        ),
        (lambda f: f.IndRNN(5, 7, proj_size=3), ValueError, f"{PROJECTION} RNN or GRU"),
        (lambda f: f.IndRNN(5, 7, nonlinearity="x"), ValueError, "Unknown nonlinearity 'x'"),
        (lambda f: f.IndRNN(5, 7, 1, "x"), ValueError, "Unknown nonlinearity 'x'"),
        (lambda f: f.IndRNN(5, 7, 1, "relu", nonlinearity="tanh"), TypeError, "nonlinearity"),
        (lambda f: f.GRU(5, 7, 1, True, False, 0.0, False, None, None, False), TypeError, ""),
        (lambda f: f.GRUCell(5, 7, True, None, None, False), TypeError, "positional argument"),
        (lambda f: f.LSTM(5, 7, reset_after=False), TypeError, "reset_after"),
        (lambda f: f.PeepholeLSTMCell(5), TypeError, "hidden_size"),
        (lambda f: f.CoupledLSTMCell(5, 7, foo=1), TypeError, "foo"),
    ],
    ids=lambda value: source(value) if inspect.isfunction(value) else "",
)
def test_refused(build: Callable[[Any], object], error: type[Exception], words: str) -> None:
    kind, message = complaint(lambda: build(fused_rnn))
    assert kind is error
    assert words in message


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "PEEPHOLE": {"weight_ih": (28, 5), "weight_hh": (28, 7), "weight_ch": (21,)},
    "PEEPHOLEP": {"weight_ih": (28, 5), "weight_hh": (28, 3), "weight_ch": (21,)},
    "COUPLED": {"weight_ih": (21, 5), "weight_hh": (21, 7)},
    "LN": {"weight_ih": (28, 5), "weight_hh": (28, 7), "norm": (70,)},
    "LNP": {"weight_ih": (28, 5), "weight_hh": (28, 3), "norm": (70,)},
    "LN_GRU": {"weight_ih": (21, 5), "weight_hh": (21, 7), "norm": (42,)},
    "GRU_BEFORE": {"weight_ih": (21, 5), "weight_hh": (21, 7)},
    "INDRNN": {"weight_ih": (7, 5), "weight_hh": (7,)},
    "INDRNN_TANH": {"weight_ih": (7, 5), "weight_hh": (7,)},
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_names_shapes_and_order_of_the_parameters(kind: str, bias: bool) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, bias=bias, bidirectional=True)
    stems = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if bias else ())]
    stems += ["weight_hr"] if layer.proj_size else []
    stems += [stem for stem in ("weight_ch", "norm") if stem in SHAPES[kind]]
    expected = [
        f"{stem}_l{k}{suffix}" for k in range(2) for suffix in ("", "_reverse") for stem in stems
    ]
    assert [name for name, _ in layer.named_parameters()] == expected
    assert list(layer.state_dict()) == expected
    assert layer._flat_weights_names == expected
    for mine, flat in zip(layer.parameters(), layer._flat_weights, strict=True):
        assert mine is flat
    assert [[p.shape for p in group] for group in layer.all_weights] == [
        [getattr(layer, name).shape for name in names] for names in layer._all_weights
    ]
    for stem, shape in SHAPES[kind].items():
        assert getattr(layer, f"{stem}_l0_reverse").shape == shape
        inner = (shape[0], 2 * (layer.proj_size or 7)) if stem == "weight_ih" else shape
        assert getattr(layer, f"{stem}_l1").shape == inner


@each_cell
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_names_and_shapes_of_the_parameters_of_cells(kind: str, bias: bool) -> None:
    cell = make_cell(kind, 5, 7, bias)
    rows = SHAPES[kind]["weight_ih"][:1]
    biases = {"bias_ih": rows, "bias_hh": rows} if bias else {}
    expected = {**SHAPES[kind], **biases}
    assert {name: tuple(p.shape) for name, p in cell.named_parameters()} == expected
    assert set(cell.state_dict()) == set(expected)


@pytest.mark.parametrize("kind", [*BEYOND, *(f"{kind} cell" for kind in CELLS)])
def test_initial_weights(kind: str) -> None:
    """All within 1 / sqrt(H), and none left over; IndRNN's recurrent ones from 0 to 1.

    Norms change nothing at first.
    """
    name, _, cell = kind.partition(" ")
    layer = make_cell(name, 64, 100) if cell else make(fused_rnn, name, 64, 100)
    for stem, weight in layer.named_parameters():
        if stem.startswith("norm"):
            gains = 900 if name.startswith("LN") and "GRU" not in name else 600
            assert torch.equal(weight, (torch.arange(len(weight)) < gains).float())
            continue
        low, high = (0.0, 1.0) if "IND" in kind and "weight_hh" in stem else (-0.1, 0.1)
        assert low <= weight.min() < 0.8 * low + 0.2 * high
        assert 0.2 * low + 0.8 * high < weight.max() <= high


@each_kind
def test_repr_has_what_differs(kind: str) -> None:
    name = BEYOND[kind][0]
    tail = {"GRU_BEFORE": ", reset_after=False"}.get(kind, "")
    tail = ", proj_size=3" if kind.endswith("P") else tail
    assert repr(make(fused_rnn, kind, 5, 7)) == f"{name}(5, 7{tail})"
    assert repr(fused_rnn.GRU(5, 7)) == "GRU(5, 7)"


@each_cell
def test_repr_of_cells(kind: str) -> None:
    name = CELLS[kind][0]
    tail = {"GRU_BEFORE": ", reset_after=False", "INDRNN": ", nonlinearity=relu"}.get(kind, "")
    assert repr(make_cell(kind, 5, 7, False)) == f"{name}(5, 7, bias=False{tail})"


@each_kind
def test_positional_arguments(kind: str) -> None:
    """In torch.nn's order, which for RNN has the nonlinearity."""
    name, options = BEYOND[kind]
    before = (5, 7, 2, "tanh") if "IND" in kind else (5, 7, 2)
    options = {k: v for k, v in options.items() if k != "nonlinearity"}
    layer = getattr(fused_rnn, name)(*before, False, True, 0.5, True, **options)
    found = layer.num_layers, layer.bias, layer.batch_first, layer.dropout, layer.bidirectional
    assert found == (2, False, True, 0.5, True)
    if "IND" in kind:
        assert layer.nonlinearity == "tanh"


# Life


def through_pickle(layer: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(layer))
    return copied


@each_kind
@pytest.mark.parametrize("reproduce", [through_pickle, copy.deepcopy, copy.copy])
def test_copies(kind: str, reproduce: Any) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True)
    twin = reproduce(layer)
    assert repr(twin) == repr(layer)
    assert torch.equal(twin(INPUT)[0], layer(INPUT)[0])
    with torch.no_grad():
        twin.weight_hh_l1.mul_(2)
    same = torch.equal(twin(INPUT)[0], layer(INPUT)[0])
    assert same == (reproduce is copy.copy)


@each_cell
@pytest.mark.parametrize("reproduce", [through_pickle, copy.deepcopy, copy.copy])
def test_copies_of_cells(kind: str, reproduce: Any) -> None:
    cell = make_cell(kind, 5, 7)
    twin = reproduce(cell)
    assert repr(twin) == repr(cell)
    assert all(map(torch.equal, flatten(twin(INPUT[0])), flatten(cell(INPUT[0]))))


@each_kind
def test_state_dicts_travel(kind: str) -> None:
    one, other = (make(fused_rnn, kind, 5, 7, 2, bidirectional=True) for _ in range(2))
    assert not torch.equal(one(INPUT)[0], other(INPUT)[0])
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(INPUT)[0], other(INPUT)[0])
    with torch.device("meta"):
        empty = make(fused_rnn, kind, 5, 7, 2, bidirectional=True)
    empty.load_state_dict(one.state_dict(), assign=True)
    assert torch.equal(one(INPUT)[0], empty(INPUT)[0])


def test_weights_of_an_lstm_lack_the_peepholes() -> None:
    layer = fused_rnn.PeepholeLSTM(5, 7)
    result = layer.load_state_dict(nn.LSTM(5, 7).state_dict(), strict=False)
    assert result.missing_keys == ["weight_ch_l0"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight_ch_l0\""):
        layer.load_state_dict(nn.LSTM(5, 7).state_dict())


def test_without_peepholes_it_is_an_lstm() -> None:
    layer, plain = fused_rnn.PeepholeLSTM(5, 7, 2), nn.LSTM(5, 7, 2)
    layer.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in layer.named_parameters():
        if "weight_ch" in name:
            nn.init.zeros_(parameter)
    torch.testing.assert_close(flatten(layer(INPUT)), flatten(plain(INPUT)))


@each_kind
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts(kind: str, dtype: torch.dtype) -> None:
    def draw() -> tuple[Tensors, Tensors, Tensors]:
        layer, input = make(fused_rnn, kind, 5, 7, 2).to(dtype), torch.randn(4, 3, 5).to(dtype)
        double = copy.deepcopy(layer).double()
        results = (
            layer(input, None),
            oracle(layer)(input, None),
            oracle(double)(input.double(), None),
        )
        assert {t.dtype for t in flatten(results[0])} == {dtype}
        fused, plain, exact = (name_outputs(t.detach() for t in flatten(r)) for r in results)
        return fused, plain, exact

    judge_draws(draw)


@each_kind
def test_on_meta_and_back(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True, device="meta")
    output, ends = layer(INPUT.to("meta"), reset=torch.zeros(4, 3, device="meta"))
    assert output.is_meta
    assert output.shape == (4, 3, 2 * (layer.proj_size or 7))
    assert all(end.shape[:2] == (4, 3) for end in flatten(ends))
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(INPUT)[0].isfinite().all()


@each_kind
def test_functional_call(kind: str) -> None:
    layer, other = (make(fused_rnn, kind, 5, 7) for _ in range(2))
    weights = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    output = torch.func.functional_call(layer, weights, (INPUT,))[0]
    assert torch.equal(output, other(INPUT)[0])
    found = torch.autograd.grad(output.sum(), list(weights.values()))
    other(INPUT)[0].sum().backward()
    assert all(map(torch.equal, found, [p.grad for p in other.parameters()]))


def prune_some(layer: nn.RNNBase, name: str) -> object:
    weight = getattr(layer, name)
    mask = (torch.arange(weight.numel()) % 3 > 0).view_as(weight)
    return prune.custom_from_mask(layer, name, mask)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "reparametrize",
    [parametrizations.weight_norm, nn.utils.weight_norm, prune_some],
    ids=["weight_norm", "old weight_norm", "prune"],
)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, "weight_hh_l0") for kind in BEYOND]
    + [("PEEPHOLE", "weight_ch_l0"), ("PEEPHOLEP", "weight_ch_l0")],
)
def test_reparametrized_layers_train(kind: str, name: str, reparametrize: Any) -> None:
    """As the layer that has the computed weight; the gradient goes on to what it is made of."""
    layer = make(fused_rnn, kind, 5, 7)
    reparametrize(layer, name)
    before = layer(INPUT)[0]
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(INPUT)[0].square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())
    optimizer.step()
    plain = make(fused_rnn, kind, 5, 7)
    after = layer(INPUT)[0]
    with torch.no_grad():
        for stem, parameter in plain.named_parameters():
            parameter.copy_(getattr(layer, stem))
    torch.testing.assert_close(after, plain(INPUT)[0])
    assert not torch.equal(after, before)


# Forms of the input


@each_kind
def test_a_packed_sequence_carries_the_same_objects(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, bidirectional=True)
    rows = [torch.randn(n, 5) for n in (2, 4, 1)]
    input = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    output, _ = layer(input)
    assert type(output) is PackedSequence
    assert output.batch_sizes is input.batch_sizes
    assert output.unsorted_indices is input.unsorted_indices


def twins_of(name: str) -> Callable[[Callable[[Any], object]], None]:
    def same(call: Callable[[Any], object]) -> None:
        theirs = complaint(lambda: call(getattr(nn, LIKE[name])(5, 7)))
        assert complaint(lambda: call(getattr(fused_rnn, name)(5, 7))) == theirs

    return same


def hx_of(layer: nn.RNNBase, *shape: int) -> Any:
    state = torch.zeros(shape)
    return (state, state) if layer.mode == "LSTM" else state


@each_class
@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(torch.zeros(4)),
        lambda m: m(torch.zeros(4, 3, 2, 5)),
        lambda m: m(torch.zeros(4, 3, 6)),
        lambda m: m(torch.zeros(4, 3, 5, dtype=torch.float64)),
        lambda m: m(torch.zeros(0, 3, 5)),
        lambda m: m(torch.zeros(4, 3, 5), hx_of(m, 1, 2, 7)),
        lambda m: m(torch.zeros(4, 3, 5), hx_of(m, 1, 3, 8)),
        lambda m: m(torch.zeros(4, 3, 5), hx_of(m, 2, 3, 7)),
        lambda m: m(torch.zeros(4, 3, 5), hx_of(m, 1, 7)),
        lambda m: m(torch.zeros(4, 5), hx_of(m, 1, 3, 7)),
    ],
    ids=source,
)
def test_input_is_refused_as_torch_refuses_it(name: str, call: Callable[[Any], object]) -> None:
    twins_of(name)(call)


@pytest.mark.parametrize("name", ["PeepholeLSTMCell", "CoupledLSTMCell", "IndRNNCell"])
@pytest.mark.parametrize("call", REFUSED_BY_CELLS, ids=source)
def test_cells_refuse_as_torch_refuses(name: str, call: Callable[[nn.Module], object]) -> None:
    like = "RNNCell" if name.startswith("Ind") else "LSTMCell"
    theirs = complaint(lambda: call(getattr(nn, like)(5, 7)))
    assert complaint(lambda: call(getattr(fused_rnn, name)(5, 7))) == theirs


# Tools


@each_kind
def test_convert_and_to_torch_leave_them_and_say_why(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    model = nn.ModuleDict({"rnn": layer, "plain": nn.LSTM(5, 7)})
    outcomes: dict[str, str] = {}
    fused_rnn.convert(model, report=outcomes.__setitem__)
    assert outcomes == {"plain": "converted"}
    fused_rnn.to_torch(model, report=outcomes.__setitem__)
    name = type(layer).__name__
    missing = "GRU whose reset gate acts before the product" if name == "GRU" else name
    assert outcomes == {"plain": "converted", "rnn": f"skipped: torch.nn has no {missing}"}
    assert type(layer) is getattr(fused_rnn, name)


@each_cell
def test_to_torch_leaves_cells(kind: str) -> None:
    cell = make_cell(kind, 5, 7)
    outcomes: dict[str, str] = {}
    fused_rnn.to_torch(cell, report=outcomes.__setitem__)
    assert outcomes[""].startswith("skipped: torch.nn has no ")
    assert type(cell) is getattr(fused_rnn, CELLS[kind][0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [*BEYOND, *(f"{kind} cell" for kind in CELLS)])
def test_script_says_what_to_use(kind: str) -> None:
    name, _, cell = kind.partition(" ")
    layer = make_cell(name, 5, 7) if cell else make(fused_rnn, name, 5, 7)
    with pytest.raises(NotImplementedError, match=r"use torch\.compile or torch\.export"):
        torch.jit.script(nn.Sequential(layer))


@each_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_unroll_the_reference(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2).eval()
    traced = torch.jit.trace(layer, INPUT)
    input = torch.randn(4, 3, 5)
    torch.testing.assert_close(traced(input), layer(input))


@each_kind
@pytest.mark.filterwarnings("ignore")
def test_onnx_by_torchscript_gets_the_reference_unrolled(kind: str, tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = make(fused_rnn, kind, 5, 7)

        def forward(self, input: Tensor, reset: Tensor) -> Tensor:
            return self.rnn(input, reset=reset)[0]

    model, path = Model().eval(), str(tmp_path / "model.onnx")
    arguments = INPUT, torch.rand(4, 3) < 0.4
    torch.onnx.export(model, arguments, path, dynamo=False, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    arguments = torch.randn(4, 3, 5), torch.rand(4, 3) < 0.4
    names = [value.name for value in session.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, arguments, strict=True)}
    (found,) = session.run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(found), model(*arguments))


@each_kind
def test_symbolic_trace_keeps_the_layer_a_leaf(kind: str) -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(make(fused_rnn, kind, 5, 7)))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]


@each_kind
def test_without_the_library_the_numbers_are_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = precise(kind)
    layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True, dropout=0.4, dtype=dtype)
    input, hx = INPUT.to(dtype), state_for(layer, 3)

    def everything() -> Tensors:
        torch.manual_seed(2)  # of the dropout
        return run(layer, dict(layer.named_parameters()), input, hx, dtype)

    fused = everything()
    monkeypatch.setattr(ops, "available", False)
    torch.testing.assert_close(everything(), fused)


@each_cell
def test_cells_without_the_library(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = make_cell(kind, 5, 7)
    fused = flatten(cell(INPUT[0]))
    monkeypatch.setattr(ops, "available", False)
    torch.testing.assert_close(flatten(cell(INPUT[0])), fused)


@each_cell
def test_gradients_of_cells(kind: str) -> None:
    cell = make_cell(kind, 2, 4, dtype=torch.float64)
    names = [name for name, _ in cell.named_parameters()]
    states = flatten(state_for(make(fused_rnn, kind, 2, 4, dtype=torch.float64), 3))
    leaves = [torch.randn(3, 2, dtype=torch.float64), *(s[0] for s in states), *cell.parameters()]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        hx = leaves[1 : 1 + len(states)]
        weights = dict(zip(names, leaves[1 + len(states) :], strict=True))
        arguments = (leaves[0], hx if len(hx) > 1 else hx[0])
        return tuple(flatten(torch.func.functional_call(cell, weights, arguments)))

    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@each_cell
def test_cells_under_autocast(kind: str) -> None:
    cell = make_cell(kind, 5, 7)
    expected = flatten(cell(INPUT[0]))
    with torch.autocast("cpu", torch.bfloat16):
        found = flatten(cell(INPUT[0]))
    assert all(map(torch.equal, found, expected))  # in the dtype of the input, as torch's LSTMCell
    sum(t.float().sum() for t in found).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in cell.parameters())


def test_every_layer_and_cell_is_asked() -> None:
    """A layer that the package exports and no list here or in layers.py has is not tested."""
    asked = {name for name, _ in [*KINDS.values(), *BEYOND.values(), *CELLS.values()]}
    exported = {
        name
        for name in fused_rnn.__all__
        if isinstance(layer := getattr(fused_rnn, name), type)
        and issubclass(layer, nn.RNNBase | nn.RNNCellBase)
        and not name.startswith("Frozen")
        and not hasattr(nn, name)
    }
    assert exported <= asked

"""Compilers and exporters with every layer, control and cell; derivatives are right or refused."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as fwAD
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from layers import BEYOND, KINDS, flatten, make, map_tensors, oracle, state_for
from processes import output_of
from test_contract_every import CONTROLS, PLAIN_SUBJECTS, Subject, build, subject
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn

close = torch.testing.assert_close
LAYERS = (*KINDS, *BEYOND)
# One layer of each kind of control; test_contract_every.py has them all.
CONTROLLED = [
    ("LSTMP", "lengths"),
    ("GRU", "reset"),
    ("PEEPHOLE", "to initial"),
    ("LSTM", "states"),
    ("COUPLED", "recompute"),
    ("GRU_BEFORE", "recompute"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def question(s: Subject, T: int, B: int, control: str) -> tuple[Any, Any, dict[str, Any]]:
    """Input, hx and controls of these sizes."""
    dtype = s.input.dtype
    if control == "cell":
        input, states = torch.randn(B, 2, dtype=dtype), [torch.randn(B, 4, dtype=dtype)]
        states *= len(s.states)
        return input, tuple(states) if len(states) > 1 else states[0], {}
    controls: dict[str, Any] = dict(s.controls)
    if control == "lengths":
        controls["lengths"] = torch.randint(0, T + 1, (B,))
    if "reset" in controls:
        controls["reset"] = torch.rand(T, B) < 0.4
    return torch.randn(T, B, 2, dtype=dtype), state_for(s.module, B), controls


def train_step(call: Any, module: Any, input: Tensor, hx: Any, **controls: Any) -> list[Tensor]:
    module.zero_grad()
    input = input.clone().requires_grad_()
    outputs = flatten(call(input, hx, **controls))
    sum(output.square().sum() for output in outputs).backward()
    gradients = [input.grad, *(p.grad.clone() for p in module.parameters())]
    return [output.detach() for output in outputs] + gradients


# Cells share their forward; test_onnx.py exports every one of them.
SOME_CELLS = ("LSTMCell", "GRUCell", "LN", "INDRNN")
SUBJECTS = [s for s in PLAIN_SUBJECTS if s[1] != "cell" or s[0] in SOME_CELLS]


@pytest.mark.parametrize(("kind", "control"), [*SUBJECTS, *CONTROLLED])
def test_one_graph_for_all_sizes(kind: str, control: str) -> None:
    options = {"bidirectional": True} if control == "plain" else {}
    s = subject(kind, control, **options)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(s.module, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    # No size of the layer is among them: for the compiler equal sizes would be one.
    for T, B in ((6, 5), (7, 8)):
        input, hx, controls = question(s, T, B, control)
        close(
            train_step(compiled, s.module, input, hx, **controls),
            train_step(s.module, s.module, input, hx, **controls),
        )
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("kind", "control"), [("GRU", "plain"), ("LSTM", "lengths"), ("RNN", "recompute")]
)
def test_sizes_are_dynamic_after_a_second_one(kind: str, control: str) -> None:
    s = subject(kind, control)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(s.module, backend=counter, fullgraph=True)
    counts = []
    for T, B in ((3, 2), (5, 3), (4, 6)):
        input, hx, controls = question(s, T, B, control)
        train_step(compiled, s.module, input, hx, **controls)
        with torch.no_grad():
            expected = flatten(s.module(input, hx, **controls))
            close(flatten(compiled(input, hx, **controls)), expected)
        counts.append(counter.frame_count)
    assert counts[1] == counts[2]


def ops_in(graphs: list[Any]) -> list[list[str]]:
    return [
        [str(node.target) for node in g.nodes if "fused_rnn" in str(node.target)] for g in graphs
    ]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_layer_recomputes(dynamic: bool) -> None:
    """What backward needs is computed there; of symbolic sizes in one segment."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    backend = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
    )
    layer = fused_rnn.GRU(2, 4, recompute=True)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    input = torch.randn(1040, 1, 2)
    close(train_step(compiled, layer, input, None), train_step(layer, layer, input, None))
    segments = 1 if dynamic else 2
    there, back = ops_in(graphs)
    assert there == ["fused_rnn.inference.default"] * segments
    assert back == ["fused_rnn.forward.default", "fused_rnn.backward.default"] * segments


@pytest.mark.parametrize("sort", [True, False], ids=["any order", "sorted"])
def test_packed_input_needs_neither_states_nor_settings(sort: bool) -> None:
    assert not torch._dynamo.config.capture_dynamic_output_shape_ops
    layer = fused_rnn.LSTM(2, 4, bidirectional=True, dtype=torch.float64)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    counts = []
    for lengths in ((4, 3, 2), (5, 2), (6, 5, 4, 1), (3, 1)):
        lengths = lengths[::-1] if sort else lengths
        rows = [torch.randn(n, 2, dtype=torch.float64) for n in lengths]
        packed = pack_sequence(rows, enforce_sorted=not sort)
        results = []
        for call in (compiled, layer):
            layer.zero_grad()
            outputs = flatten(call(packed))
            sum(output.square().sum() for output in outputs).backward()
            results.append([*outputs, *(p.grad.clone() for p in layer.parameters())])
        close(*results)
        counts.append(counter.frame_count)
    assert counts[2] == counts[3]


# Derivatives of compiled code


def penalty(call: Any, layer: nn.Module, input: Tensor) -> list[Tensor]:
    """The gradient of a loss of the outputs and of their slope."""
    layer.zero_grad()
    input = input.clone().requires_grad_()
    output = call(input)[0]
    (slope,) = torch.autograd.grad(output.sum(), input, create_graph=True)
    (output.sum() + slope.square().sum()).backward()
    return [input.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("kind", LAYERS)
def test_double_backward_of_compiled_layers_by_eager(kind: str) -> None:
    layer = make(fused_rnn, kind, 2, 4, dtype=torch.float64)
    input = torch.randn(3, 2, 2, dtype=torch.float64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    close(penalty(compiled, layer, input), penalty(layer, layer, input))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("control", ["plain", "recompute"])
def test_double_backward_of_compiled_layers_is_refused(backend: str, control: str) -> None:
    layer = build("LSTM", control)
    input = torch.randn(3, 2, 2, dtype=torch.float64)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        penalty(compiled, layer, input)


TRANSFORMED: dict[str, Callable[[Any, Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x)[0].square().sum())(x),
    "vmap": lambda f, x: torch.vmap(lambda x: f(x)[0])(x),
    "jvp": lambda f, x: torch.func.jvp(lambda x: f(x)[0], (x,), (x.cos(),))[1],
}


@pytest.mark.parametrize(
    ("kind", "transform"), [("RNN", "grad"), ("GRU_BEFORE", "vmap"), ("INDRNN", "jvp")]
)
def test_transforms_inside_of_compiled_code(kind: str, transform: str) -> None:
    """Their results, and the gradients of these."""
    layer = make(fused_rnn, kind, 2, 4, dtype=torch.float64)
    input = torch.randn(3, 2, 2, dtype=torch.float64)

    def call(x: Tensor) -> Any:
        return TRANSFORMED[transform](layer, x)

    results = []
    for each in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        output = each(input)
        gradients = torch.autograd.grad(output.square().sum(), [*layer.parameters()])
        results.append([output, *gradients])
    close(*results)


@pytest.mark.parametrize("transform", TRANSFORMED)
@pytest.mark.parametrize("frozen", [False, True])
def test_transforms_of_compiled_layers_are_right_or_refused(transform: str, frozen: bool) -> None:
    layer = fused_rnn.GRU(2, 4)
    given = fused_rnn.freeze(layer) if frozen else layer
    compiled = torch.compile(given, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        TRANSFORMED[transform](compiled, torch.randn(3, 2, 2))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("called", [False, True], ids=["at first", "later"])
def test_forward_mode_of_compiled_layers_is_refused(called: bool, trained: bool) -> None:
    """Where nothing requires a gradient, the tangents would be lost in silence."""
    layer = fused_rnn.GRU(2, 4).requires_grad_(trained)
    input = torch.randn(3, 2, 2)
    for module, words in ((layer, "outside of torch.compile"), (fused_rnn.freeze(layer), "frozen")):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        if called:
            compiled(input)
        with fwAD.dual_level(), pytest.raises(torch._dynamo.exc.Unsupported, match=words):
            compiled(fwAD.make_dual(input, input))
        close(compiled(input)[0], layer(input)[0])


# Export


@pytest.mark.parametrize(
    ("kind", "control", "strict"),
    [
        ("INDRNN", "plain", True),
        ("LSTMP", "lengths", True),
        ("GRU", "reset", False),
        ("PEEPHOLE", "to initial", False),
        ("LSTM", "states", False),
        ("GRU_BEFORE", "recompute", True),
        ("COUPLED", "cell", False),
    ],
)
def test_an_exported_layer_trains(kind: str, control: str, strict: bool) -> None:
    s = subject(kind, control)
    input, hx, controls = question(s, 3, 2, control)
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    sizes: Any = {0: B} if control == "cell" else {0: T, 1: B}
    states = map_tensors(lambda state: {0 if control == "cell" else 1: B}, hx)
    shapes: dict[str, Any] = {"input": sizes, "hx": states}
    shapes |= {name: {} for name in controls}
    if "lengths" in controls:
        shapes["lengths"] = {0: B}
    if "reset" in controls:
        shapes["reset"] = {0: T, 1: B}
    shapes |= {name: None for name, value in controls.items() if isinstance(value, bool)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            s.module, (input, hx), controls, dynamic_shapes=shapes, strict=strict
        )
        (name,) = ops_in([program.graph])[0]
        file = io.BytesIO()
        torch.export.save(program, file)
    assert name == "fused_rnn.rnn.default"
    file.seek(0)
    loaded = torch.export.load(file)
    for T_, B_ in ((3, 2), (5, 4)):
        input, hx, controls = question(s, T_, B_, control)
        expected = train_step(s.module, s.module, input, hx, **controls)
        for exported in (program, loaded):
            module = exported.module()
            close(train_step(module, module, input, hx, **controls), expected)
        lowered = program.run_decompositions()
        assert "rnn.default" not in ops_in([lowered.graph])[0][0].split("fused_rnn.")[1]
        with torch.no_grad():
            outputs = flatten(s.module(input, hx, **controls))
            close(flatten(lowered.module()(input, hx, **controls)), outputs)


class Two(nn.Module):
    """A layer, one with lengths and a frozen one, in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = fused_rnn.PeepholeLSTM(3, 8, bidirectional=True)
        self.upper = fused_rnn.GRU(16, 8, reset_after=False)
        self.frozen = fused_rnn.freeze(fused_rnn.LSTM(8, 4))

    def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
        x = self.upper(self.lower(input)[0], lengths=lengths)[0]
        return self.frozen(x)[0]


LOAD = """
import torch, fused_rnn
model = torch._inductor.aoti_load_package("{path}/model.pt2")
input, lengths, expected = torch.load("{path}/question.pt")
torch.testing.assert_close(model(input, lengths), expected)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_package_of_aotinductor_runs_in_another_process(tmp_path: Path) -> None:
    model = Two().eval()
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    arguments = torch.randn(4, 3, 3), torch.tensor([2, 4, 0])
    shapes = ({0: T, 1: B}, {0: B})
    with torch.no_grad():
        program = torch.export.export(model, arguments, dynamic_shapes=shapes)
        path = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        arguments = torch.randn(7, 2, 3), torch.tensor([7, 1])
        torch.save((*arguments, model(*arguments)), tmp_path / "question.pt")
    output_of(LOAD.format(path=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "control"), [("PEEPHOLEP", "plain"), ("GRU", "to initial"), ("LSTM", "states")]
)
def test_opcheck_of_what_graphs_hold(kind: str, control: str) -> None:
    s = subject(kind, control)
    layer = s.module
    states = [*s.states, None][:2]
    weights = [p.detach().requires_grad_() for p in layer.parameters()]
    controls = fused_rnn.reference.Controls(
        reset=None if "reset" not in s.controls else s.controls["reset"].bool(),
        reset_to_initial=control == "to initial",
        all_c=control == "states",
    )
    call = layer._cell, s.input, None, *states, weights, 1, False, False
    torch.library.opcheck(torch.ops.fused_rnn.rnn.default, (*call, *controls))


# Shapes and sizes without data


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_flops_are_those_of_the_reference(
    kind: str, of_input: bool, options: dict[str, Any]
) -> None:
    layer = make(fused_rnn, kind, 3, 4, **options)
    input = torch.randn(5, 2, 3, requires_grad=of_input)
    hx = map_tensors(Tensor.requires_grad_, state_for(layer, 2))

    def count(call: Any) -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter:
            outputs = flatten(call(input, hx))
            forward = counter.get_total_flops()
            sum(output.sum() for output in outputs).backward()
        return forward, counter.get_total_flops() - forward

    expected = count(oracle(layer))
    assert count(layer) == expected
    frozen = fused_rnn.freeze(layer)
    controls: dict[str, Any]
    for controls in ({}, {"reset": torch.zeros(5, 2)}):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            frozen(input, hx, **controls)
            layer(input, hx, **controls)
        assert counter.get_total_flops() == 2 * expected[0]
    reset = CONTROLS["reset"]()["reset"].repeat(2, 1)[:5]
    assert count(lambda x, hx: layer(x, hx, reset=reset)) == expected

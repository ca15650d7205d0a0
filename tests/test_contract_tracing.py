"""Compilers, exporters and tracers see one node, a leaf, or a way back to torch.nn."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from layers import KINDS, flatten, make, state_for, twins
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn

each_kind = pytest.mark.parametrize("kind", KINDS)


class Model(nn.Module):
    """A layer inside a model, as users have it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn = layer
        self.head = nn.Linear(layer.proj_size or layer.hidden_size, 2)

    def forward(self, input: Tensor) -> Tensor:
        output, _ = self.rnn(input)
        return self.head(output)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def train_step(model: Any, layer: nn.Module, input: Tensor) -> list[Tensor]:
    layer.zero_grad()
    outputs = flatten(model(input))
    sum(output.square().sum() for output in outputs).backward()
    return [*(o.detach() for o in outputs), *(p.grad.clone() for p in layer.parameters())]


def test_compile_with_dropout_and_states() -> None:
    layer = fused_rnn.LSTM(5, 7, 2, dropout=0.5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    input, hx = torch.randn(4, 3, 5), state_for(layer, 3)
    assert not torch.equal(compiled(input, hx)[0], compiled(input, hx)[0])
    layer.eval()
    torch.testing.assert_close(compiled(input, hx), layer(input, hx))


@pytest.mark.slow
def test_compile_by_inductor() -> None:
    layer = fused_rnn.LSTM(5, 7, 2)
    compiled = torch.compile(Model(layer), fullgraph=True)
    input = torch.randn(4, 3, 5)
    torch.testing.assert_close(train_step(compiled, layer, input)[1:],
                               train_step(compiled._orig_mod, layer, input)[1:])  # fmt: skip


@each_kind
@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_time_and_batch(kind: str, strict: bool) -> None:
    model = Model(make(fused_rnn, kind, 5, 7, 2, bidirectional=False)).eval()
    weights = list(model.rnn._flat_weights)
    dynamic = ({0: torch.export.Dim("time"), 1: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model, (torch.randn(4, 3, 5),), dynamic_shapes=dynamic, strict=strict
        )
    assert not program.constants
    assert all(a is b for a, b in zip(model.rnn._flat_weights, weights, strict=True))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for shape in ((4, 3, 5), (7, 2, 5)):
        input = torch.randn(shape)
        for exported in (program, loaded, program.run_decompositions()):
            torch.testing.assert_close(exported.module()(input), model(input))


@each_kind
def test_symbolic_trace_keeps_the_layer_a_leaf(kind: str) -> None:
    model = Model(make(fused_rnn, kind, 5, 7))
    graph = torch.fx.symbolic_trace(model)
    assert "rnn" in [node.target for node in graph.graph.nodes if node.op == "call_module"]
    input = torch.randn(4, 3, 5)
    assert torch.equal(graph(input), model(input))


@each_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_of_a_model(kind: str) -> None:
    model = Model(make(fused_rnn, kind, 5, 7, 2, bidirectional=False, batch_first=True))
    scripted = torch.jit.script(model)
    input = torch.randn(3, 4, 5)
    torch.testing.assert_close(scripted(input), model(input))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(input), model(input))


class WithState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.LSTM(5, 7)

    def forward(self, input: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.rnn(input, (h, c))


class WithPacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.GRU(5, 7)

    def forward(self, input: PackedSequence) -> Tensor:
        output, _ = self.rnn(input)
        return output.data


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_with_states_and_packed_sequences() -> None:
    model, input = WithState(), torch.randn(4, 3, 5)
    h, c = state_for(model.rnn, 3)
    torch.testing.assert_close(torch.jit.script(model)(input, h, c), model(input, h, c))
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    other = WithPacked()
    torch.testing.assert_close(torch.jit.script(other)(packed), other(packed))


@each_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_trace_generalises_over_time_and_batch(kind: str) -> None:
    model = Model(make(fused_rnn, kind, 5, 7, 2)).eval()
    traced = torch.jit.trace(model, torch.randn(4, 3, 5))
    for shape in ((4, 3, 5), (7, 2, 5)):
        input = torch.randn(shape)
        torch.testing.assert_close(traced(input), model(input))


@each_kind
@pytest.mark.filterwarnings("ignore")
def test_onnx_by_torchscript(kind: str, tmp_path: Any) -> None:
    """The old exporter, which sees torch's operators. The other: tests/test_onnx.py."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    if kind == "LSTMP":
        pytest.skip("torch.onnx has no projections")
    model = Model(make(fused_rnn, kind, 5, 7, 2)).eval()
    input, path = torch.randn(4, 3, 5), str(tmp_path / "model.onnx")
    torch.onnx.export(model, (input,), path, dynamo=False, verbose=False)
    nodes = onnx.load(path).graph.node
    assert model.rnn.mode.partition("_")[0] in {node.op_type for node in nodes}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: input.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(input), rtol=1e-4, atol=1e-5)


@each_kind
def test_make_fx_and_functionalize(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    input = torch.randn(4, 3, 5)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: layer(x)[0])(input)
    assert torch.equal(graph(input), layer(input)[0])
    functional = torch.func.functionalize(lambda x: layer(x)[0])
    torch.testing.assert_close(functional(input), layer(input)[0])


@each_kind
def test_fake_tensors(kind: str) -> None:
    with torch._subclasses.FakeTensorMode():
        layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True, batch_first=True)
        output = layer(torch.randn(3, 4, 5))[0]
    assert output.shape == (3, 4, 2 * (layer.proj_size or 7))
    assert output.is_contiguous()


@each_kind
def test_modes_and_the_profiler_see_the_call(kind: str) -> None:
    ours, theirs = twins(kind, 5, 7)
    input = torch.randn(4, 3, 5)
    expected = ours(input)[0]

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.calls += 1
            return function(*args, **(kwargs or {}))

    with Counting() as mode:
        assert torch.equal(ours(input)[0], expected)
    assert mode.calls >= 1
    with torch.profiler.profile() as profile:
        ours(input)
    assert any("fused_rnn" in event.key for event in profile.key_averages())
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert torch.equal(ours(input)[0], expected)
    assert len(list(theirs.parameters())) == len(list(ours.parameters()))

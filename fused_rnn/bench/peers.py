"""Libraries that run a layer from an ONNX graph, in inference, float32.

Each is given what is natural to it: arrays that stay where they are, padded sequences with their
lengths (`sequence_lens`) where fused_rnn gets a PackedSequence, and a dense array where it gets a
view. A cell is a layer of one step.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import fused_rnn
from fused_rnn.bench import work
from fused_rnn.bench.shapes import Shape
from fused_rnn.bench.sides import Build
from fused_rnn.bench.work import Timer

# The rows of ONNX's gates, from torch's: i f g o -> i o f c(g); r z n -> z r h(n).
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def ours(shape: Shape, mode: str, dtype: str, threads: int) -> tuple[Timer, list[Tensor]]:
    """fused_rnn in a process of its own, whose torch has `threads` threads already."""
    layer, arguments = work.make(fused_rnn, shape, mode, dtype)
    results = work.evaluate(layer, arguments)
    return work.timer(layer, arguments), results


@dataclass
class _Call:
    run: Callable[[], object]
    arrays: Iterable[object]  # seen by the library, which need not keep them alive (OpenVINO)

    def __call__(self) -> float:
        run = self.run
        start = perf_counter()
        run()
        return perf_counter() - start


def onnxruntime(shape: Shape, threads: int) -> tuple[Timer, list[Tensor]]:
    """ONNX Runtime, its arrays bound beforehand: run() with a dict would copy the outputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    model, inputs, outputs = _case(shape)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {
        name: ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
        for name, tensor in (inputs | outputs).items()
    }
    for name in inputs:
        binding.bind_ortvalue_input(name, values[name])
    for name in outputs:
        binding.bind_ortvalue_output(name, values[name])
    call = _Call(partial(session.run_with_iobinding, binding), values.values())
    call()
    return call, _as_ours(shape, list(outputs.values()))


def openvino(shape: Shape, threads: int) -> tuple[Timer, list[Tensor]]:
    """OpenVINO's CPU plugin, its arrays shared with it beforehand."""
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model, inputs, outputs = _case(shape)
    core = ov.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    request = compiled.create_infer_request()
    arrays = {name: tensor.numpy() for name, tensor in (inputs | outputs).items()}
    for name, array in arrays.items():
        request.set_tensor(name, ov.Tensor(array, shared_memory=True))
    call = _Call(partial(request.infer, share_outputs=True), arrays.values())
    call()
    return call, _as_ours(shape, list(outputs.values()))


BUILDERS: dict[str, Build] = {"onnxruntime": onnxruntime, "openvino": openvino}


def missing(peer: str) -> list[str]:
    """The packages that this peer needs and that are not installed."""
    needed = ("onnx", peer) if peer in BUILDERS else ()
    return [name for name in needed if importlib.util.find_spec(name) is None]


def version(peer: str) -> str:
    return str(importlib.import_module(peer).__version__)


def _case(shape: Shape) -> tuple[bytes, dict[str, Tensor], dict[str, Tensor]]:
    """The ONNX model of a shape, its inputs, and room for its outputs."""
    layer, arguments = work.make(nn, shape, "inference", "float32")
    x = arguments.leaf
    if isinstance(arguments.input, PackedSequence):
        x, _ = pad_packed_sequence(arguments.input, shape.batch_first)
    elif shape.cell.endswith("Cell"):
        x = x[None]
    inputs = {"x": x.contiguous()}
    if shape.packed:
        inputs["lengths"] = torch.tensor(shape.lengths, dtype=torch.int32)
    states = ("h", "c") if shape.family == "LSTM" else ("h",)
    if shape.state:
        hx = arguments.hx if isinstance(arguments.hx, tuple) else (arguments.hx,)
        directions = (shape.L * shape.D, shape.B, shape.H)
        inputs |= {f"{s}0": value.reshape(directions) for s, value in zip(states, hx, strict=True)}

    outputs = {"y": torch.empty(*x.shape[:2], shape.D * shape.H)}
    outputs |= {f"{s}_n": torch.empty(shape.L * shape.D, shape.B, shape.H) for s in states}
    return _graph(shape, list(layer.parameters()), inputs, outputs, states), inputs, outputs


def _graph(
    shape: Shape,
    weights: Sequence[Tensor],
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
    states: Sequence[str],
) -> bytes:
    """A node per layer. Names of values: x and y of layer k are `x{k}` and `y{k}`."""
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []

    def add(kind: str, sources: Sequence[str], targets: Sequence[str], **options: Any) -> None:
        nodes.append(helper.make_node(kind, sources, targets, **options))

    def constant(name: str, value: Tensor) -> str:
        constants.append(numpy_helper.from_array(value.detach().numpy(), name))
        return name

    def in_order(rows: Tensor) -> Tensor:
        gates = torch.split(rows, shape.H)
        return torch.cat([gates[gate] for gate in GATES[shape.family]])

    options: dict[str, Any] = {"hidden_size": shape.H}
    options["direction"] = "bidirectional" if shape.D == 2 else "forward"
    if shape.family == "GRU":
        options["linear_before_reset"] = 1
    x = "x"
    if shape.batch_first:
        add("Transpose", [x], ["x0"], perm=(1, 0, 2))
        x = "x0"
    if shape.state and shape.L > 1:
        each = constant("directions", torch.tensor([shape.D] * shape.L))
        for state in states:
            add("Split", [f"{state}0", each], [f"{state}0_{k}" for k in range(shape.L)])
    of_layer = "" if shape.L == 1 else "_{}"  # one layer's states are the graph's own
    for k in range(shape.L):
        # torch's flat order: weight_ih, weight_hh, bias_ih, bias_hh for each direction
        parts = [weights[4 * d : 4 * d + 4] for d in range(k * shape.D, (k + 1) * shape.D)]
        w_ih, w_hh, b_ih, b_hh = (
            [in_order(tensor) for tensor in group] for group in zip(*parts, strict=True)
        )
        bias = [torch.cat(pair) for pair in zip(b_ih, b_hh, strict=True)]
        sources = [
            x,
            constant(f"W{k}", torch.stack(w_ih)),
            constant(f"R{k}", torch.stack(w_hh)),
            constant(f"B{k}", torch.stack(bias)),
            "lengths" if shape.packed else "",
            *(f"{state}0{of_layer.format(k)}" for state in states if shape.state),
        ]
        targets = [f"Y{k}", *(f"{state}_n{of_layer.format(k)}" for state in states)]
        add(shape.family, sources, targets, **options)
        # Y is [T, D, B, H]: the directions go beside each other, [T, B, D*H] or [B, T, D*H].
        last = k == shape.L - 1
        swap = shape.batch_first and last
        x = "y" if last else f"x{k + 1}"
        if shape.D == 1 and not swap:
            add("Squeeze", [f"Y{k}", constant(f"direction{k}", torch.tensor([1]))], [x])
        else:
            add("Transpose", [f"Y{k}"], [f"Z{k}"], perm=(2, 0, 1, 3) if swap else (0, 2, 1, 3))
            add("Reshape", [f"Z{k}", constant(f"beside{k}", torch.tensor([0, 0, -1]))], [x])
    for state in states if shape.L > 1 else ():
        add("Concat", [f"{state}_n_{k}" for k in range(shape.L)], [f"{state}_n"], axis=0)

    def declared(tensors: dict[str, Tensor]) -> list[Any]:
        return [
            helper.make_tensor_value_info(
                name, TensorProto.INT32 if name == "lengths" else TensorProto.FLOAT, tensor.shape
            )
            for name, tensor in tensors.items()
        ]

    graph = helper.make_graph(nodes, "layer", declared(inputs), declared(outputs), constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def _as_ours(shape: Shape, found: list[Tensor]) -> list[Tensor]:
    """Results in the form that `work.evaluate` gives them: packed rows, or a cell's states."""
    if shape.packed:
        found[0] = work.pack(found[0], shape).data
    return [state[0] for state in found[1:]] if shape.cell.endswith("Cell") else found

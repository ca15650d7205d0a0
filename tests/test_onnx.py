"""`torch.onnx.export`: which nodes it makes of the layers, and what ONNX Runtime computes by them.

An export takes seconds whatever is in it, so one model has every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import BEYOND, KINDS, flatten, make
from test_beyond_torch import CELLS as CELLS_BEYOND
from test_beyond_torch import make_cell
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fused_rnn

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")

I, H = 5, 7
TIME, BATCH = torch.export.Dim("time"), torch.export.Dim("batch")
EVERY = {**KINDS, **BEYOND}
# The node of each kind and its attributes; Scan for the others.
NODES: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {"linear_before_reset": 1}),
    "RNN": ("RNN", {}),
    "RNN_RELU": ("RNN", {"activations": ["Relu"]}),
    "PEEPHOLE": ("LSTM", {}),
    "COUPLED": ("LSTM", {"input_forget": 1}),
    "GRU_BEFORE": ("GRU", {"linear_before_reset": 0}),
}


class Layers(nn.Module):
    """Each kind once over the same input; states [rows, B, H] are cut to what a kind takes."""

    def __init__(self, kinds: Any, call: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {kind: make(fused_rnn, kind, I, H, **options) for kind in kinds}
        )
        self.call = call

    def forward(self, *arguments: Tensor) -> list[Tensor]:
        return [t for layer in self.layers.values() for t in flatten(self.call(layer, *arguments))]


def hx_for(layer: nn.RNNBase, h: Tensor, c: Tensor) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h, c = h[:rows, :, : layer.proj_size or H], c[:rows]
    return (h, c) if layer.mode == "LSTM" else h


class Exported:
    """A model in ONNX, and its sessions."""

    def __init__(self, model: nn.Module, arguments: tuple[Tensor, ...], path: Path, **how: Any):
        self.model = model.eval()
        self.program = torch.onnx.export(
            how.pop("program", model), arguments, dynamo=True, verbose=False, **how
        )
        self.program.save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def nodes(self) -> Iterator[Any]:
        return (n for n in self.program.model.graph if n.op_type in ("LSTM", "GRU", "RNN", "Scan"))

    def check(self, *arguments: Tensor) -> None:
        """What ONNX Runtime says is what the layers say."""
        feeds = dict(zip([i.name for i in self.session.get_inputs()], arguments, strict=True))
        found = self.session.run(None, {name: t.numpy() for name, t in feeds.items()})
        with torch.no_grad():
            expected = flatten(self.model(*arguments))
        torch.testing.assert_close([torch.from_numpy(f) for f in found], expected)


@pytest.mark.parametrize("directions", [1, 2])
def test_every_layer_is_a_node_with_dynamic_time_and_batch(directions: int, tmp_path: Path) -> None:
    options = {"bidirectional": directions == 2, "batch_first": True, "bias": directions == 2}
    model = Layers(EVERY, lambda layer, x: layer(x), **options)
    exported = Exported(
        model,
        (torch.randn(3, 4, I),),
        tmp_path / "layers.onnx",
        dynamic_shapes={"arguments": ({0: BATCH, 1: TIME},)},
        opset_version=18 if directions == 1 else None,
    )
    scans = directions * len(EVERY.keys() - NODES.keys())
    nodes = [node for node in exported.nodes() if node.op_type != "Scan"]
    assert len(list(exported.nodes())) == len(nodes) + scans
    for kind, node in zip([kind for kind in EVERY if kind in NODES], nodes, strict=True):
        name, attributes = NODES[kind]
        assert node.op_type == name
        for key, value in attributes.items():
            repeated = value * directions if isinstance(value, list) else value
            assert node.attributes[key].value == repeated
        assert node.attributes["hidden_size"].value == H
        weights = [w for w in node.inputs[1:4] if w is not None]
        assert len(weights) == (3 if model.layers[kind].bias else 2)
        assert all(w.const_value is not None for w in weights), "weights are constants of the model"
        assert (len(node.inputs) > 7) == (kind == "PEEPHOLE")
    for B, T in ((3, 4), (2, 9), (1, 1)):
        exported.check(torch.randn(B, T, I))


def test_states_and_lengths(tmp_path: Path) -> None:
    """Two layers and directions. A sequence without steps keeps its states."""
    exported = Exported(
        Layers(
            EVERY,
            lambda layer, x, lengths, h, c: layer(x, hx_for(layer, h, c), lengths=lengths),
            num_layers=2,
            bidirectional=True,
        ),
        (torch.randn(4, 3, I), torch.tensor([2, 4, 0]), torch.randn(4, 3, H), torch.randn(4, 3, H)),
        tmp_path / "lengths.onnx",
        dynamic_shapes={"arguments": ({0: TIME, 1: BATCH}, {0: BATCH}, {1: BATCH}, {1: BATCH})},
    )
    for T, lengths in ((4, [2, 4, 0]), (9, [0, 5])):
        states = (torch.randn(4, len(lengths), H) for _ in range(2))
        exported.check(torch.randn(T, len(lengths), I), torch.tensor(lengths), *states)


def test_what_no_node_has_is_a_scan(tmp_path: Path) -> None:
    """Resets with and without lengths, to zero and to the states; zoneout; states of all steps."""

    def call(layer: nn.RNNBase, x: Tensor, reset: Tensor, lengths: Tensor, h: Tensor) -> Any:
        hx = hx_for(layer, h, 2 * h)
        return (
            layer(x, hx, reset=reset, lengths=lengths),
            layer(x, hx, reset=reset, reset_to_initial=True),
            layer(x, return_all_states=True),
        )

    model = Layers(["LSTM", "GRU_BEFORE"], call, bidirectional=True, zoneout=(0.1, 0.3))
    exported = Exported(
        model,
        (
            torch.randn(4, 3, I),
            torch.rand(4, 3) < 0.4,
            torch.tensor([2, 4, 0]),
            torch.randn(2, 3, H),
        ),
        tmp_path / "scan.onnx",
        dynamic_shapes={
            "arguments": ({0: TIME, 1: BATCH}, {0: TIME, 1: BATCH}, {0: BATCH}, {1: BATCH})
        },
    )
    assert {node.op_type for node in exported.nodes()} == {"Scan"}
    for T, lengths in ((4, [2, 4, 0]), (9, [5, 8])):
        B = len(lengths)
        exported.check(
            torch.randn(T, B, I),
            torch.rand(T, B) < 0.4,
            torch.tensor(lengths),
            torch.randn(2, B, H),
        )


class Cells(nn.Module):
    """Every cell, two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(getattr(fused_rnn, name)(I, H) for name in CELLS)
        self.cells.extend(make_cell(kind, I, H) for kind in CELLS_BEYOND)

    def forward(self, input: Tensor) -> list[Tensor]:
        return [t for cell in self.cells for t in flatten(cell(input, cell(input)))]


CELLS = ("LSTMCell", "GRUCell", "RNNCell")


def test_cells(tmp_path: Path) -> None:
    exported = Exported(
        Cells(),
        (torch.randn(3, I),),
        tmp_path / "cells.onnx",
        dynamic_shapes=({0: BATCH},),
    )
    exported.check(torch.randn(3, I))
    exported.check(torch.randn(1, I))


def test_a_program_of_torch_export(tmp_path: Path) -> None:
    """It holds our ops, of layers, controlled layers and cells, until they are decomposed."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fused_rnn.LSTM(I, H, 2)
            self.cell = fused_rnn.PeepholeLSTMCell(I, H)

        def forward(self, x: Tensor, lengths: Tensor) -> list[Tensor]:
            results = self.lstm(x), self.lstm(x, lengths=lengths, return_all_states=True)
            return flatten((*results, self.cell(x[0])))

    model = Model().eval()
    arguments = torch.randn(4, 3, I), torch.tensor([2, 4, 0])
    dynamic = {0: TIME, 1: BATCH}, {0: BATCH}
    program = torch.export.export(model, arguments, dynamic_shapes=dynamic)
    program = program.run_decompositions(fused_rnn.onnx.decompositions())
    exported = Exported(model, (), tmp_path / "program.onnx", program=program)
    assert [n.op_type for n in exported.nodes()].count("LSTM") == 2
    exported.check(*arguments)
    exported.check(torch.randn(9, 2, I), torch.tensor([8, 3]))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "ONNX has no packed sequences: give the layer a padded batch and `lengths=`": (
        lambda: fused_rnn.GRU(I, H),
        lambda: pack_sequence([torch.randn(3, I), torch.randn(2, I)]),
    ),
    "ONNX has no zoneout and no recurrent_dropout in training: call model.eval()": (
        lambda: fused_rnn.LSTM(I, H, zoneout=0.1),
        lambda: torch.randn(4, 3, I),
    ),
    "ONNX has no frozen layers: export the model that the frozen one was made from": (
        lambda: fused_rnn.freeze(fused_rnn.RNN(I, H)),
        lambda: torch.randn(4, 3, I),
    ),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("words", REFUSED)
def test_what_onnx_cannot_say_is_refused(
    words: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both ways in which the exporter tries to record a model."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    model, input = REFUSED[words]
    with torch.no_grad(), pytest.raises(Exception, match=words) as raised:
        torch.export.export(model(), (input(),), strict=strict)
    assert strict or raised.type is RuntimeError


def test_the_sentence_reaches_the_user() -> None:
    model = fused_rnn.IndRNN(I, H, recurrent_dropout=0.1)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="recurrent_dropout is for cells"):
        torch.onnx.export(model, (torch.randn(4, 3, I),), dynamo=True, verbose=False)

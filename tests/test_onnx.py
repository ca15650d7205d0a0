"""`torch.onnx.export`: which nodes it makes of the layers, and what ONNX Runtime computes by them.

An export takes seconds whatever is in it, so a model here has many layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import BEYOND, CELLS, flatten, make
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
# The node of each kind and its attributes; of the others, a Scan per direction.
NODES: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {"linear_before_reset": 1}),
    "RNN": ("RNN", {}),
    "RNN_RELU": ("RNN", {"activations": ("Relu", "Relu")}),
    "PEEPHOLE": ("LSTM", {}),
    "COUPLED": ("LSTM", {"input_forget": 1}),
    "GRU_BEFORE": ("GRU", {"linear_before_reset": 0}),
}
# Two more Scans, in the second model only, to save time.
IN_RAGGED = ("PEEPHOLEP", "INDRNN_TANH")


def hx_for(layer: nn.RNNBase, h: Tensor, c: Tensor) -> Any:
    """States [rows, B, H], cut to what `layer` takes."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h, c = h[:rows, :, : layer.proj_size or H], c[:rows]
    return (h, c) if layer.mode == "LSTM" else h


class Exported:
    """A model in ONNX, and a session of it."""

    def __init__(self, model: nn.Module, program: torch.onnx.ONNXProgram, path: Path) -> None:
        self.model, self.program = model, program
        self.program.save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def nodes(self) -> list[Any]:
        return [n for n in self.program.model.graph if n.op_type in ("LSTM", "GRU", "RNN", "Scan")]

    def check(self, *arguments: Tensor) -> None:
        """What ONNX Runtime says is what the model says."""
        feeds = dict(zip([i.name for i in self.session.get_inputs()], arguments, strict=True))
        found = self.session.run(None, {name: t.numpy() for name, t in feeds.items()})
        with torch.no_grad():
            expected = flatten(self.model(*arguments))
        torch.testing.assert_close([torch.from_numpy(f) for f in found], expected)


def export(model: nn.Module, arguments: tuple[Tensor, ...], **how: Any) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(model, arguments, dynamo=True, verbose=False, **how)
    assert program is not None
    return program


class Everything(nn.Module):
    """Each layer, each cell: one of everything over the same input [B, T, I].

    Two directions are two Scans, and how they come together is the same for all: one has them.
    """

    def __init__(self) -> None:
        super().__init__()
        kinds = [*NODES, "LSTMP", *(k for k in BEYOND if k not in (*NODES, *IN_RAGGED))]
        both_ways = (*NODES, "LSTMP")
        self.layers = nn.ModuleDict(
            {
                kind: make(fused_rnn, kind, I, H, batch_first=True, bidirectional=kind in both_ways)
                for kind in kinds
            }
        )
        self.cells = nn.ModuleList(getattr(fused_rnn, name)(I, H) for name in CELLS)
        self.cells.extend(make_cell(kind, I, H) for kind in CELLS_BEYOND)

    def forward(self, input: Tensor) -> list[Tensor]:
        step = input[:, 0]
        by_layers = [layer(input) for layer in self.layers.values()]
        return flatten((*by_layers, *(cell(step) for cell in self.cells)))


def test_every_layer_is_a_node_with_dynamic_time_and_batch(tmp_path: Path) -> None:
    model = Everything().eval()
    dynamic = ({0: BATCH, 1: TIME},)
    program = export(model, (torch.randn(3, 4, I),), dynamic_shapes=dynamic)
    exported = Exported(model, program, tmp_path / "everything.onnx")
    nodes, scans = exported.nodes()[: len(NODES)], exported.nodes()[len(NODES) :]
    for (kind, (name, attributes)), node in zip(NODES.items(), nodes, strict=True):
        assert node.op_type == name
        assert node.attributes["hidden_size"].value == H
        assert node.attributes["direction"].value == "bidirectional"
        for key, value in attributes.items():
            assert node.attributes[key].value == value, (kind, key)
        weights = [*node.inputs[1:4], *node.inputs[7:]]
        assert len(weights) == (4 if kind == "PEEPHOLE" else 3)
        assert all(w.const_value is not None for w in weights), "weights are constants of the model"
    assert [node.op_type for node in scans] == ["Scan"] * (1 + len(model.layers.keys() - NODES))
    for B, T in ((3, 4), (2, 9), (1, 1)):
        exported.check(torch.randn(B, T, I))


class Ragged(nn.Module):
    """Every layer with states and lengths, in stacks."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [*NODES, *IN_RAGGED]
        self.layers = nn.ModuleList(
            make(fused_rnn, kind, I, H, 1 + (kind in NODES), bias=False) for kind in kinds
        )

    def forward(self, x: Tensor, lengths: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
        return flatten([m(x, hx_for(m, h, c), lengths=lengths) for m in self.layers])


def test_states_and_lengths(tmp_path: Path) -> None:
    """A sequence without steps keeps its states."""
    model = Ragged().eval()

    def question(T: int, *lengths: int) -> tuple[Tensor, ...]:
        h, c = (torch.randn(2, len(lengths), H) for _ in range(2))
        return torch.randn(T, len(lengths), I), torch.tensor(lengths), h, c

    dynamic = {0: TIME, 1: BATCH}, {0: BATCH}, {1: BATCH}, {1: BATCH}
    program = export(model, question(4, 2, 4, 0), dynamic_shapes=dynamic, opset_version=18)
    exported = Exported(model, program, tmp_path / "ragged.onnx")
    assert len([node for node in exported.nodes() if node.op_type != "Scan"]) == 2 * len(NODES)
    exported.check(*question(4, 2, 4, 0))
    exported.check(*question(9, 0, 5))


class Controlled(nn.Module):
    """What no node has: resets, zoneout, c of every step."""

    def __init__(self) -> None:
        super().__init__()
        options = {"bidirectional": True, "zoneout": (0.1, 0.3)}
        self.lstm = make(fused_rnn, "LSTM", I, H, **options)
        self.gru = make(fused_rnn, "GRU_BEFORE", I, H, **options)
        self.cell = fused_rnn.PeepholeLSTMCell(I, H)

    def forward(self, x: Tensor, reset: Tensor, lengths: Tensor, h: Tensor) -> list[Tensor]:
        return flatten(
            (
                self.lstm(x, (h, 2 * h), reset=reset, lengths=lengths, return_all_states=True),
                self.gru(x, h, reset=reset, reset_to_initial=True),
                self.cell(x[0]),
            )
        )


def test_a_program_of_torch_export_and_what_no_node_has(tmp_path: Path) -> None:
    """The program holds our ops until they are decomposed."""
    model = Controlled().eval()

    def question(T: int, *lengths: int) -> tuple[Tensor, ...]:
        B = len(lengths)
        h = torch.randn(2, B, H)
        return torch.randn(T, B, I), torch.rand(T, B) < 0.4, torch.tensor(lengths), h

    dynamic = {0: TIME, 1: BATCH}, {0: TIME, 1: BATCH}, {0: BATCH}, {1: BATCH}
    program = torch.export.export(model, question(4, 2, 4, 0), dynamic_shapes=dynamic)
    assert sum("fused_rnn" in str(node.target) for node in program.graph.nodes) == 3
    program = program.run_decompositions(fused_rnn.onnx.decompositions())
    exported = Exported(model, export(program, ()), tmp_path / "controlled.onnx")
    assert [node.op_type for node in exported.nodes()] == ["Scan"] * 4
    exported.check(*question(4, 2, 4, 0))
    exported.check(*question(9, 5, 8))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "ONNX has no packed sequences: give the layer a padded batch and `lengths=`": (
        lambda: fused_rnn.GRU(I, H),
        lambda: pack_sequence([torch.randn(3, I), torch.randn(2, I)]),
    ),
    "ONNX has no zoneout, recurrent_dropout and candidate_dropout in training: call model.eval()": (
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
    with pytest.raises(
        torch.onnx.errors.OnnxExporterError, match="recurrent_dropout hides units of h"
    ):
        torch.onnx.export(model, (torch.randn(4, 3, I),), dynamo=True, verbose=False)

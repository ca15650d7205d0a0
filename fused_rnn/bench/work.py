"""The work that is measured: one call of a layer, made from a shape, the same in every process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn.bench.shapes import Shape

LIBRARIES: dict[str, Any] = {"fused_rnn": fused_rnn, "torch.nn": nn}
MODES = ("inference", "training")
FROZEN = "frozen"  # inference by what fused_rnn.freeze() makes of the layer
DTYPES = ("float32", "float64", "bfloat16", "float16")

# Makes one call and returns the seconds it took.
Timer = Callable[[], float]


@dataclass
class Arguments:
    input: Tensor | PackedSequence
    leaf: Tensor  # the input's numbers, where their gradient arrives
    hx: Any
    d_output: Tensor
    controls: dict[str, Any] = field(default_factory=dict)  # keywords that torch.nn does not have

    def widened(self) -> Arguments:
        """The same in float32."""
        leaf = self.leaf.detach().float().requires_grad_(self.leaf.requires_grad)
        input, hx = self.input, self.hx
        if isinstance(hx, tuple):
            hx = tuple(state.float() for state in hx)
        elif hx is not None:
            hx = hx.float()
        return Arguments(
            input._replace(data=leaf) if isinstance(input, PackedSequence) else leaf,
            *(leaf, hx, self.d_output.float(), self.controls),
        )


def make(
    library: Any, shape: Shape, mode: str, dtype: str, device: str = "cpu"
) -> tuple[nn.Module, Arguments]:
    """The layer of `library` and its arguments: equal numbers for every library, in every process.

    The layer is in eval(), because two libraries need not draw the same dropout mask; on a GPU,
    where cuDNN has no backward in eval() and no shape has dropout, in train() for training.
    """
    layer, arguments = _make(library, shape, mode, dtype, device)
    return _finished(layer, library, mode, device), arguments


def make_widened(
    library: Any, shape: Shape, mode: str, dtype: str, device: str = "cpu"
) -> tuple[nn.Module, Arguments]:
    """The same numbers, those of `dtype`, in float32."""
    layer, arguments = _make(library, shape, mode, dtype, device)
    return _finished(layer.float(), library, mode, device), arguments.widened()


def _make(
    library: Any, shape: Shape, mode: str, dtype: str, device: str
) -> tuple[nn.Module, Arguments]:
    torch.manual_seed(0)
    made = _layer(nn, shape, dtype)
    layer = made if library is nn else _layer(library, shape, dtype)
    layer.load_state_dict(made.state_dict())
    torch.manual_seed(1)  # whatever another library's constructor drew
    return layer, _arguments(shape, getattr(torch, dtype), mode == "training", device)


def _finished(layer: nn.Module, library: Any, mode: str, device: str) -> nn.Module:
    frozen = mode == FROZEN and library is not nn
    made = (fused_rnn.freeze(layer) if frozen else layer).to(device)
    return made.train(mode == "training" and device != "cpu")


def _layer(library: Any, shape: Shape, dtype: str) -> nn.Module:
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if not shape.cell.endswith("Cell"):
        options |= {
            "num_layers": shape.L,
            "bidirectional": shape.D == 2,
            "batch_first": shape.batch_first,
            "dropout": shape.dropout,
        }
    layer: nn.Module = getattr(library, shape.cell)(shape.I, shape.H, **options)
    return layer


def _arguments(shape: Shape, dtype: torch.dtype, training: bool, device: str = "cpu") -> Arguments:
    cell = shape.cell.endswith("Cell")
    T, B = shape.T, shape.B
    sizes = [B] if cell else [B, T] if shape.batch_first else [T, B]
    x = torch.randn(*sizes, shape.I, dtype=dtype)
    if shape.strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    d_output = torch.randn(*sizes, shape.D * shape.H, dtype=dtype)

    packed = None
    if shape.packed:
        packed = pack(x.to(device), shape)
        x = packed.data
        d_output = d_output.flatten(0, 1)[: len(x)]
    x, d_output = x.to(device), d_output.to(device)
    leaf = x.detach().requires_grad_(training)

    hx: Any = None
    if shape.state:
        state = [B, shape.H] if cell else [shape.L * shape.D, B, shape.H]
        hx = torch.randn(*state, dtype=dtype).to(device)
        if shape.family == "LSTM":
            hx = (hx, torch.randn(*state, dtype=dtype).to(device))
    return Arguments(leaf if packed is None else packed._replace(data=leaf), leaf, hx, d_output)


def pack(padded: Tensor, shape: Shape) -> PackedSequence:
    lengths = torch.tensor(shape.lengths)
    return pack_padded_sequence(padded, lengths, shape.batch_first, enforce_sorted=False)


def _output(result: Any) -> Tensor:
    """The first tensor of what a layer returned: y of (y, h), (y, (h, c)), (h, c), h or packed."""
    while isinstance(result, tuple):
        result = result[0]
    assert isinstance(result, Tensor)
    return result


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, tuple):
        return [tensor for part in result for tensor in _tensors(part)]
    return [result]


def evaluate(module: nn.Module, arguments: Arguments) -> list[Tensor]:
    """Everything the module computes: outputs and states, and in training every gradient."""
    training = arguments.leaf.requires_grad
    with torch.set_grad_enabled(training):
        result = module(arguments.input, arguments.hx, **arguments.controls)
    values = [tensor.detach() for tensor in _tensors(result)]
    if training:
        torch.autograd.backward(_output(result), arguments.d_output)
        for leaf in (arguments.leaf, *module.parameters()):
            assert leaf.grad is not None
            values.append(leaf.grad)
            leaf.grad = None
    return values


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def seconds_on_gpu(call: Callable[[], object]) -> float:
    """By events on an idle GPU, so that a launch that the host brings late counts as well."""
    event: Any = torch.cuda.Event  # without types
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))


def timer(module: nn.Module, arguments: Arguments) -> Timer:
    """Inference is a call under no_grad; training, in train(), a forward and a backward call."""
    leaves = [arguments.leaf, *module.parameters()]
    x, hx, d_output = arguments.input, arguments.hx, arguments.d_output
    controls = arguments.controls

    clock = seconds_on_gpu if arguments.leaf.is_cuda else _seconds

    @torch.no_grad()
    def inference() -> float:
        return clock(lambda: module(x, hx, **controls))

    def training() -> float:
        for leaf in leaves:
            leaf.grad = None
        return clock(lambda: torch.autograd.backward(_output(module(x, hx, **controls)), d_output))

    module.train(arguments.leaf.requires_grad)
    return training if arguments.leaf.requires_grad else inference

"""Layers and their torch.nn twins: made, run, compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from judge import Tensors, judge_draws
from scans import Arguments, by_reference, name_outputs, one_sided, seeds_like
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn.reference import Controls

CELL_OF_MODE = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}
# The layers of torch.nn by a short name: class and the arguments that make the difference.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTMP": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {}),
    "RNN": ("RNN", {}),
    "RNN_RELU": ("RNN", {"nonlinearity": "relu"}),
}
# The layers that torch.nn does not have.
BEYOND: dict[str, tuple[str, dict[str, Any]]] = {
    "PEEPHOLE": ("PeepholeLSTM", {}),
    "PEEPHOLEP": ("PeepholeLSTM", {"proj_size": 3}),
    "COUPLED": ("CoupledLSTM", {}),
    "LN": ("LayerNormLSTM", {}),
    "LNP": ("LayerNormLSTM", {"proj_size": 3}),
    "LN_GRU": ("LayerNormGRU", {}),
    "GRU_BEFORE": ("GRU", {"reset_after": False}),
    "INDRNN": ("IndRNN", {}),
    "INDRNN_TANH": ("IndRNN", {"nonlinearity": "tanh"}),
}
# A layer that is added arrives tested.
BEYOND |= {
    name: (name, {})
    for name in fused_rnn.__all__
    if isinstance(getattr(fused_rnn, name), type)
    and issubclass(getattr(fused_rnn, name), nn.RNNBase)
    and not name.startswith("Frozen")  # no constructor of its own: tests/test_freeze.py
    and name not in {known for known, _ in (*KINDS.values(), *BEYOND.values())}
}
PROJECTED = tuple(kind for kind, (_, o) in {**KINDS, **BEYOND}.items() if "proj_size" in o)
CELLS = ("LSTMCell", "GRUCell", "RNNCell")


def make(
    library: ModuleType, kind: str, *sizes: int, dtype: torch.dtype | None = None, **options: Any
) -> nn.RNNBase:
    """The layer `kind` of `library` (fused_rnn or torch.nn)."""
    name, fixed = {**KINDS, **BEYOND}[kind]
    layer: nn.RNNBase = getattr(library, name)(*sizes, **{**fixed, **options}, dtype=dtype)
    return layer


def twins(
    kind: str, *sizes: int, dtype: torch.dtype | None = None, **options: Any
) -> tuple[nn.RNNBase, nn.RNNBase]:
    """Our layer and torch.nn's with the same weights."""
    ours = make(fused_rnn, kind, *sizes, dtype=dtype, **options)
    theirs = make(nn, kind, *sizes, dtype=dtype, **options)
    if has_deciding_kink(theirs):
        with torch.no_grad():
            for weight in theirs.parameters():
                weight.copy_(one_sided(weight, theirs.hidden_size))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def precise(kind: str) -> torch.dtype:
    """In which two orders of a sum agree to the tolerance of assert_close: what is normalised makes
    much of every rounding."""
    return torch.float64 if kind.startswith("LN") else torch.float32


def judged_steps(kind: str, T: int) -> int:
    """Of T steps those after which errors are still those of the arithmetic.

    A step through the norm of a projected state multiplies them by about three: after seven of
    them one draw decides a pool.
    """
    return min(T, 3) if kind == "LNP" else T


def has_deciding_kink(layer: nn.RNNBase) -> bool:
    """Whether low precision decides the side of the kink, where no gradient is right or wrong."""
    return layer.mode == "RNN_RELU" and layer.weight_ih_l0.dtype.itemsize == 2


def state_for(layer: nn.RNNBase, *batch: int) -> Any:
    """A random hx for `layer`; no `batch` for unbatched input."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    dtype = layer.weight_ih_l0.dtype
    h0 = torch.randn(rows, *batch, layer.proj_size or layer.hidden_size)
    if layer.mode != "LSTM":
        return h0.to(dtype)
    c0 = torch.randn(rows, *batch, layer.hidden_size)
    return h0.to(dtype), c0.to(dtype)


def flatten(result: Any) -> list[Tensor]:
    """The tensors in what a layer takes or returns, packed sequences by their data."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result if part is not None for tensor in flatten(part)]


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` on every floating-point tensor of a layer's input or hx."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=function(value.data))
    return None if value is None else tuple(map_tensors(function, part) for part in value)


def oracle(layer: nn.RNNBase, **controls: Any) -> Callable[[Any, Any], Any]:
    """`layer`, of torch.nn or ours, computed by `fused_rnn.reference`; controls: lengths, ..."""
    cell = layer._cell if isinstance(layer, fused_rnn.modules._Layer) else CELL_OF_MODE[layer.mode]

    def call(input: Any, hx: Any) -> Any:
        packed = isinstance(input, PackedSequence)
        data, sizes, order, back = input if packed else (input, None, None, None)
        states = [None, None] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
        unbatched = not packed and data.dim() == 2
        if unbatched:
            data = data.unsqueeze(0 if layer.batch_first else 1)
            states = [None if state is None else state.unsqueeze(1) for state in states]
        if order is not None:
            states = [None if state is None else state[:, order] for state in states]
        output, *ends = by_reference(
            Arguments(
                cell,
                data,
                sizes,
                states[0],
                states[1] if layer.mode == "LSTM" else None,
                [getattr(layer, name) for name in layer._flat_weights_names],
                layer.num_layers,
                bool(layer.bidirectional),
                layer.batch_first and not packed,
                Controls(**controls),
            )
        )
        if unbatched:
            output = output.squeeze(0 if layer.batch_first else 1)
            ends = [end.squeeze(1) for end in ends]
        if back is not None:
            ends = [end[:, back] for end in ends]
        output = input._replace(data=output) if packed else output
        return output, ends[0] if len(ends) == 1 else tuple(ends)

    return call


def run(
    layer: Callable[[Any, Any], Any],
    parameters: Mapping[str, Tensor],
    input: Any,
    hx: Any,
    dtype: torch.dtype,
) -> Tensors:
    """Outputs and gradients of one call, by name; `dtype` holds the gradients' seeds."""
    input, hx = map_tensors(lambda t: t.detach().clone().requires_grad_(), (input, hx))
    outputs = flatten(layer(input, hx))
    names = ["input", *(("h_0", "c_0")[: len(flatten(hx))] if hx is not None else ()), *parameters]
    leaves = [*flatten((input, hx)), *parameters.values()]
    gradients = torch.autograd.grad(outputs, leaves, seeds_like(outputs, dtype))
    results = name_outputs(outputs)
    results |= {f"d_{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in results.items()}


def judge_layer(
    ours: nn.RNNBase, theirs: nn.RNNBase, question: Callable[[], tuple[Any, Any]]
) -> None:
    """Judge outputs, states and every gradient on random (input, hx) against the torch.nn twin."""
    dtype = theirs.weight_ih_l0.dtype
    double = copy.deepcopy(theirs).double()

    def draw() -> tuple[Tensors, Tensors, Tensors]:
        input, hx = question()
        if has_deciding_kink(theirs):
            input, hx = map_tensors(Tensor.abs, (input, hx))
        fused = run(ours, dict(ours.named_parameters()), input, hx, dtype)
        plain = run(theirs, dict(theirs.named_parameters()), input, hx, dtype)
        input, hx = map_tensors(Tensor.double, (input, hx))
        exact = run(oracle(double), dict(double.named_parameters()), input, hx, dtype)
        return fused, plain, exact

    judge_draws(draw)


def complaint(call: Callable[[], object]) -> tuple[type[BaseException], str]:
    """Type and words of what `call` raises."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")


def assert_same_complaint(call: Callable[[ModuleType], object]) -> None:
    """`call(fused_rnn)` and `call(torch.nn)` raise the same exception with the same words."""
    theirs = complaint(lambda: call(nn))
    assert complaint(lambda: call(fused_rnn)) == theirs

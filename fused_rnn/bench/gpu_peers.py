"""Libraries with layers of their own for a GPU, which whoever wants the comparison installs.

They run on torch's tensors and stream, so they are timed in one process with ours. What they do not
have is left out: several layers, two directions, packed sequences, initial states. Their weights
are laid out in other ways, so what is compared are results and the gradient of the input.

Haste: Nanavati, https://github.com/lmnt-com/haste.
FlashRNN: Poeppel, Beck & Hochreiter 2024, arXiv:2412.07752.

Written from their documentation, and tried against stand-ins with the same interface: they have not
been measured yet.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_rnn.bench.shapes import Shape


class _Haste(nn.Module):
    """Its layer of the same name, which reads and returns what torch's does."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        haste: Any = importlib.import_module("haste_pytorch")
        made = getattr(haste, type(layer).__name__)
        options = layer.input_size, layer.hidden_size, layer.batch_first
        self.layer = made(*options).to(layer.weight_ih_l0)
        with torch.no_grad():
            self.layer.from_native_weights(*layer.parameters())

    def forward(self, input: Tensor, hx: None) -> Any:
        return self.layer(input)


class _FlashRNN(nn.Module):
    """Its function of the pre-activations W_ih x, with one head.

    Gates are i, f, g, o as torch's, in GRU r, z, n, where R h and the biases have n's first and the
    part of n without h last. Shapes: Wx [B, T, G, 1, H], R [G, 1, H, H], b [G, 1, H], states
    [S, B, T, 1, H].
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self._function: Any = importlib.import_module("flashrnn").flashrnn
        self._cell = type(layer).__name__.lower()
        self._batch_first = layer.batch_first
        H = layer.hidden_size
        w_ih, w_hh, b_ih, b_hh = (parameter.detach() for parameter in layer.parameters())
        R, bias = w_hh.view(-1, 1, H, H), (b_ih + b_hh).view(-1, 1, H)
        if self._cell == "gru":
            R = R.roll(1, 0)
            bias = torch.cat([b_hh.view(3, 1, H)[2:], bias[:2], b_ih.view(3, 1, H)[2:]])
        self.weight = nn.Parameter(w_ih)
        self.R = nn.Parameter(R.contiguous())
        self.bias = nn.Parameter(bias)

    def forward(self, input: Tensor, hx: None) -> Any:
        x = input if self._batch_first else input.transpose(0, 1)
        H = self.R.shape[-1]
        states, last = self._function(
            F.linear(x, self.weight).reshape(*x.shape[:2], -1, 1, H),
            self.R,
            self.bias,
            function=self._cell,
            dtype=str(input.dtype).removeprefix("torch."),
        )
        output = states[0].flatten(-2)
        h_n, *c_n = (state.flatten(-2).transpose(0, 1) for state in last)
        return output if self._batch_first else output.transpose(0, 1), (h_n, *c_n)


class Library(NamedTuple):
    package: str
    make: Callable[[Any], nn.Module]  # from torch's layer, on its device
    dtypes: tuple[str, ...]


LIBRARIES = {
    "haste": Library("haste_pytorch", _Haste, ("float32", "float64")),
    "flashrnn": Library("flashrnn", _FlashRNN, ("float32", "bfloat16", "float16")),
}


def can(shape: Shape) -> bool:
    """Whether these libraries have the layer."""
    only_one = shape.L == shape.D == 1 and not (shape.packed or shape.state)
    return shape.cell in ("LSTM", "GRU") and only_one


def obstacle(peer: str, dtype: str) -> str | None:
    """Why a library cannot be measured, or None."""
    library = LIBRARIES[peer]
    if importlib.util.find_spec(library.package) is None:
        return f"{peer} needs the package {library.package}, which is not installed"
    if dtype not in library.dtypes:
        return f"{peer} has {', '.join(library.dtypes)}, not {dtype}"
    return None


def version(peer: str) -> str:
    return importlib.metadata.version(LIBRARIES[peer].package)

"""What serves a call: the fused op, the reference, or torch's own function.

    fused      wherever the library has kernels
    reference  where only plain torch will do: torch.func, forward-mode AD
    torch      everywhere else: other devices and dtypes, tracing, no library

`logging.getLogger("fused_rnn").setLevel("DEBUG")` tells which one it was, and why, and
"fused_rnn.strategy" how the threads share a fused call.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from . import ops, reference, strategy

_log = logging.getLogger("fused_rnn")
_strategy_log = logging.getLogger("fused_rnn.strategy")

FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NO_STEPS = "Expected sequence length to be larger than 0 in RNN"  # torch's words
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Result = tuple[Tensor, Tensor, Tensor | None]


def _onednn_has_bfloat16() -> bool:
    """Whether torch's LSTM runs on oneDNN in bfloat16 here: on processors with AVX-512."""
    try:  # a private name, and missing where torch is built without oneDNN
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:
        return False


_ONEDNN_BFLOAT16 = _onednn_has_bfloat16()


class _Call(NamedTuple):
    """The arguments of the ops, in their order."""

    cell: str
    input: Tensor
    batch_sizes: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor]
    num_layers: int
    bidirectional: bool
    batch_first: bool
    lengths: Tensor | None = None
    reset: Tensor | None = None
    reset_to_initial: bool = False


def rnn(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to_initial: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> Result:
    """A stack of recurrent layers over a batch of sequences.

    Args:
        cell: a key of `reference.CELLS`: "lstm", "peephole_lstm", "gru" ...
        input: [T, B, I], [B, T, I] with `batch_first`, [N, I] with `batch_sizes`.
        batch_sizes: [T] int64 on the CPU, how many sequences are active at every step, as in
            PackedSequence; `batch_first` is then ignored.
        h0: [L*D, B, R], zeros if None; L layers, D directions, R = proj_size or H.
        c0: [L*D, B, H], zeros if None; for cells that have c.
        weights: torch's flat order, `weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr]` by
            layer and direction, and for cells with peepholes `weight_ch` at the end of each.
        lengths: [B], how many steps of a padded batch each sequence has, from 0 to T. Output
            beyond is zero, final states are those at the length, and the second direction starts
            there.
        reset: [T, B], [B, T] or [N] like the input, bool or anything else where not 0 is true: a
            new sequence begins with this step. The state before it is zero, and the second
            direction, too, sees nothing of what lies beyond.
        reset_to_initial: new sequences begin with h0 and c0 instead of zeros.
        dropout: probability of a zero between layers when `training`; the masks are those of
            `F.dropout` on the time-major output of the layer below.

    Returns:
        output like `input` with D*R features, contiguous; h_n [L*D, B, R]; c_n [L*D, B, H], or
        None for cells without c.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    if batch_sizes is not None:
        batch_first = False
    # Nameless until names are needed: a _Call costs a microsecond, a small fused call takes 15.
    call: Any = cell, input, batch_sizes, h0, c0, weights, num_layers, bidirectional, batch_first
    if lengths is not None or reset is not None:
        lengths, reset = _controls(input, batch_sizes, batch_first, lengths, reset)
        call = *call, lengths, reset, reset_to_initial
    route = _route(*call)
    if route == "torch":
        return _torch(_Call(*call), dropout, training)
    if input.shape[1 if batch_first else 0] == 0:
        raise RuntimeError(_NO_STEPS)
    autocast = torch.is_autocast_enabled("cpu")
    drops = training and dropout > 0.0 and num_layers > 1
    if route == "fused" and not autocast and not drops:
        return _fused(*call)
    named = _Call(*call)
    if autocast:
        # As torch: the products are autocast, and rnn, which is little else; of the others what
        # oneDNN runs (lstm in bfloat16) and what ends in a product (the projection).
        low = torch.get_autocast_dtype("cpu")
        bfloat16 = low == torch.bfloat16 and _ONEDNN_BFLOAT16
        onednn = cell == "lstm" and batch_sizes is None and bfloat16
        scans = num_layers * (2 if bidirectional else 1)
        projected = reference.split_weights(cell, weights, scans)[0].hr is not None
        whole = cell.startswith("rnn") or onednn or projected
        named = _autocast(named, low if whole else None)
    if route == "reference":
        return _reference(named, dropout, training)
    return _fused_with_dropout(named, dropout) if drops else _fused(*named)


def step(
    cell: str,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_ch: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One time step of one layer: the states (h, c) after it, None for c in cells without.

    input [B, I]; h, c [B, H], zeros if None; weights as in `rnn`, either bias may be absent.
    """
    weights = cell_weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_ch)
    call = cell, input, None, h, c, weights, 1, False, False
    route = _route(*call)
    if route == "torch":
        size = (input.shape[0], weight_hh.shape[1])
        hx = [input.new_zeros(size) if state is None else state for state in (h, c)]
        run = getattr(_VF, f"{cell}_cell")
        if reference.CELLS[cell].states > 1:
            after: tuple[Tensor, Tensor] = run(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
            return after
        return run(input, hx[0], weight_ih, weight_hh, bias_ih, bias_hh), None
    autocast = torch.is_autocast_enabled("cpu")
    if route == "fused" and not autocast:
        output, _, c_n = _fused(*call)
        return output, c_n
    named = _Call(*call)
    if autocast:
        low = torch.get_autocast_dtype("cpu")
        named = _autocast(named, low if cell.startswith("rnn") else None)
    output, _, c_n = _fused(*named) if route == "fused" else _reference(named)
    return output, c_n


def cell_weights(
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_ch: Tensor | None,
) -> list[Tensor]:
    """A cell's weights as the ops take them."""
    weights = [weight_ih, weight_hh]
    if bias_ih is not None and bias_hh is not None:
        weights += bias_ih, bias_hh
    elif bias_ih is not None or bias_hh is not None:
        zeros = weight_ih.new_zeros(weight_ih.shape[0])
        weights += zeros if bias_ih is None else bias_ih, zeros if bias_hh is None else bias_hh
    if weight_ch is not None:
        weights.append(weight_ch)
    return weights


def frozen(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    packed: Sequence[Tensor],
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    *,
    dtype: torch.dtype,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to_initial: bool = False,
) -> Result:
    """`rnn` with weights that `ops.pack` has packed, of `dtype`; no gradients.

    A step, input [B, I] without batch_sizes, gives the states [B, H] as output and c_n. Under
    autocast everything is computed in `dtype`.
    """
    refuse_all_but_inference(input, h0, c0)
    tensors = [t for t in (input, h0, c0) if t is not None]
    for tensor in tensors:
        if not tensor.is_cpu:
            raise RuntimeError(
                "a frozen layer runs on the CPU, where its weights were packed: "
                f"got a tensor on {tensor.device}"
            )
    if torch.is_autocast_enabled("cpu") and all(t.dtype in _AUTOCAST_DTYPES for t in tensors):
        input = input.to(dtype)
        h0 = None if h0 is None else h0.to(dtype)
        c0 = None if c0 is None else c0.to(dtype)
    if input.dtype != dtype:
        raise RuntimeError(f"input must have the dtype of the weights, {dtype}, got {input.dtype}")
    step = batch_sizes is None and input.dim() == 2
    batch_first = batch_first and batch_sizes is None
    if not step and input.shape[1 if batch_first else 0] == 0:
        raise RuntimeError(_NO_STEPS)
    if lengths is not None or reset is not None:
        lengths, reset = _controls(input, batch_sizes, batch_first, lengths, reset)
    output, h_n, c_n = ops.frozen(
        *(cell, input, batch_sizes, h0, c0, packed, hidden_size, proj_size),
        *(num_layers, bidirectional, batch_first),
        *ops.given_controls(lengths, reset, reset_to_initial),
    )
    return output, h_n, c_n if reference.CELLS[cell].states > 1 else None


def refuse_all_but_inference(*tensors: Tensor | None) -> None:
    """A gradient that a frozen layer does not have raises, and so does what cannot record it."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "a frozen layer has no gradients, and an argument requires one: call it under "
            "torch.no_grad() or torch.inference_mode(), or use the layer it was made from"
        )
    if not torch.compiler.is_compiling() and (
        ops.transforms_active() or getattr(forward_ad, "_current_level", -1) >= 0
    ):
        raise RuntimeError(
            "a frozen layer has no gradients: torch.func and forward-mode AD need the layer that "
            "it was made from"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            "torch.jit.trace, and torch.onnx by its way, cannot record a frozen layer: give them "
            "the layer that it was made from, or use torch.export"
        )


def _controls(
    input: Tensor,
    batch_sizes: Tensor | None,
    batch_first: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """`lengths` and `reset` as the ops take them."""
    if lengths is not None:
        if batch_sizes is not None:
            raise ValueError("lengths belong to a padded input, got a packed one")
        B = input.shape[0 if batch_first else 1]
        if lengths.dim() != 1 or lengths.shape[0] != B:
            raise RuntimeError(f"lengths must have shape [B] = ({B},), got {tuple(lengths.shape)}")
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths must be integers, got {lengths.dtype}")
        lengths = lengths.to("cpu", torch.int64)
    if reset is not None:
        if reset.shape != input.shape[:-1]:
            name = "N" if batch_sizes is not None else "B, T" if batch_first else "T, B"
            raise RuntimeError(
                f"reset must have shape [{name}] = {tuple(input.shape[:-1])}, "
                f"got {tuple(reset.shape)}"
            )
        reset = reset.to(input.device, torch.bool)
    return lengths, reset


def _route(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *options: Any,
) -> str:
    compiling = torch.compiler.is_compiling()
    tensors = [input, *weights]
    if h0 is not None:
        tensors.append(h0)
    if c0 is not None:
        tensors.append(c0)
    route, reason = _choose(tensors, compiling)
    controlled = len(options) > 3 and (options[3] is not None or options[4] is not None)
    if route == "torch" and (controlled or not hasattr(_VF, cell)):
        route = "reference"
    if not compiling and _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s: %s%s", cell, route, reason and f", because {reason}")
        if route == "fused":
            _log_strategy(_Call(cell, input, batch_sizes, h0, c0, weights, *options))
    return route


def _log_strategy(call: _Call) -> None:
    from . import _C

    directions = 2 if call.bidirectional else 1
    weights = reference.split_weights(call.cell, call.weights, call.num_layers * directions)[0]
    rows = 0
    if call.batch_sizes is not None:
        rows = call.input.shape[0]
        T, B = len(call.batch_sizes), int(call.batch_sizes[0])
    elif call.input.dim() == 2:
        T, B = 1, call.input.shape[0]
    else:
        B, T = call.input.shape[:2] if call.batch_first else call.input.shape[1::-1]
    if call.lengths is not None:
        T, rows = int(call.lengths.max()), int(call.lengths.sum())
    I, H = call.input.shape[-1], weights.units
    for backward in (False, True) if torch.is_grad_enabled() else (False,):
        plan = _C.strategy(
            *(call.cell, T, B, I, H),
            proj=0 if weights.hr is None else weights.hr.shape[0],
            layers=call.num_layers,
            directions=directions,
            rows=rows,
            threads=torch.get_num_threads(),
            backward=backward,
            busy=torch.get_num_threads() > 1 and _C.busy(),
        )
        text = strategy.describe(plan)
        name = f"{call.cell} {'backward' if backward else 'forward'}"
        _strategy_log.debug("%s T=%d B=%d I=%d H=%d: %s", name, T, B, I, H, text)


def _choose(tensors: list[Tensor], compiling: bool) -> tuple[str, str]:
    """The route of a call on [input, weight_ih, ...] and, unless it is "fused", the reason."""
    if ops.transforms_active():
        return "reference", "a torch.func transform is active"
    if compiling:
        if torch.onnx.is_in_onnx_export():
            return "torch", "ONNX has no such operator"
    else:
        if getattr(forward_ad, "_current_level", -1) >= 0:
            return "reference", "forward-mode AD is active"
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return "torch", "torch.jit.trace is recording"
        if has_torch_function(tensors) and any(map(_overrides_torch_function, tensors)):
            return "torch", "a tensor subclass overrides __torch_function__"
    for tensor in tensors:
        if not tensor.is_cpu:
            return "torch", f"there are no kernels for {tensor.device.type}"
    if tensors[0].dtype not in FUSED_DTYPES:
        return "torch", f"there are no kernels for {tensors[0].dtype}"
    if not tensors[1].numel():  # weight_ih [G*H, I]
        return "torch", "there are no kernels for layers without features or without units"
    if not ops.available:
        return "torch", str(ops.unavailable_reason)
    return "fused", ""


def _overrides_torch_function(tensor: Tensor) -> bool:
    # A mode alone makes has_torch_function true. Parameter's is disabled, not a function.
    function, default = (
        getattr(kind.__torch_function__, "__func__", None) for kind in (type(tensor), Tensor)
    )
    return function is not None and function is not default


def _autocast(call: _Call, dtype: torch.dtype | None) -> _Call:
    """Everything in `dtype`; if None in that of the states, or of the input if they are None."""
    states = [state for state in (call.h0, call.c0) if state is not None]
    tensors = (call.input, *states, *call.weights)
    if not call.input.is_cpu or any(t.dtype not in _AUTOCAST_DTYPES for t in tensors):
        return call
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, [t.dtype for t in states or [call.input]])
    return call._replace(
        input=call.input.to(dtype),
        h0=None if call.h0 is None else call.h0.to(dtype),
        c0=None if call.c0 is None else call.c0.to(dtype),
        weights=[weight.to(dtype) for weight in call.weights],
    )


def _fused(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to_initial: bool = False,
) -> Result:
    has_c = reference.CELLS[cell].states > 1
    # An exported graph holds nothing but the op: what backward needs would be computed in vain.
    if (
        torch.is_grad_enabled()
        and not torch.compiler.is_exporting()
        and (
            input.requires_grad
            or any(weight.requires_grad for weight in weights)
            or (h0 is not None and h0.requires_grad)
            or (c0 is not None and c0.requires_grad)
        )
    ):
        output, h_n, *c_n = ops.RNNFunction.apply(  # type: ignore[no-untyped-call]
            *(cell, num_layers, bidirectional, batch_first, lengths, reset, reset_to_initial),
            *(input, batch_sizes, h0, c0, *weights),
        )
        return output, h_n, c_n[0] if has_c else None
    options = num_layers, bidirectional, batch_first
    controls = ops.given_controls(lengths, reset, reset_to_initial)
    output, h_n, c_n = ops.inference(cell, input, batch_sizes, h0, c0, weights, *options, *controls)
    return output, h_n, c_n if has_c else None


def _fused_with_dropout(call: _Call, dropout: float) -> Result:
    """Layer by layer. All but the last run time-major: that is how torch draws its masks."""
    directions = 2 if call.bidirectional else 1
    count = len(call.weights) // call.num_layers
    x = call.input.transpose(0, 1) if call.batch_first else call.input
    reset = call.reset
    last = call.num_layers - 1
    results = []
    for layer in range(call.num_layers):
        scans = slice(layer * directions, (layer + 1) * directions)
        batch_first = call.batch_first and layer == last
        one = call._replace(
            input=x.transpose(0, 1) if batch_first else x,
            h0=None if call.h0 is None else call.h0[scans],
            c0=None if call.c0 is None else call.c0[scans],
            weights=call.weights[layer * count : (layer + 1) * count],
            num_layers=1,
            batch_first=batch_first,
            reset=reset.t() if reset is not None and call.batch_first != batch_first else reset,
        )
        results.append(_fused(*one))
        if layer < last:
            x = F.dropout(results[-1][0], dropout)
    outputs, h_n, c_n = zip(*results, strict=True)
    return outputs[-1], torch.cat(h_n), None if c_n[0] is None else torch.cat(c_n)


def _reference(call: _Call, dropout: float = 0.0, training: bool = False) -> Result:
    with torch.autocast("cpu", enabled=False):  # all casting has been done
        return reference.rnn(
            call.cell,
            call.input,
            call.batch_sizes,
            call.h0,
            call.c0,
            call.weights,
            num_layers=call.num_layers,
            bidirectional=call.bidirectional,
            batch_first=call.batch_first,
            lengths=call.lengths,
            reset=call.reset,
            reset_to_initial=call.reset_to_initial,
            dropout=dropout,
            training=training,
        )


def _torch(call: _Call, dropout: float, training: bool) -> Result:
    """By `torch.lstm` and its kin, which on CUDA is cuDNN."""
    # cuDNN differentiates only what it ran in training mode.
    training = training or (call.input.is_cuda and torch.is_grad_enabled())
    scans = call.num_layers * (2 if call.bidirectional else 1)
    states = _states(call)
    output, *after = getattr(_VF, call.cell)(
        call.input,
        *(() if call.batch_sizes is None else (call.batch_sizes,)),
        states if len(states) > 1 else states[0],
        list(call.weights),
        len(call.weights) // scans >= 4,  # has biases
        call.num_layers,
        dropout,
        training,
        bool(call.bidirectional),
        *((call.batch_first,) if call.batch_sizes is None else ()),
    )
    return output.contiguous(), after[0], after[1] if len(states) > 1 else None


def _states(call: _Call) -> list[Tensor]:
    """h0 and, for cells that have it, c0, with zeros where the call has None."""
    B: Any  # a tensor if packed: torch.jit.trace would make a constant of an int
    if call.batch_sizes is not None:
        B = call.batch_sizes[0]
    else:
        B = call.input.shape[0 if call.batch_first else 1]
    scans = reference.split_weights(
        call.cell, call.weights, call.num_layers * (2 if call.bidirectional else 1)
    )
    return reference.initial_states(call.cell, call.input, B, call.h0, call.c0, scans)

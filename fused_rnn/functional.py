"""What serves a call: the fused op, the reference, or torch's own function.

    fused      wherever the library has kernels
    reference  where only plain torch will do: torch.func, forward-mode AD
    torch      everywhere else: other devices and dtypes, tracing, no library
    onnx       while torch.onnx.export(dynamo=True) records

`logging.getLogger("fused_rnn").setLevel("DEBUG")` tells which one it was, and why, and
"fused_rnn.strategy" how the threads share a fused call.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from logging import DEBUG
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function

from . import onnx, ops, reference, strategy
from .reference import Controls

_log = logging.getLogger("fused_rnn")
_strategy_log = logging.getLogger("fused_rnn.strategy")

FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NO_STEPS = "Expected sequence length to be larger than 0 in RNN"  # torch's words
# Rows of a segment that is computed again, at least: it packs the weights for itself.
_SEGMENT_ROWS = 1024
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# output, h_n, c_n for cells with c, and all states (h, c) where they were asked for.
Result = tuple[Tensor, Tensor, Tensor | None, Any]
State = TypeVar("State")


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
    controls: Controls | None = None


class Regularisers(NamedTuple):
    """What is done to the recurrence in training.

    zoneout_h, zoneout_c: the probability that a unit's h or c stays what it was; outside training
    the states are the expectation, that share of the old one.
    recurrent_dropout: the probability that W_hh does not see a unit of h, the same units of a
    sequence at every step; what it sees is scaled up.
    candidate_dropout: the probability that the candidate for the new state (g of an LSTM, n of a
    GRU) does not enter it, in the same units of a sequence at every step; others are scaled up.
    weight_dropout: the probability of a zero in W_hh, the same for the whole call (DropConnect).
    variational: dropout between layers takes the same features of a sequence at every step.
    """

    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    variational: bool = False
    candidate_dropout: float = 0.0


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
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to_initial: bool = False,
    regularisers: Regularisers | None = None,
    return_all_states: bool = False,
    recompute: bool = False,
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
            layer and direction, and at the end of each `weight_ch` [P*H] for cells with peepholes,
            `norm` [P*H] for those with layer normalisation.
        dropout: probability of a zero between layers when `training`; the masks are those of
            `F.dropout` on the time-major output of the layer below.
        lengths: [B], how many steps of a padded batch each sequence has, from 0 to T. Output
            beyond is zero, final states are those at the length, and the second direction starts
            there.
        reset: [T, B], [B, T] or [N] like the input, bool or anything else where not 0 is true: a
            new sequence begins with this step. The state before it is zero, and the second
            direction, too, sees nothing of what lies beyond.
        reset_to_initial: new sequences begin with h0 and c0 instead of zeros.
        regularisers: `Regularisers`; their masks come from torch's generator.
        return_all_states: also the states of every layer after every step.
        recompute: keep for backward the states between segments of some sqrt(T) steps, and compute
            the rest again there. Two directions and packed input: layer by layer.

    Returns:
        output like `input` with D*R features, contiguous; h_n [L*D, B, R]; c_n [L*D, B, H], or
        None for cells without c; with `return_all_states` (h, c), like the output with a leading
        dimension for the layers, and c with D*H features or None; else None.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    if batch_sizes is not None:
        batch_first = False
    # Nameless until names are needed: making a _Call can be seen in the time of a small call.
    call: Any = cell, input, batch_sizes, h0, c0, weights, num_layers, bidirectional, batch_first
    if lengths is not None or reset is not None or regularisers is not None:
        lengths, reset = _check_masks(input, batch_sizes, batch_first, lengths, reset)
        controls = Controls(lengths, reset, reset_to_initial)
        if regularisers is not None:
            if training and regularisers.weight_dropout:
                count = len(weights) // (num_layers * (2 if bidirectional else 1))
                share = regularisers.weight_dropout
                weights = [
                    F.dropout(w, share) if k % count == 1 else w for k, w in enumerate(weights)
                ]
                call = *call[:5], weights, *call[6:]
            controls = _regularise(_Call(*call), controls, regularisers, training)
        if controls.any:
            call = *call, controls
    route = _route(*call)
    drops = training and dropout > 0.0 and num_layers > 1
    variational = drops and regularisers is not None and regularisers.variational
    if route == "torch" and (variational or return_all_states):
        route = "reference"
    if route == "torch":
        return _torch(_Call(*call), dropout, training)
    if input.shape[1 if batch_first else 0] == 0:
        raise RuntimeError(_NO_STEPS)
    device = "cuda" if input.is_cuda else "cpu"
    autocast = torch.is_autocast_enabled(device)
    if route == "fused" and not (autocast or drops or return_all_states or recompute):
        return _fused(*call)
    named = _Call(*call)
    if autocast:
        # As torch: the products are autocast, and rnn, which is little else; of the others what
        # oneDNN runs (lstm in bfloat16) and what ends in a product (the projection). On CUDA all.
        low = torch.get_autocast_dtype(device)
        bfloat16 = low == torch.bfloat16 and _ONEDNN_BFLOAT16
        onednn = cell == "lstm" and batch_sizes is None and bfloat16
        scans = num_layers * (2 if bidirectional else 1)
        projected = reference.split_weights(cell, weights, scans)[0].hr is not None
        whole = input.is_cuda or cell.startswith("rnn") or onednn or projected
        named = _autocast(named, low if whole else None)
    run: Callable[[_Call], Result] = onnx.layer if route == "onnx" else _reference
    if route == "fused":
        run = _recomputed if recompute and torch.is_grad_enabled() else _fused_named
    whole_layers = route == "onnx" or (recompute and (bidirectional or batch_sizes is not None))
    if return_all_states or whole_layers or (drops and (route == "fused" or variational)):
        return _layer_by_layer(
            named, run, dropout if drops else 0.0, variational, return_all_states
        )
    return run(named) if route == "fused" else _reference(named, dropout, training)


def step(
    cell: str,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    unit_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One time step of one layer: the states (h, c) after it, None for c in cells without.

    input [B, I]; h, c [B, H], zeros if None; weights as in `rnn`, either bias may be absent;
    unit_weight is `weight_ch` or `norm`.
    """
    weights = cell_weights(weight_ih, weight_hh, bias_ih, bias_hh, unit_weight)
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
    device = "cuda" if input.is_cuda else "cpu"
    autocast = torch.is_autocast_enabled(device)
    if route == "fused" and not autocast:
        output, _, c_n, _ = _fused(*call)
        return output, c_n
    named = _Call(*call)
    if autocast:
        low = torch.get_autocast_dtype(device)
        whole = input.is_cuda or cell.startswith("rnn")
        named = _autocast(named, low if whole else None)
    output, _, c_n, _ = _fused(*named) if route == "fused" else _reference(named)
    return output, c_n


def cell_weights(
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    unit_weight: Tensor | None,
) -> list[Tensor]:
    """A cell's weights as the ops take them."""
    weights = [weight_ih, weight_hh]
    if bias_ih is not None and bias_hh is not None:
        weights += bias_ih, bias_hh
    elif bias_ih is not None or bias_hh is not None:
        zeros = weight_ih.new_zeros(weight_ih.shape[0])
        weights += zeros if bias_ih is None else bias_ih, zeros if bias_hh is None else bias_hh
    if unit_weight is not None:
        weights.append(unit_weight)
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
    question = cell, input, batch_sizes, h0, c0, packed, hidden_size, proj_size
    options = num_layers, bidirectional, batch_first
    if lengths is None and reset is None:
        output, h_n, c_n = ops.frozen(*question, *options)
    else:
        lengths, reset = _check_masks(input, batch_sizes, batch_first, lengths, reset)
        controls = Controls(lengths, reset, reset_to_initial)
        output, h_n, c_n, _ = ops.frozen_controlled(*question, *options, *controls)
    return output, h_n, c_n if reference.CELLS[cell].states > 1 else None, None


def may_go_direct() -> bool:
    """Whether `ops.call` may be asked: it sees the tensors, and what is asked here it does not."""
    return not (is_compiling() or _log.isEnabledFor(DEBUG))


def refuse_all_but_inference(*tensors: Tensor | None) -> None:
    """A gradient that a frozen layer does not have raises, and so does what cannot record it."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "a frozen layer has no gradients, and an argument requires one: call it under "
            "torch.no_grad() or torch.inference_mode(), or use the layer it was made from"
        )
    if ops.transforms_active() or ops.in_forward_mode():
        raise RuntimeError(
            "a frozen layer has no gradients: torch.func and forward-mode AD need the layer that "
            "it was made from"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            "torch.jit.trace, and torch.onnx by its way, cannot record a frozen layer: give them "
            "the layer that it was made from, or use torch.export"
        )


def detach(hx: State) -> State:
    """The same state, cut off from the computation that led to it.

    For truncated backpropagation through time: the state goes on to the next window, the gradient
    does not come back through it::

        output, hx = layer(window, fused_rnn.detach(hx))

    Equivalent PyTorch code, for an LSTM::

        hx = tuple(state.detach() for state in hx)

    Args:
        hx: a tensor, a tuple or list of what is allowed here, or None, which stays None. The
            result is of the same kind and shares the memory.

    Raises:
        TypeError: anything else is in it.
    """
    result: Any
    if hx is None or isinstance(hx, Tensor):
        result = hx if hx is None else hx.detach()
    elif isinstance(hx, tuple | list):
        parts = [detach(part) for part in hx]
        result = type(hx)(*parts) if hasattr(hx, "_fields") else type(hx)(parts)
    else:
        kind = type(hx).__name__
        raise TypeError(f"hx must be a Tensor, or a tuple or list of Tensors, got {kind}")
    return result  # type: ignore[no-any-return]


def _check_masks(
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
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths must be a Tensor, got {type(lengths).__name__}")
        B = input.shape[0 if batch_first else 1]
        if lengths.dim() != 1 or lengths.shape[0] != B:
            raise RuntimeError(f"lengths must have shape [B] = ({B},), got {tuple(lengths.shape)}")
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths must be integers, got {lengths.dtype}")
        if not torch.compiler.is_compiling() and ops.is_batched(lengths):
            raise RuntimeError(
                "lengths decide how many steps are executed, so torch.vmap cannot map over them: "
                "map over the other arguments, or call the layer for one batch after the other"
            )
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


def _regularise(
    call: _Call, controls: Controls, regularisers: Regularisers, training: bool
) -> Controls:
    shares = regularisers.zoneout_h, regularisers.zoneout_c
    input, facts = call.input, reference.CELLS[call.cell]
    scans = reference.split_weights(
        call.cell, call.weights, call.num_layers * (2 if call.bidirectional else 1)
    )
    if any(shares[: facts.states]):
        if not training:
            controls = controls._replace(zoneout_h=shares[0], zoneout_c=shares[1])
        else:
            rows = input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]
            sizes = [scans[0].features, scans[0].units][: facts.states]
            shape = len(scans), rows, sum(sizes)
            mask = torch.empty(shape, dtype=torch.bool, device=input.device)
            for part, share in zip(torch.split(mask, sizes, -1), shares, strict=False):
                part.bernoulli_(share)
            controls = controls._replace(zoneout_mask=mask)
    if not training:
        return controls
    if regularisers.recurrent_dropout and not facts.recurrent:
        raise ValueError(
            f"recurrent_dropout hides units of h from W_hh, which {call.cell} does not have: a "
            "unit sees itself only, and would have no memory for a whole sequence or, scaled up, "
            "more at every step. Use zoneout, or dropout between the layers with variational=True"
        )
    if regularisers.candidate_dropout and not facts.candidate:
        other = "recurrent_dropout" if facts.recurrent else "zoneout"
        raise ValueError(
            "candidate_dropout is for cells with a candidate that is added to their memory (LSTM "
            f"and GRU), and {call.cell} has none: use {other}"
        )

    def mask_of_sequences(units: int, share: float) -> Tensor:
        B: Any = input.shape[0 if call.batch_first else 1]
        if call.batch_sizes is not None:
            B = int(call.batch_sizes[0])
        return F.dropout(input.new_ones(len(scans), B, units), share)

    if share := regularisers.recurrent_dropout:
        controls = controls._replace(h_mask=mask_of_sequences(scans[0].features, share))
    if share := regularisers.candidate_dropout:
        controls = controls._replace(candidate_mask=mask_of_sequences(scans[0].units, share))
    return controls


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
    in_torch = len(options) <= 3 and hasattr(_VF, cell)
    route, reason = _choose(tensors, compiling, in_torch)
    if route == "fused" and in_torch and input.is_cuda and ops.cudnn_first:
        call = _Call(cell, input, batch_sizes, h0, c0, weights, *options)
        if reason := _why_cudnn(call, compiling):
            route = "torch"
    if route == "torch" and not in_torch:
        route = "reference"
    if not compiling and _log.isEnabledFor(DEBUG):
        _log.debug("%s: %s%s", cell, route, reason and f", because {reason}")
        if route == "fused" and input.is_cuda:
            _log_schedule(_Call(cell, input, batch_sizes, h0, c0, weights, *options))
        elif route == "fused" and input.is_cpu:
            _log_strategy(_Call(cell, input, batch_sizes, h0, c0, weights, *options))
    return route


def _log_schedule(call: _Call) -> None:
    directions = 2 if call.bidirectional else 1
    weights = reference.split_weights(call.cell, call.weights, call.num_layers * directions)[0]
    controls = call.controls
    ragged = call.batch_sizes is not None or (controls is not None and controls.lengths is not None)
    T, B, _ = _sizes(call)
    if T == 0 or B == 0:
        return
    for backward in strategy.ways(torch.is_grad_enabled()):
        plan = strategy.persistent_on(
            *(call.input.device.index, call.cell, B, weights.units, call.input.dtype),
            backward=backward,
            projected=weights.hr is not None,
            ragged=ragged,
            controlled=not ragged and controls is not None and controls.any,
        )
        text = strategy.describe_schedule(plan, strategy.forced_schedule())
        way = "backward" if backward else "forward"
        _strategy_log.debug("%s %s B=%d H=%d: %s", call.cell, way, B, weights.units, text)


def _sizes(call: _Call) -> tuple[int, int, int]:
    """T, B, and the rows of all steps where the sequences have lengths of their own, or 0."""
    rows = 0
    if call.batch_sizes is not None:
        rows = call.input.shape[0]
        T, B = len(call.batch_sizes), int(call.batch_sizes[0])
    elif call.input.dim() == 2:
        T, B = 1, call.input.shape[0]
    else:
        B, T = call.input.shape[:2] if call.batch_first else call.input.shape[1::-1]
    if call.controls is not None and call.controls.lengths is not None:
        lengths = call.controls.lengths
        T, rows = max(lengths.tolist(), default=0), int(lengths.sum())
    return T, B, rows


def _log_strategy(call: _Call) -> None:
    from . import _C

    directions = 2 if call.bidirectional else 1
    weights = reference.split_weights(call.cell, call.weights, call.num_layers * directions)[0]
    T, B, rows = _sizes(call)
    if T == 0 or B == 0:
        return
    I, H = call.input.shape[-1], weights.units
    for backward in strategy.ways(torch.is_grad_enabled()):
        plan = _C.strategy(
            *(call.cell, T, B, I, H),
            proj=0 if weights.hr is None else weights.hr.shape[0],
            layers=call.num_layers,
            directions=directions,
            rows=rows,
            threads=torch.get_num_threads(),
            backward=backward,
            busy=torch.get_num_threads() > 1 and _C.busy(),
            weight_bytes=call.input.element_size(),
        )
        text = strategy.describe(plan)
        name = f"{call.cell} {'backward' if backward else 'forward'}"
        _strategy_log.debug("%s T=%d B=%d I=%d H=%d: %s", name, T, B, I, H, text)


def _choose(tensors: list[Tensor], compiling: bool, in_torch: bool) -> tuple[str, str]:
    """The route of a call on [input, weight_ih, ...] and, unless it is "fused", the reason."""
    if ops.transforms_active():
        return "reference", "a torch.func transform is active"
    if ops.in_forward_mode():
        if compiling:
            raise RuntimeError(
                "forward-mode AD of a compiled layer: inductor would lose the tangents. Call the "
                "layer outside of torch.compile, or compile a function that calls torch.func.jvp"
            )
        return "reference", "forward-mode AD is active"
    if compiling:
        if _onnx_is_recording():
            return "onnx", "torch.onnx.export is recording"
    else:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return "torch", "torch.jit.trace is recording"
        if has_torch_function(tensors) and any(map(_overrides_torch_function, tensors)):
            return "torch", "a tensor subclass overrides __torch_function__"
    on_cuda = tensors[0].is_cuda
    for tensor in tensors:
        if not (tensor.is_cuda if on_cuda else tensor.is_cpu):
            return "torch", f"there are no kernels for {tensor.device.type}"
    if tensors[0].dtype not in FUSED_DTYPES:
        return "torch", f"there are no kernels for {tensors[0].dtype}"
    if not tensors[1].numel():  # weight_ih [G*H, I]
        return "torch", "there are no kernels for layers without features or without units"
    if not ops.available:
        return "torch", str(ops.unavailable_reason)
    if on_cuda:
        if not ops.has_cuda:
            return "torch", f"the kernels for cuda are off: {ops.cuda_off}"
        if not compiling and (reason := ops.cuda_device_off(tensors[0].device.index)):
            return "torch", f"there are no kernels for cuda: {reason}"
    return "fused", ""


def _why_cudnn(call: _Call, compiling: bool) -> str:
    """Why cuDNN serves a call on a GPU that both can make, or nothing."""
    other = "(FUSED_RNN_CUDA_KERNELS=1 takes our kernels)"
    if compiling:  # before all that Dynamo cannot trace
        return f"compiled calls are cuDNN's so far {other}"
    if strategy.forced_schedule() is not None:
        return ""
    H = call.weights[0].shape[0] // reference.CELLS[call.cell].gates
    T, B, _ = _sizes(call)
    plain = call.batch_sizes is None and call.weights[1].shape[1] == H and T > 0 and B > 0
    where = call.input.device.index, call.cell, B, H, call.input.dtype
    if plain and not strategy.cudnn_is_faster(*where, torch.is_grad_enabled()):
        return ""
    return f"cuDNN is faster {other}"


def _onnx_is_recording() -> bool:
    return torch.onnx.is_in_onnx_export()


# Dynamo takes torch's own function for False. This is what torch.compiler.assume_constant_result
# does, but that imports the compiler, with which `import fused_rnn` took as long again as torch.
_onnx_is_recording._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    known = call.input.is_cpu or call.input.is_cuda
    if not known or any(t.dtype not in _AUTOCAST_DTYPES for t in tensors):
        return call
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, [t.dtype for t in states or [call.input]])
    return call._replace(
        input=call.input.to(dtype),
        h0=None if call.h0 is None else call.h0.to(dtype),
        c0=None if call.c0 is None else call.c0.to(dtype),
        weights=[weight.to(dtype) for weight in call.weights],
        controls=call.controls and call.controls.to(dtype),
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
    controls: Controls | None = None,
    recompute: bool = False,
    in_graph: bool = False,
) -> Result:
    question = cell, input, batch_sizes, h0, c0, weights, num_layers, bidirectional, batch_first
    has_c = reference.CELLS[cell].states > 1
    if torch.compiler.is_compiling() and not in_graph:
        # No default is spelled out: the compiler would look at it before every call.
        asked: Any = controls or ()
        output, h_n, c_n, all_c = _in_graph(*question, *asked, recompute=recompute)
        return output, h_n, c_n if has_c else None, all_c if asked and asked.all_c else None
    if torch.is_grad_enabled() and (
        input.requires_grad
        or any(weight.requires_grad for weight in weights)
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
    ):
        output, h_n, *c = ops.RNNFunction.apply(  # type: ignore[no-untyped-call]
            *(None, cell, num_layers, bidirectional, batch_first, controls, recompute),
            *(input, batch_sizes, h0, c0, *weights),
        )
        c_n, all_c = (*c, None, None)[:2]
        return output, h_n, c_n, all_c
    if controls is None:
        output, h_n, c_n = ops.inference(*question)
        return output, h_n, c_n if has_c else None, None
    output, h_n, c_n, all_c = ops.inference_controlled(*question, *controls)
    return output, h_n, c_n if has_c else None, all_c if controls.all_c else None


def _recorded(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `fused_rnn::rnn` in a graph does: all that a call outside of it would.

    Hence a graph that has not been lowered to the other ops can be trained and differentiated in
    every way, and one that has been is as fast as they are.
    """
    # The dispatcher leaves out what is the default at the end.
    controls, recompute = Controls(*args[9:18]), any(args[18:])
    call = _Call(*args[:9])
    if controls.any:
        call = call._replace(controls=controls)
    if _route(*call) != "fused":
        result = _reference(call)
    elif recompute:
        result = _recomputed(call, in_graph=True)
    else:
        result = _fused(*call, in_graph=True)
    nothing = args[1].new_empty(0)
    output, h_n, c_n, all_c = (nothing if part is None else part for part in result)
    return output, h_n, c_n, all_c


# Composite: a compiler's tracer goes into it, an exporter's keeps it.
torch.library.define(
    "fused_rnn::rnn",
    "(str cell, Tensor input, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, "
    "int num_layers, bool bidirectional, bool batch_first, Tensor? lengths=None, "
    "Tensor? reset=None, bool reset_to_initial=False, Tensor? zoneout_mask=None, "
    "float zoneout_h=0.0, float zoneout_c=0.0, Tensor? h_mask=None, "
    "Tensor? candidate_mask=None, bool all_c=False, bool recompute=False) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor all_c)",
)
torch.library.impl("fused_rnn::rnn", "CompositeImplicitAutograd", _recorded)
_in_graph = torch.ops.fused_rnn.rnn  # found once: a compiler guards every step of the way to it


def _fused_named(call: _Call) -> Result:
    return _fused(*call)


def _recomputed(call: _Call, in_graph: bool = False) -> Result:
    """Segment by segment, each of which keeps nothing for backward but what it was given."""
    if torch.compiler.is_compiling() and not in_graph:
        return _fused(*call, recompute=True)
    controls = call.controls or Controls()
    time = 1 if call.batch_first else 0
    whole = call.bidirectional or call.batch_sizes is not None or controls.reset_to_initial
    sizes: Any = call.input.shape
    T, B = sizes[time], sizes[1 - time]
    # Of symbolic sizes one segment: a graph has as many as it was recorded with.
    if whole or isinstance(T, torch.SymInt) or isinstance(B, torch.SymInt):
        return _fused(*call, recompute=True, in_graph=in_graph)
    size = max(math.isqrt(T), _SEGMENT_ROWS // max(B, 1))
    h, c = call.h0, call.c0
    results = []
    first = 0
    # By split: the gradient of a narrow view is as large as what it views.
    for part in torch.split(call.input, size, time):
        steps = part.shape[time]
        segment = call
        if steps < T:
            own = call.controls and controls.narrow(time, first, steps, T)
            segment = call._replace(input=part, h0=h, c0=c, controls=own)
        first += steps
        result = _fused(*segment, recompute=True, in_graph=in_graph)
        _, h, c, _ = result
        results.append(result)
    if len(results) == 1:
        return results[0]
    outputs, _, _, every_c = zip(*results, strict=True)
    all_c = torch.cat(every_c, time) if controls.all_c else None
    return torch.cat(outputs, time), results[-1][1], c, all_c


def _layer_by_layer(
    call: _Call,
    run: Callable[[_Call], Result],
    dropout: float,
    variational: bool,
    return_all_states: bool,
) -> Result:
    """All layers but the last run time-major: that is how torch draws its masks."""
    directions = 2 if call.bidirectional else 1
    count = len(call.weights) // call.num_layers
    controls = call.controls or Controls()
    all_c = return_all_states and reference.CELLS[call.cell].states > 1
    controlled = call.controls is not None or all_c
    x = call.input.transpose(0, 1) if call.batch_first else call.input
    reset = controls.reset
    if call.batch_first and reset is not None:
        reset = reset.t()
    last = call.num_layers - 1
    results = []
    for layer in range(call.num_layers):
        scans = slice(layer * directions, (layer + 1) * directions)
        batch_first = call.batch_first and layer == last
        own = controls._replace(
            reset=reset.t() if batch_first and reset is not None else reset,
            zoneout_mask=None if controls.zoneout_mask is None else controls.zoneout_mask[scans],
            h_mask=None if controls.h_mask is None else controls.h_mask[scans],
            candidate_mask=(
                None if controls.candidate_mask is None else controls.candidate_mask[scans]
            ),
            all_c=all_c,
        )
        one = call._replace(
            input=x.transpose(0, 1) if batch_first else x,
            h0=None if call.h0 is None else call.h0[scans],
            c0=None if call.c0 is None else call.c0[scans],
            weights=call.weights[layer * count : (layer + 1) * count],
            num_layers=1,
            batch_first=batch_first,
            controls=own if controlled else None,
        )
        results.append(run(one))
        if layer < last:
            x = results[-1][0]
            if variational and dropout:
                x = x * _mask_of_features(x, call.batch_sizes, dropout)
            elif dropout:
                x = F.dropout(x, dropout)
    outputs, h_n, c_n, every_c = zip(*results, strict=True)
    c = None if c_n[0] is None else torch.cat(c_n)
    if not return_all_states:
        return outputs[-1], torch.cat(h_n), c, None

    def stack(sequences: tuple[Tensor, ...]) -> Tensor:
        *lower, top = sequences
        return torch.stack([s.transpose(0, 1) if call.batch_first else s for s in lower] + [top])

    return outputs[-1], torch.cat(h_n), c, (stack(outputs), stack(every_c) if all_c else None)


def _mask_of_features(x: Tensor, batch_sizes: Tensor | None, dropout: float) -> Tensor:
    """One of 0 and 1 / (1 - dropout) for every sequence and feature of x [T, B, F] or [N, F]."""
    if batch_sizes is None:
        return F.dropout(x.new_ones(1, *x.shape[1:]), dropout)
    sizes = batch_sizes.tolist()
    mask = F.dropout(x.new_ones(sizes[0], x.shape[1]), dropout)
    return torch.cat([mask[:size] for size in sizes])


def _reference(call: _Call, dropout: float = 0.0, training: bool = False) -> Result:
    with torch.autocast("cpu", enabled=False):  # all casting has been done
        return reference.rnn(
            *call[:6],
            num_layers=call.num_layers,
            bidirectional=call.bidirectional,
            batch_first=call.batch_first,
            controls=call.controls or Controls(),
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
    return output.contiguous(), after[0], after[1] if len(states) > 1 else None, None


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

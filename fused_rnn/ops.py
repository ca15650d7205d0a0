"""torch's side of the library: loads it, tells its shapes, makes it differentiable.

The ops are `torch.ops.fused_rnn.inference`, `forward` and `backward`, and for frozen weights `pack`
and `frozen`; docs/design.md has their arguments. When they are called is decided in `functional`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

available = True
unavailable_reason: str | None = None
try:
    import fused_rnn._C as _C
except ImportError as error:
    available, unavailable_reason = False, f"fused_rnn._C cannot be imported: {error}"
    _remedy = (
        f"{unavailable_reason}. Build it for this torch ({torch.__version__}) with a C++20 "
        "compiler: `python setup.py build_ext --inplace` in a checkout, or install fused_rnn again "
        "with `pip install --no-build-isolation`"
    )
    if os.environ.get("FUSED_RNN_STRICT") == "1":
        raise ImportError(_remedy) from error
    warnings.warn(
        f"{_remedy}. Until then the layers run on torch's own kernels.",
        RuntimeWarning,
        stacklevel=2,
    )

# Called directly where no gradient is needed.
inference: Callable[..., tuple[Tensor, Tensor, Tensor]]
frozen: Callable[..., tuple[Tensor, Tensor, Tensor]]
pack: Callable[..., list[Tensor]]
_forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
_backward: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]

# Private names, hence the fallbacks.
# A transform of torch.func (vmap, grad, jvp, ...) is running.
transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: False
)
_is_key_included: Callable[[Any], bool] = getattr(
    torch._C, "_dispatch_tls_is_dispatch_key_included", lambda key: False
)
# Asked for by its name, a key is parsed every time, for 10 us.
_VMAP_MODE = getattr(torch._C, "_dispatch_key_parse", lambda name: name)("VmapMode")


def empty_cache() -> None:
    """Give back to the system the blocks of memory (up to 256 MiB) kept from call to call."""
    if available:
        _C.empty_cache()


# lengths, reset, reset_to_initial: the last arguments of the ops, left out where none is wanted.
Controls = tuple[()] | tuple[Tensor | None, Tensor | None, bool]


def given_controls(lengths: Tensor | None, reset: Tensor | None, to_initial: bool) -> Controls:
    return () if lengths is None and reset is None else (lengths, reset, to_initial)


class RNNFunction(torch.autograd.Function):
    """The ops under autograd: (output, h_n) or, for cells with two states, (output, h_n, c_n)."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        num_layers: int,
        bidirectional: bool,
        batch_first: bool,
        lengths: Tensor | None,
        reset: Tensor | None,
        reset_to_initial: bool,
        input: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        options = num_layers, bidirectional, batch_first
        controls = given_controls(lengths, reset, reset_to_initial)
        *outputs, saved = _forward(cell, input, batch_sizes, h0, c0, weights, *options, *controls)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, batch_sizes, h0, c0, lengths, reset, saved, *weights)
        ctx.cell, ctx.options, ctx.reset_to_initial = cell, options, reset_to_initial
        return tuple(outputs[: 1 + reference.CELLS[cell].states])

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[7:]
        d_output, d_h_n, d_c_n = d_outputs if len(d_outputs) == 3 else (*d_outputs, None)
        if d_output is None and d_h_n is None and d_c_n is None:
            return (None,) * (7 + len(needs))
        input, batch_sizes, h0, c0, lengths, reset, saved, *weights = ctx.saved_tensors
        controls = given_controls(lengths, reset, ctx.reset_to_initial)
        # Inside backward, gradients are enabled under create_graph only, and the key is there under
        # autograd.grad(is_grads_batched=True) only. The op has neither a derivative nor a batching
        # rule, the reference has both.
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or transforms_active() or _is_key_included(_VMAP_MODE)
        ):
            tensors = [input, batch_sizes, h0, c0, *weights]
            return (None,) * 7 + _differentiable_backward(
                ctx.cell, ctx.options, controls, tensors, needs, d_outputs
            )
        need_input, _, need_h0, need_c0, *need_weights = needs
        d_input, d_h0, d_c0, d_weights = _backward(
            ctx.cell,
            *(d_output, d_h_n, d_c_n),
            *(input, batch_sizes, h0, c0, weights, saved),
            *ctx.options,
            *(need_input, need_h0 or need_c0, any(need_weights)),
            *controls,
        )
        gradients = (d_input, None, d_h0, d_c0, *d_weights)
        return (None,) * 7 + tuple(
            [d if need else None for d, need in zip(gradients, needs, strict=True)]
        )


def _differentiable_backward(
    cell: str,
    options: tuple[int, bool, bool],
    controls: Controls,
    tensors: list[Any],  # input, batch_sizes, h0, c0, *weights
    needs: tuple[bool, ...],
    d_outputs: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients by way of the reference, so that they can be differentiated again."""
    create_graph = torch.is_grad_enabled()
    num_layers, bidirectional, batch_first = options
    lengths, reset, reset_to_initial = controls or (None, None, False)
    with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        # Aliases, because one argument may have been computed from another (h0 from the input):
        # the gradient of the second must not run through the first.
        tensors = [t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=True)]
        outputs = reference.rnn(
            cell,
            *(tensors[0], tensors[1], tensors[2], tensors[3]),
            tensors[4:],
            num_layers=num_layers,
            bidirectional=bidirectional,
            batch_first=batch_first,
            lengths=lengths,
            reset=reset,
            reset_to_initial=reset_to_initial,
        )
        # Not every output depends on every argument: c_n does not on the projection above it.
        given = [
            (output, d)
            for output, d in zip(outputs, d_outputs, strict=False)
            if output is not None and output.requires_grad and d is not None
        ]
        if not given:
            return (None,) * len(needs)
        gradients = iter(
            torch.autograd.grad(
                [output for output, _ in given],
                [t for t, need in zip(tensors, needs, strict=True) if need],
                [d for _, d in given],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return tuple(next(gradients) if need else None for need in needs)


def _fake_inference(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to_initial: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(input, h0, c0, *weights)
    scans = num_layers * (2 if bidirectional else 1)
    first = reference.split_weights(cell, weights, scans)[0]
    return _fake_outputs(
        *(cell, input, batch_sizes, h0, first.units, first.features),
        *(num_layers, bidirectional, batch_first),
    )


def _fake_frozen(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    packed: list[Tensor],
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to_initial: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(input, h0, c0, *packed)
    return _fake_outputs(
        *(cell, input, batch_sizes, h0, hidden_size, proj_size or hidden_size),
        *(num_layers, bidirectional, batch_first),
    )


def _fake_pack(
    cell: str, weights: list[Tensor], num_layers: int, bidirectional: bool
) -> list[Tensor]:
    directions = 2 if bidirectional else 1
    return [
        weights[0].new_empty(
            _C.packed_bytes(
                *(cell, w.ih.shape[1], w.units, w.features),
                projected=w.hr is not None,
                double=w.ih.dtype == torch.float64,
            ),
            dtype=torch.uint8,
        )
        for w in reference.split_weights(cell, weights, num_layers * directions)
    ]


def _check_devices(input: Tensor, *tensors: Tensor | None) -> None:
    # One meta tensor among real ones brings the call here, where nothing would be computed.
    for tensor in tensors:
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                "fused_rnn: all tensors must be on the device of the input, "
                f"{input.device}, found one on {tensor.device}"
            )


def _fake_outputs(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    H: int,
    R: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    directions = 2 if bidirectional else 1
    has_c = reference.CELLS[cell].states > 1
    B: int | torch.SymInt
    if batch_sizes is None and input.dim() == 2:  # a step
        output = input.new_empty(input.shape[0], R)
        h_n, c_n = input.new_empty(0), input.new_empty(0)
        if has_c:
            c_n = torch.empty_like(output)
        return output, h_n, c_n
    if batch_sizes is None:
        B = input.shape[0 if batch_first else 1]
    elif h0 is not None:
        B = h0.shape[1]
    else:  # what is in batch_sizes tells, and nothing else
        B = torch.library.get_ctx().new_dynamic_size()
    output = input.new_empty(*input.shape[:-1], directions * R)
    h_n = input.new_empty(num_layers * directions, B, R)
    if not has_c:
        return output, h_n, input.new_empty(0)
    return output, h_n, input.new_empty(num_layers * directions, B, H)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, h_n, c_n = _fake_inference(*args)
    cell, input, batch_sizes, _, _, weights, *_ = args
    step = batch_sizes is None and input.dim() == 2
    scans = 1 if step else h_n.shape[0]
    rows = input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]
    first = reference.split_weights(cell, weights, scans)[0]
    slots = _C.cells()[cell]["states"] + _C.cells()[cell]["saved"] + (first.hr is not None)
    units = (first.units + 15) // 16 * 16
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return output, h_n, c_n, input.new_empty(scans, rows, slots * units, dtype=dtype)


def _fake_backward(
    cell: str,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    saved: Tensor,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    need_input: bool,
    need_state: bool,
    need_weights: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to_initial: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    def gradient(shape: Sequence[int], needed: bool) -> Tensor:
        return input.new_empty(shape if needed else 0)

    state = c0 if h0 is None else h0  # one of them is there if their gradients are needed
    leading = (0,) if state is None else state.shape[:-1]
    first = reference.split_weights(cell, weights, num_layers * (2 if bidirectional else 1))[0]
    has_c = reference.CELLS[cell].states > 1
    return (
        gradient(input.shape, need_input),
        gradient((*leading, first.features), need_state),
        gradient((*leading, first.units), need_state and has_c),
        [gradient(weight.shape, need_weights) for weight in weights],
    )


if available:
    inference = torch.ops.fused_rnn.inference.default
    frozen = torch.ops.fused_rnn.frozen.default
    pack = torch.ops.fused_rnn.pack.default
    _forward = torch.ops.fused_rnn.forward.default
    _backward = torch.ops.fused_rnn.backward.default
    torch.library.register_fake("fused_rnn::inference", _fake_inference)
    torch.library.register_fake("fused_rnn::frozen", _fake_frozen)
    torch.library.register_fake("fused_rnn::pack", _fake_pack)
    torch.library.register_fake("fused_rnn::forward", _fake_forward)
    torch.library.register_fake("fused_rnn::backward", _fake_backward)

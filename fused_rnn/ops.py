"""torch's side of the library: loads it, tells its shapes, makes it differentiable.

The ops are `torch.ops.fused_rnn.inference`, `forward` and `backward`, and for frozen weights `pack`
and `frozen`; docs/design.md has their arguments. When they are called is decided in `functional`.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .reference import Controls

_log = logging.getLogger("fused_rnn")

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

# The architectures of GPUs that there are kernels for, and if there are none, why.
cuda_architectures, cuda_off = "", str(unavailable_reason)
if available:
    cuda_architectures, cuda_off = _C.cuda()
    if cuda_architectures and torch.version.cuda is None:
        cuda_off = f"this torch ({torch.__version__}) is built without CUDA"
has_cuda = not cuda_off
# Whether cuDNN serves what it has where our kernels are not faster: functional._why_cudnn.
cudnn_first = os.environ.get("FUSED_RNN_CUDA_KERNELS") != "1"


@functools.cache
def cuda_device_off(index: int) -> str:
    """Why there are no kernels for that GPU, or nothing."""
    gpu = torch.cuda.get_device_capability(index)
    for name in cuda_architectures.split():
        base = name.removesuffix("+PTX")
        built = tuple(map(int, base.rstrip("af").split(".")))
        later_minor = base[-1].isdigit() and built[0] == gpu[0]
        if built == gpu or (built < gpu and (later_minor or base != name)):
            return ""
    return f"the library is built for {cuda_architectures}, and this GPU is {gpu[0]}.{gpu[1]}"


# Called directly where no gradient is needed.
inference: Callable[..., tuple[Tensor, Tensor, Tensor]]
inference_controlled: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
frozen: Callable[..., tuple[Tensor, Tensor, Tensor]]
frozen_controlled: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
pack: Callable[..., list[Tensor]]
# The same for a plain call, without the dispatcher; None where only the op can answer.
call: Callable[..., Any] = lambda *args: None  # noqa: E731
call_frozen: Callable[..., Any] = call
_plain_backward: Callable[..., Any] = call
_forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
_forward_controlled: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
_backward: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]
_backward_controlled: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]

# Private names, hence the fallbacks.
# A transform of torch.func (vmap, grad, jvp, ...) is running.
transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: False
)


def in_forward_mode() -> bool:
    return getattr(forward_ad, "_current_level", -1) >= 0  # in compiled code this is a guard


# vmap maps over this tensor.
is_batched: Callable[[Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_batchedtensor", lambda tensor: False
)
_is_key_included: Callable[[Any], bool] = getattr(
    torch._C, "_dispatch_tls_is_dispatch_key_included", lambda key: False
)
# Asked for by its name, a key is parsed every time.
_VMAP_MODE = getattr(torch._C, "_dispatch_key_parse", lambda name: name)("VmapMode")


def _allow_direct() -> None:
    """Tell `_C.call` where to ask whether a call is plain. What cannot be asked is a no."""
    names = (
        "_are_functorch_transforms_active",
        "_is_any_autocast_enabled",
        "_is_tracing",
        "_len_torch_dispatch_stack",
        "_len_torch_function_stack",
    )
    probes: list[Any] = [getattr(torch._C, name, None) for name in names]
    probes.append(getattr(torch.autograd, "_profiler_enabled", None))
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if None not in probes and exchange is not None:
        _C.allow_direct(
            *(Tensor, torch.nn.Parameter, exchange, Tensor.is_neg, tuple(probes)),
            *(forward_ad, _record),
        )


def empty_cache() -> None:
    """Give back to the system the blocks of memory (up to 256 MiB) kept from call to call."""
    if available:
        _C.empty_cache()


def _infer(question: tuple[Any, ...], controls: Controls | None) -> tuple[Tensor, ...]:
    return inference(*question) if controls is None else inference_controlled(*question, *controls)


def _save(question: tuple[Any, ...], controls: Controls | None) -> tuple[Tensor, ...]:
    return _forward(*question) if controls is None else _forward_controlled(*question, *controls)


class RNNFunction(torch.autograd.Function):
    """The ops under autograd: (output, h_n), for cells with c (output, h_n, c_n[, all_c]).

    With `recompute` what backward needs is computed there, not kept. `computed`: the outputs and
    saved, if they are there already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        computed: tuple[Tensor, ...] | None,
        cell: str,
        num_layers: int,
        bidirectional: bool,
        batch_first: bool,
        controls: Controls | None,
        recompute: bool,
        input: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        options = num_layers, bidirectional, batch_first
        question = cell, input, batch_sizes, h0, c0, weights, *options
        masks: tuple[Tensor | None, ...] = ()
        count = 1 + reference.CELLS[cell].states
        outputs: Sequence[Tensor]
        saved = None
        if computed is not None:
            *outputs, saved = computed
        elif recompute:
            outputs = _infer(question, controls)
        else:
            *outputs, saved = _save(question, controls)
        if controls is not None:
            count += controls.all_c
            masks = controls.masks()
            controls = controls.with_masks(*[None] * len(masks))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, batch_sizes, h0, c0, saved, *masks, *weights)
        ctx.cell, ctx.options, ctx.controls = cell, options, controls
        # Whether backward may go past the dispatcher as well.
        ctx.plain = computed is not None or not (controls or batch_sizes is not None)
        return tuple(outputs[:count])

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[7:]
        d_output, d_h_n, d_c_n, d_all_c = (*d_outputs, None, None)[:4]
        if d_output is None and d_h_n is None and d_c_n is None and d_all_c is None:
            return (None,) * (7 + len(needs))
        input, batch_sizes, h0, c0, saved, *weights = ctx.saved_tensors
        controls: Controls | None = ctx.controls
        masks: list[Any] = []
        if controls is not None:
            count = len(controls.masks())
            masks, weights = weights[:count], weights[count:]
        # Inside backward, gradients are enabled under create_graph only, and the key is there under
        # autograd.grad(is_grads_batched=True) only. The op has neither a derivative nor a batching
        # rule, the reference has both.
        compiling = torch.compiler.is_compiling()
        if not compiling and (
            torch.is_grad_enabled() or transforms_active() or _is_key_included(_VMAP_MODE)
        ):
            tensors = [input, batch_sizes, h0, c0, *weights]
            controls = controls and controls.with_masks(*masks)
            return (None,) * 7 + _differentiable_backward(
                ctx.cell, ctx.options, controls, tensors, needs, d_outputs
            )
        question = ctx.cell, input, batch_sizes, h0, c0, weights, *ctx.options
        if saved is None:
            saved = _save(question, controls and controls.with_masks(*masks))[-1]
        if ctx.plain and not compiling:
            steps: tuple[Any, Any, bool] = None, None, False
            if controls is not None:
                steps = masks[0], masks[1], controls.reset_to_initial
            found: tuple[Tensor | None, ...] | None = _plain_backward(
                *(needs, d_output, d_h_n, d_c_n, ctx.cell, input, h0, c0, weights),
                *(*ctx.options, *steps, saved),
            )
            if found is not None:
                return (None,) * 7 + found
        controls = controls and controls.with_masks(*masks)
        need_input, _, need_h0, need_c0, *need_weights = needs
        wanted = saved, need_input, need_h0 or need_c0, any(need_weights)
        if controls is None:
            gradients = _backward(d_output, d_h_n, d_c_n, *question, *wanted)
        else:
            seeds = d_output, d_h_n, d_c_n, d_all_c
            gradients = _backward_controlled(*seeds, *question, *wanted, *controls)
        d_input, d_h0, d_c0, d_weights = gradients
        return (None,) * 7 + tuple(
            [
                d if need else None
                for d, need in zip((d_input, None, d_h0, d_c0, *d_weights), needs, strict=True)
            ]
        )


# RNNFunction.apply without what torch.func needs: while it is active no call is plain.
_apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, RNNFunction).apply


def _record(
    computed: tuple[Tensor, ...],
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_to_initial: bool,
) -> Any:
    """What a layer or cell returns whose outputs and `saved` a plain call has computed."""
    controls = None
    if lengths is not None or reset is not None:
        controls = Controls(lengths, reset, reset_to_initial)
    output, h_n, *c_n = _apply(
        *(computed, cell, num_layers, bidirectional, batch_first, controls, False),
        *(input, None, h0, c0, *weights),
    )
    if input.dim() == 2:
        return (output, c_n[0]) if c_n else output
    return output, (h_n, c_n[0]) if c_n else h_n


def _differentiable_backward(
    cell: str,
    options: tuple[int, bool, bool],
    controls: Controls | None,
    tensors: list[Any],  # input, batch_sizes, h0, c0, *weights
    needs: tuple[bool, ...],
    d_outputs: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients by way of the reference, so that they can be differentiated again."""
    create_graph = torch.is_grad_enabled()
    reason = "its gradients are to be differentiated" if create_graph else "they come in batches"
    _log.debug("%s backward: reference, because %s", cell, reason)
    num_layers, bidirectional, batch_first = options
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
            controls=controls or Controls(),
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
) -> tuple[Tensor, Tensor, Tensor]:
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "ONNX has no frozen layers: export the model that the frozen one was made from"
        )
    _check_devices(input, h0, c0, *packed)
    return _fake_outputs(
        *(cell, input, batch_sizes, h0, hidden_size, proj_size or hidden_size),
        *(num_layers, bidirectional, batch_first),
    )


def _fake_frozen_controlled(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (input, hidden_size, bidirectional), controls = (args[1], args[6], args[9]), args[11:]
    directions = 2 if bidirectional else 1
    shape = (*input.shape[:-1], directions * hidden_size) if Controls(*controls).all_c else (0,)
    return *_fake_frozen(*args[:11]), input.new_empty(shape)


def _fake_pack(
    cell: str, weights: list[Tensor], num_layers: int, bidirectional: bool
) -> list[Tensor]:
    directions = 2 if bidirectional else 1
    return [
        weights[0].new_empty(
            _C.packed_bytes(
                *(cell, w.ih.shape[1], w.units, w.features),
                projected=w.hr is not None,
                dtype=str(w.ih.dtype).removeprefix("torch."),
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


def _fake_inference_controlled(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (cell, input, _, _, _, weights, num_layers, bidirectional, _), controls = args[:9], args[9:]
    shape: tuple[int, ...] = (0,)
    if Controls(*controls).all_c:
        directions = 2 if bidirectional else 1
        H = reference.split_weights(cell, weights, num_layers * directions)[0].units
        shape = (*input.shape[:-1], directions * H)
    return *_fake_inference(*args[:9]), input.new_empty(shape)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake_inference(*args), _fake_saved(args, Controls())


def _fake_forward_controlled(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_fake_inference_controlled(*args), _fake_saved(args[:9], Controls(*args[9:]))


def _fake_saved(question: tuple[Any, ...], controls: Controls) -> Tensor:
    cell, input, batch_sizes, _, _, weights, num_layers, bidirectional, _ = question
    step = batch_sizes is None and input.dim() == 2
    scans = 1 if step else num_layers * (2 if bidirectional else 1)
    rows = input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]
    first = reference.split_weights(cell, weights, scans)[0]
    facts = _C.cells()[cell]
    states = facts["states"]
    own = states if controls.zoned else 1 if first.hr is not None else 0
    raw = 2 * facts["gates"] if facts["norm_gates"] else 0
    slots = states + facts["saved"] + own + raw
    units = (first.units + 15) // 16 * 16
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    new: Tensor = input.new_empty(scans, rows, slots * units, dtype=dtype)
    return new


def _fake_backward(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    saved: Tensor,
    need_input: bool,
    need_state: bool,
    need_weights: bool,
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


def _fake_backward_controlled(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    # Without d_all_c and the controls it is the plain one.
    return _fake_backward(*args[:3], *args[4:17])


# What torch.utils.flop_counter counts: the products with matrices, a step of a sequence each.


def _flops(
    cell: str, input: Sequence[int], _: Any, h0: Any, c0: Any, weights: Sequence[Any], *rest: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    """Tensors come by their shapes."""
    matrices = [int(math.prod(shape)) for shape in weights if len(shape) == 2]
    return 2 * math.prod(input[:-1]) * sum(matrices)


def _flops_of_backward(d_output: Any, d_h_n: Any, d_c_n: Any, *args: Any, **kwargs: Any) -> int:
    """Each product twice, for both that it multiplied, where their gradients are wanted."""
    if not isinstance(args[0], str):
        args = args[1:]  # d_all_c
    input, weights, bidirectional = args[1], args[5], args[7]
    _, need_input, _, need_weights = args[9:13]
    products = _flops(*args)
    directions = 2 if bidirectional else 1
    of_input = 2 * math.prod(input[:-1]) * math.prod(weights[0]) * directions
    return products * (2 if need_weights else 1) - (0 if need_input else of_input)


def _flops_of_frozen(
    cell: str, input: Sequence[int], _: Any, h0: Any, c0: Any, packed: Any, hidden_size: int,
    proj_size: int, num_layers: int, bidirectional: bool, *rest: Any, **kwargs: Any,
) -> int:  # fmt: skip
    facts = reference.CELLS[cell]
    H, R, D = hidden_size, proj_size or hidden_size, 2 if bidirectional else 1
    features = input[-1] + (num_layers - 1) * D * R  # of the inputs of all layers
    recurrent = num_layers * R if facts.recurrent else 0
    projection = num_layers * R * H if proj_size else 0
    return 2 * math.prod(input[:-1]) * D * (facts.gates * H * (features + recurrent) + projection)


if available:
    inference = torch.ops.fused_rnn.inference.default
    inference_controlled = torch.ops.fused_rnn.inference.controlled
    frozen = torch.ops.fused_rnn.frozen.default
    frozen_controlled = torch.ops.fused_rnn.frozen.controlled
    pack = torch.ops.fused_rnn.pack.default
    call, call_frozen, _plain_backward = _C.call, _C.call_frozen, _C.backward
    _allow_direct()
    _forward = torch.ops.fused_rnn.forward.default
    _forward_controlled = torch.ops.fused_rnn.forward.controlled
    _backward = torch.ops.fused_rnn.backward.default
    _backward_controlled = torch.ops.fused_rnn.backward.controlled
    torch.library.register_fake("fused_rnn::inference", _fake_inference)
    torch.library.register_fake("fused_rnn::inference.controlled", _fake_inference_controlled)
    torch.library.register_fake("fused_rnn::frozen", _fake_frozen)
    torch.library.register_fake("fused_rnn::frozen.controlled", _fake_frozen_controlled)
    torch.library.register_fake("fused_rnn::pack", _fake_pack)
    torch.library.register_fake("fused_rnn::forward", _fake_forward)
    torch.library.register_fake("fused_rnn::forward.controlled", _fake_forward_controlled)
    torch.library.register_fake("fused_rnn::backward", _fake_backward)
    torch.library.register_fake("fused_rnn::backward.controlled", _fake_backward_controlled)
    register_flop_formula([torch.ops.fused_rnn.inference, torch.ops.fused_rnn.forward])(_flops)
    register_flop_formula(torch.ops.fused_rnn.backward)(_flops_of_backward)
    register_flop_formula(torch.ops.fused_rnn.frozen)(_flops_of_frozen)

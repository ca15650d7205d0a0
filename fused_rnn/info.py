"""`python -m fused_rnn.info`: what is installed, what serves which call and why, and does it work.

Ends with `OK` and status 0 when the layers agree with torch.nn, forward and backward.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn import ops
from fused_rnn.strategy import describe, describe_schedule, forced_schedule, gpu_sizes

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYERS: dict[str, tuple[str, dict[str, str]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "RNN tanh": ("RNN", {}),
    "RNN relu": ("RNN", {"nonlinearity": "relu"}),
}
# T, B, H, layers, directions
SHAPES = (
    (1, 1, 64, 1, 1),
    (64, 1, 256, 1, 1),
    (500, 1, 64, 2, 1),
    (64, 8, 256, 1, 2),
    (64, 64, 512, 1, 1),
)
# Of layers on a GPU: units and dtype.
GPU_SIZES = (
    (16, 128, "bfloat16"),
    (16, 512, "float32"),
    (64, 1024, "bfloat16"),
    (256, 1024, "bfloat16"),
    (16, 2048, "bfloat16"),
)
# SMs and shared memory of a block, that scans are planned for where there is no GPU.
H200 = (132, 227 * 1024)
# Twenty times the rounding error of float32: sums are taken in another order than torch's.
WORST_ERROR = 20 * torch.finfo(torch.float32).eps


class _Messages(logging.Handler):
    """Keeps what the package logs: the route of a call is what that call says it took."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "fused_rnn":
            self.texts.append(record.getMessage())


def routes(device: str) -> list[tuple[str, str]]:
    """For every layer, the dtypes that share a route, and that route."""
    logger = logging.getLogger("fused_rnn")
    messages = _Messages()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(messages)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    found: dict[tuple[str, str], list[str]] = {}
    try:
        for name, (kind, options) in LAYERS.items():
            for dtype in DTYPES:
                layer = getattr(fused_rnn, kind)(3, 5, **options, device=device, dtype=dtype)
                messages.texts.clear()
                try:
                    layer(torch.zeros(2, 1, 3, device=device, dtype=dtype))
                    # "lstm: fused", "lstm: torch, because ..."
                    route = "; ".join(text.partition(": ")[2] for text in messages.texts)
                except RuntimeError as error:
                    route = f"fails: {error}"
                found.setdefault((name, route), []).append(str(dtype).removeprefix("torch."))
    finally:
        logger.removeHandler(messages)
        logger.setLevel(level)
        logger.propagate = propagate
    return [(f"{name} {', '.join(dtypes)}", route) for (name, route), dtypes in found.items()]


def strategies() -> Iterable[tuple[str, str]]:
    """For an LSTM of typical shapes: how threads share the forward scan, and why."""
    from fused_rnn import _C

    for T, B, H, layers, directions in SHAPES:
        plan = _C.strategy(
            *("lstm", T, B, H, H),
            layers=layers,
            directions=directions,
            threads=torch.get_num_threads(),
        )
        yield f"T={T} B={B} H={H} L={layers} D={directions}", describe(plan)


def schedules() -> Iterable[tuple[str, str]]:
    """For an LSTM of some sizes: the schedule of its scans on a GPU, and why."""
    from fused_rnn import _C

    sms, shared = H200
    if torch.cuda.is_available():
        sms, shared = gpu_sizes(torch.cuda.current_device())
    for (B, H, dtype), backward in itertools.product(GPU_SIZES, (False, True)):
        plan = _C.schedule(
            *("lstm", B, H, dtype), sms=sms, shared_per_block=shared, backward=backward
        )
        way = "backward" if backward else "forward"
        yield f"{way} B={B} H={H} {dtype}", describe_schedule(plan, forced_schedule())


def _outputs_and_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output, h_n = layer(x)
    states = h_n if isinstance(h_n, tuple) else (h_n,)
    loss = output.square().sum() + sum(state.sum() for state in states)
    grads = torch.autograd.grad(loss, [x, *layer.parameters()])
    return [output.detach(), *(state.detach() for state in states), *grads]


def largest_error(name: str) -> float:
    """Of all outputs and gradients against torch.nn, relative to the largest value of each."""
    kind, options = LAYERS[name]
    sizes = {"input_size": 9, "hidden_size": 21, "num_layers": 2, "bidirectional": True}
    theirs = getattr(nn, kind)(**sizes, **options)
    ours = getattr(fused_rnn, kind)(**sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 3, 9)
    pairs = zip(_outputs_and_gradients(ours, x), _outputs_and_gradients(theirs, x), strict=True)
    # max() of Python would pass over a NaN.
    return max(
        float("inf") if not a.isfinite().all() else float((a - b).abs().max() / b.abs().max())
        for a, b in pairs
    )


def _lines(title: str, rows: Iterable[tuple[str, str]]) -> None:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    print(f"\n{title}")
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")


def main() -> int:
    versions = [
        ("fused_rnn", fused_rnn.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("machine", f"{platform.system()} {platform.machine()}"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"),
        ("instruction set of torch", torch.backends.cpu.get_cpu_capability()),
        ("ATEN_CPU_CAPABILITY", os.environ.get("ATEN_CPU_CAPABILITY", "not set")),
        ("CUDA kernels", f"off: {ops.cuda_off}" if ops.cuda_off else "on"),
    ]
    _lines("running with", versions)
    if ops.available:
        from fused_rnn import _C

        library = [
            ("instruction sets", ", ".join(_C.compiled_isas())),
            ("chosen", _C.isa()),
            ("CUDA architectures", ops.cuda_architectures or "none"),
            *_C.build_info().items(),
        ]
        _lines("library, built with", library)
        _lines("how threads share the forward scan of an LSTM", strategies())
        _lines("how the scans of an LSTM are scheduled on a GPU", schedules())
    else:
        _lines("library", [("missing", str(ops.unavailable_reason))])
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        _lines(f"what serves a call on {device}", routes(device))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        errors = {name: largest_error(name) for name in LAYERS}
    checks = [
        (name, f"largest relative error {error:.1e}{'' if error < WORST_ERROR else '  WRONG'}")
        for name, error in errors.items()
    ]
    _lines("forward and backward against torch.nn, float32 on the CPU", checks)
    ok = all(error < WORST_ERROR for error in errors.values())
    print("\nOK" if ok else "\nFAILED")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

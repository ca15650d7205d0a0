"""The least time that this machine needs for a call: what its arithmetic and its caches allow.

The model, for one layer and direction with N rows (steps of all sequences), G gates, H units, I
inputs, on all threads together:

    forward     max(2 N G H (I + H) flops / tile rate,  streamed bytes / stream rate)
    backward    the same for what leads back through time and to the input (dh, dx)
    gradients   the same flops for dW; its bytes once, as dW is written

Training is the three together: three times the flops of inference, and with one sequence about
three times its bytes. The tile rate is that of the register tile on float32. Streamed is what a
step must read whatever the number of sequences: W_hh at each of T steps, and W_ih as well when
there is but one step; with more, W_ih x is one product for all of them. The stream rate is that of
the cache level which holds what one step reads, read forth and back in turn.

A call's bound is the sum over layers and directions. Directions that run side by side, each on its
part of the threads, take what they take one after the other, each on all of them: the rates are of
all threads together. Left out: the cells' own arithmetic, x, outputs, saved values, packing and
barriers. Hence a bound, which no layer reaches, and which says most for large layers.

On a GPU the rates are those of torch.matmul on two large squares and of a large copy, in the dtype
of the call, and what is read once is read from memory: a step's weights may stay in its caches.

    forward     max(2 N G H (I + H) flops / matmul rate,  bytes of W, x and y / copy rate)

and three times that in training, with as many bytes again for what is saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from fused_rnn.bench.shapes import Shape
from fused_rnn.bench.work import seconds_on_gpu

FLOAT = 4  # bytes; both rates are of float32
# Smaller weights are in the first-level cache as well, but too few to measure a rate with.
LEAST_BYTES = 2**14


def layers(shape: Shape) -> list[int]:
    """The number of inputs of every layer and direction."""
    return [
        shape.I if layer == 0 else shape.D * shape.H
        for layer in range(shape.L)
        for _ in range(shape.D)
    ]


def flops(shape: Shape, inputs: int) -> float:
    """Floating-point operations of a layer's products, forward."""
    return 2.0 * shape.rows * shape.gates * shape.H * (inputs + shape.H)


def step_bytes(shape: Shape, inputs: int) -> int:
    """Bytes of weights that a layer must read at every step."""
    return FLOAT * shape.gates * shape.H * (shape.H + (inputs if shape.T == 1 else 0))


def bound_ms(shape: Shape, mode: str, threads: int) -> float:
    """Milliseconds below which no call of this shape can take."""
    return 1e3 * sum(_seconds(shape, mode, threads, inputs) for inputs in layers(shape))


def _seconds(shape: Shape, mode: str, threads: int, inputs: int) -> float:
    product = flops(shape, inputs) / (1e9 * tile_rate(threads))
    step = step_bytes(shape, inputs)
    read = shape.T * step / (1e9 * stream_rate(step, threads))
    forward = max(product, read)
    if mode != "training":
        return forward
    matrices = FLOAT * shape.gates * shape.H * (inputs + shape.H)
    written = matrices / (1e9 * stream_rate(matrices, threads))
    return 2 * forward + max(product, written)


@cache
def tile_rate(threads: int) -> float:
    """GFLOP/s of the register tile."""
    from fused_rnn import _C

    with _pool(threads):
        return _C.tile_rate(threads)


def stream_rate(size: int, threads: int) -> float:
    """GB/s of reading `size` bytes of weights again and again.

    That of the power of two below, which is no slower: the bound stays a bound.
    """
    return _stream_rate(max(2 ** int(math.log2(size)), LEAST_BYTES), threads)


@cache
def _stream_rate(size: int, threads: int) -> float:
    from fused_rnn import _C

    with _pool(threads):
        return _C.stream_rate(size, threads)


@contextmanager
def _pool(threads: int) -> Iterator[None]:
    """torch's pool, on which our kernels run, has this many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bound_ms_on_gpu(shape: Shape, mode: str, dtype: str) -> float:
    """The same on the current GPU."""
    size = getattr(torch, dtype).itemsize
    seconds = 0.0
    for inputs in layers(shape):
        weights = shape.gates * shape.H * (inputs + shape.H)
        moved = size * (weights + shape.rows * (inputs + shape.H))
        forward = max(flops(shape, inputs) / matmul_rate(dtype), moved / copy_rate())
        seconds += forward if mode != "training" else 3 * forward
    return 1e3 * seconds


@cache
def matmul_rate(dtype: str) -> float:
    """Operations per second of a product of two large squares, as torch's switches have it."""
    n = 4096
    a, b = (torch.randn(n, n, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
    return 2.0 * n**3 / _least_seconds(lambda: a @ b)


@cache
def copy_rate() -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / _least_seconds(lambda: target.copy_(source))


def _least_seconds(call: Callable[[], object]) -> float:
    until = time.perf_counter() + 0.5
    least = math.inf
    while time.perf_counter() < until:
        least = min(least, seconds_on_gpu(call))
    return least

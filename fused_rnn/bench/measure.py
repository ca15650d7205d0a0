"""One measurement: the same layer call in torch.nn and in fused_rnn, first compared, then timed."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn.bench.shapes import Shape

MODES = ("inference", "training")
DTYPES = ("float32", "float64", "bfloat16", "float16")

# A median and two quartiles need a few pairs, however slow the shape is.
LEAST_PAIRS = 5


class DisagreementError(Exception):
    """The two libraries do not compute the same: there is nothing to time."""


@dataclass(frozen=True)
class Result:
    """Medians in milliseconds; `speedup` is torch.nn's time over ours, pair by pair."""

    shape: Shape
    mode: str
    threads: int
    dtype: str
    torch_ms: float
    fused_ms: float
    speedup: float
    q25: float
    q75: float
    pairs: int
    max_abs_diff: float
    max_rel_diff: float


def measure_all(
    jobs: Iterable[tuple[Shape, str]], threads: Sequence[int], dtype: str, budget: float
) -> Iterator[Result | DisagreementError]:
    """Measures every (shape, mode), for each number of threads in a process of its own.

    A thread pool once started cannot be shrunk, hence the fresh process.
    """
    jobs = tuple(jobs)
    for count in threads:
        with ProcessPoolExecutor(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=torch.set_num_threads,
            initargs=(count,),
        ) as worker:
            try:
                for shape, mode in jobs:
                    yield worker.submit(_outcome, shape, mode, dtype, budget).result()
            except BrokenProcessPool as error:
                raise RuntimeError(f"the process died in {shape.label}, {mode}") from error


def _outcome(shape: Shape, mode: str, dtype: str, budget: float) -> Result | DisagreementError:
    try:
        return measure(shape, mode, dtype, budget)
    except DisagreementError as error:
        return error


def measure(shape: Shape, mode: str, dtype: str, budget: float, library: Any = fused_rnn) -> Result:
    """Times `library`'s layer against torch.nn's for about `budget` seconds.

    Both sides run in this process, call by call in turn, on one input and the same weights, so
    that a change of the machine's mood meets both. Training is a forward and a backward call with
    gradients of the input and of every weight. Raises `DisagreementError` where results differ.
    """
    torch.manual_seed(0)
    training = mode == "training"
    theirs = _layer(nn, shape, dtype)
    ours = _layer(library, shape, dtype)
    ours.load_state_dict(theirs.state_dict())
    arguments = _arguments(shape, getattr(torch, dtype), training)

    with torch.set_grad_enabled(training):
        # eval() takes the dropout out: the two need not draw the same mask.
        expected = _evaluate(theirs.eval(), arguments)
        max_abs_diff, max_rel_diff = _compare(_evaluate(ours.eval(), arguments), expected)
        if not max_rel_diff <= _tolerance(getattr(torch, dtype)):
            raise DisagreementError(
                f"{shape.label}, {mode}, {dtype}: fused_rnn and torch.nn differ by "
                f"{max_rel_diff:.1e} (relative), {_tolerance(getattr(torch, dtype)):.1e} is allowed"
            )
        del expected
        sides = [_timer(module.train(training), arguments) for module in (theirs, ours)]
        gc.collect()
        gc.disable()
        try:
            _alternate(sides, budget / 10, at_least=1)
            times = _alternate(sides, budget, at_least=LEAST_PAIRS)
        finally:
            gc.enable()

    q25, speedup, q75 = statistics.quantiles((a / b for a, b in times), n=4, method="inclusive")
    torch_ms, fused_ms = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
    return Result(
        shape=shape,
        mode=mode,
        threads=torch.get_num_threads(),
        dtype=dtype,
        torch_ms=torch_ms,
        fused_ms=fused_ms,
        speedup=speedup,
        q25=q25,
        q75=q75,
        pairs=len(times),
        max_abs_diff=max_abs_diff,
        max_rel_diff=max_rel_diff,
    )


@dataclass
class _Arguments:
    input: Tensor | PackedSequence
    leaf: Tensor  # the input's numbers, where their gradient arrives
    hx: Any
    d_output: Tensor


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


def _arguments(shape: Shape, dtype: torch.dtype, training: bool) -> _Arguments:
    cell = shape.cell.endswith("Cell")
    T, B = shape.T, shape.B
    sizes = [B] if cell else [B, T] if shape.batch_first else [T, B]
    x = torch.randn(*sizes, shape.I, dtype=dtype)
    if shape.strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    d_output = torch.randn(*sizes, shape.D * shape.H, dtype=dtype)

    packed = None
    if shape.packed:
        lengths = torch.randint(1, T + 1, (B,))
        lengths[0] = T
        packed = pack_padded_sequence(x, lengths, shape.batch_first, enforce_sorted=False)
        x = packed.data
        d_output = d_output.flatten(0, 1)[: len(x)]
    leaf = x.detach().requires_grad_(training)

    hx: Any = None
    if shape.state:
        state = [B, shape.H] if cell else [shape.L * shape.D, B, shape.H]
        hx = torch.randn(*state, dtype=dtype)
        if shape.family == "LSTM":
            hx = (hx, torch.randn(*state, dtype=dtype))
    return _Arguments(leaf if packed is None else packed._replace(data=leaf), leaf, hx, d_output)


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


def _evaluate(module: nn.Module, arguments: _Arguments) -> list[Tensor]:
    """Everything the module computes: outputs and states, and in training every gradient."""
    result = module(arguments.input, arguments.hx)
    values = [tensor.detach() for tensor in _tensors(result)]
    if arguments.leaf.requires_grad:
        torch.autograd.backward(_output(result), arguments.d_output)
        for leaf in (arguments.leaf, *module.parameters()):
            assert leaf.grad is not None
            values.append(leaf.grad)
            leaf.grad = None
    return values


def _compare(ours: list[Tensor], theirs: list[Tensor]) -> tuple[float, float]:
    """Largest absolute difference, and largest difference in the norm relative to torch.nn's."""
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return float("inf"), float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    absolute = torch.stack([(a - b).abs().max() for a, b in pairs])
    relative = torch.stack([(a - b).norm() / b.norm().clamp_min(1e-300) for a, b in pairs])
    return absolute.max().item(), relative.max().item()  # a NaN anywhere is the maximum


def _tolerance(dtype: torch.dtype) -> float:
    """Half of the digits: finds a wrong formula or weight. How exact we are, the tests say."""
    return float(torch.finfo(dtype).eps ** 0.5)


def _timer(module: nn.Module, arguments: _Arguments) -> Callable[[], float]:
    leaves = [arguments.leaf, *module.parameters()]
    x, hx, d_output = arguments.input, arguments.hx, arguments.d_output

    def inference() -> float:
        start = perf_counter()
        module(x, hx)
        return perf_counter() - start

    def training() -> float:
        for leaf in leaves:
            leaf.grad = None
        start = perf_counter()
        torch.autograd.backward(_output(module(x, hx)), d_output)
        return perf_counter() - start

    return training if arguments.leaf.requires_grad else inference


def _alternate(
    sides: Sequence[Callable[[], float]], budget: float, at_least: int
) -> list[tuple[float, ...]]:
    """Calls the sides in turn until the budget is spent; one tuple of seconds per round."""
    start = perf_counter()
    rounds: list[tuple[float, ...]] = []
    while len(rounds) < at_least or perf_counter() - start < budget:
        rounds.append(tuple(side() for side in sides))
    return rounds

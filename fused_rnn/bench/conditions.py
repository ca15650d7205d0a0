"""What disturbs a layer, and how much: the time of a call beside that of an ordinary one.

busy     every core is kept busy by another program: n threads there, over one thread there. Threads
         that wait for each other must not make it worse than having none.
ragged   a PackedSequence of random lengths, over a dense batch of as many sequences and rows.
values   saturated, denormal, zero and NaN numbers, over ordinary ones.
reset    new sequences that begin inside, with one step of twenty, over none.
recompute  a layer with recompute=True, over one that saves the gates.
cell     a cell that torch.nn does not have, over one of ours with as many gates that it has.

The two take turns; so do torch.nn's two, afterwards: who is called after another library finds its
code and data gone from the caches. Where each has a process of its own, all four take turns.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn.bench import sides, work
from fused_rnn.bench.shapes import Shape
from fused_rnn.bench.work import Timer


class Kind(NamedTuple):
    limit: float  # what we promise: the largest ratio
    words: str


# By the names of the shapes.
KINDS = {
    "busy": Kind(1.5, "another program on every core; ordinary is one thread there"),
    "ragged": Kind(1.15, "ordinary is a dense batch of as many sequences and rows"),
    "values": Kind(1.3, "numbers beside ordinary ones"),
    "reset": Kind(1.05, "a reset at one step of twenty; ordinary is none"),
    "recompute": Kind(1.6, "recompute=True; ordinary is the gates saved for backward"),
    "cell": Kind(1.3, "a cell beyond torch.nn; ordinary is ours of torch.nn with as many gates"),
}

# By what x, hx and d_output, what the matrices and what the biases are multiplied, given the
# smallest normal number. With ordinary biases every state would be ordinary after one step.
VALUES: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "saturated": lambda tiny: (1e4, 1e4, 1e4),
    "denormal": lambda tiny: (tiny / 100, 1.0, tiny / 100),
    "zero": lambda tiny: (0.0, 1.0, 0.0),
    "NaN": lambda tiny: (math.nan, 1.0, 1.0),
}

# By the plain cell that they are compared with.
BEYOND: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "LSTM": {"PeepholeLSTM": fused_rnn.PeepholeLSTM, "LayerNormLSTM": fused_rnn.LayerNormLSTM},
    "GRU": {
        "CoupledLSTM": fused_rnn.CoupledLSTM,
        "LayerNormGRU": fused_rnn.LayerNormGRU,
        "GRU(reset_after=False)": partial(fused_rnn.GRU, reset_after=False),
    },
    "RNN": {"IndRNN": fused_rnn.IndRNN},
}

# Seconds of a disturbed call, and of an ordinary one.
Pairs = Sequence[tuple[float, ...]]


@dataclass(frozen=True)
class Condition:
    """Medians in milliseconds; `ratio` is `ms` over `base_ms`, pair by pair."""

    shape: Shape
    mode: str
    threads: int
    dtype: str
    case: str
    base_ms: float
    ms: float
    ratio: float
    q25: float
    q75: float
    torch_ratio: float  # of torch.nn, in the same run; NaN for what it cannot do
    pairs: int

    @property
    def limit(self) -> float:
        return KINDS[self.shape.name].limit

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x when {self.case}, {self.shape.label}, {self.mode}"


@dataclass(frozen=True)
class Job:
    threads: int
    shape: Shape
    mode: str
    case: str  # one of VALUES or BEYOND, or the name of the shape


def jobs(shapes: Sequence[Shape], modes: Sequence[str], threads: Sequence[int]) -> list[Job]:
    return [
        Job(count, shape, mode, case)
        for count in threads
        for shape in shapes
        if not (shape.name == "busy" and count == 1)  # nobody to wait for
        for mode in modes
        if not (shape.name == "recompute" and mode == "inference")  # nothing to save
        for case in cases(shape)
    ]


def cases(shape: Shape) -> Collection[str]:
    if shape.name == "values":
        return VALUES
    return BEYOND[shape.cell] if shape.name == "cell" else (shape.name,)


def measure_all(jobs: Sequence[Job], dtype: str, budget: float) -> Iterator[Condition]:
    """Measures every job, in the order of `jobs`."""
    for (threads, busy), group in groupby(jobs, lambda job: (job.threads, job.case == "busy")):
        yield from (_busy if busy else _disturbed)(list(group), threads, dtype, budget)


def _disturbed(jobs: Sequence[Job], threads: int, dtype: str, budget: float) -> Iterator[Condition]:
    with sides.process(threads) as worker:
        for job in jobs:
            with sides.named(f"{job.shape.label}, {job.mode}, {job.case}"):
                condition = worker.submit(measure, job, dtype, budget).result()
            yield condition


def measure(job: Job, dtype: str, budget: float) -> Condition:
    """What disturbs from within, in this process."""
    pair = PAIRS[job.shape.name]
    times: list[Pairs] = []
    for library in work.LIBRARIES.values():
        if library is nn and job.shape.name in ONLY_OURS:
            times.append([(math.nan, 1.0)])
            continue
        case, base, scale = pair(job, library, dtype)
        found = sides.alternate([case, base], budget)
        times.append([(disturbed, scale * ordinary) for disturbed, ordinary in found])
    return _condition(job, dtype, *times)


def _ragged(job: Job, library: Any, dtype: str) -> tuple[Timer, Timer, float]:
    """The ragged batch, a dense one, and by how many rows the first has more."""
    ragged = job.shape
    dense = replace(ragged, packed=False, T=round(ragged.rows / ragged.B))
    case, base = (work.timer(*work.make(library, s, job.mode, dtype)) for s in (ragged, dense))
    return case, base, ragged.rows / dense.rows


def _values(job: Job, library: Any, dtype: str) -> tuple[Timer, Timer, float]:
    layer, arguments = made = work.make(library, job.shape, job.mode, dtype)
    inputs, matrices, biases = VALUES[job.case](torch.finfo(getattr(torch, dtype)).tiny)
    states = arguments.hx if isinstance(arguments.hx, tuple) else (arguments.hx,)
    with torch.no_grad():
        for tensor in (arguments.leaf, arguments.d_output, *states):
            if tensor is not None:
                tensor.mul_(inputs)
        for parameter in layer.parameters():
            parameter.mul_(matrices if parameter.ndim == 2 else biases)
    return work.timer(*made), work.timer(*work.make(library, job.shape, job.mode, dtype)), 1.0


def _reset(job: Job, library: Any, dtype: str) -> tuple[Timer, Timer, float]:
    layer, arguments = work.make(library, job.shape, job.mode, dtype)
    begins = torch.rand(job.shape.T, job.shape.B) < 0.05
    disturbed = replace(arguments, controls={"reset": begins})
    ordinary = work.make(library, job.shape, job.mode, dtype)
    return work.timer(layer, disturbed), work.timer(*ordinary), 1.0


def _cell(job: Job, library: Any, dtype: str) -> tuple[Timer, Timer, float]:
    shape = job.shape
    plain, arguments = work.make(library, shape, job.mode, dtype)
    beyond = BEYOND[shape.cell][job.case](shape.I, shape.H, dtype=getattr(torch, dtype))
    return work.timer(beyond, replace(arguments)), work.timer(plain, arguments), 1.0


def _recompute(job: Job, library: Any, dtype: str) -> tuple[Timer, Timer, float]:
    layer, arguments = work.make(library, job.shape, job.mode, dtype)
    layer.recompute = True  # type: ignore[assignment]
    ordinary = work.make(library, job.shape, job.mode, dtype)
    return work.timer(layer, arguments), work.timer(*ordinary), 1.0


ONLY_OURS = ("reset", "recompute", "cell")
PAIRS: dict[str, Callable[[Job, Any, str], tuple[Timer, Timer, float]]] = {
    "ragged": _ragged,
    "values": _values,
    "reset": _reset,
    "recompute": _recompute,
    "cell": _cell,
}


def _busy(jobs: Sequence[Job], threads: int, dtype: str, budget: float) -> Iterator[Condition]:
    with ExitStack() as stack:
        each = [
            (library, stack.enter_context(closing(sides.Side(count))))
            for library in work.LIBRARIES
            for count in (threads, 1)
        ]
        stack.enter_context(every_core_busy())
        for job in jobs:
            with sides.named(f"{job.shape.label}, {job.mode}, {job.case}"):
                for library, side in each:
                    side.load(_ready, library, job.shape, job.mode, dtype)
                times = sides.take_turns([side for _, side in each], budget)
            yield _condition(job, dtype, [t[:2] for t in times], [t[2:] for t in times])


def _ready(
    library: str, shape: Shape, mode: str, dtype: str, threads: int
) -> tuple[Timer, list[Tensor]]:
    return work.timer(*work.make(work.LIBRARIES[library], shape, mode, dtype)), []


# Ends with its parent, however that ends.
SPIN = """
import os, sys
cpu, parent = map(int, sys.argv[1:])
os.sched_setaffinity(0, {cpu})
print(flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextmanager
def every_core_busy() -> Iterator[None]:
    """Other programs spin, one on each core of ours."""
    with ExitStack() as stack:
        for cpu in os.sched_getaffinity(0):
            command = [sys.executable, "-c", SPIN, str(cpu), str(os.getpid())]
            spinning = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(spinning.kill)
            assert spinning.stdout is not None
            spinning.stdout.readline()
        yield


def _condition(job: Job, dtype: str, ours: Pairs, theirs: Pairs) -> Condition:
    ratios = [disturbed / ordinary for disturbed, ordinary in ours]
    q25, ratio, q75 = statistics.quantiles(ratios, n=4, method="inclusive")
    ms, base_ms = (1e3 * statistics.median(side) for side in zip(*ours, strict=True))
    return Condition(
        shape=job.shape,
        mode=job.mode,
        threads=job.threads,
        dtype=dtype,
        case=job.case,
        base_ms=base_ms,
        ms=ms,
        ratio=ratio,
        q25=q25,
        q75=q75,
        torch_ratio=statistics.median(disturbed / ordinary for disturbed, ordinary in theirs),
        pairs=len(ours),
    )

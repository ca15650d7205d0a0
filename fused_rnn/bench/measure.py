"""One measurement: the same layer call in fused_rnn and in a peer, first compared, then timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import _VF, Tensor, nn

import fused_rnn
from fused_rnn import ops, strategy
from fused_rnn.bench import gpu_peers, peers, roof, sides, work
from fused_rnn.bench.shapes import Shape

# What can be compared with, and in which modes, by the names that the results have.
TORCH = "torch.nn"
FLOAT32 = "float32"  # our own layer, with what measures low precision: the same numbers in float32
_IN_ONE_PROCESS = (TORCH, FLOAT32, *gpu_peers.LIBRARIES)
PEERS = (
    dict.fromkeys((TORCH, FLOAT32), (*work.MODES, work.FROZEN))
    | dict.fromkeys(gpu_peers.LIBRARIES, work.MODES)
    | dict.fromkeys(peers.BUILDERS, ("inference", work.FROZEN))
)

# shape, mode, peer
Job = tuple[Shape, str, str]


class DisagreementError(Exception):
    """The two libraries do not compute the same: there is nothing to time."""


@dataclass(frozen=True)
class Result:
    """Medians in milliseconds; `speedup` is the peer's time over ours, pair by pair.

    The roof is what the machine does at its best, so the fastest call is held against it.
    """

    shape: Shape
    mode: str
    threads: int
    dtype: str
    peer: str
    peer_ms: float
    fused_ms: float
    speedup: float
    q25: float
    q75: float
    pairs: int
    max_abs_diff: float
    max_rel_diff: float
    roof_ms: float = math.nan  # the least time, by roof.py; unknown in older files
    schedule: str = ""  # of our scans on a GPU, or "cuDNN"; unknown in older files
    best_ms: float = math.nan  # the fastest call; unknown in older files
    peer_best_ms: float = math.nan

    @property
    def of_roof(self) -> float:
        return self.roof_ms / self.best_ms

    @property
    def peer_of_roof(self) -> float:
        return self.roof_ms / self.peer_best_ms

    def __str__(self) -> str:
        return f"{self.speedup:.2f}x {self.shape.label}, {self.mode}, {self.peer}"


def jobs(shapes: Sequence[Shape], modes: Sequence[str], against: Sequence[str]) -> list[Job]:
    """All that the peers can do."""
    return [
        (shape, mode, peer)
        for peer in against
        for shape in shapes
        for mode in modes
        if mode in PEERS[peer] and (peer not in gpu_peers.LIBRARIES or gpu_peers.can(shape))
    ]


def measure_all(
    jobs: Sequence[Job],
    threads: Sequence[int],
    dtype: str,
    budget: float,
    device: str = "cpu",
    schedule: str | None = None,
) -> Iterator[Result | DisagreementError]:
    """Measures every job with each number of threads, in the order of `jobs`."""
    for count in threads:
        # Now, while no other process of ours is there. On the CPU its rates are those of float32.
        known = ops.available and (dtype == "float32" or device == "cuda")
        roofs = {}
        for job in jobs if known else ():
            shape, mode, _ = job
            if device == "cuda":
                roofs[job] = roof.bound_ms_on_gpu(shape, mode, dtype)
            else:
                roofs[job] = roof.bound_ms(shape, mode, count)
        for peer, group in groupby(jobs, key=itemgetter(2)):
            mine = list(group)
            pairs = [(shape, mode) for shape, mode, _ in mine]
            if peer in _IN_ONE_PROCESS:
                outcomes = _in_one_process(peer, pairs, count, dtype, budget, device, schedule)
            else:
                outcomes = _in_two_processes(peer, pairs, count, dtype, budget)
            for job, outcome in zip(mine, outcomes, strict=True):
                if isinstance(outcome, Result) and known:
                    outcome = replace(outcome, roof_ms=roofs[job])
                yield outcome


def _in_one_process(
    peer: str,
    pairs: Sequence[tuple[Shape, str]],
    threads: int,
    dtype: str,
    budget: float,
    device: str,
    schedule: str | None,
) -> Iterator[Result | DisagreementError]:
    """Against what runs on the one thread pool, or stream, of torch."""
    with sides.process(threads) as worker:
        for shape, mode in pairs:
            with sides.named(f"{shape.label}, {mode}"):
                arguments = peer, shape, mode, dtype, budget, device, schedule
                outcome = worker.submit(_outcome, *arguments).result()
            yield outcome


def _outcome(
    peer: str,
    shape: Shape,
    mode: str,
    dtype: str,
    budget: float,
    device: str,
    schedule: str | None,
) -> Result | DisagreementError:
    try:
        if device == "cpu":
            return measure(shape, mode, dtype, budget, peer=peer)
        taken = possible_schedule(shape, mode, dtype, schedule)
        with strategy.force_schedule(taken if schedule else None):
            result = measure(shape, mode, dtype, budget, peer=peer, device=device)
        return replace(result, schedule=taken)
    except DisagreementError as error:
        return error


def possible_schedule(shape: Shape, mode: str, dtype: str, wanted: str | None) -> str:
    """What our scans have on this GPU: what is wanted where they can, or else stepwise. With None
    the library's choice, which may be "cuDNN"."""
    cell = shape.family.lower().replace("rnn", "rnn_tanh")
    where = torch.cuda.current_device(), cell, shape.B, shape.H, getattr(torch, dtype)
    training = mode == "training"
    plans = [
        strategy.persistent_on(*where, backward=backward, ragged=shape.packed)
        for backward in strategy.ways(training)
    ]
    both = wanted is None and ops.cudnn_first and hasattr(_VF, cell)
    if both and (shape.packed or strategy.cudnn_is_faster(*where, training)):
        return "cuDNN"
    if wanted == "stepwise":
        return wanted
    fits = all(plan["chosen" if wanted is None else "possible"] for plan in plans)
    return "persistent" if fits else "stepwise"


def measure(
    shape: Shape,
    mode: str,
    dtype: str,
    budget: float,
    library: Any = fused_rnn,
    peer: str = TORCH,
    device: str = "cpu",
) -> Result:
    """Times `library`'s layer against a peer that runs in this process, for about `budget` seconds.

    Both sides run in this process, call by call in turn, on one input and the same weights, so
    that a change of the machine's mood meets both. Training is a forward and a backward call with
    gradients of the input and of every weight. Raises `DisagreementError` where results differ.
    """
    # cuDNN has a switch of its own, and another default: with both alike the same is computed.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    ours, arguments = work.make(library, shape, mode, dtype, device)
    if peer == FLOAT32:
        theirs, their_arguments = work.make_widened(fused_rnn, shape, mode, dtype, device)
    else:
        theirs, their_arguments = work.make(nn, shape, mode, dtype, device)[0], arguments
    if peer in gpu_peers.LIBRARIES:
        theirs = gpu_peers.LIBRARIES[peer].make(theirs).train(theirs.training)
    expected = work.evaluate(theirs, their_arguments)
    found = work.evaluate(ours, arguments)
    if peer in gpu_peers.LIBRARIES:  # weights of another layout, and their gradients behind
        count = len(expected) - (mode == "training") * len(list(theirs.parameters()))
        expected, found = expected[:count], found[:count]
    differences = _agree(found, expected, shape, mode, dtype, peer)
    del expected, found
    pair = [work.timer(theirs, their_arguments), work.timer(ours, arguments)]
    times = sides.alternate(pair, budget)
    return _result(shape, mode, torch.get_num_threads(), dtype, peer, times, differences)


def _in_two_processes(
    peer: str, pairs: Sequence[tuple[Shape, str]], threads: int, dtype: str, budget: float
) -> Iterator[Result | DisagreementError]:
    """Against a library with a thread pool of its own."""
    with closing(sides.Side(threads)) as theirs, closing(sides.Side(threads)) as ours:
        for shape, mode in pairs:
            with sides.named(f"{shape.label}, {mode}, {peer}"):
                expected = theirs.load(peers.BUILDERS[peer], shape)
                results = ours.load(peers.ours, shape, mode, dtype)
                try:
                    differences = _agree(results, expected, shape, mode, dtype, peer)
                except DisagreementError as error:
                    outcome: Result | DisagreementError = error
                else:
                    times = sides.take_turns([theirs, ours], budget)
                    outcome = _result(shape, mode, threads, dtype, peer, times, differences)
            yield outcome


def _agree(
    ours: list[Tensor], theirs: list[Tensor], shape: Shape, mode: str, dtype: str, peer: str
) -> tuple[float, float]:
    """The differences, which are small, or else a `DisagreementError`."""
    max_abs_diff, max_rel_diff = _compare(ours, theirs)
    tolerance = _tolerance(getattr(torch, dtype))
    if not max_rel_diff <= tolerance:
        raise DisagreementError(
            f"{shape.label}, {mode}, {dtype}: fused_rnn and {peer} differ by "
            f"{max_rel_diff:.1e} (relative), {tolerance:.1e} is allowed"
        )
    return max_abs_diff, max_rel_diff


def _compare(ours: list[Tensor], theirs: list[Tensor]) -> tuple[float, float]:
    """Largest absolute difference, and largest difference in the norm relative to the peer's."""
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return float("inf"), float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    absolute = torch.stack([(a - b).abs().max() for a, b in pairs])
    relative = torch.stack([(a - b).norm() / b.norm().clamp_min(1e-300) for a, b in pairs])
    return absolute.max().item(), relative.max().item()  # a NaN anywhere is the maximum


def _tolerance(dtype: torch.dtype) -> float:
    """Half of the digits: finds a wrong formula or weight. How exact we are, the tests say."""
    return float(torch.finfo(dtype).eps ** 0.5)


def _result(
    shape: Shape,
    mode: str,
    threads: int,
    dtype: str,
    peer: str,
    times: Sequence[tuple[float, ...]],
    differences: tuple[float, float],
) -> Result:
    q25, speedup, q75 = statistics.quantiles((a / b for a, b in times), n=4, method="inclusive")
    both = list(zip(*times, strict=True))
    peer_ms, fused_ms = (1e3 * statistics.median(side) for side in both)
    peer_best_ms, best_ms = (1e3 * min(side) for side in both)
    return Result(
        shape=shape,
        mode=mode,
        threads=threads,
        dtype=dtype,
        peer=peer,
        peer_ms=peer_ms,
        fused_ms=fused_ms,
        speedup=speedup,
        q25=q25,
        q75=q75,
        pairs=len(times),
        max_abs_diff=differences[0],
        max_rel_diff=differences[1],
        best_ms=best_ms,
        peer_best_ms=peer_best_ms,
    )

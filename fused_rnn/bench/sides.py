"""The sides of a comparison take turns, in this process or each in one of its own."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from fused_rnn.bench.work import Timer

# A median and two quartiles need a few pairs, however slow the shape is.
LEAST_PAIRS = 5
# What a process is asked for lasts this long at least, beside which its waking up is little.
TURN = 2e-3


def process(threads: int) -> ProcessPoolExecutor:
    """A fresh process for one job at a time, in which torch has `threads` threads.

    A thread pool once started cannot be shrunk, hence a process for each number of threads.
    """
    return ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(threads,),
    )


@contextmanager
def named(job: str) -> Iterator[None]:
    """A crash of a process says in which job it was."""
    try:
        yield
    except BrokenProcessPool as error:
        raise RuntimeError(f"the process died in {job}") from error


def alternate(sides: Sequence[Timer], budget: float) -> list[tuple[float, ...]]:
    """Calls the sides in turn until the budget is spent; one tuple of seconds per round."""
    gc.collect()
    gc.disable()
    try:
        _rounds(sides, budget / 10, at_least=1)
        return _rounds(sides, budget, at_least=LEAST_PAIRS)
    finally:
        gc.enable()


def _rounds(sides: Sequence[Timer], budget: float, at_least: int) -> list[tuple[float, ...]]:
    start = time.perf_counter()
    rounds: list[tuple[float, ...]] = []
    while len(rounds) < at_least or time.perf_counter() - start < budget:
        rounds.append(tuple(side() for side in sides))
    return rounds


# Makes a program ready: what times its calls, and the results of one.
Build = Callable[..., tuple[Timer, list[Tensor]]]


class Side:
    """A program in a process of its own, which makes and times its calls when asked.

    Two libraries in one process would run two thread pools side by side, and one would wait,
    spinning, on the cores where the other is timed.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._process = process(threads)
        self._pid = self._process.submit(_die_with_parent).result()

    def load(self, build: Build, *arguments: object) -> list[Tensor]:
        """Replaces the program by `build(*arguments, threads)`; what a call of it gives."""
        results = self._turn(_load, build, *arguments, self._threads)
        return [torch.from_numpy(result) for result in results]

    def timer(self, calls: int = 1) -> Timer:
        """Seconds of a call, in the mean over `calls` in a row."""
        return lambda: self._turn(_time, calls)

    def _turn(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Between its turns the process is stopped: threads of a pool spin on after a call, some
        without end, on the cores of the side whose turn it is."""
        os.kill(self._pid, signal.SIGCONT)
        result = self._process.submit(function, *arguments).result()
        os.kill(self._pid, signal.SIGSTOP)
        return result

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGCONT)
        self._process.shutdown()


def take_turns(sides: Sequence[Side], budget: float) -> list[tuple[float, ...]]:
    """As `alternate`. Every side makes as many calls per turn: those of the fastest fill `TURN`."""
    fastest = min(side.timer()() for side in sides)
    calls = math.ceil(TURN / fastest)
    return alternate([side.timer(calls) for side in sides], budget)


# In the process of a side:

_timer: Timer | None = None


def _die_with_parent() -> int:
    """This process's number. Killed with its parent: a stopped process would never notice."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getpid()


def _load(build: Build, *arguments: object) -> list[object]:
    global _timer
    _timer = None  # the old program's threads and memory go before the next one's come
    gc.collect()
    _timer, results = build(*arguments)
    return [result.numpy() for result in results]


def _time(calls: int) -> float:
    timer = _timer
    assert timer is not None
    timer()  # while this process slept, the caches became another's
    gc.disable()
    try:
        return sum(timer() for _ in range(calls)) / calls
    finally:
        gc.enable()

"""The same seed gives the same bits; threads, interrupts and time do no harm."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import BEYOND, KINDS, flatten, make
from processes import output_of
from test_contract_tools import EVERY, loss
from test_environment import resident_kib
from torch import Tensor

import fused_rnn

each_kind = pytest.mark.parametrize("kind", [*KINDS, *BEYOND])
# What draws masks in training.
RANDOM: dict[str, dict[str, Any]] = {
    "nothing": {},
    "dropout": {"dropout": 0.4, "weight_dropout": 0.3, "variational": True},
    "zoneout": {"zoneout": (0.2, 0.3)},
    "recurrent_dropout": {"recurrent_dropout": 0.3, "recompute": True},
    "candidate_dropout": {"candidate_dropout": 0.3},
}


def refused(kind: str, random: str) -> bool:
    facts = fused_rnn.reference.CELLS[make(fused_rnn, kind, 1, 4)._cell]
    needs = {"recurrent_dropout": facts.recurrent, "candidate_dropout": facts.candidate}
    return not needs.get(random, True)


PAIRS = [(k, r) for r in RANDOM for k in (*KINDS, *BEYOND) if not refused(k, r)]


def train(kind: str, options: dict[str, Any]) -> list[Tensor]:
    """Seeded: weights, input, masks; two steps of training, and what is left of them.

    Of sizes that are shared by rows among 2 and 3 threads, or with two directions among 4.
    """
    torch.manual_seed(3)
    layer = make(fused_rnn, kind, 12, 40, 2, bidirectional="dropout" not in options, **options)
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        found = flatten(layer(torch.randn(11, 13, 12)))
        sum((t.square().sum() for t in found), start=torch.zeros(())).backward()
        optimizer.step()
    return [*(t.detach() for t in found), *(p.detach() for p in layer.parameters())]


@pytest.mark.parametrize(("kind", "random"), PAIRS)
def test_the_same_seed_gives_the_same_bits_with_any_number_of_threads(
    kind: str, random: str
) -> None:
    """And with and without deterministic algorithms, which conftest.py asks for."""
    expected = train(kind, RANDOM[random])
    for threads, deterministic in ((1, False), (2, True), (3, True), (4, True)):
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        found = train(kind, RANDOM[random])
        assert all(map(torch.equal, found, expected)), (threads, deterministic)


def test_python_threads_train_at_once() -> None:
    """Each its own layer or cell, all kinds at the same time, values and gradients."""
    jobs = list(EVERY) * 3

    def gradients(kind: str) -> list[Tensor]:
        module = modules[kind]
        parameters = list(module.parameters())
        total = loss(module)
        return [total.detach(), *torch.autograd.grad(total, parameters, allow_unused=True)]

    modules = {kind: build() for kind, build in EVERY.items()}
    expected = {kind: gradients(kind) for kind in EVERY}
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(gradients, jobs))
    for kind, ours in zip(jobs, found, strict=True):
        assert all(map(torch.equal, ours, expected[kind])), kind


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_over_2000_steps() -> None:
    """Every layer and cell, an optimizer, and calls of changing shapes."""
    modules = [build() for build in EVERY.values()]
    optimizers = [torch.optim.SGD(module.parameters(), 1e-4) for module in modules]
    layer = fused_rnn.LSTM(5, 16, dropout=0.0, zoneout=0.1, recompute=True)

    def steps(count: int) -> None:
        for k in range(count):
            module, optimizer = modules[k % len(modules)], optimizers[k % len(modules)]
            optimizer.zero_grad()
            loss(module).backward()
            optimizer.step()
            layer(torch.ones(1 + k % 7, 1 + k % 5, 5))[0].sum().backward()

    steps(200)
    gc.collect()
    before = resident_kib()
    steps(2000)
    gc.collect()
    # The smallest leak of one page per step would be 8000 KiB.
    assert resident_kib() - before < 4 * 1024


INTERRUPTED = """
import os, signal, threading, time
import torch, fused_rnn
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
torch.set_num_threads(1)
torch.manual_seed(0)
layer, small = fused_rnn.LSTM(64, 256), torch.randn(3, 2, 64)
T = 200
while True:  # until a call lasts long enough to be interrupted in the middle
    input = torch.randn(T, 32, 64)
    start = time.perf_counter()
    layer(input)
    seconds = time.perf_counter() - start
    if seconds > 0.3:
        break
    T *= 2
expected = [small, *torch.autograd.grad(layer(small)[0].sum(), list(layer.parameters()))]
for backward in (False, True):
    output = layer(input)[0].sum()
    timer = threading.Timer(seconds / 3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        output.backward() if backward else layer(input)
        time.sleep(5)  # where the interrupt came too late for the call
        raise SystemExit("no interrupt")
    except KeyboardInterrupt:
        print("interrupted")
    timer.join()
    layer.zero_grad()
    found = [small, *torch.autograd.grad(layer(small)[0].sum(), list(layer.parameters()))]
    assert all(map(torch.equal, found, expected))
    whole = layer(input)[0]
    assert torch.equal(whole[:5], layer(input[:5])[0]) and whole.isfinite().all()
"""


def test_an_interrupt_during_a_call_leaves_a_process_that_computes() -> None:
    """The interrupt is raised when the call returns, forward or backward."""
    assert output_of(INTERRUPTED).split() == ["interrupted"] * 2

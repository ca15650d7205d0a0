"""Threads, processes, instruction sets and memory around the layers."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from layers import KINDS, flatten, make
from processes import output_of
from torch import Tensor, nn

import fused_rnn
from fused_rnn import ops

each_kind = pytest.mark.parametrize("kind", KINDS)


def train_step(layer: nn.Module, input: Tensor) -> list[Tensor]:
    outputs = flatten(layer(input))
    return [*outputs, *torch.autograd.grad(outputs[0].sum(), list(layer.parameters()))]


@each_kind
@pytest.mark.parametrize("threads", [1, 2])
def test_python_threads_share_a_layer(kind: str, threads: int) -> None:
    torch.set_num_threads(threads)
    layer = make(fused_rnn, kind, 16, 40, 2, bidirectional=True)
    inputs = [torch.randn(10, 9, 16) for _ in range(8)]
    expected = [train_step(layer, input) for input in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda input: train_step(layer, input), inputs))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_the_interpreter_runs_on_during_a_call() -> None:
    """The lock is released: another Python thread makes progress while the kernel works."""
    torch.set_num_threads(1)
    layer = fused_rnn.LSTM(64, 256)
    input = torch.randn(400, 16, 64)
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.001):
            ticks += 1

    with torch.no_grad():
        layer(input)
        thread = threading.Thread(target=tick)
        thread.start()
        before = ticks
        layer(input)
        during = ticks - before
        stop.set()
        thread.join()
    assert during > 0


FORK = """
import os, torch, fused_rnn
layer, input = fused_rnn.GRU(16, 200, 2, bidirectional=True), torch.randn(20, 8, 16)
def step():
    layer.zero_grad()
    layer(input)[0].sum().backward()
    return [p.grad.clone() for p in layer.parameters()]
torch.set_num_threads(2)
expected = step()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if all(map(torch.equal, step(), expected)) else 1)
assert os.waitpid(child, 0)[1] == 0
assert all(map(torch.equal, step(), expected))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_after_its_parent_did() -> None:
    output_of(FORK)


class Rows(torch.utils.data.Dataset[Tensor]):
    """A data set that runs a layer in the worker."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.layer(torch.full((5, 3), float(index)))[0]
        return output


def test_workers_of_a_data_loader() -> None:
    layer = fused_rnn.LSTM(3, 8)
    layer(torch.randn(5, 3))
    rows = Rows(layer)
    loader = torch.utils.data.DataLoader(rows, num_workers=2)
    for k, row in enumerate(loader):
        torch.testing.assert_close(row[0], rows[k])


@each_kind
def test_nothing_outlives_its_last_reference(kind: str) -> None:
    """No reference cycle keeps a layer, an output or the saved tensors until the collector runs."""
    gc.collect()
    gc.disable()
    try:
        layer = make(fused_rnn, kind, 5, 7, 2)
        output = layer(torch.randn(4, 3, 5, requires_grad=True))[0]
        output.sum().backward(retain_graph=True)
        dead = [weakref.ref(layer), weakref.ref(output), weakref.ref(output.grad_fn)]
        del layer, output
        assert [ref() for ref in dead] == [None, None, None]
    finally:
        gc.enable()


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow() -> None:
    layer = fused_rnn.LSTM(8, 64, 2, bidirectional=True)
    input = torch.randn(20, 8, 8)
    for _ in range(100):
        train_step(layer, input)
    before = resident_kib()
    for _ in range(300):
        train_step(layer, input)
    # One leaked `saved` of 300 calls would be 4 x 160 x 384 floats, 280 MB in all.
    assert resident_kib() - before < 8 * 1024


def answers() -> list[Tensor]:
    """What the children below compute: every layer, forward and backward, odd sizes."""
    torch.manual_seed(0)
    results: list[Tensor] = []
    for kind in KINDS:
        layer = make(fused_rnn, kind, 13, 37, 2, bidirectional=True)
        results += train_step(layer, torch.randn(6, 9, 13))
    return results


@pytest.mark.parametrize("isa", fused_rnn._C.compiled_isas())
def test_every_instruction_set_gives_the_same_answers(isa: str, tmp_path: Path) -> None:
    if not supported(isa):
        pytest.skip("this processor does not have it")
    path = tmp_path / "answers.pt"
    code = (
        "import torch, test_environment as t, fused_rnn;"
        f"assert fused_rnn._C.isa() == {isa!r}, fused_rnn._C.isa();"
        f"torch.save(t.answers(), {str(path)!r})"
    )
    output_of(code, ATEN_CPU_CAPABILITY="default" if isa == "baseline" else isa)
    torch.testing.assert_close(torch.load(path), answers(), rtol=1e-5, atol=1e-5)


def supported(isa: str) -> bool:
    """Whether it is no wider than what this process, capped or not, has chosen."""
    widest_first = fused_rnn._C.compiled_isas()
    return widest_first.index(isa) >= widest_first.index(fused_rnn._C.isa())


def test_results_are_the_same_in_another_process() -> None:
    code = "import test_environment as t; print([x.double().sum().item() for x in t.answers()])"
    assert output_of(code).strip() == str([x.double().sum().item() for x in answers()])


@each_kind
@pytest.mark.parametrize("relay", ["strided", "unaligned"])
def test_strange_memory_under_weights_and_input(kind: str, relay: str) -> None:
    def move(tensor: Tensor) -> Tensor:
        if relay == "strided":
            return torch.stack([tensor, tensor], -1)[..., 0]
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    layer = make(fused_rnn, kind, 5, 7)
    input = torch.randn(4, 3, 5)
    expected = train_step(layer, input)
    for parameter in layer.parameters():
        parameter.data = move(parameter.data)
    assert all(map(torch.equal, train_step(layer, move(input)), expected))


def test_kept_memory_is_bounded_and_given_back() -> None:
    layer = fused_rnn.LSTM(64, 256)
    for T in (40, 300, 90):
        layer(torch.randn(T, 16, 64))[0].sum().backward()
    assert 1 << 20 < ops._C.cached_bytes() <= 256 << 20
    fused_rnn.empty_cache()
    assert ops._C.cached_bytes() == 0

"""The conditions of every test: a fixed seed, poisoned memory, torch's settings put back."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before the import, which reads it.
os.environ.setdefault("FUSED_RNN_CUDA_KERNELS", "1")

import hypothesis
import pytest
import scans
import torch

from fused_rnn import ops

# cuBLAS is deterministic with it only, and torch insists.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

hypothesis.settings.register_profile(
    "default", max_examples=30, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated", action="store_true", help="layers are served by the emulated CUDA kernels"
    )


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.config.getoption("--emulated"):
        serve_by_emulator(monkeypatch)


@pytest.fixture(autouse=True)
def conditions() -> Iterator[None]:
    """Seed 0; new memory, torch's and ours, is NaN, so that what a kernel leaves unwritten is seen.

    One thread unless a test wants more: on a busy machine OpenMP's waiting takes minutes.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    log = logging.getLogger("fused_rnn")
    level = log.level
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    if ops.available:
        ops._C.poison_new_memory(True)
    yield
    if ops.available:
        ops._C.poison_new_memory(False)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    log.setLevel(level)  # no call is plain while somebody reads along


@pytest.fixture(params=["emu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[scans.Backend]:
    """The CUDA kernels, executed on the host and on a GPU: `scans.ops` are theirs, and what
    serves layers."""
    name: str = request.param
    if name == "emu":
        serve_by_emulator(monkeypatch)
    elif not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    elif not ops.has_cuda:
        pytest.skip(f"there are no CUDA kernels: {ops.cuda_off}")
    scans.ops.backend = scans.BACKENDS[name]
    yield scans.ops.backend
    scans.ops.backend = scans.BACKENDS["cpu"]


def serve_by_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and cells ask the emulated ops, and nothing goes past them."""
    load_emulator()
    for op in ("inference", "forward", "backward"):
        own = "" if op == "inference" else "_"
        packet = getattr(torch.ops.fused_rnn_emu, op)
        monkeypatch.setattr(ops, own + op, packet.default)
        monkeypatch.setattr(ops, f"{own}{op}_controlled", packet.controlled)
    for direct in ("call", "_plain_backward"):
        monkeypatch.setattr(ops, direct, lambda *_: None)


def load_emulator() -> None:
    """The library of the emulated kernels; FUSED_RNN_EMULATOR=1 when building makes it."""
    flavour = "sanitize" if os.environ.get("FUSED_RNN_SANITIZE", "0") != "0" else "release"
    root = Path(__file__).resolve().parent.parent
    found = sorted(map(str, root.glob(f"build/*-{flavour}/libfused_rnn_emu.so")))
    found += filter(None, [os.environ.get("FUSED_RNN_EMULATOR_LIBRARY")])
    if not found:
        message = "the emulator is not built: FUSED_RNN_EMULATOR=1 python setup.py build_ext"
        if os.environ.get("FUSED_RNN_STRICT") == "1":
            pytest.fail(message)
        pytest.skip(message)
    torch.ops.load_library(found[-1])

"""CUDA kernels where there is no GPU: every file compiles for every architecture, without a
warning, a spill or local memory, and within its registers. What they compute is for tests/emu.
"""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import run
from toolkit import BENCHMARK, ROOT, made, nvcc, tool

ARCHITECTURES = ["80", "90a", "100"]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Every cell as device code, and every word of the vocabulary.
SOURCES += [ROOT / "tests" / "csrc" / "compile_cells.cu", ROOT / "tests" / "emu" / "conformance.cu"]
SOURCES += [BENCHMARK]
# What has no words of its own for any, and what is for one only.
ONE_ARCHITECTURE = {"compile_cells": "80", "exchange": "90a"}
FLAGS = [
    *("-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emu'}"),
    *("-Werror", "all-warnings"),
    *("-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage,-Werror"),
]
# With 128 registers an SM holds 512 threads. FUSED_RNN_LAUNCH_BOUNDS says what a kernel may have;
# without it ptxas unrolls for one architecture what it leaves alone for another.
REGISTERS = 128

KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)
INSTRUCTIONS = {"mma_m16n8k16": "HMMA.16816", "mma_m16n8k8": "HMMA.1688", "mma_m8n8k4": "DMMA"}

Compiled = dict[Path, Future[tuple[Path, str]]]


def architectures(source: Path) -> list[str]:
    one = ONE_ARCHITECTURE.get(source.stem)
    return [one] if one else ARCHITECTURES


each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """source -> the object file, and what ptxas said of its kernels."""
    compiler = nvcc()

    def compile_source(source: Path) -> tuple[Path, str]:
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures(source)]
        return made(f"{source.stem}-cuda.o", compiler, *FLAGS, *codes, "-c", source)

    # Each is waited for by its own tests, and fails them alone.
    pool = ThreadPoolExecutor(2)
    return {source: pool.submit(compile_source, source) for source in SOURCES}


@each_source
def test_kernels_fit_their_registers(compiled: Compiled, source: Path) -> None:
    kernels = KERNEL.findall(compiled[source].result()[1])
    found = {architecture for _, architecture, *_ in kernels}
    assert found == {f"sm_{a}" for a in architectures(source)}
    names = dict(zip(kernels, run("c++filt", *(k[0] for k in kernels)).splitlines(), strict=True))
    too_many = []
    for kernel, name in names.items():
        _, architecture, *memory, registers = kernel
        assert memory == ["0", "0", "0"], f"{name} on {architecture} uses local memory: {memory}"
        # Of the persistent kernels an SM has one block, of 256 threads.
        if int(registers) > (255 if "::persistent_" in name else REGISTERS):
            too_many.append(f"{name} on {architecture}: {registers} registers")
    assert not too_many, "\n".join(too_many)


def included(source: Path) -> str:
    """The text of a file and of what it includes of csrc/cuda, but for the vocabulary itself."""
    text = source.read_text()
    for name in re.findall(r'#include "(?:cuda/)?(\w+\.cuh)"', text):
        header = ROOT / "csrc" / "cuda" / name
        if header.exists() and name != "platform.cuh":
            text += included(header)
    return text


@each_source
def test_instructions(compiled: Compiled, source: Path) -> None:
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("this CUDA toolkit has no cuobjdump")
    # The kernels with products are for float.
    text = "" if source.stem == "cells_double" else included(source)
    for architecture in architectures(source):
        listing = run(
            cuobjdump, "-sass", "-arch", f"sm_{architecture}", compiled[source].result()[0]
        )
        assert "EXIT" in listing
        assert not re.search(r"\b(LDL|STL)\b", listing)
        for word, instruction in INSTRUCTIONS.items():
            assert (word in text) == (instruction in listing), f"{instruction} on sm_{architecture}"

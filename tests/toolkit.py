"""CUDA's compiler and headers, and programs kept from one run of the tests to the next."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import run

ROOT = Path(__file__).parent.parent
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
CXX = shlex.split(os.environ.get("CXX", "c++"))
# What a program of tests/emu is made of.
SOURCES = [ROOT / "csrc" / "core", ROOT / "csrc" / "cells", ROOT / "csrc" / "cuda"]
SOURCES += [ROOT / "tests" / "emu", ROOT / "tests" / "csrc"]
BENCHMARK = ROOT / "benchmarks" / "exchange.cu"


def nvcc() -> str:
    """The compiler; without one the test is skipped."""
    found = shutil.which("nvcc", path=CUDA_HOME / "bin") or shutil.which("nvcc")
    return found or pytest.skip(f"there is no nvcc on PATH or in {CUDA_HOME / 'bin'}")


def tool(name: str) -> str | None:
    """Another program of the toolkit, which may come without it."""
    return shutil.which(name, path=CUDA_HOME / "bin") or shutil.which(name)


def has_gpu() -> bool:
    """Whatever torch was built for."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def headers() -> Path:
    """CUDA's headers; without them the test is skipped."""
    folder = CUDA_HOME / "include"
    if not (folder / "cuda_bf16.h").exists():
        pytest.skip(f"CUDA's headers are not in {folder}; CUDA_HOME says where they are")
    return folder


def contents() -> bytes:
    """Everything that a program or kernel can be compiled from."""
    files = sorted(file for folder in SOURCES for file in folder.iterdir() if file.is_file())
    files.append(BENCHMARK)
    return b"".join(f"\n{file}\n".encode() + file.read_bytes() for file in files)


def made(target: str, *command: str | Path) -> tuple[Path, str]:
    """The file that command -o makes, and what was said; made anew when something has changed."""
    said = shlex.join(map(str, command))
    tag = hashlib.sha256(said.encode() + b"\0" + contents()).hexdigest()[:16]
    file = ROOT / "build" / "tests" / f"{target}-{tag}"
    words = file.with_name(f"{file.name}.txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.parent / f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests may be making it
        if words.exists():
            return file, words.read_text()
        for stale in file.parent.glob(f"{target}-{'?' * 16}*"):
            stale.unlink()
        output = run(*command, "-o", file)
        words.write_text(output)
    return file, words.read_text()


def emulated(source: Path, *flags: str) -> list[str | Path]:
    """The command that compiles a file of csrc/cuda or tests/emu for the emulator."""
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emu'}", "-isystem", headers()]
    strict = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-DFUSED_RNN_EMULATE"]
    return [*CXX, *strict, *flags, *include, "-x", "c++", "-c", source]


def native(target: str, sources: Sequence[Path], *flags: str) -> Path:
    """A program for the GPU of this machine."""
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emu'}"]
    command = [nvcc(), "-std=c++20", "-O3", "-arch=native", "-cudart=static", *include]
    return made(target, *command, *flags, *sources)[0]

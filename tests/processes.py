"""Other programs, and fresh interpreters for what cannot be tried in this one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path


def run(*command: str | Path, **environment: str) -> str:
    """Run a program and return its output; a failure shows it."""
    # A sanitizer preloaded for the library is not for compilers.
    inherited = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=inherited | environment,
    )
    assert done.returncode == 0, f"{shlex.join(done.args)}\n{done.stdout}"
    return done.stdout


def interpreter(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python arguments` with the import path of this process."""
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | path | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def torchrun(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`torchrun` with two processes on this machine."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    return interpreter(*launch, script, *arguments, OMP_NUM_THREADS="1")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return interpreter("-c", code, **environment)


def output_of(code: str, **environment: str) -> str:
    """What `code` prints; it must succeed."""
    process = python(code, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout

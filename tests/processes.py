"""Fresh interpreters for what cannot be tried in this one."""

from __future__ import annotations

import os
import subprocess
import sys


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
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
    return run(*launch, script, *arguments, OMP_NUM_THREADS="1")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("-c", code, **environment)


def output_of(code: str, **environment: str) -> str:
    """What `code` prints; it must succeed."""
    process = python(code, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout

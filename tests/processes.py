"""Fresh interpreters for what cannot be tried in this one."""

from __future__ import annotations

import os
import subprocess
import sys


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the import path of this process."""
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | path | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def output_of(code: str, **environment: str) -> str:
    """What `code` prints; it must succeed."""
    process = python(code, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout

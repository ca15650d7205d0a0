"""Two gloo processes: what tests/two_processes.py found out, check by check."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import two_processes
from processes import torchrun

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch is built without gloo",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for each check and process, empty where it passed. One launch for all of them."""
    folder = tmp_path_factory.mktemp("two_processes") / "outcomes"
    folder.mkdir()
    process = torchrun(two_processes.__file__, str(folder))
    assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.parametrize("name", two_processes.CHECKS)
def test_two_processes(name: str, outcomes: Path) -> None:
    for rank in range(2):
        outcome = (outcomes / f"{name}.{rank}").read_text()
        assert not outcome, f"process {rank}: {outcome}"

"""`python -m fused_rnn.info` tells the truth about the library, and notices when it is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fused_rnn
from fused_rnn import info, ops

needs_library = pytest.mark.skipif(not ops.available, reason=str(ops.unavailable_reason))


def section(text: str, title: str) -> dict[str, str]:
    """The rows under a title."""
    (block,) = (b for b in text.split("\n\n") if b.strip().startswith(title))
    rows = (line.strip().split("  ", 1) for line in block.strip().splitlines()[1:])
    return {name: value.strip() for name, value in rows}


@needs_library
def test_says_what_runs_and_ends_with_ok(capsys: pytest.CaptureFixture[str]) -> None:
    from fused_rnn import _C

    assert info.main() == 0
    text = capsys.readouterr().out
    assert text.endswith("\nOK\n")
    assert section(text, "running with")["torch"] == torch.__version__
    kernels = section(text, "running with")["CUDA kernels"]
    assert kernels == "on" or re.match("off: (this torch|built with|.*nvcc)", kernels)
    assert section(text, "library")["chosen"] == _C.isa()
    assert section(text, "library")["compiler"] == _C.build_info()["compiler"]
    assert len(section(text, "how threads share")) == len(info.SHAPES)
    assert len(section(text, "forward and backward")) == len(info.LAYERS)


@needs_library
@pytest.mark.parametrize(("name", "chosen"), [("default", "baseline"), ("AVX2", "avx2")])
def test_instruction_set_is_capped_by_aten_cpu_capability(name: str, chosen: str) -> None:
    from fused_rnn import _C

    if chosen not in _C.compiled_isas() or "avx" not in _C.isa():
        pytest.skip(f"this machine has no {chosen}, or a cap already")
    ran = subprocess.run(
        [sys.executable, "-m", "fused_rnn.info"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert section(ran.stdout, "library")["chosen"] == chosen


def test_every_route_is_named() -> None:
    found = info.routes("cpu")
    named = [row.split(maxsplit=1)[0] for row, _ in found]
    assert set(named) == {"LSTM", "GRU", "RNN"}
    assert all(route and not route.startswith("fails") for _, route in found)


@pytest.mark.parametrize("damage", [1e-4, float("nan")])
def test_a_wrong_layer_fails_the_self_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: float
) -> None:
    forward = fused_rnn.GRU.forward

    def damaged(self: fused_rnn.GRU, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, h_n = forward(self, x, hx)
        return output, h_n + damage

    monkeypatch.setattr(fused_rnn.GRU, "forward", damaged)
    assert info.main() == 1
    text = capsys.readouterr().out
    checks = section(text, "forward and backward")
    assert [name for name, check in checks.items() if "WRONG" in check] == ["GRU"]
    assert text.endswith("\nFAILED\n")


def test_a_missing_library_is_named_and_the_reference_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "available", False)
    monkeypatch.setattr(ops, "unavailable_reason", "no compiler was there")
    assert info.main() == 0
    text = capsys.readouterr().out
    assert section(text, "library") == {"missing": "no compiler was there"}
    assert text.endswith("\nOK\n")

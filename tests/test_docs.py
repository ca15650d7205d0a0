"""The Python in the documents runs as it stands: each block by itself, as if pasted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/with_pytorch.md")


def blocks() -> list[tuple[str, int, str]]:
    """Page, line and text of every block that is marked as Python."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found += [
            (page, text.count("\n", 0, match.start(1)) + 1, match[1])
            for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        ]
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Anomaly Detection")
@pytest.mark.parametrize(
    ("page", "line", "code"), [pytest.param(*b, id=f"{b[0]}:{b[1]}") for b in blocks()]
)
def test_the_block_runs(page: str, line: int, code: str) -> None:
    torch._dynamo.reset()
    # The line numbers of a traceback are those of the page.
    exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_overlooked(page: str) -> None:
    fences = (ROOT / page).read_text(encoding="utf-8").count("```python")
    assert fences == sum(where == page for where, _, _ in blocks()) > 0

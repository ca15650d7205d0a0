"""Peak memory of a training step, of fused_rnn and of torch.nn.

What is counted: by how much the resident set of a process grows at most, from just before a forward
and a backward call until just after. That is the output, what is saved for backward, workspaces,
gradients of the input and of every weight, and whatever a library keeps; not the weights, the
input and the gradient of the output, which were there before. Pages count, not bytes: memory that
is asked for and never touched is not there, and a huge page is 2 MiB from its first byte. The
kernel's count of the peak is off by some hundred KiB, so small shapes say little.

Every number comes from a process of its own, which has only done a tiny step before (threads,
code, the libraries' tables). What that left free, in our cache of blocks and in malloc's arenas,
is given back first: the step would use it again without growing.

In the shapes called "recompute" (suite "conditions") our layer has recompute=True.
"""

from __future__ import annotations

import ctypes
import gc
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import fused_rnn
from fused_rnn.bench import sides, work
from fused_rnn.bench.shapes import Shape


@dataclass(frozen=True)
class Memory:
    """MiB by which a training step makes the process grow."""

    shape: Shape
    threads: int
    dtype: str
    torch_mib: float
    fused_mib: float

    @property
    def ratio(self) -> float:
        """Ours over torch.nn's; of nothing, which is less than a page, there is none."""
        return self.fused_mib / self.torch_mib if self.torch_mib else math.nan

    def __str__(self) -> str:
        return f"{self.fused_mib:.1f} of {self.torch_mib:.1f} MiB, {self.shape.label}"


def measure_all(shapes: Sequence[Shape], threads: Sequence[int], dtype: str) -> Iterator[Memory]:
    for count in threads:
        for shape in shapes:
            fused_mib, torch_mib = (_alone(name, shape, count, dtype) for name in work.LIBRARIES)
            yield Memory(shape, count, dtype, torch_mib, fused_mib)


def _alone(library: str, shape: Shape, threads: int, dtype: str) -> float:
    with sides.process(threads) as worker, sides.named(f"{shape.label}, memory of {library}"):
        return worker.submit(growth, library, shape, dtype).result()


def growth(library: str, shape: Shape, dtype: str) -> float:
    """MiB by which this process grows in a training step of this shape."""
    module = work.LIBRARIES[library]
    tiny = replace(shape, T=min(shape.T, 2), B=min(shape.B, 2), I=8, H=8)
    work.evaluate(*work.make(module, tiny, "training", dtype))

    layer, arguments = work.make(module, shape, "training", dtype)
    if shape.name == "recompute" and module is fused_rnn:
        layer.recompute = True  # type: ignore[assignment]
    step = work.timer(layer, arguments)
    gc.collect()
    fused_rnn.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is what is there
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """KiB, from what the kernel says of this process."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1])

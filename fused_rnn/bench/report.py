"""What a benchmark leaves behind: CSV, tables, summaries and comparisons."""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

import fused_rnn
from fused_rnn import ops
from fused_rnn.bench.measure import TORCH, Result
from fused_rnn.bench.shapes import Shape


@dataclass(frozen=True)
class Environment:
    machine: str
    torch: str
    fused_rnn: str
    isa: str
    date: str
    command: str
    peers: str = ""  # names and versions of those other than torch.nn

    @classmethod
    def here(
        cls, command: str, machine: str | None = None, peers: Iterable[str] = ()
    ) -> Environment:
        return cls(
            machine=machine or f"{_cpu_model()}, {os.cpu_count()} CPUs",
            torch=torch.__version__,
            fused_rnn=fused_rnn.__version__,
            isa=_isa(),
            date=datetime.now().isoformat(timespec="seconds"),
            command=command,
            peers=", ".join(f"{peer} {metadata.version(peer)}" for peer in peers if peer != TORCH),
        )

    @property
    def versions(self) -> str:
        ours = f"fused_rnn {self.fused_rnn} ({self.isa})"
        return ", ".join(filter(None, (ours, f"torch {self.torch}", self.peers)))

    @property
    def slug(self) -> str:
        device = re.sub(r"[^a-z0-9]+", "-", self.machine.lower()).strip("-")
        return f"{self.date[:10]}-{device}"


def _isa() -> str:
    if not ops.available:
        return "library not built"
    from fused_rnn import _C

    return _C.isa()


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


# CSV: one line per measurement, with the shape and the environment beside it.


class Writer:
    """Writes every result at once, so that an interrupted run leaves what it has."""

    def __init__(self, file: TextIO, environment: Environment) -> None:
        names = [f.name for f in (*fields(Shape), *fields(Result), *fields(Environment))]
        names.remove("shape")
        self._file = file
        self._environment = asdict(environment)
        self._writer = csv.DictWriter(file, names, lineterminator="\n")
        self._writer.writeheader()

    def write(self, result: Result) -> None:
        values = asdict(result)
        self._writer.writerow(values.pop("shape") | values | self._environment)
        self._file.flush()


def read(path: Path) -> tuple[Environment, list[Result]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no measurements")
    if "torch_ms" in rows[0]:  # written when torch.nn was the only peer
        rows = [row | {"peer": TORCH, "peer_ms": row["torch_ms"]} for row in rows]
    results = [Result(shape=Shape(**_values(Shape, row)), **_values(Result, row)) for row in rows]
    return Environment(**_values(Environment, rows[0])), results


def _values(cls: type[Any], row: dict[str, str]) -> dict[str, Any]:
    parse: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "bool": "True".__eq__,
        "str": str,
    }
    return {
        f.name: parse[str(f.type)](row[f.name])
        for f in fields(cls)
        if f.type in parse and f.name in row
    }


# Tables: lists of strings, shown by rich on a terminal and as Markdown in a file.


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: tuple[str, ...] = ("shape",)  # the columns of words; the others are numbers

    def markdown(self) -> str:
        rule = ["---" if name in self.words else "---:" for name in self.header]
        lines = (" | ".join(row) for row in (self.header, rule, *self.rows))
        return f"### {self.title}\n\n" + "".join(f"| {line} |\n" for line in lines)


def measurements(results: Iterable[Result]) -> list[Table]:
    """A table for each number of threads, mode and peer."""
    tables: dict[tuple[int, str, str], Table] = {}
    for r in results:
        title = f"{r.mode}, {threads(r.threads)}, against {r.peer}"
        header = ("shape", f"{r.peer} ms", "fused_rnn ms", "speed-up", "of the roof")
        table = tables.setdefault((r.threads, r.mode, r.peer), Table(title, header, []))
        speedup = f"{r.speedup:.2f}x [{r.q25:.2f}-{r.q75:.2f}]"
        of_roof = "-" if math.isnan(r.of_roof) else f"{r.of_roof:.0%}"
        table.rows.append((r.shape.label, _ms(r.peer_ms), _ms(r.fused_ms), speedup, of_roof))
    return [tables[key] for key in sorted(tables, key=lambda key: key[:2])]


def threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def names(peers: Iterable[str]) -> str:
    """Each once, in order, as a sentence has them."""
    *most, last = dict.fromkeys(peers)
    return f"{', '.join(most)} and {last}" if most else last


def summary(results: Sequence[Result]) -> Table:
    groups: dict[tuple[str, str, int, str], list[Result]] = {}
    for r in results:
        groups.setdefault((r.shape.family, r.mode, r.threads, r.peer), []).append(r)
    rows: list[tuple[str, ...]] = []
    for (family, mode, number, peer), group in groups.items():
        worst = min(group, key=lambda r: r.speedup)
        mean = statistics.geometric_mean(r.speedup for r in group)
        rows.append(
            (
                family,
                mode,
                str(number),
                peer,
                str(len(group)),
                f"{mean:.2f}x",
                f"{worst.speedup:.2f}x",
                worst.shape.label,
            )
        )
    header = ("cell", "mode", "threads", "peer", "shapes", "geometric mean", "worst", "worst shape")
    title = f"Speed-up over {names(r.peer for r in results)}"
    return Table(title, header, rows, ("cell", "mode", "peer", "worst shape"))


def comparison(results: Iterable[Result], old: Iterable[Result]) -> Table:
    """`change` is the old time of fused_rnn over the new one: above 1 it became faster."""
    before = {_key(r): r for r in old}
    rows: list[tuple[str, ...]] = []
    changes = []
    for r in results:
        if (then := before.get(_key(r))) is None:
            continue
        changes.append(then.fused_ms / r.fused_ms)
        rows.append(
            (
                r.shape.label,
                r.mode,
                str(r.threads),
                r.peer,
                _ms(then.fused_ms),
                _ms(r.fused_ms),
                f"{changes[-1]:.2f}x",
                f"{then.speedup:.2f}x",
                f"{r.speedup:.2f}x",
            )
        )
    title = f"{len(rows)} measurements in common with the older run"
    if changes:
        title += f", change {statistics.geometric_mean(changes):.2f}x in the geometric mean"
    compared = ("shape", "mode", "threads", "peer")
    header = (*compared, "old ms", "new ms", "change", "old speed-up", "new")
    return Table(title, header, rows, ("shape", "mode", "peer"))


def _key(r: Result) -> tuple[Shape, str, int, str, str]:
    return r.shape, r.mode, r.threads, r.dtype, r.peer


def slower(results: Iterable[Result], limit: float) -> list[Result]:
    return [r for r in results if r.speedup < limit]


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(
    results: Sequence[Result], environment: Environment, failures: Sequence[str], plot: str | None
) -> str:
    """The page for people: what was measured on which machine, the summary, every row."""
    dtypes = ", ".join(sorted({r.dtype for r in results}))
    peers = names(r.peer for r in results)
    parts = [
        f"# fused_rnn against {peers}, {environment.date[:10]}\n",
        f"{environment.machine}; {environment.versions}; {dtypes}.\n\n"
        f"    {environment.command}\n\n"
        "Time of one call of the layer: median of calls made in turn with the peer's; with "
        "torch.nn's in one process, with others' in one process each. Speed-up is the peer's time "
        "over fused_rnn's, with its quartiles over the pairs of calls. Training is a forward and a "
        "backward call. Every row was first checked for equal results. Of the roof: the least time "
        "that this machine's arithmetic and caches allow, over fused_rnn's.\n",
    ]
    if failures:
        parts.append("**No numbers, because the results differ:**\n")
        parts.append("".join(f"- {failure}\n" for failure in failures))
    if plot:
        parts.append(f"![speed-up per shape]({plot})\n")
    parts += [table.markdown() for table in (summary(results), *measurements(results))]
    return "\n".join(parts)

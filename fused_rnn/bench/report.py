"""What a benchmark leaves behind: CSV, tables, summaries and comparisons."""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import torch

import fused_rnn
from fused_rnn import ops
from fused_rnn.bench import conditions, gpu_peers, peers
from fused_rnn.bench.conditions import Condition
from fused_rnn.bench.measure import TORCH, Result
from fused_rnn.bench.memory import Memory
from fused_rnn.bench.shapes import Shape

# What a line of a file says; the lines of one file say the same.
Record = Result | Condition | Memory
KINDS = (Result, Condition, Memory)


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
        cls, command: str, machine: str | None = None, against: Iterable[str] = ()
    ) -> Environment:
        return cls(
            machine=machine or f"{_cpu_model()}, {os.cpu_count()} CPUs",
            torch=torch.__version__,
            fused_rnn=fused_rnn.__version__,
            isa=_isa(),
            date=datetime.now().isoformat(timespec="seconds"),
            command=command,
            peers=", ".join(
                f"{peer} {library.version(peer)}"
                for peer in against
                for library, known in ((peers, peers.BUILDERS), (gpu_peers, gpu_peers.LIBRARIES))
                if peer in known
            ),
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

    def __init__(self, file: TextIO, environment: Environment, kind: type[Record]) -> None:
        names = [f.name for f in (*fields(Shape), *fields(kind), *fields(Environment))]
        names.remove("shape")
        self._file = file
        self._environment = asdict(environment)
        self._writer = csv.DictWriter(file, names, lineterminator="\n")
        self._writer.writeheader()

    def write(self, record: Record) -> None:
        values = asdict(record)
        self._writer.writerow(values.pop("shape") | values | self._environment)
        self._file.flush()


def read(path: Path) -> tuple[Environment, list[Record]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no measurements")
    if "torch_ms" in rows[0]:  # written when torch.nn was the only peer
        rows = [row | {"peer": TORCH, "peer_ms": row["torch_ms"]} for row in rows]
    for kind in KINDS:
        if _required(kind) <= rows[0].keys() | {"shape"}:
            break
    else:
        raise ValueError(f"{path} is no file of this benchmark")
    records = [kind(shape=Shape(**_values(Shape, row)), **_values(kind, row)) for row in rows]
    return Environment(**_values(Environment, rows[0])), records


def _required(kind: type[Record]) -> set[str]:
    return {f.name for f in fields(kind) if f.default is MISSING}


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


def details(records: Iterable[Record]) -> list[Table]:
    """Every record, in tables of those that belong together."""
    records = list(records)
    return [
        *measurements(r for r in records if isinstance(r, Result)),
        *disturbed(r for r in records if isinstance(r, Condition)),
        *memories(r for r in records if isinstance(r, Memory)),
    ]


def measurements(results: Iterable[Result]) -> list[Table]:
    """A table for each number of threads, mode and peer."""
    tables: dict[tuple[int, str, str], Table] = {}
    for r in results:
        title = f"{r.mode}, {threads(r.threads)}, against {r.peer}"
        sides = f"{r.peer} ms", "fused_rnn ms"
        header = ("shape", *sides, "speed-up", f"{r.peer} of the roof", "fused_rnn of the roof")
        table = tables.setdefault((r.threads, r.mode, r.peer), Table(title, header, []))
        speedup = f"{r.speedup:.2f}x [{r.q25:.2f}-{r.q75:.2f}]"
        of_roof = known(r.peer_of_roof, ".0%"), known(r.of_roof, ".0%")
        label = ", ".join(filter(None, (r.shape.label, r.schedule)))
        table.rows.append((label, _ms(r.peer_ms), _ms(r.fused_ms), speedup, *of_roof))
    return [tables[key] for key in sorted(tables, key=lambda key: key[:2])]


def known(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


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


def disturbed(records: Iterable[Condition]) -> list[Table]:
    """A table for each kind of condition."""
    tables: dict[str, Table] = {}
    header = ("shape", "mode", "threads", "case", "ordinary ms", "ms", "ratio", "", "torch.nn's")
    for r in records:
        kind = conditions.KINDS[r.shape.name]
        title = f"{r.shape.name}: {kind.words}; at most {kind.limit:g}x"
        words = ("shape", "mode", "case", "")
        table = tables.setdefault(r.shape.name, Table(title, header, [], words))
        table.rows.append(
            (
                r.shape.label,
                r.mode,
                str(r.threads),
                r.case,
                _ms(r.base_ms),
                _ms(r.ms),
                f"{r.ratio:.2f}x [{r.q25:.2f}-{r.q75:.2f}]",
                "exceeded" if r.ratio > r.limit else "",
                "-" if math.isnan(r.torch_ratio) else f"{r.torch_ratio:.2f}x",
            )
        )
    return list(tables.values())


def memories(records: Iterable[Memory]) -> list[Table]:
    """A table for each number of threads."""
    tables: dict[int, Table] = {}
    header = ("shape", "torch.nn MiB", "fused_rnn MiB", "ratio")
    for r in records:
        title = f"Peak memory of a training step, {threads(r.threads)}"
        table = tables.setdefault(r.threads, Table(title, header, []))
        ratio = known(r.ratio, ".2f")
        table.rows.append((r.shape.label, f"{r.torch_mib:.1f}", f"{r.fused_mib:.1f}", ratio))
    return list(tables.values())


def comparison(results: Iterable[Result], old: Iterable[Record]) -> Table:
    """`change` is the old time of fused_rnn over the new one: above 1 it became faster."""
    before = {_key(r): r for r in old if isinstance(r, Result)}
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


def heading(records: Sequence[Record]) -> tuple[str, str]:
    """Of a page: its title, and what was measured how."""
    if times := [r for r in records if isinstance(r, Result)]:
        return (
            f"fused_rnn against {names(r.peer for r in times)}",
            "Time of one call of the layer: median of calls made in turn with the peer's; with "
            "torch.nn's in one process, with others' in one process each. Speed-up is the peer's "
            "time over fused_rnn's, with its quartiles over the pairs of calls. Training is a "
            "forward and a backward call. Every row was first checked for equal results. Of the "
            "roof: the least time that this machine's arithmetic and caches allow, over that of "
            "the fastest call, since the roof is measured at the machine's best.",
        )
    if any(isinstance(r, Memory) for r in records):
        return (
            "memory of fused_rnn and torch.nn",
            "By how much a process grows at most in one forward and backward call, each in a "
            "process of its own: output, saved values, workspaces and all gradients, in pages that "
            "were touched. Ratio is fused_rnn's over torch.nn's.",
        )
    return (
        "fused_rnn under conditions",
        "Time of one call of the layer under a condition and of one without, median of calls made "
        "in turn; their ratio, with its quartiles over the pairs of calls, what it may be at most, "
        "and that of torch.nn in the same run.",
    )


def markdown(
    records: Sequence[Record], environment: Environment, failures: Sequence[str], plot: str | None
) -> str:
    """The page for people: what was measured on which machine, the summary, every row."""
    dtypes = ", ".join(sorted({r.dtype for r in records}))
    title, words = heading(records)
    parts = [
        f"# {title}, {environment.date[:10]}\n",
        f"{environment.machine}; {environment.versions}; {dtypes}.\n\n"
        f"    {environment.command}\n\n"
        f"{words}\n",
    ]
    if failures:
        parts.append("**No numbers, because the results differ:**\n")
        parts.append("".join(f"- {failure}\n" for failure in failures))
    if plot:
        parts.append(f"![speed-up per shape]({plot})\n")
    if times := [r for r in records if isinstance(r, Result)]:
        parts.append(summary(times).markdown())
    parts += [table.markdown() for table in details(records)]
    return "\n".join(parts)

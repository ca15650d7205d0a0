"""What it costs that every block of a GPU learns what every other one has: `exchange.cu`.

    python benchmarks/exchange.py [--out FOLDER] [--machine NAME]

compiles it, runs each way in a process of its own, so that none can keep the GPU from the others,
prints a table and leaves a CSV and a page in benchmarks/results/. It needs nvcc and a GPU, and
takes ten seconds besides compiling. What arrives is checked in the same run.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fused_rnn.bench.report import Environment, Table

ROOT = Path(__file__).resolve().parent.parent
WAYS = (
    "grid-barrier",
    "flag-barrier",
    "tagged-data",
    "sentinel-data",
    "cluster-barrier",
    "counted-stores",
)
# Of all ways together. One that is right needs a second; what hangs is killed.
SECONDS = 10


@dataclass(frozen=True)
class Exchange:
    """The best of three launches of so many exchanges, one after another."""

    way: str
    blocks: int
    cluster: int  # blocks that exchange among themselves; 1 where all do
    clusters: int  # such clusters that the GPU holds at a time
    bytes: int  # that every block receives
    exchanges: int
    microseconds: float  # of one exchange

    @classmethod
    def parse(cls, line: str) -> Exchange:
        way, *numbers, microseconds = line.split(",")
        blocks, cluster, clusters, size, exchanges = map(int, numbers)
        return cls(way, blocks, cluster, clusters, size, exchanges, float(microseconds))


def compiled(nvcc: str) -> Path:
    program = ROOT / "build" / "exchange"
    program.parent.mkdir(exist_ok=True)
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emu'}"]
    source = ROOT / "benchmarks" / "exchange.cu"
    command = [nvcc, "-std=c++20", "-O3", "-arch=native", *include, str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def measure(
    program: Path, way: str, arguments: list[str], seconds: float
) -> tuple[list[Exchange], str]:
    """What was measured, and what was wrong."""
    try:
        done = subprocess.run(
            [program, way, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        lines, wrong = done.stdout.splitlines(), "" if done.returncode == 0 else "failed"
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        lines = (said.decode() if isinstance(said, bytes) else said).splitlines()
        wrong = f"no end after {seconds:.1f} s"
    found = [Exchange.parse(line) for line in lines if line.startswith(f"{way},")]
    words = [line for line in lines if not line.startswith(f"{way},")]
    return found, "; ".join(filter(None, (*words, wrong)))


def tables(found: list[Exchange]) -> list[Table]:
    """A row for each number of blocks and payload, a column for each way; clusters apart."""
    made = []
    for in_clusters in (False, True):
        mine = [e for e in found if (e.cluster > 1) == in_clusters]
        if not mine:
            continue
        ways = [way for way in WAYS if any(e.way == way for e in mine)]
        rows: dict[tuple[int, ...], dict[str, float]] = {}
        for e in mine:
            key = e.blocks, e.cluster, e.clusters, e.bytes
            rows.setdefault(key, {})[e.way] = e.microseconds
        where = "within clusters" if in_clusters else "among all blocks"
        lines = [
            (*map(str, key), *(f"{times[way]:.2f}" if way in times else "" for way in ways))
            for key, times in sorted(rows.items(), key=lambda row: (row[0][-1], row[0]))
        ]
        header = ("blocks", "cluster", "clusters held", "bytes", *ways)
        made.append(Table(f"Microseconds per exchange {where}", header, lines))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--machine", help="what to call this GPU (default: its name)")
    parser.add_argument("--program", type=Path, help="exchange.cu as it is compiled already")
    parser.add_argument("--sizes", nargs="*", default=[], help="exchanges, blocks, pairs of words")
    options = parser.parse_args()
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if not options.program and not nvcc:
        sys.exit("there is no nvcc: CUDA_HOME says where it is")
    program = options.program or compiled(str(nvcc))

    machine = options.machine
    if not machine:
        import torch

        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    environment = Environment.here(shlex.join(["python", *sys.argv]), machine)
    found: list[Exchange] = []
    complaints = []
    end = time.monotonic() + SECONDS
    for way in WAYS:
        # Half of what is left, so that one that hangs leaves some to the others.
        seconds = max(1.0, (end - time.monotonic()) / 2)
        measured, wrong = measure(program, way, options.sizes, seconds)
        found += measured
        if wrong:
            complaints.append(f"{way}: {wrong}")
        elif not measured:
            complaints.append(f"{way}: not on this GPU")
        print(f"{way}: {len(measured)} measurements{'; ' * bool(wrong)}{wrong}")
    if found:
        options.out.mkdir(parents=True, exist_ok=True)
        page = options.out / f"{environment.slug}-exchange.csv"
        with page.open("w", newline="", encoding="utf-8") as file:
            rows = [asdict(e) | asdict(environment) for e in found]
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        parts = [
            f"# What an exchange between blocks costs, {environment.date[:10]}\n",
            f"{environment.machine}; {environment.versions}.\n\n    {environment.command}\n",
            "The best of three launches, over its exchanges. What every block received was\n"
            "compared with what it must.\n",
            *(f"- {complaint}\n" for complaint in complaints),
            *(table.markdown() for table in tables(found)),
        ]
        page.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")
        for table in tables(found):
            print(f"\n{table.markdown()}")
        print(f"written: {page.with_suffix('')}.{{csv,md}}")
    print(*complaints, sep="\n")
    return 1 if any("not on this GPU" not in c for c in complaints) else 0


if __name__ == "__main__":
    sys.exit(main())

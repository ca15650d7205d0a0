"""Command line of the benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fused_rnn import ops
from fused_rnn.bench import conditions, gpu_peers, measure, memory, peers, report
from fused_rnn.bench.conditions import Condition
from fused_rnn.bench.measure import FLOAT32, PEERS, TORCH, DisagreementError, Result
from fused_rnn.bench.memory import Memory
from fused_rnn.bench.shapes import CELLS, SUITES, Shape
from fused_rnn.bench.work import DTYPES, FROZEN, MODES

try:
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.table import Table
except ImportError:
    sys.exit("the benchmark needs rich and matplotlib: pip install 'fused_rnn[bench]'")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn.bench",
        description="Times fused_rnn against its peers and leaves a CSV with every "
        "measurement, a page (.md) and a plot (.png). Exits with 1 if results disagree.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", choices=SUITES, default="quick", help="which shapes; conditions: disturbed ones")
    add("--cell", nargs="+", choices=[c.lower() for c in CELLS], help="only these cells")
    add("--filter", type=re.compile, metavar="REGEX", help="only shapes whose label matches")
    add("--list", action="store_true", help="print the labels of the shapes and stop")
    add(
        "--peer",
        nargs="+",
        choices=PEERS,
        default=[TORCH],
        type=lambda name: TORCH if name == "torch" else name,
        help="what to compare with: torch (torch.nn); float32 (fused_rnn's own layer, beside "
        "--dtype bfloat16 or float16); onnxruntime and openvino, in inference, float32; haste and "
        "flashrnn, with --device cuda, where you have installed them (not measured yet)",
    )
    add("--memory", action="store_true", help="peak memory of a training step, instead of time")
    add(
        "--mode",
        nargs="+",
        choices=(*MODES, FROZEN),
        default=MODES,
        help="forward, forward + backward, or forward with our layers frozen (fused_rnn.freeze)",
    )
    add(
        "--threads",
        nargs="+",
        type=int,
        default=sorted({1, torch.get_num_threads()}),
        help="numbers of threads",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU")
    add(
        "--schedule",
        choices=("stepwise", "persistent"),
        help="of the scans on a GPU; shapes that cannot be persistent are stepwise "
        "(default: the library's choice, which may be cuDNN)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="of input and weights")
    add("--budget", type=float, default=1.0, metavar="SECONDS", help="time per measurement")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    add("--machine", help="what to call this machine (default: its CPU)")
    add("--load", type=Path, metavar="CSV", help="report on this file instead of measuring")
    add("--compare", type=Path, metavar="CSV", help="also compare with an older file")
    add(
        "--fail-if-slower",
        type=float,
        metavar="X",
        help="exit with 1 if a median speed-up is below X",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a log has no edge to wrap at

    # Read first: a wrong path should not cost a whole run.
    old = report.read(options.compare)[1] if options.compare else None
    if options.load:
        page = options.load
        environment, records = report.read(page)
        failures: list[str] = []
    else:
        shapes = [shape for shape in SUITES[options.suite] if selected(shape, options)]
        if options.list:
            console.print(*(shape.label for shape in shapes), sep="\n", soft_wrap=True)
            return 0
        if not shapes:
            console.print("[red]--cell and --filter leave no shape of this suite")
            return 2
        todo = plan(shapes, options)
        if isinstance(todo, str):
            console.print(f"[red]{todo}")
            return 2
        if not ops.available:
            console.print(f"[red]not the times of our kernels: {ops.unavailable_reason}")
        command = shlex.join(["python", "-m", "fused_rnn.bench", *argv])
        machine = options.machine
        if options.device == "cuda":
            machine = machine or torch.cuda.get_device_name()
        environment = report.Environment.here(command, machine, options.peer)
        page = options.out / f"{environment.slug}-{selection(options)}.csv"
        page.parent.mkdir(parents=True, exist_ok=True)
        records, failures = run(todo, environment, page, console)

    results = [record for record in records if isinstance(record, Result)]
    if records:
        write_page(page, environment, records, results, failures, console)
        for table in report.details(records):
            show(table, console)
    if results:
        show(report.summary(results), console)
    if old is not None:
        show(report.comparison(results, old), console)
    for failure in failures:
        console.print(f"[bold red]DIFFERENT RESULTS, not timed: {failure}")
    too_slow = report.slower(results, options.fail_if_slower or 0.0)
    for r in too_slow:
        console.print(
            f"[red]below {options.fail_if_slower:g}x: {r.speedup:.2f}x [{r.q25:.2f}-{r.q75:.2f}] "
            f"{r.shape.label}, {r.mode}, threads {r.threads}, {r.peer}"
        )
    return 1 if failures or too_slow else 0


class Plan(NamedTuple):
    kind: type[report.Record]
    total: int
    outcomes: Iterator[report.Record | DisagreementError]  # measures when asked for the next


def plan(shapes: Sequence[Shape], options: argparse.Namespace) -> Plan | str:
    """What is to be measured, or why it cannot be."""
    dtype, budget, threads = options.dtype, options.budget, options.threads
    if options.schedule and options.device != "cuda":
        return "a schedule is for a GPU: --device cuda"
    if options.device == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no GPU here"
        if not ops.has_cuda:
            return f"the kernels for cuda are off: {ops.cuda_off}"
        others = [peer for peer in options.peer if peer in gpu_peers.LIBRARIES]
        if options.memory or options.suite == "conditions":
            return "on a GPU times are measured"
        if {*options.peer} - {TORCH, *others}:
            return f"on a GPU the peers are {report.names([TORCH, *gpu_peers.LIBRARIES])}"
        if FROZEN in options.mode:
            return "frozen layers run on the CPU"
        if obstacle := next(filter(None, (gpu_peers.obstacle(p, dtype) for p in others)), None):
            return obstacle
        jobs = measure.jobs(shapes, options.mode, options.peer)
        if not jobs:
            return f"{report.names(options.peer)}: one layer and direction of LSTM and GRU only"
        outcomes = measure.measure_all(jobs, [1], dtype, budget, "cuda", options.schedule)
        return Plan(Result, len(jobs), outcomes)
    of_one_peer = options.memory or options.suite == "conditions"
    if of_one_peer and options.peer != [TORCH]:
        return "memory and conditions are compared with torch's only"
    if of_one_peer and FROZEN in options.mode:
        return "memory and conditions are not measured of frozen layers"
    if options.memory:
        total = len(shapes) * len(threads)
        return Plan(Memory, total, memory.measure_all(shapes, threads, dtype))
    if options.suite == "conditions":
        cases = conditions.jobs(shapes, options.mode, threads)
        if not cases:
            return "a busy machine matters to two threads or more"
        return Plan(Condition, len(cases), conditions.measure_all(cases, dtype, budget))

    for peer in options.peer:
        if peer in gpu_peers.LIBRARIES:
            return f"{peer} runs on a GPU: --device cuda"
        if missing := peers.missing(peer):
            return f"{peer} needs {' and '.join(missing)}: pip install 'fused_rnn\\[bench]'"
        if peer == FLOAT32:
            if dtype not in ("bfloat16", "float16"):
                return f"float32 is what low precision is compared with, not {dtype}"
        elif peer != TORCH and dtype != "float32":
            return f"{peer} is measured in float32 only, not in {dtype}"
    jobs = measure.jobs(shapes, options.mode, options.peer)
    if not jobs:
        return f"{report.names(options.peer)} can be measured in inference only"
    total = len(jobs) * len(threads)
    return Plan(Result, total, measure.measure_all(jobs, threads, dtype, budget))


def selected(shape: Shape, options: argparse.Namespace) -> bool:
    if options.cell and shape.family.lower() not in options.cell:
        return False
    return not options.filter or bool(options.filter.search(shape.label))


def selection(options: argparse.Namespace) -> str:
    """Names the suite and what was left out of it: a partial run must not replace a full one."""
    words = [options.suite, *(options.cell or ())]
    words += options.peer if options.peer != [TORCH] else ()
    words += ["memory"] if options.memory else ()
    words += options.mode if set(options.mode) != set(MODES) else ()
    words += ["cuda"] if options.device == "cuda" else ()
    words += [options.schedule] if options.schedule else ()
    words += [options.dtype] if options.dtype != "float32" else ()
    words += ["filtered"] if options.filter else ()
    return "-".join(words)


def run(
    todo: Plan, environment: report.Environment, path: Path, console: Console
) -> tuple[list[report.Record], list[str]]:
    """Measures everything, with the records in `path` as they come."""
    records: list[report.Record] = []
    failures: list[str] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.description}")
    # Drawn between two measurements only: a thread that draws would disturb them.
    progress = Progress(
        *columns, console=console, auto_refresh=False, disable=not console.is_terminal
    )
    with path.open("w", newline="", encoding="utf-8") as file, progress:
        writer = report.Writer(file, environment, todo.kind)
        task = progress.add_task("", total=todo.total)
        for done, outcome in enumerate(todo.outcomes, start=1):
            if isinstance(outcome, DisagreementError):
                failures.append(str(outcome))
                line = f"[red]different results: {outcome}"
            else:
                writer.write(outcome)
                records.append(outcome)
                line = str(outcome)
            progress.update(task, completed=done, description=line, refresh=True)
            if not console.is_terminal:
                console.print(f"{done}/{todo.total}", line)
    return records, failures


def write_page(
    path: Path,
    environment: report.Environment,
    records: Sequence[report.Record],
    results: Sequence[Result],
    failures: Sequence[str],
    console: Console,
) -> None:
    """The page of all records, and the plot of those that are times."""
    picture = path.with_suffix(".png")
    drawn = bool(results) and importlib.util.find_spec("matplotlib") is not None
    if drawn:
        from fused_rnn.bench import plot

        plot.save(results, environment, picture)
    elif results:
        console.print("[yellow]no plot: it needs matplotlib (pip install matplotlib)")
    text = report.markdown(records, environment, failures, picture.name if drawn else None)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(f"written: {path.with_suffix('')}" + ".{csv,md" + ",png" * drawn + "}")


def show(table: report.Table, console: Console) -> None:
    view = Table(title=table.title, title_style="bold", box=box.SIMPLE_HEAD)
    for name in table.header:
        view.add_column(name, justify="left" if name in table.words else "right")
    for row in table.rows:
        view.add_row(*row)
    console.print(view)


if __name__ == "__main__":
    sys.exit(main())

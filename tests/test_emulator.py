"""The emulator of tests/emu, which executes CUDA kernels on the host: it finds planted bugs and
nothing else, and agrees with plain host code. So does the GPU, where there is one.

The programs run by hand as well: `build/tests/planted-tsan-... wrong NAME` shows whole reports.
"""

from __future__ import annotations

import collections
import csv
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import interpreter, run
from toolkit import BENCHMARK, CXX, ROOT, emulated, has_gpu, headers, made, native

BUILDS = {
    "plain": "-O1 -g1".split(),
    "asan": [
        *("-O1", "-g1", "-fno-sanitize-recover=all"),
        # Of UBSan what a kernel can do wrong: all of it takes twice as long to compile.
        "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow",
    ],
    "tsan": "-O1 -g1 -fsanitize=thread".split(),
}
EMU = ROOT / "tests" / "emu"
# program -> its builds; test_stepwise.py runs the schedule in the plain one.
PROGRAMS = {
    "planted": list(BUILDS),
    "conformance": list(BUILDS),
    "run_stepwise": ["asan", "tsan"],
    "exchange": list(BUILDS),
}
# The first report is enough. Who is stopped by a failure does not tidy up.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}

each_build = pytest.mark.parametrize("build", BUILDS)


Programs = dict[tuple[str, str], Path]


def has(build: str) -> bool:
    """Whether the compiler has the sanitizer's library."""
    library = f"lib{build}.so"
    return build == "plain" or run(*CXX, f"-print-file-name={library}").strip() != library


@pytest.fixture(scope="module")
def programs() -> Programs:
    """(program, build) -> file, of the builds that the compiler can do."""
    headers()  # or skip, before there are threads
    # No sanitizer sees the emulator itself, so its containers look after themselves.
    flags = BUILDS | {"uninstrumented": ["-O2", "-g1", "-D_GLIBCXX_ASSERTIONS"]}
    builds = [build for build in BUILDS if has(build)]
    keys = [(name, build) for build in builds for name in PROGRAMS if build in PROGRAMS[name]]
    # The emulator itself is never instrumented: see emulator.cpp.
    parts = {key: [(EMU / "emulator.cpp", "uninstrumented")] for key in keys}
    for name, build in keys:
        source = BENCHMARK if name == "exchange" else EMU / f"{name}.cu"
        parts[name, build].append((source, build))
        if name == "run_stepwise":
            # Compilers of sanitizers are slow, and types that are not run need none.
            parts[name, build] += [
                (file, "uninstrumented" if file.stem == "cells_double" else build)
                for file in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
            ]
    wanted = sorted({part for of_program in parts.values() for part in of_program})

    def compiled(part: tuple[Path, str]) -> Path:
        source, build = part
        return made(
            f"{source.parent.name}-{source.stem}-{build}.o", *emulated(source, *flags[build])
        )[0]

    def linked(key: tuple[str, str]) -> Path:
        name, build = key
        files = [objects[part] for part in parts[key]]
        return made(f"{name}-{build}", *CXX, *flags[build], *files)[0]

    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip(wanted, pool.map(compiled, wanted), strict=True))
        return dict(zip(keys, pool.map(linked, keys), strict=True))


def execute(programs: Programs, name: str, build: str, *arguments: str, **environment: str) -> str:
    """What the program prints; it must succeed."""
    if (name, build) not in programs:
        pytest.skip(f"{shlex.join(CXX)} has no lib{build}.so")
    command = [programs[name, build], *arguments]
    try:
        return run(*command, **ENVIRONMENT, **environment)
    except AssertionError as error:
        # Where the kernel scatters mappings widely, GCC's ThreadSanitizer needs it not to.
        if "unexpected memory mapping" not in str(error):
            raise
        return run("setarch", "-R", *command, **ENVIRONMENT, **environment)


@each_build
def test_every_planted_bug_is_caught(programs: Programs, build: str) -> None:
    print(execute(programs, "planted", build, "wrong"))


@each_build
def test_nothing_is_found_without_bugs(programs: Programs, build: str) -> None:
    print(execute(programs, "planted", build, "right"))


@each_build
@pytest.mark.parametrize("order", ["forward", "random:4"])
def test_emulator_agrees_with_host(programs: Programs, build: str, order: str) -> None:
    print(execute(programs, "conformance", build, FUSED_RNN_EMULATOR_ORDER=order))


def test_reports_name_the_place(programs: Programs) -> None:
    source = (EMU / "planted.cu").read_text().splitlines()
    divergent = execute(programs, "planted", "plain", "wrong", "divergent_sync_block")
    kernel = next(i for i, line in enumerate(source) if "void divergent_sync_block" in line)
    lines = [i + 1 for i in range(kernel, kernel + 12) if "sync_block();" in source[i]]
    assert len(lines) == 2
    assert all(f"planted.cu:{line}:" in divergent for line in lines), divergent
    assert "32 threads wait in sync_block" in divergent

    returned = execute(programs, "planted", "plain", "wrong", "return_before_sync_grid")
    assert "deadlock: 192 threads wait in sync_grid" in returned
    assert "64 have returned" in returned


@pytest.mark.parametrize("build", PROGRAMS["run_stepwise"])
def test_sanitizers_find_nothing_in_the_schedule(programs: Programs, build: str) -> None:
    print(execute(programs, "run_stepwise", build))


# Of the persistent kernels: behind the weights, forward and backward, behind a product, and with
# float32 behind its operands.
BARRIERS = 4


@pytest.mark.parametrize("barrier", range(BARRIERS + 1))
def test_every_barrier_of_the_persistent_kernel_is_needed(programs: Programs, barrier: int) -> None:
    arguments = "run_stepwise", "tsan", "without", str(barrier)
    if barrier == BARRIERS:  # there is no such one, so nothing is left out
        print(execute(programs, *arguments))
        return
    with pytest.raises(AssertionError, match=r"data race|results differ"):
        execute(programs, *arguments)


WAYS = {
    "grid-barrier": 6,
    "flag-barrier": 6,
    "tagged-data": 6,
    "sentinel-data": 6,
    "cluster-barrier": 6,
    "counted-stores": 6,
}
# Five exchanges of four blocks, 21 pairs of words; the last argument leaves one out.
SIZES = ("5", "4", "21")


@pytest.mark.parametrize(
    ("build", "order"),
    [("plain", "forward"), ("plain", "eager"), ("asan", "random:4"), ("tsan", "forward")],
)
def test_exchanges_give_what_they_must(programs: Programs, build: str, order: str) -> None:
    """benchmarks/exchange.cu, which judges itself."""
    for way, lines in WAYS.items():
        said = execute(programs, "exchange", build, way, *SIZES, FUSED_RNN_EMULATOR_ORDER=order)
        assert len(re.findall(f"^{way},", said, re.MULTILINE)) == lines, said


def test_the_benchmark_of_exchanges_leaves_its_files(programs: Programs, tmp_path: Path) -> None:
    program = str(programs["exchange", "plain"])
    script = ROOT / "benchmarks" / "exchange.py"
    done = interpreter(
        *(str(script), "--program", program, "--out", str(tmp_path), "--machine", "an emulator"),
        *("--sizes", *SIZES),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = tmp_path.glob("*-an-emulator-exchange.csv")
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert collections.Counter(row["way"] for row in rows) == WAYS
    assert "within clusters" in table.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith(("grid", "cluster"))])
def test_exchanges_give_up_waiting(programs: Programs, way: str) -> None:
    with pytest.raises(AssertionError, match="gave up waiting in exchange 3"):
        execute(programs, "exchange", "plain", way, *SIZES, "3")


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", [["planted", "right"], ["conformance"]], ids=str)
def test_gpu_agrees_with_host(arguments: list[str]) -> None:
    if not has_gpu():
        pytest.skip("needs an NVIDIA GPU")
    name, *rest = arguments
    program = native(f"{name}-gpu", [EMU / f"{name}.cu"])
    print(run(program, *rest))

"""The emulator of tests/emu, which executes CUDA kernels on the host: it finds planted bugs and
nothing else, and agrees with plain host code. So does the GPU, where there is one.

The programs run by hand as well: `build/tests/planted-tsan-... wrong NAME` shows whole reports.
"""

from __future__ import annotations

import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import run
from toolkit import CXX, ROOT, emulated, has_gpu, headers, made, native

BUILDS = {
    "plain": "-O1 -g1".split(),
    "asan": [
        *("-O1", "-g1", "-fno-sanitize-recover=all"),
        # Of UBSan what a kernel can do wrong: all of it takes twice as long to compile.
        "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow",
    ],
    "tsan": "-O1 -g1 -fsanitize=thread".split(),
}
PROGRAMS = ["planted", "conformance"]
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
    # The emulator itself is never instrumented: see emulator.cpp.
    runtime = emulated("emulator.cpp", "-O2", "-g1")

    def program(name: str, build: str) -> Path:
        flags = BUILDS[build]
        object_file, _ = made(f"{name}-{build}.o", *emulated(f"{name}.cu", *flags))
        return made(f"{name}-{build}", *CXX, *flags, library.result()[0], object_file)[0]

    keys = [(name, build) for build in BUILDS if has(build) for name in PROGRAMS]
    with ThreadPoolExecutor(3) as pool:  # one waits for the emulator
        library = pool.submit(made, "emulator.o", *runtime)
        files = [pool.submit(program, *key) for key in keys]
        return {key: file.result() for key, file in zip(keys, files, strict=True)}


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
    source = (ROOT / "tests" / "emu" / "planted.cu").read_text().splitlines()
    divergent = execute(programs, "planted", "plain", "wrong", "divergent_sync_block")
    kernel = next(i for i, line in enumerate(source) if "void divergent_sync_block" in line)
    lines = [i + 1 for i in range(kernel, kernel + 12) if "sync_block();" in source[i]]
    assert len(lines) == 2
    assert all(f"planted.cu:{line}:" in divergent for line in lines), divergent
    assert "32 threads wait in sync_block" in divergent

    returned = execute(programs, "planted", "plain", "wrong", "return_before_sync_grid")
    assert "deadlock: 192 threads wait in sync_grid" in returned
    assert "64 have returned" in returned


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", [["planted", "right"], ["conformance"]], ids=str)
def test_gpu_agrees_with_host(arguments: list[str]) -> None:
    if not has_gpu():
        pytest.skip("needs an NVIDIA GPU")
    name, *rest = arguments
    program = native(f"{name}-gpu", [ROOT / "tests" / "emu" / f"{name}.cu"])
    print(run(program, *rest))

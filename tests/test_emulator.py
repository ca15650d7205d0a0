"""The emulator of tests/emu, which executes CUDA kernels on the host: it finds planted bugs and
nothing else, and agrees with plain host code. So does the GPU, where there is one.

The programs run by hand as well: `build/tests/planted-tsan-... wrong NAME` shows whole reports.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import run
from toolkit import CXX, ROOT, emulated, has_gpu, headers, made, native

BUILDS = {
    "plain": "-O1 -g1".split(),
    "asan": "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all".split(),
    "tsan": "-O1 -g1 -fsanitize=thread".split(),
}
PROGRAMS = ["planted", "conformance"]
# The first report is enough. Who is stopped by a failure does not tidy up.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}

each_build = pytest.mark.parametrize("build", BUILDS)


@pytest.fixture(scope="module")
def programs() -> dict[tuple[str, str], Path]:
    """(program, build) -> file."""
    headers()  # or skip, before there are threads
    # The emulator itself is never instrumented: see emulator.cpp.
    runtime = emulated("emulator.cpp", "-O2", "-g1")

    def program(name: str, build: str) -> Path:
        flags = BUILDS[build]
        object_file, _ = made(f"{name}-{build}.o", *emulated(f"{name}.cu", *flags))
        return made(f"{name}-{build}", *CXX, *flags, library.result()[0], object_file)[0]

    keys = [(name, build) for build in BUILDS for name in PROGRAMS]
    with ThreadPoolExecutor(3) as pool:  # one waits for the emulator
        library = pool.submit(made, "emulator.o", *runtime)
        files = [pool.submit(program, *key) for key in keys]
        return {key: file.result() for key, file in zip(keys, files, strict=True)}


@each_build
def test_every_planted_bug_is_caught(programs: dict[tuple[str, str], Path], build: str) -> None:
    print(run(programs["planted", build], "wrong", **ENVIRONMENT))


@each_build
def test_nothing_is_found_without_bugs(programs: dict[tuple[str, str], Path], build: str) -> None:
    print(run(programs["planted", build], "right", **ENVIRONMENT))


@each_build
@pytest.mark.parametrize("order", ["forward", "random:4"])
def test_emulator_agrees_with_host(
    programs: dict[tuple[str, str], Path], build: str, order: str
) -> None:
    environment = ENVIRONMENT | {"FUSED_RNN_EMULATOR_ORDER": order}
    print(run(programs["conformance", build], **environment))


def test_reports_name_the_place(programs: dict[tuple[str, str], Path]) -> None:
    source = (ROOT / "tests" / "emu" / "planted.cu").read_text().splitlines()
    divergent = run(programs["planted", "plain"], "wrong", "divergent_sync_block")
    kernel = next(i for i, line in enumerate(source) if "void divergent_sync_block" in line)
    lines = [i + 1 for i in range(kernel, kernel + 12) if "sync_block();" in source[i]]
    assert len(lines) == 2
    assert all(f"planted.cu:{line}:" in divergent for line in lines), divergent
    assert "32 threads wait in sync_block" in divergent

    returned = run(programs["planted", "plain"], "wrong", "return_before_sync_grid")
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

"""What a user gets: a complete sdist, a wheel that works away from the source tree, a clear word
where there is no compiler. And the tools that guard the source tree."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without this process's own build switches."""
    own = ("FUSED_RNN_", "PYTHONPATH", "CXXFLAGS", "LDFLAGS", "LD_PRELOAD")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build_wheel(source: Path, folder: Path, **environment: str) -> tuple[str, Path]:
    """The build's output, and the folder in which the wheel was unpacked."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
    built = run(*command, source, cwd=folder, **environment)
    assert built.returncode == 0, built.stdout
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return built.stdout, folder / "unpacked"


def python(package: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with an unpacked wheel and the site-packages of torch on its path.

    Without `site`, since an editable install finds the modules that the wheel lacks.
    """
    path = os.pathsep.join([str(package), str(Path(torch.__file__).parent.parent)])
    command = (sys.executable, "-S", *arguments)
    return run(*command, cwd=package.parent, PYTHONPATH=path, **environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder]
    built = run(*command, ROOT, cwd=folder)
    assert built.returncode == 0, built.stdout
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return Path(str(archive).removesuffix(".tar.gz"))


@pytest.mark.slow
def test_sdist_is_complete(sdist: Path) -> None:
    def files(root: Path, folder: str) -> set[str]:
        kinds = (".h", ".cpp", ".cuh", ".cu", ".py", ".pyi", ".typed", ".md", ".sh")
        found = (root / folder).rglob("*")
        return {f.relative_to(root).as_posix() for f in found if f.suffix in kinds}

    for folder in ("csrc", "fused_rnn", "tests", "tools", "examples", "docs"):
        assert files(sdist, folder) == files(ROOT, folder)
    for name in ("setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "CHANGELOG.md"):
        assert (sdist / name).is_file()
    assert not list(sdist.rglob("*.so"))


@pytest.mark.slow
def test_wheel_from_sdist_works_away_from_the_source(sdist: Path, tmp_path: Path) -> None:
    # Of one set and type and unoptimised: the same headers, in little of the time.
    quick = {"FUSED_RNN_STRICT": "1", "FUSED_RNN_CUDA": "0", "CXXFLAGS": "-O0"}
    quick |= {"FUSED_RNN_ISAS": "baseline", "FUSED_RNN_TYPES": "float32"}
    _, package = build_wheel(sdist, tmp_path, **quick)
    modules = {f.relative_to(sdist) for f in (sdist / "fused_rnn").rglob("*.py")}
    assert {f.relative_to(package) for f in package.rglob("*.py")} == modules
    assert (package / "fused_rnn/py.typed").is_file()
    assert len(list(package.glob("fused_rnn/_C.*.so"))) == 1

    where = python(package, "-c", "import fused_rnn; print(fused_rnn.__file__)")
    assert Path(where.stdout.strip()) == package / "fused_rnn/__init__.py"
    info = python(package, "-m", "fused_rnn.info", FUSED_RNN_STRICT="1")
    assert info.returncode == 0, info.stdout
    assert info.stdout.endswith("OK\n")
    assert "off: built with FUSED_RNN_CUDA=0" in info.stdout

    call = (
        "import fused_rnn, torch; x = torch.ones(1, 1, 2).double(); fused_rnn.GRU(2, 2).double()(x)"
    )
    left_out = python(package, "-c", call)
    assert left_out.returncode != 0
    assert "built without kernels for float64: see FUSED_RNN_TYPES" in left_out.stdout


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions of setup.py."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    for name in (
        "FUSED_RNN_CUDA",
        "FUSED_RNN_ISAS",
        "FUSED_RNN_TYPES",
        "FUSED_RNN_SANITIZE",
        "TORCH_CUDA_ARCH_LIST",
        "CUDA_HOME",
    ):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def test_architectures_are_those_that_nvcc_knows(recipe: Any) -> None:
    names, flags = recipe.gencode("", ["compute_80", "compute_90", "compute_100"])
    assert names == "8.0 9.0a 10.0+PTX"
    assert flags[1::2] == [
        "arch=compute_80,code=[sm_80]",
        "arch=compute_90a,code=[sm_90a]",
        "arch=compute_100,code=[sm_100,compute_100]",
    ]
    assert recipe.gencode("7.5;9.0+PTX", [])[0] == "7.5 9.0+PTX"
    with pytest.raises(CompileError, match="'Hopper': write"):
        recipe.gencode("Hopper", [])


def test_instruction_sets_that_are_built(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def built() -> dict[str, set[str]]:
        sets: dict[str, set[str]] = {}
        for isa, type_ in recipe.kernels():
            sets.setdefault(isa, set()).add(type_)
        return sets

    every = {"Float32", "Float64", "BFloat16", "Float16"}
    everything = dict.fromkeys(("baseline", "avx2", "avx512"), every)
    everything["avx512_bf16"] = {"BFloat16"}
    monkeypatch.setitem(recipe.kernels.__globals__, "X86", True)
    assert built() == everything
    monkeypatch.setenv("FUSED_RNN_ISAS", "avx2")
    assert built() == {"baseline": every, "avx2": every}
    monkeypatch.setenv("FUSED_RNN_ISAS", "avx512_bf16, avx2")
    assert built() == everything
    monkeypatch.setenv("FUSED_RNN_TYPES", "float64")
    two = {"Float32", "Float64"}
    assert built() == {"baseline": two, "avx2": two, "avx512": two}
    monkeypatch.setenv("FUSED_RNN_TYPES", "int8")
    with pytest.raises(CompileError, match="FUSED_RNN_TYPES: 'int8' is none of float32, float64"):
        recipe.kernels()
    monkeypatch.setenv("FUSED_RNN_ISAS", "sse2")
    with pytest.raises(CompileError, match="FUSED_RNN_ISAS: 'sse2' is none of baseline, avx512"):
        recipe.kernels()
    monkeypatch.delenv("FUSED_RNN_TYPES")
    monkeypatch.setitem(recipe.kernels.__globals__, "X86", False)
    assert built() == {"baseline": every}


def test_flags_are_left_out_that_the_compiler_does_not_take(recipe: Any) -> None:
    compiler = recipe.find_compiler()
    assert recipe.accepted(compiler, ["-fno-such-flag", "-O1"]) == ["-O1"]


def test_without_nvcc_the_build_goes_on_and_says_why(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    cuda = recipe.find_cuda(["c++"])
    assert not cuda.nvcc
    assert f"{tmp_path}/bin/nvcc" in cuda.off
    monkeypatch.setenv("FUSED_RNN_CUDA", "1")
    with pytest.raises(CompileError, match="FUSED_RNN_CUDA=1, but"):
        recipe.find_cuda(["c++"])
    monkeypatch.setenv("FUSED_RNN_CUDA", "0")
    assert recipe.find_cuda(["c++"]).off == "built with FUSED_RNN_CUDA=0"


@pytest.mark.slow
def test_without_a_compiler_the_package_installs_and_says_so(sdist: Path, tmp_path: Path) -> None:
    output, package = build_wheel(sdist, tmp_path, CXX="no-such-compiler")
    assert "fused_rnn._C was NOT built" in output
    assert "no-such-compiler is not on PATH" in output
    assert not list(package.rglob("*.so"))

    info = python(package, "-m", "fused_rnn.info")
    assert info.returncode == 0, info.stdout
    assert "RuntimeWarning: fused_rnn._C cannot be imported" in info.stdout
    assert re.search(r"^  missing +fused_rnn\._C cannot be imported", info.stdout, re.MULTILINE)
    assert info.stdout.endswith("OK\n")


@pytest.mark.slow
def test_strict_build_fails_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    environment = {"CXX": "no-such-compiler", "FUSED_RNN_STRICT": "1"}
    built = run(*command, sdist, cwd=tmp_path, **environment)
    assert built.returncode != 0
    assert "no-such-compiler is not on PATH" in built.stdout
    assert not list(tmp_path.glob("*.whl"))


def test_includes_of_the_source_tree() -> None:
    ran = run(sys.executable, ROOT / "tools/check_includes.py", cwd=ROOT)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    ("file", "include", "complaint"),
    [
        ("cpu/scan.h", "<torch/csrc/stable/tensor.h>", "bindings only"),
        ("cpu/scan.h", "<pybind11/pybind11.h>", "bindings only"),
        ("core/math.h", "<Python.h>", "bindings only"),
        ("core/math.h", '"../cells/cell.h"', "csrc/core may not depend on csrc/cells"),
        ("cells/cell.h", '"cpu/scan.h"', "csrc/cells may not depend on csrc/cpu"),
        ("cpu/scan.h", '"missing.h"', "no file of csrc/"),
        ("rocm/scan.h", "<stdint.h>", "knows no folder rocm"),
        ("bindings/ops.cpp", "<torch/csrc/stable/tensor.h>", None),
        ("cpu/scan.h", '"../cells/cell.h"', None),
        ("cpu/scan.h", "<stdint.h>", None),
    ],
)
def test_check_includes_catches_a_planted_include(
    tmp_path: Path, file: str, include: str, complaint: str | None
) -> None:
    for name in ("core/math.h", "cells/cell.h", "cpu/scan.h", file):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / file).write_text(f"#pragma once\n  # include {include}\n")
    ran = run(sys.executable, ROOT / "tools/check_includes.py", tmp_path, cwd=ROOT)
    if complaint is None:
        assert ran.returncode == 0, ran.stdout
    else:
        assert ran.returncode == 1
        assert f"{tmp_path / file}" in ran.stdout
        assert complaint in ran.stdout


@pytest.mark.parametrize(("shared", "status"), [(True, 1), (False, 0)])
@pytest.mark.parametrize(
    "units",
    [("kernels_avx2_float32", "kernels_baseline_float32"), ("cells_avx2_float", "cells_float")],
)
def test_check_symbols_catches_a_function_two_instruction_sets_share(
    tmp_path: Path, units: tuple[str, str], shared: bool, status: int
) -> None:
    for unit in units:
        name = "shared" if shared else unit
        source = f"inline int {name}_name(int x) {{ return x + 1; }} auto {unit} = &{name}_name;"
        (tmp_path / f"{unit}.cpp").write_text(source)
        command = [*shlex.split(os.environ.get("CXX", "c++")), "-c", f"{unit}.cpp"]
        compiled = run(*command, cwd=tmp_path)
        assert compiled.returncode == 0, compiled.stdout
    ran = run(sys.executable, ROOT / "tools/check_symbols.py", tmp_path, cwd=ROOT)
    assert ran.returncode == status, ran.stdout
    assert ("shared_name(int)" in ran.stdout) == shared

"""Builds fused_rnn._C. Everything else about the project is in pyproject.toml.

Environment:
    CXX, CXXFLAGS, LDFLAGS   compiler (may carry a launcher: "ccache g++") and extra flags
    MAX_JOBS                 parallel compiler processes
    FUSED_RNN_SANITIZE=1     AddressSanitizer and UndefinedBehaviorSanitizer
    FUSED_RNN_STRICT=1       fail when the library cannot be built, instead of installing without it
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()

X86 = platform.machine().lower() in ("x86_64", "amd64")
SANITIZE = os.environ.get("FUSED_RNN_SANITIZE") == "1"
STRICT = os.environ.get("FUSED_RNN_STRICT") == "1"

# The stable ABI of torch 2.11: the library loads with every later torch, whichever built it.
TORCH_TARGET_VERSION = "0x020b000000000000"

# Only these files may use more than the base instruction set: the choice is made at run time.
AVX2 = "-mavx2 -mfma -mf16c".split()
# GCC 12 takes the undefined operands of its own intrinsics for a mistake.
AVX512 = (
    "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512 -Wno-maybe-uninitialized"
).split()
ISA_FLAGS = {
    "kernels_avx512_bf16.cpp": [*AVX2, *AVX512, "-mavx512bf16"],
    "kernels_avx512.cpp": [*AVX2, *AVX512],
    "kernels_avx2.cpp": AVX2,
}

CXX_FLAGS = (
    "-std=c++20 -O3 -fPIC -pthread -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-ffp-contract=fast -Wall -Wextra -Wno-psabi"
).split()
LD_FLAGS = ["-shared", "-pthread"]
if SANITIZE:
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    CXX_FLAGS += [*SANITIZERS, "-fno-omit-frame-pointer", "-g", "-O1"]
    LD_FLAGS += SANITIZERS


def sources() -> list[str]:
    files = [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/bindings/*.cpp")]
    wanted = [f for f in files if X86 or f.name not in ISA_FLAGS]
    return sorted(f.relative_to(ROOT).as_posix() for f in wanted)


def find_compiler() -> list[str]:
    if sys.platform != "linux":
        raise CompileError(f"the kernels are built on Linux only, this is {sys.platform}")
    command = shlex.split(os.environ.get("CXX", ""))
    if not command:
        command = [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not command or not shutil.which(command[0]):
        raise CompileError(
            f"no C++ compiler ({command[0] if command else 'c++, g++, clang++'} is not on PATH); "
            "install g++, or name yours in CXX"
        )
    return command


def find_ninja() -> str:
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        program = shutil.which("ninja")
        if program is None:
            raise CompileError("ninja is missing: pip install ninja") from None
        return program


def bindings_flags() -> list[str]:
    """Flags of csrc/bindings, the only folder that sees torch, Python and pybind11."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths

    python = sysconfig.get_paths()["include"]
    if not Path(python, "Python.h").exists():
        raise CompileError(f"{python}/Python.h is missing: install the headers (python3-dev)")
    # In this order: torch has a copy of pybind11 among its headers.
    includes = [pybind11.get_include(), *include_paths(), python]
    return [
        *(flag for path in includes for flag in ("-isystem", path)),
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f'-DFUSED_RNN_CXX_FLAGS="{shlex.join(CXX_FLAGS)}"',
        f'-DFUSED_RNN_TORCH_VERSION="{torch.__version__}"',
    ]


def torch_libraries() -> list[str]:
    # libtorch_cpu has all of the stable ABI. Nothing else is linked, so that a symbol from outside
    # it fails the import here and not on a user's other torch. No rpath: torch is imported first.
    from torch.utils.cpp_extension import library_paths

    return [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]


def ninja_path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_command(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: depfiles, so that an edited header rebuilds its includers."""

    def build_extension(self, ext: Extension) -> None:
        # Whoever asks for the library by name wants to hear that it did not build.
        ext.optional = not STRICT and "build_ext" not in self.distribution.commands
        try:
            self.run_ninja(ext)
        except (CompileError, ImportError) as error:
            # A library left over from an earlier build would answer for sources it does not have.
            name = self.get_ext_filename(ext.name)
            for stale in (Path(self.build_lib, name), ROOT / name):
                stale.unlink(missing_ok=True)
            if ext.optional:
                self.warn(
                    f"\n{'*' * 78}\n{ext.name} was NOT built: {error}\n"
                    "fused_rnn is installed without its kernels: its layers run on torch's own.\n"
                    f"FUSED_RNN_STRICT=1 turns this into an error.\n{'*' * 78}"
                )
            raise CompileError(f"{ext.name}: {error}") from error

    def run_ninja(self, ext: Extension) -> None:
        compiler = find_compiler()
        ninja = find_ninja()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not build_temp: an editable install gets an empty one every time.
        flavour = "sanitize" if SANITIZE else "release"
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{platform.machine()}-{flavour}"
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(ext, compiler, folder, target))

        jobs = os.environ.get("MAX_JOBS")
        command = [ninja, "-C", str(folder), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command).returncode != 0:
            raise CompileError("the compiler failed, its messages stand above")

    def ninja_file(self, ext: Extension, compiler: list[str], folder: Path, target: Path) -> str:
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        common = [*extra, *CXX_FLAGS, f"-I{ROOT / 'csrc'}", *(["-DFUSED_RNN_X86"] if X86 else [])]
        flags = {"cpu": [], "bindings": bindings_flags()}
        # One rule per language; a source's suffix picks its rule.
        rules = {".cpp": "cxx"}
        lines = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {ninja_command(compiler)} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = c++ $in",
            "rule link",
            f"  command = {ninja_command(compiler)} $in -o $out $flags",
            "  description = link $out",
        ]
        objects = []
        for source in map(Path, ext.sources):
            own = [*common, *flags[source.parent.name], *ISA_FLAGS.get(source.name, [])]
            objects.append(ninja_path(source.with_suffix(".o")))
            lines += [
                f"build {objects[-1]}: {rules[source.suffix]} {ninja_path(ROOT / source)}",
                f"  flags = {ninja_command(own)}",
            ]
        link = [*shlex.split(os.environ.get("LDFLAGS", "")), *LD_FLAGS, *torch_libraries()]
        lines += [
            f"build {ninja_path(target)}: link {' '.join(objects)}",
            f"  flags = {ninja_command(link)}",
            f"default {ninja_path(target)}",
        ]
        return "\n".join(lines) + "\n"


setup(
    ext_modules=[Extension("fused_rnn._C", sources())],
    cmdclass={"build_ext": NinjaBuild},
)

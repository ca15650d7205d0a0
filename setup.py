"""Builds fused_rnn._C. Everything else about the project is in pyproject.toml.

Environment:
    CXX, CXXFLAGS, LDFLAGS   compiler (may carry a launcher: "ccache g++") and extra flags
    MAX_JOBS                 parallel compiler processes
    FUSED_RNN_CUDA           0: without CUDA kernels; 1: fail where nvcc is missing; otherwise they
                             are built where it is found
    CUDA_HOME                where CUDA is (bin/nvcc), if nvcc is not on PATH
    TORCH_CUDA_ARCH_LIST     architectures, as torch's own extensions take them: "8.0;9.0a+PTX"
    NVCCFLAGS                extra flags of nvcc
    FUSED_RNN_EMULATOR=1     build the library that executes the CUDA kernels on the host, for tests
    FUSED_RNN_ISAS           instruction sets to build kernels for, of those in ISA_FLAGS: "avx2".
                             The baseline is always there; otherwise all are
    FUSED_RNN_TYPES          storage types to build them for, of those in TYPES: "bfloat16". float32
                             is always there; otherwise all are. Calls in the others fail
    FUSED_RNN_SANITIZE=1     AddressSanitizer and UndefinedBehaviorSanitizer; with the name of an
                             instruction set (avx2) in its kernels only, and the others unoptimised
    FUSED_RNN_STRICT=1       fail when the library cannot be built, instead of installing without it
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()

X86 = platform.machine().lower() in ("x86_64", "amd64")
SANITIZE = os.environ.get("FUSED_RNN_SANITIZE") or "0"
STRICT = os.environ.get("FUSED_RNN_STRICT") == "1"
EMULATOR = os.environ.get("FUSED_RNN_EMULATOR") == "1"

# The stable ABI of torch 2.11: the library loads with every later torch, whichever built it.
TORCH_TARGET_VERSION = "0x020b000000000000"

# Only these files may use more than the base instruction set: the choice is made at run time.
AVX2 = "-mavx2 -mfma -mf16c".split()
# GCC 12 takes the undefined operands of its own intrinsics for a mistake.
AVX512 = (
    "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512 -Wno-maybe-uninitialized"
).split()
# Named as `fused_rnn._C.isa()` names them. csrc/cpu/kernels.cpp is compiled for each in each type,
# csrc/cpu/cells.cpp in each type that is calculated in.
ISA_FLAGS = {
    "baseline": [],
    "avx512_bf16": [*AVX2, *AVX512, "-mavx512bf16"],
    "avx512": [*AVX2, *AVX512],
    "avx2": AVX2,
}
# Of storage, and what each is calculated in.
TYPES = {"Float32": "float", "Float64": "double", "BFloat16": "float", "Float16": "float"}
# Of a set whose instructions are for some types only; in the others it runs the kernels of a base,
# and in all of them its cells.
OWN_TYPES = {"avx512_bf16": ("BFloat16",)}
BASES = {"avx512_bf16": "avx512"}

# Every generation since Ampere, as far as the compiler knows it. Kernels for 9.0a run on nothing
# else, so the last one is there as PTX as well.
CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
NVCC_FLAGS = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden".split()

CXX_FLAGS = (
    "-std=c++20 -O3 -fPIC -pthread -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-ffp-contract=fast -Wall -Wextra -Wno-psabi"
).split()
# Of g++: how far it looks for what else a register tile's element may be ("alias stmt walking" of
# -ftime-report). Its own limit is 1000, for the same code but for some instructions. And the loops
# of a tile are in fewer lines of the cache of decoded instructions where they begin one, which
# counts where two threads share a core.
OPTIONAL_FLAGS = ["--param=sccvn-max-alias-queries-per-access=250", "-falign-loops=64"]
LD_FLAGS = ["-shared", "-pthread"]
KERNELS, CELLS = Path("csrc/cpu/kernels.cpp"), Path("csrc/cpu/cells.cpp")
FOR_PYTHON = ("module.cpp", "direct.cpp")  # in csrc/bindings, and no part of an op
SANITIZERS: list[str] = []
if SANITIZE != "0":
    # What UBSan says of pointers AddressSanitizer says when they are used, and it takes half as
    # long again to compile.
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,pointer-overflow,object-size"]
    SANITIZERS += ["-fno-sanitize-recover=all"]
    CXX_FLAGS += [*SANITIZERS, "-fno-omit-frame-pointer", "-g1", "-O1"]
    LD_FLAGS += SANITIZERS


def choice(variable: str, known: Iterable[str]) -> list[str]:
    """Those of the known names that a variable of the environment lists; all, where it is not."""
    names = {name.lower(): name for name in known}
    listed = os.environ.get(variable, "").replace(",", " ").lower().split()
    for name in listed:
        if name not in names:
            raise CompileError(f"{variable}: {name!r} is none of {', '.join(names)}")
    return [names[name] for name in listed or names]


def with_bases(isas: Iterable[str]) -> set[str]:
    return {base for isa in isas for base in (isa, BASES.get(isa, isa))}


def kernels() -> list[tuple[str, str]]:
    """The instruction sets and types that kernels are compiled for, the baseline's first."""
    isas = {"baseline"} | (with_bases(choice("FUSED_RNN_ISAS", ISA_FLAGS)) if X86 else set())
    types = {"Float32", *choice("FUSED_RNN_TYPES", TYPES)}
    return [
        (isa, type_)
        for isa in sorted(isas, key=list(ISA_FLAGS).index)
        for type_ in OWN_TYPES.get(isa, TYPES)
        if type_ in types
    ]


def isas_to_sanitize() -> set[str]:
    """Those whose kernels are instrumented."""
    if SANITIZE in ("0", "1"):
        return set(ISA_FLAGS)
    return with_bases(choice("FUSED_RNN_SANITIZE", ISA_FLAGS))


def sources() -> list[str]:
    patterns = ("csrc/cpu/*.cpp", "csrc/bindings/*.cpp", "csrc/cuda/*.cu")
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


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


def accepted(compiler: list[str], flags: list[str]) -> list[str]:
    """Those flags that a compiler takes without a word."""

    def takes(flag: str) -> bool:
        command = [*compiler, "-Werror", flag, "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    return [flag for flag in flags if takes(flag)]


def find_ninja() -> str:
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        program = shutil.which("ninja")
        if program is None:
            raise CompileError("ninja is missing: pip install ninja") from None
        return program


class Cuda(NamedTuple):
    """A CUDA toolkit; without nvcc where there is none, or it is not wanted, and why."""

    nvcc: str = ""
    root: Path = Path()
    flags: tuple[str, ...] = ()
    architectures: str = ""
    off: str = ""


def find_cuda(compiler: list[str]) -> Cuda:
    wanted = os.environ.get("FUSED_RNN_CUDA", "")
    off = "built with FUSED_RNN_CUDA=0" if wanted == "0" else ""
    if SANITIZE != "0":
        off = f"built with FUSED_RNN_SANITIZE={SANITIZE}"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if nvcc is None and Path("/usr/local/cuda/bin/nvcc").exists():
        nvcc = "/usr/local/cuda/bin/nvcc"
    try:
        if nvcc is None:
            raise CompileError("it is not on PATH, and CUDA_HOME is not set")
        # nvcc on PATH may be a script, so it is asked where it stands.
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        plan = subprocess.run(command, capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
        if plan.returncode != 0 or top is None:
            raise CompileError(f"{nvcc} does not run:\n{plan.stderr}")
        root = Path(top[1]).resolve()
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        names, flags = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), known.split())
    except (OSError, CompileError) as error:
        if wanted == "1":
            raise CompileError(f"FUSED_RNN_CUDA=1, but {error}") from error
        return Cuda(off=off or f"built without nvcc: {error}")
    if off:
        return Cuda(root=root, off=off)  # the emulator reads CUDA's headers
    own = [*NVCC_FLAGS, "-ccbin", compiler[-1], *flags]
    own += shlex.split(os.environ.get("NVCCFLAGS", ""))
    return Cuda(nvcc, root, tuple(own), names)


def gencode(wanted: str, known: list[str]) -> tuple[str, list[str]]:
    """The architectures, and nvcc's flags for them."""

    def number(architecture: str) -> str:
        return architecture.replace(".", "")

    names = wanted.replace(";", " ").replace(",", " ").split()
    if not names:
        # compute_90 stands for 90a, which nvcc knows and does not list.
        listed = [a for a in CUDA_ARCHITECTURES if f"compute_{number(a).rstrip('a')}" in known]
        names = [*listed[:-1], f"{listed[-1]}+PTX"]
    flags = []
    for name in names:
        base = name.removesuffix("+PTX")
        if not re.fullmatch(r"\d+\.\d[af]?", base):
            raise CompileError(f"TORCH_CUDA_ARCH_LIST has {name!r}: write 8.0, 9.0a or 9.0+PTX")
        codes = [f"sm_{number(base)}", *([f"compute_{number(base)}"] if base != name else [])]
        flags += [
            "-gencode",
            f"arch=compute_{number(base)},code=[{','.join(codes)}]",
        ]
    return " ".join(names), flags


def bindings_flags(cuda: Cuda) -> list[str]:
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
        *(["-DFUSED_RNN_CUDA"] if cuda.nvcc else []),
        f'-DFUSED_RNN_CUDA_ARCHITECTURES="{cuda.architectures}"',
        f'-DFUSED_RNN_CUDA_OFF="{ninja_string(cuda.off)}"',
    ]


def torch_libraries() -> list[str]:
    # libtorch_cpu has all of the stable ABI. Nothing else is linked, so that a symbol from outside
    # it fails the import here and not on a user's other torch. No rpath: torch is imported first.
    from torch.utils.cpp_extension import library_paths

    return [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]


def ninja_string(text: str) -> str:
    """Text that may stand in a string of C++ on a command line."""
    return " ".join(text.split()).replace("\\", "\\\\").replace('"', "'")


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
        flavour = "release" if SANITIZE == "0" else "sanitize"
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
        common = [*CXX_FLAGS, *extra, f"-I{ROOT / 'csrc'}"]
        cuda = find_cuda(compiler)
        flags = {"cpu": common, "bindings": [*common, *bindings_flags(cuda)]}
        flags["cuda"] = [f"-I{ROOT / 'csrc'}", *cuda.flags]
        lines = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {ninja_command(compiler)} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = c++ $in",
            "rule nvcc",
            f"  command = {ninja_command([cuda.nvcc])} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
            "rule link",
            f"  command = {ninja_command(compiler)} $in -o $out $flags",
            "  description = link $out",
        ]
        # One rule per language; a source's suffix picks its rule.
        rules = {".cpp": "cxx", ".cu": "nvcc"}

        def compile_to(target: Path, source: Path, rule: str, own: list[str]) -> str:
            lines.append(f"build {ninja_path(target)}: {rule} {ninja_path(ROOT / source)}")
            lines.append(f"  flags = {ninja_command(own)}")
            return ninja_path(target)

        def link_to(target: Path, objects: list[str], *own: str) -> None:
            all_flags = [*shlex.split(os.environ.get("LDFLAGS", "")), *LD_FLAGS]
            all_flags += [*torch_libraries(), *own]
            lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
            lines.append(f"  flags = {ninja_command(all_flags)}")
            lines.append(f"default {ninja_path(target)}")

        objects = {}
        for source in map(Path, ext.sources):
            if source in (KERNELS, CELLS) or (source.suffix == ".cu" and not cuda.nvcc):
                continue
            name = source.with_suffix(".o")
            own = flags[source.parent.name]
            objects[source] = compile_to(name, source, rules[source.suffix], own)

        optional = accepted(compiler, OPTIONAL_FLAGS)
        sanitized = isas_to_sanitize()
        # Of a function that several objects have, the linker keeps the first one's: not one with
        # wider instructions, nor one that is not sanitized.
        for isa, type_ in sorted(kernels(), key=lambda kernel: kernel[0] not in sanitized):
            own = [*common, *optional, *ISA_FLAGS[isa], f"-DFUSED_RNN_ISA={isa}"]
            if isa not in sanitized:  # nor run
                own = [*(flag for flag in own if flag not in SANITIZERS), "-O0", "-g0"]
            elif SANITIZERS:
                # Looking for uses of a local after its scope, g++ takes three times as long.
                own.append("-fno-sanitize-address-use-after-scope")
            cells = BASES.get(isa, isa)
            scans = [f"-DFUSED_RNN_CELLS={cells}", f"-DFUSED_RNN_TYPE={type_}"]
            accumulate = TYPES[type_]
            files = [(KERNELS, f"kernels_{isa}_{type_.lower()}.o", scans)]
            if cells == isa:
                define = f"-DFUSED_RNN_ACCUMULATE={accumulate}"
                files.append((CELLS, f"cells_{isa}_{accumulate}.o", [define]))
            for source, file, defines in files:
                name = source.with_name(file)
                if name not in objects:  # cells serve several types
                    objects[name] = compile_to(name, source, "cxx", [*own, *defines])
        # Static, because torch may have another version of it loaded, or none.
        runtime = [f"-L{cuda.root / 'lib64'}", "-lcudart_static", "-ldl", "-lrt"]
        link_to(target, list(objects.values()), *(runtime if cuda.nvcc else []))

        if EMULATOR and cuda.root != Path():
            # Kernels and bindings once more; the rest is the same.
            emulated = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/bindings/*.cpp")]
            emulated = [file.relative_to(ROOT) for file in emulated if file.name not in FOR_PYTHON]
            emulated.append(Path("tests/emu/emulator.cpp"))
            define = ["-DFUSED_RNN_CUDA", "-DFUSED_RNN_EMULATE"]
            own = [*flags["bindings"], *define, f"-I{ROOT / 'tests' / 'emu'}"]
            own += ["-isystem", str(cuda.root / "include")]
            parts = [obj for source, obj in objects.items() if source.parent.name == "cpu"]
            for source in sorted(emulated):
                name = Path("emulator", source).with_suffix(".o")
                if source.name == "emulator.cpp":  # no part of what is watched
                    own = [flag for flag in own if flag not in SANITIZERS]
                parts.append(compile_to(name, source, "cxx", ["-x", "c++", *own]))
            link_to(Path("libfused_rnn_emu.so"), parts)
        return "\n".join(lines) + "\n"


setup(
    ext_modules=[Extension("fused_rnn._C", sources())],
    cmdclass={"build_ext": NinjaBuild},
)

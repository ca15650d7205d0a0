"""Checks that no function compiled for a wider instruction set can replace one of the base set.

The linker keeps one copy of a function that several objects define inline. Were that the copy from
kernels_avx512_float32.o, a machine without AVX-512 would die in it, far away from any kernel.

python tools/check_symbols.py FOLDER_OF_OBJECTS...
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def instruction_set(file: Path) -> str:
    """The set whose kernels or cells an object has, or the base set, as csrc/cuda has it."""
    found = re.fullmatch(r"(?:kernels|cells)_(.+)_[^_]+", file.stem)
    return found[1] if found else "baseline"


def weak_functions(file: Path) -> set[str]:
    command = ["nm", "--demangle", "--defined-only", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    fields = (line.split(maxsplit=2) for line in lines)
    return {name for _, kind, name in fields if kind == "W"}


def complaints(folder: Path) -> list[str]:
    functions = {file: weak_functions(file) for file in sorted(folder.rglob("*.o"))}
    found = []
    for wide in (file for file in functions if instruction_set(file) != "baseline"):
        for other in functions:
            if instruction_set(other) != instruction_set(wide):
                shared = sorted(functions[wide] & functions[other])
                found += [f"{wide.name} and {other.name} both define {name}" for name in shared]
    return found


def main() -> int:
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders or not all(any(folder.rglob("*.o")) for folder in folders):
        sys.exit("usage: check_symbols.py FOLDER_OF_OBJECTS... (each must hold some)")
    found = [complaint for folder in folders for complaint in complaints(folder)]
    print("\n".join(found) or "symbols: ok")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

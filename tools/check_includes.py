"""Checks what the files of csrc/ include: dependence runs one way, torch is seen by bindings only.

python tools/check_includes.py [csrc]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# folder -> what it may include, besides itself
MAY_INCLUDE = {
    "core": set[str](),
    "cells": {"core"},
    "cpu": {"core", "cells"},
    "cuda": {"core", "cells"},
    "bindings": {"core", "cells", "cpu", "cuda"},
}
BINDINGS_ONLY = re.compile(r"(torch|ATen|c10|pybind11)/|Python\.h$")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:<([^>]+)>|"([^"]+)")', re.MULTILINE)


def complaints(csrc: Path) -> list[str]:
    found = []
    for file in sorted(csrc.rglob("*")):
        if file.suffix not in (".h", ".cpp", ".cuh", ".cu"):
            continue
        folder = file.relative_to(csrc).parts[0]
        if folder not in MAY_INCLUDE:
            found.append(f"{file}: tools/check_includes.py knows no folder {folder}")
            continue
        text = file.read_text(encoding="utf-8")
        for match in INCLUDE.finditer(text):
            name = match[1] or match[2]
            place = f"{file}:{text.count(chr(10), 0, match.start()) + 1}"
            if BINDINGS_ONLY.match(name):
                if folder != "bindings":
                    found.append(f"{place}: {name} may be included in csrc/bindings only")
                continue
            if match[1]:
                continue
            candidates = [(file.parent / name).resolve(), (csrc / name).resolve()]
            target = next((c for c in candidates if c.is_file()), None)
            if target is None or not target.is_relative_to(csrc.resolve()):
                found.append(f"{place}: {name} is no file of csrc/")
                continue
            other = target.relative_to(csrc.resolve()).parts[0]
            if other != folder and other not in MAY_INCLUDE[folder]:
                found.append(f"{place}: csrc/{folder} may not depend on csrc/{other} ({name})")
    return found


def main() -> int:
    default = Path(__file__).resolve().parent.parent / "csrc"
    csrc = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    if not csrc.is_dir():
        sys.exit(f"{csrc} is no folder")
    found = complaints(csrc)
    print("\n".join(found) or "includes: ok")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

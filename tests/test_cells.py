"""The cell floor: csrc/core and csrc/cells with a bare compiler, and as the library has them."""

from __future__ import annotations

import os
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from judge import Tensors, judge
from processes import run

from fused_rnn import _C, reference

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "tests" / "csrc"
# Contraction is the same at every level; one program runs for long, the others are large.
OPTIMISED = {"test_math": "-O3", "test_cells": "-O1", "test_products": "-O1"}
FLAGS = "-std=c++20 -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -Wno-psabi".split()
ISA_FLAGS = {
    "DEFAULT": [],
    "AVX2": "-mavx2 -mfma".split(),
    "AVX512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma".split(),
}
CELLS = _C.cells()
MAX_ULP = {"sigmoid": 2.5, "tanh": 2.6}

each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_float = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_function = pytest.mark.parametrize("name", MAX_ULP)
# Fewer than a vector, exactly some, some and a rest.
each_count = pytest.mark.parametrize("count", [1, 7, 64, 203])


# With a bare compiler


@pytest.mark.slow  # and the same whatever set the library has chosen
@pytest.mark.parametrize("isa", ISA_FLAGS)
@pytest.mark.parametrize("program", ["test_math", "test_cells"])
def test_program(program: str, isa: str, tmp_path: Path) -> None:
    isas = list(ISA_FLAGS)
    best = torch.backends.cpu.get_cpu_capability()
    if isas.index(isa) > (isas.index(best) if best in isas else 0):
        pytest.skip(f"{isa} needs more than this machine or ATEN_CPU_CAPABILITY has, {best}")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    binary = tmp_path / program
    flags = [*FLAGS, OPTIMISED[program], *ISA_FLAGS[isa], f"-I{ROOT / 'csrc'}"]
    run(*compiler, *flags, CSRC / f"{program}.cpp", "-o", binary)
    print(run(binary))


# By the set that the machine must have. What multiplies pairs of bfloat16 by an instruction is
# tested without it as well, in vectors as wide.
AVX512 = [*ISA_FLAGS["AVX512"], "-mf16c"]
PRODUCTS = {
    "avx512_bf16-without": ("baseline", ["-DFUSED_RNN_VECTOR_BYTES=64"]),
    "avx2": ("avx2", [*ISA_FLAGS["AVX2"], "-mf16c"]),
    "avx512": ("avx512", AVX512),
    "avx512_bf16": ("avx512_bf16", [*AVX512, "-mavx512bf16"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("products", PRODUCTS)
def test_products(products: str, tmp_path: Path) -> None:
    isa, flags = PRODUCTS[products]
    widest_first = _C.compiled_isas()
    if isa not in widest_first or widest_first.index(isa) < widest_first.index(_C.isa()):
        pytest.skip(f"{isa} is more than this machine or ATEN_CPU_CAPABILITY has, {_C.isa()}")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    common = [*FLAGS, OPTIMISED["test_products"], f"-I{ROOT / 'csrc'}"]
    # Of g++ 12 about its own headers, without optimisation.
    common += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    binary = tmp_path / "test_products"
    run(*compiler, *common, *flags, CSRC / "test_products.cpp", "-o", binary)
    print(run(binary))


@pytest.mark.slow
def test_team(tmp_path: Path) -> None:
    """Under ThreadSanitizer, which the library as a whole does not run under: torch would not."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = "-std=c++20 -O1 -g -fsanitize=thread -pthread -Wall -Wextra -Werror".split()
    binary = tmp_path / "test_team"
    sources = [CSRC / "test_team.cpp", *ROOT.glob("csrc/cpu/[st]*.cpp")]  # strategy, team
    run(*compiler, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", binary)
    print(run("timeout", "60", binary))  # a thread that is forgotten waits without end


@pytest.mark.slow
def test_a_set_takes_from_its_base_what_it_lacks(tmp_path: Path) -> None:
    """As avx512_bf16 does, which few machines can run: here a stand-in for avx2, which is chosen
    only where it runs."""
    if "avx2" not in _C.compiled_isas() or _C.isa() == "baseline":
        pytest.skip(f"avx2 is more than this machine or ATEN_CPU_CAPABILITY has, {_C.isa()}")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = "-std=c++20 -O1 -Wall -Wextra -Werror".split()
    binary = tmp_path / "test_isa"
    sources = [CSRC / "test_isa.cpp", ROOT / "csrc" / "cpu" / "isa.cpp"]
    run(*compiler, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", binary)
    print(run(binary, ATEN_CPU_CAPABILITY="avx2"))


def test_constants_are_those_of_the_script() -> None:
    """math.h holds the numbers that tools/fit_polynomials.py derives, in its order."""
    script = runpy.run_path(str(ROOT / "tools" / "fit_polynomials.py"))
    number = re.compile(r"-?\b\d+\.\d*(?:e[+-]?\d+)?f?\b")
    source = (ROOT / "csrc" / "core" / "math.h").read_text()
    written: list[str] = number.findall(source)

    def values(literals: list[str]) -> list[float]:
        return [float(literal.removesuffix("f")) for literal in literals]

    for fmt in script["FORMATS"]:
        for name, literals in script["constants"](fmt).items():
            there = any(
                values(written[i : i + len(literals)]) == values(literals)
                for i in range(len(written))
            )
            assert there, f"{fmt.name} {name}: {', '.join(literals)} not in math.h"


# In the library, with the instruction set it has chosen


@each_float
@each_function
def test_ulps(name: str, dtype: type[np.floating]) -> None:
    rng = np.random.default_rng(0)
    info = np.finfo(dtype)
    scales = 2.0 ** rng.uniform(-40, 6, 200_001)
    x = (rng.standard_normal(scales.size) * scales).astype(dtype)
    y = _C.math(name, x)
    wide = x.astype(np.longdouble)
    exact = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))
    seen = exact >= 2 * info.tiny if name == "sigmoid" else np.full(x.shape, True)
    _, exponent = np.frexp(exact)
    ulps = np.abs(np.ldexp(y - exact, info.nmant + 1 - exponent))[seen]
    assert y.dtype == dtype
    assert ulps.max() <= MAX_ULP[name], f"{ulps.max()} at {x[seen][ulps.argmax()]}"


@each_float
@each_function
def test_function_saturates_and_keeps_nan(name: str, dtype: type[np.floating]) -> None:
    limit, tiny = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    x = np.array([np.inf, limit, tiny, 0, -limit, -np.inf, np.nan], dtype)
    small = [0.5, 0.5, 0, 0] if name == "sigmoid" else [tiny, 0, -1, -1]
    np.testing.assert_array_equal(_C.math(name, x), np.array([1, 1, *small, np.nan], dtype))


def test_every_cell_has_an_oracle() -> None:
    """A new cell needs an entry in fused_rnn.reference."""
    assert CELLS.keys() == reference.CELLS.keys()
    for cell, facts in CELLS.items():
        oracle = reference.CELLS[cell]
        assert all(facts[name] == getattr(oracle, name) for name in facts if name != "saved")


def arguments(cell: str, count: int, dtype: torch.dtype) -> Tensors:
    gates, states = CELLS[cell]["gates"], CELLS[cell]["states"]
    diagonals = CELLS[cell]["diagonals"]
    m = CELLS[cell]["candidate"]
    rows = {"x": gates, "h": gates, "w": diagonals, "m": m, "prev": states, "d_state": states}
    return {name: torch.randn(n, count, dtype=dtype) for name, n in rows.items()}


def by_library(cell: str, args: Tensors) -> Tensors:
    names = ("x", "h", "w", "m", "prev", "d_state")
    x, h, w, m, prev, d_state = (args[name].numpy() for name in names)
    state, saved = _C.cell_forward(cell, x, h, w, m, prev)
    dx, dh, d_prev, dw = _C.cell_backward(cell, saved, w, m, prev, state, d_state)
    results = {"state": state, "dx": dx, "dh": dh, "d_prev": d_prev, "dw": dw}
    return {name: torch.from_numpy(value) for name, value in results.items()}


def by_reference(cell: str, args: Tensors) -> Tensors:
    names = ("x", "h", "w", "prev")
    x, h, w, prev = leaves = [args[name].clone().requires_grad_() for name in names]
    oracle = reference.CELLS[cell]
    flat = h.flatten()
    m = args["m"].flatten() if oracle.candidate else None
    if oracle.operand is not None:  # W_hh of its product is the identity, a norm changes nothing
        operand = oracle.operand(x.flatten(), flat, m, tuple(prev))
        if oracle.normed_operand:
            operand, flat = torch.zeros(()), torch.cat([flat, operand])
        first = oracle.first_gates * prev.shape[1]
        flat = torch.cat([flat[:first], flat[first:] + operand])
    state = torch.stack(oracle.step(x.flatten(), flat, w.flatten(), m, tuple(prev)))
    gradients = torch.autograd.grad(state, leaves, args["d_state"], materialize_grads=True)
    return {"state": state.detach()} | {
        f"d_{name}" if name == "prev" else f"d{name}": gradient
        for name, gradient in zip(names, gradients, strict=True)
    }


@each_count
@each_dtype
@each_cell
def test_cell_agrees_with_reference(cell: str, dtype: torch.dtype, count: int) -> None:
    """Some 500 units: in calls of so many by the library, at once by the reference."""
    calls = 1 + 500 // count
    args = arguments(cell, calls * count, dtype)
    splits = {name: value.chunk(calls, 1) for name, value in args.items()}
    found = [
        by_library(cell, {name: parts[k].contiguous() for name, parts in splits.items()})
        for k in range(calls)
    ]
    assert all(part.shape[1] == count for results in found for part in results.values())
    judge(
        {name: torch.cat([results[name] for results in found], 1) for name in found[0]},
        by_reference(cell, args),
        by_reference(cell, {name: value.double() for name, value in args.items()}),
    )

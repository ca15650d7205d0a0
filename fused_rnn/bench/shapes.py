"""The shapes that are measured, as data.

`PROGRAMS` are the RNN layers of published programs (speech, genomes, hydrology, OCR ...), read off
while those programs ran; a row of several sizes stands for one program. `GRID` goes through the
sizes one by one. `QUICK` is a sample of both for a first impression.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
CELLS = tuple(GATES)


@dataclass(frozen=True)
class Shape:
    """One layer call: T steps, B sequences, I inputs, H hidden units, L layers, D directions."""

    name: str
    cell: str  # name of the class, in torch.nn and in fused_rnn
    T: int
    B: int
    I: int
    H: int
    L: int = 1
    D: int = 1
    batch_first: bool = False
    packed: bool = False  # PackedSequence of random lengths, uniform in 1..T
    strided: bool = False  # the input is a transposed view, as a preceding layer leaves it
    state: bool = False  # the caller passes hx
    dropout: float = 0.0

    @property
    def family(self) -> str:
        return self.cell.removesuffix("Cell")

    @property
    def gates(self) -> int:
        return GATES[self.family]

    @property
    def lengths(self) -> list[int]:
        """Of every sequence; equal in every run, so that runs can be compared."""
        if not self.packed:
            return [self.T] * self.B
        uniform = random.Random(0)
        return [self.T, *(uniform.randint(1, self.T) for _ in range(self.B - 1))]

    @property
    def rows(self) -> int:
        """Steps of all sequences together: N, the rows of a PackedSequence."""
        return sum(self.lengths)

    @property
    def sizes(self) -> str:
        words = [f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        words += [f"L{self.L}"] * (self.L > 1) + [f"D{self.D}"] * (self.D > 1)
        words += [flag for flag in ("batch_first", "packed", "strided") if getattr(self, flag)]
        return " ".join(words)

    @property
    def label(self) -> str:
        return f"{self.name}: {self.cell} {self.sizes}"


# The first row of every program is its most typical one: QUICK takes that.
PROGRAMS = (
    Shape("speaker embedding", "LSTM", 160, 24, 40, 256, L=3, batch_first=True),
    Shape("speaker embedding", "LSTM", 160, 33, 40, 256, L=3, batch_first=True),
    *(
        Shape(
            "speech activity, offline",
            "LSTM",
            293,
            B,
            60,
            128,
            L=4,
            D=2,
            batch_first=True,
            strided=True,
            dropout=0.5,
        )
        for B in (1, 8, 32)
    ),
    *(Shape("speech activity, streaming", "LSTMCell", 1, B, 128, 128, state=True) for B in (1, 16)),
    Shape("genome consensus", "GRU", 1000, 1, 10, 128, L=2, D=2),
    Shape("genome consensus", "GRU", 1000, 16, 10, 128, L=2, D=2),
    Shape("genome consensus", "GRU", 1000, 1, 10, 256, L=2, D=2),
    Shape("genome consensus", "GRU", 1000, 16, 10, 256, L=2, D=2),
    Shape("genome consensus", "GRU", 10000, 1, 10, 128, L=2, D=2),
    Shape("hydrology forecast", "LSTM", 365, 64, 4, 128),
    Shape("probabilistic forecast, training", "LSTM", 47, 32, 21, 40, L=2),
    Shape("probabilistic forecast, sampling", "LSTM", 1, 300, 21, 40, L=2, state=True),
    *(Shape("recurrent PPO", "LSTM", 1, B, 2, 256, state=True) for B in (1, 9)),
    *(Shape("word language model", "LSTM", 35, B, 200, 200, L=2, state=True) for B in (20, 10)),
    Shape("grapheme to phoneme, encoder", "GRU", 20, 26, 256, 256, packed=True),
    Shape("grapheme to phoneme, encoder", "GRU", 8, 1, 256, 256),
    *(
        Shape("grapheme to phoneme, decoder", "GRUCell", 1, B, 256, 256, state=True)
        for B in (1, 26)
    ),
    Shape("polyphone tagging", "LSTM", 25, 8, 64, 32, D=2, packed=True),
    Shape("polyphone tagging", "LSTM", 12, 1, 64, 32, D=2, packed=True),
    *(Shape("stress marking", "LSTM", 25, B, 64, 128, L=2, D=2, packed=True) for B in (48, 1, 128)),
    *(
        Shape("diacritics", "LSTM", T, B, 128, 256, L=3, D=2, batch_first=True, dropout=0.3)
        for T, B in ((42, 10), (81, 1), (81, 20))
    ),
    *(
        Shape("line OCR", "GRU", 160, B, 192, 128, D=2, batch_first=True, strided=True)
        for B in (1, 24)
    ),
    Shape("page layout", "LSTM", 75, 225, 32, 32, D=2),
    Shape("page layout", "LSTM", 225, 75, 256, 32, D=2),
    *(
        Shape("molecule embedding", "LSTM", 88, B, I, H, batch_first=True, strided=True)
        for B, I, H in ((16, 32, 128), (64, 32, 128), (16, 128, 512), (64, 128, 512))
    ),
    Shape("beat tracking, streaming", "LSTM", 1, 1, 150, 150, L=2, state=True),
    Shape("beat tracking, offline", "LSTM", 500, 8, 150, 150, L=2),
    Shape("beat tracking, offline", "LSTM", 1500, 1, 150, 150, L=2),
    Shape("graph aggregation", "LSTM", 10, 1797, 64, 64),
    Shape("graph aggregation", "LSTM", 10, 1797, 32, 32, D=2),
    Shape("graph aggregation, sums", "GRU", 10, 1797, 64, 64),
    Shape("graph aggregation, sums", "GRU", 2, 1797, 32, 32),
)


# Nothing to compute: what remains is the cost of a call.
OVERHEAD = tuple(Shape("cost of a call", cell, 1, 1, 8, 8) for cell in CELLS)

GRID = (
    *OVERHEAD,
    *(
        Shape("grid", cell, 50, B, H, H)
        for cell, B, H in product(CELLS, (1, 8, 32, 64), (64, 128, 256, 512, 1024))
    ),
    *(
        Shape("one step", cell, 1, B, H, H, state=True)
        for cell, B, H in product(CELLS, (1, 16), (64, 256, 1024))
    ),
    *(
        Shape("ragged", cell, 50, B, H, H, packed=True)
        for cell, B, H in product(CELLS, (8, 32), (128, 512))
    ),
)

_QUICK_SIZES = {(1, 128), (1, 512), (8, 256), (32, 128)}
_first_rows = {shape.name: shape for shape in reversed(PROGRAMS)}

QUICK = (
    *OVERHEAD,
    *(shape for shape in PROGRAMS if shape is _first_rows[shape.name]),
    *(shape for shape in GRID if shape.name == "grid" and (shape.B, shape.H) in _QUICK_SIZES),
)

# What may disturb a layer, see conditions.py: with one sequence, and with several.
CONDITIONS = (
    *(Shape("busy", cell, 50, B, H, H) for cell in CELLS for B, H in ((1, 512), (32, 128))),
    *(
        Shape("ragged", cell, 50, B, H, H, packed=True)
        for cell in CELLS
        for B, H in ((8, 256), (32, 128))
    ),
    *(
        Shape(name, cell, 50, B, H, H)
        for name in ("values", "reset", "cell")
        for cell in CELLS
        for B, H in ((1, 256), (32, 128))
    ),
    *(Shape("recompute", cell, 500, B, H, H) for cell in CELLS for B, H in ((1, 256), (32, 128))),
)

# For low precision: one sequence, which is bound by reading weights, and batches, which are bound
# by multiplying. Few, because torch.nn's own is slow where there are no instructions for it.
LOW_PRECISION = (
    *(Shape("one step", "LSTM", 1, 1, H, H, state=True) for H in (256, 1024)),
    *(
        Shape("grid", "LSTM", 50, B, H, H)
        for B, H in (*product((1, 8), (128, 256, 512, 1024)), *product((32,), (128, 256, 512)))
    ),
    *(
        Shape("grid", cell, 50, B, H, H)
        for cell in ("GRU", "RNN")
        for B, H in ((1, 256), (1, 512), (8, 256), (32, 128))
    ),
)

# Sizes between which the kernels of a GPU differ.
GPU = (
    *(
        Shape("gpu", cell, 128, B, H, H)
        for cell, B, H in product(("LSTM", "GRU"), (1, 16, 64, 256), (128, 256, 512, 1024, 2048))
    ),
    *(Shape("gpu", "RNN", 128, B, 512, 512) for B in (1, 64)),
    *(
        Shape("gpu", cell, 128, 64, 512, 512, **options)
        for cell in ("LSTM", "GRU")
        for options in ({"L": 2}, {"D": 2}, {"packed": True})
    ),
)

SUITES = {
    "gpu": GPU,
    "quick": QUICK,
    "programs": PROGRAMS,
    "grid": GRID,
    "all": PROGRAMS + GRID,
    "conditions": CONDITIONS,
    "low-precision": LOW_PRECISION,
}

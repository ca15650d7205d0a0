"""Derives the constants of csrc/core/math.h and prints them as they stand there.

    e^r = 1 + r + r^2 Q(r)       |r| <= ln2 / 2

Q is a Chebyshev fit. The factor r^2 in front of it keeps the leading terms exact and shrinks the
error of the fit where it would hurt. ln2 is split so that n * high is exact for every n that
occurs; low is the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpmath import chebyfit, exp, log, mp, mpf

mp.dps = 50


@dataclass(frozen=True)
class Format:
    name: str
    suffix: str
    digits: int  # decimal digits that identify a value
    high_bits: int  # significand bits left in the high part of ln2
    exp_terms: int


FORMATS = (Format("float", "f", 9, 16, 5), Format("double", "", 17, 42, 10))


def exp_tail(r: mpf) -> mpf:
    return (exp(r) - 1 - r) / r**2 if r else mpf(1) / 2


def fit(f: Callable[[mpf], mpf], low: mpf, high: mpf, terms: int) -> list[mpf]:
    """Coefficients, the constant first."""
    return list(reversed(chebyfit(f, [low, high], terms)))


def constants(fmt: Format) -> dict[str, list[str]]:
    def literal(value: mpf) -> str:
        return f"{mp.nstr(value, fmt.digits, strip_zeros=False)}{fmt.suffix}"

    ln2 = log(2)
    high = mp.floor(ln2 * 2**fmt.high_bits + 0.5) / mpf(2) ** fmt.high_bits
    q = fit(exp_tail, -ln2 / 2, ln2 / 2, fmt.exp_terms)
    return {
        "log2e": [literal(1 / ln2)],
        "ln2": [literal(ln2)],
        "ln2 high, low": [literal(high), literal(ln2 - high)],
        "2 Q": [literal(2 * c) for c in q],
    }


if __name__ == "__main__":
    for fmt in FORMATS:
        for name, literals in constants(fmt).items():
            print(f"{fmt.name:7}{name:15}{', '.join(literals)}")

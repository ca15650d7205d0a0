"""The picture of a benchmark: a line per shape, a dot per mode, a rule at 1x for the peer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_rnn.bench.measure import Result
from fused_rnn.bench.report import Environment, names, threads
from fused_rnn.bench.shapes import CELLS, Shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# mode: what the legend says, colour, marker, distance from the middle of the line
STYLES = {
    "inference": ("inference (forward)", "#1f77b4", "o", -0.17),
    "frozen": ("frozen (forward)", "#2ca02c", "s", 0.0),
    "training": ("training (forward + backward)", "#e8710a", "D", 0.17),
}
INK, GREY, FAINT = "#222222", "#666666", "#ececec"

# inches
MARGIN = 0.3
LABELS = 6.2  # names of the layers, then their sizes
SIZES = 3.1
PANEL = 4.0
GAP = 0.2
HEAD = 1.75
FOOT = 0.8
LINE = 0.25


def save(results: Sequence[Result], environment: Environment, path: Path) -> None:
    """Draws the results to `path`; needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = sorted(dict.fromkeys((r.threads, r.peer) for r in results), key=itemgetter(0))
    modes = [mode for mode in STYLES if any(r.mode == mode for r in results)]
    lines, count = _lines(results)
    width = LABELS + len(panels) * (PANEL + GAP) - GAP + MARGIN
    height = HEAD + count * LINE + FOOT
    figure = Figure(figsize=(width, height), facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, va="top", **style)

    peers = names(peer for _, peer in panels)
    write(MARGIN, 0.25, f"How much faster is fused_rnn than {peers}?", size=17, weight="bold")
    write(
        MARGIN,
        0.65,
        "A line is one RNN layer: T steps, B sequences, I inputs, H hidden units, L layers, "
        "D directions.\nAt 2x a call of fused_rnn takes half the time of the same call of "
        "the peer; left of the rule at 1x the peer is faster.",
        size=9,
        color=GREY,
        linespacing=1.5,
    )
    dtypes = ", ".join(sorted({r.dtype for r in results}))
    write(
        MARGIN,
        height - 0.25,
        " · ".join((environment.machine, environment.versions, dtypes, environment.date[:10])),
        size=8,
        color=GREY,
    )
    handles = []
    for mode in modes:
        text, colour, marker, _ = STYLES[mode]
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, label=text))
    figure.legend(
        handles=handles,
        title="dot: median; bar: middle half of the calls",
        title_fontsize=8.5,
        fontsize=9,
        alignment="left",
        frameon=False,
        loc="upper right",
        bbox_to_anchor=(1 - MARGIN / width, 1 - 0.2 / height),
    )

    low = min(0.75, 0.85 * min(r.q25 for r in results))
    high = max(2.5, 1.3 * max(r.q75 for r in results))
    for i, (number, peer) in enumerate(panels):
        left = LABELS + i * (PANEL + GAP)
        box = (left / width, FOOT / height, PANEL / width, count * LINE / height)
        ax = figure.add_axes(box, xscale="log", xlim=(low, high), ylim=(count - 0.5, -0.5))
        _panel(ax, peer, [r for r in results if (r.threads, r.peer) == (number, peer)], lines)
        title = threads(number) if peers == peer else f"{threads(number)}, {peer}"
        ax.set_title(title, size=11, weight="bold", pad=20)
        if i == 0:
            _labels(ax, lines)
    figure.savefig(path, dpi=150)


def _lines(results: Sequence[Result]) -> tuple[dict[Shape | str, int], int]:
    """The line of every shape, and of every cell's name above its shapes; how many in all."""
    lines: dict[Shape | str, int] = {}
    count = 0
    for family in CELLS:
        shapes = dict.fromkeys(r.shape for r in results if r.shape.family == family)
        if not shapes:
            continue
        count += bool(lines)  # an empty line between the cells
        lines[family] = count
        for shape in shapes:
            count += 1
            lines[shape] = count
        count += 1
    return lines, count


def _labels(ax: Axes, lines: dict[Shape | str, int]) -> None:
    names_at, sizes_at = (MARGIN - LABELS) / PANEL, (SIZES - LABELS) / PANEL
    for key, y in lines.items():
        style: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center_baseline"}
        if isinstance(key, str):
            ax.text(names_at, y, key, size=11, weight="bold", **style)
            continue
        name = key.name if key.cell == key.family else f"{key.name} ({key.cell})"
        ax.text(names_at, y, name, size=8.5, color=INK, **style)
        ax.text(sizes_at, y, key.sizes, size=7.5, color=GREY, family="monospace", **style)


def _panel(ax: Axes, peer: str, results: Sequence[Result], lines: dict[Shape | str, int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = ax.get_xlim()
    powers = (2.0**exponent for exponent in range(-8, 12))
    ax.xaxis.set_major_locator(FixedLocator([x for x in powers if low <= x <= high]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    ax.yaxis.set_major_locator(NullLocator())
    ax.tick_params(top=True, labeltop=True, length=0, labelsize=8.5, labelcolor=GREY)
    ax.spines[:].set_visible(False)
    ax.grid(axis="x", color=FAINT, linewidth=1, zorder=0)
    ax.axvspan(low, 1, color="#f6e9e9", linewidth=0, zorder=0)
    ax.axvline(1, color=INK, linewidth=1.5, zorder=1)
    ax.set_xlabel(
        f"\u2190 {peer} is faster  |  speed-up  |  fused_rnn is faster \u2192", size=9, color=GREY
    )

    for key, y in lines.items():
        if isinstance(key, str):
            _means(ax, y, [r for r in results if r.shape.family == key])
        else:
            ax.axhline(y, color=FAINT, linewidth=0.6, zorder=0)
    for r in results:
        _, colour, marker, offset = STYLES[r.mode]
        height = lines[r.shape] + offset
        bar = [r.q25, r.q75], [height, height]
        ax.plot(*bar, color=colour, linewidth=2, alpha=0.6, zorder=2)
        ax.plot(r.speedup, height, marker, color=colour, markersize=4.5, zorder=3)


def _means(ax: Axes, y: int, results: Sequence[Result]) -> None:
    means = []
    for mode in STYLES:
        speedups = [r.speedup for r in results if r.mode == mode]
        if speedups:
            means.append(f"{mode} {statistics.geometric_mean(speedups):.2f}x")
    ax.text(
        0.01,
        y,
        "geometric mean: " + ", ".join(means),
        transform=ax.get_yaxis_transform(),
        va="center_baseline",
        size=8.5,
        weight="bold",
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
        zorder=4,
    )

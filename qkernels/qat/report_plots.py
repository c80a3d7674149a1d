"""The plots of a report's page: SVG by matplotlib, in colors that the page's style sheet decides."""

from __future__ import annotations

import bisect
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .report_table import LayerRow
from .weight_histograms import BINS, WeightHistogram

WIDTH = 4.4  # inches: 317 points, the width of a phone, on which a page shows a plot at its own size
MOST_NAMED = 28  # layers that one plot names; of more it shows the course, and names the worst
WORST = 16
# What is drawn in a color on the left gets that variable of the style sheet.
COLORS = {"#1f2328": "--ink", "#6b7280": "--muted", "#d8dce2": "--line", "#2563a8": "--blue", "#c2571a": "--orange",
          "#3f7d4e": "--green", "#7a4ea3": "--violet"}  # fmt: skip
INK, MUTED, LINE, BLUE, ORANGE, GREEN, VIOLET = COLORS
SERIES = (BLUE, ORANGE, GREEN, VIOLET, MUTED)
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.markerscale": 1.4,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
}
_count = itertools.count()
Draw = Callable[[Any], None]
FLOAT = 10.0  # where a plot of widths has those that are not quantized


def svg(draw: Draw, height: float, label: str) -> str:
    """What ``draw`` makes of axes, as an svg element that fills its container.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("html: matplotlib is missing; run: pip install 'qkernels[report]'") from error
    # Names inside of an SVG have to be unique in the page.
    style: Any = {**STYLE, "svg.hashsalt": f"plot {next(_count)}"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", text))
    text = re.sub(r"<[^>]*>", _tag, text).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return re.sub(r"\s*\n\s*", " ", text)


def _tag(match: re.Match[str]) -> str:
    """A tag in the page's colors and font, without ids that nothing refers to, and with fewer digits."""
    tag = re.sub(r'<g id="[^"]*"', "<g", match[0])
    tag = re.sub(r" font-family: [^;\"]*;", "", tag)
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag)
    return re.sub("|".join(COLORS), lambda color: f"var({COLORS[color[0]]})", tag)


def short(name: str, most: int = 24) -> str:
    """The end of a long name, which tells layers apart."""
    name = name or "(model)"
    return name if len(name) <= most else "…" + name[1 - most :]


def by_name(rows: Sequence[LayerRow], series: Mapping[str, str], unit: str, scale: float = 1.0) -> tuple[Draw, float]:
    """Dots by layer, one series for each attribute of the rows (attribute -> label), and the height."""

    def draw(axes: Any) -> None:
        for (attribute, label), color, marker in zip(series.items(), SERIES, ("o", "D"), strict=False):
            found = [(getattr(row, attribute), at) for at, row in enumerate(rows)]
            found = [(scale * value, at) for value, at in found if value is not None and math.isfinite(value)]
            axes.plot(*zip(*found, strict=True), marker, color=color, markersize=5, label=label) if found else None
        axes.set_yticks(range(len(rows)), [short(row.name) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y")
        axes.grid(axis="x", linestyle=":")
        axes.set_xlabel(unit)
        axes.spines[["left", "bottom"]].set_visible(False)
        legend_above(axes, len(series))

    return draw, 0.75 + 0.19 * len(rows)


def by_place(rows: Sequence[LayerRow], series: Mapping[str, str], unit: str, scale: float = 1.0) -> tuple[Draw, float]:
    """The course over all layers, from the first to the last."""

    def draw(axes: Any) -> None:
        for (attribute, label), color in zip(series.items(), SERIES, strict=False):
            found = [(at, getattr(row, attribute)) for at, row in enumerate(rows, 1)]
            found = [(at, scale * value) for at, value in found if value is not None and math.isfinite(value)]
            axes.plot(*zip(*found, strict=True), ".", color=color, markersize=4, label=label) if found else None
        axes.grid(axis="y")
        axes.set_xlabel("layer, as in the table")
        axes.set_ylabel(unit)
        legend_above(axes, len(series))

    return draw, 2.4


def legend_above(axes: Any, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handletextpad=0.4)


def widths(rows: Sequence[LayerRow]) -> tuple[Draw, float]:
    """The bits of each layer's weights and input, from the first layer to the last."""

    def draw(axes: Any) -> None:
        at = range(1, len(rows) + 1)
        size = 6.0 if len(rows) <= 60 else 3.0
        for shift, attribute, label, color, marker in (
            (0.09, "weight_bits", "weights", BLUE, "s"),
            (-0.09, "input_bits", "inputs", ORANGE, "D"),
        ):
            bits = [getattr(row, attribute) or FLOAT for row in rows]
            axes.plot(at, [b + shift for b in bits], marker, color=color, markersize=size, label=label, alpha=0.9)
        axes.set_yticks([2, 3, 4, 5, 6, 7, 8, FLOAT], ["2", "3", "4", "5", "6", "7", "8", "float"])
        axes.set_ylim(1.5, FLOAT + 0.6)
        axes.grid(axis="y")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer, as in the table")
        axes.set_ylabel("bits")
        legend_above(axes, 2)

    return draw, 2.5


def sizes(rows: Sequence[LayerRow]) -> tuple[Draw, float]:
    """Bytes of the largest layers, in float and quantized."""
    largest = sorted(rows, key=lambda row: -row.float_bytes)[:WORST]
    bars = [(short(row.name), row.float_bytes, row.quantized_bytes) for row in largest]
    unit, label = (1e6, "MB") if bars[0][1] >= 1e6 else (1e3, "kB")

    def draw(axes: Any) -> None:
        at = range(len(bars))
        axes.barh(at, [before / unit for _, before, _ in bars], 0.72, color=LINE, label="float")
        axes.barh(at, [after / unit for _, _, after in bars], 0.36, color=BLUE, label="quantized")
        axes.set_yticks(at, [name for name, _, _ in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.spines[["left", "bottom"]].set_visible(False)
        legend_above(axes, 2)

    return draw, 0.75 + 0.19 * len(bars)


def accuracy(accuracies: Mapping[str, Mapping[float, float]]) -> tuple[Draw, float]:
    """Accuracy against bits; a series of one point is a level."""

    def draw(axes: Any) -> None:
        places = sorted({bits for series in accuracies.values() if len(series) > 1 for bits in series})
        at = {bits: i for i, bits in enumerate(places)}
        colors = itertools.cycle(SERIES[:-1])
        for name, series in accuracies.items():
            if len(series) == 1 and places:
                (value,) = series.values()
                axes.axhline(100 * value, color=MUTED, linestyle="--", linewidth=1.2, label=f"{name} {100 * value:.1f}")
            else:
                line = sorted(series.items())
                x = [at.get(bits, 0) for bits, _ in line]
                axes.plot(x, [100 * v for _, v in line], "o-", color=next(colors), linewidth=1.8, label=name)
        axes.set_xticks(range(len(places)), [f"{bits:g}" for bits in places])
        axes.grid(axis="y")
        axes.set_xlabel("bits")
        axes.set_ylabel("accuracy, %")
        legend_above(axes, 3)

    return draw, 2.8


def latencies(seconds: Mapping[str, float]) -> tuple[Draw, float]:
    """Milliseconds of models."""

    def draw(axes: Any) -> None:
        bars = axes.barh(range(len(seconds)), [1e3 * s for s in seconds.values()], 0.6, color=BLUE)
        axes.bar_label(bars, [f"{1e3 * s:.3g}" for s in seconds.values()], padding=3, fontsize=8.5, color=INK)
        axes.set_yticks(range(len(seconds)), [short(name) for name in seconds])
        axes.set_ylim(len(seconds) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.set_xlabel("ms a call")
        axes.spines[["left", "bottom"]].set_visible(False)

    return draw, 0.7 + 0.24 * len(seconds)


def layer_latencies(seconds: Mapping[str, Mapping[int, float]], bits: Mapping[str, int | None]) -> tuple[Draw, float]:
    """Milliseconds of the slowest layers at each width that was measured; the present one is filled."""
    slowest = sorted(seconds, key=lambda name: -max(seconds[name].values()))[:WORST]
    tried = sorted({width for name in slowest for width in seconds[name]}, reverse=True)

    def draw(axes: Any) -> None:
        for width, color in zip(tried, itertools.cycle(SERIES), strict=False):
            for at, name in enumerate(slowest):
                if width in seconds[name]:
                    face = color if bits.get(name) == width else "none"
                    label = f"{width} bits" if name == next(n for n in slowest if width in seconds[n]) else None
                    axes.plot(1e3 * seconds[name][width], at, "o", color=color, markerfacecolor=face, label=label)
        axes.set_yticks(range(len(slowest)), [short(name) for name in slowest])
        axes.set_ylim(len(slowest) - 0.4, -0.6)
        axes.grid(axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel("ms a call")
        axes.spines[["left", "bottom"]].set_visible(False)
        legend_above(axes, 4)

    return draw, 0.75 + 0.19 * len(slowest)


def weights(histogram: WeightHistogram) -> tuple[Draw, float]:
    """The weights before quantization as an area, after it as bars on the levels; of many levels as a line.

    Few levels are drawn relative to the highest, as the area is to its own highest bin; many are counted in its bins.
    """
    levels, after, before = histogram.levels, histogram.after, histogram.before
    edges = [histogram.low + (histogram.high - histogram.low) * at / BINS for at in range(BINS + 1)]
    few = len(levels) <= 20
    if not few:
        after = [0] * BINS
        for level, count in zip(levels, histogram.after, strict=True):
            after[bisect.bisect(edges, level) - 1] += count
    highest = max([*before, 1] if few else [*before, *after])
    ends = [min(levels), max(levels)]
    ticks = sorted({*ends, 0.0}) if ends[0] < 0 < ends[1] else ends

    def draw(axes: Any) -> None:
        if few:
            axes.vlines(levels, 0, 1.08, color=LINE, linewidth=0.8)
            axes.vlines(levels, 0, [n / max(after) for n in after], color=BLUE, linewidth=2.2, zorder=3)
        else:
            axes.axvspan(*ends, color=LINE, alpha=0.35, linewidth=0)
            axes.stairs([n / highest for n in after], edges, color=BLUE, linewidth=1.2, zorder=3)
        if before:
            axes.stairs([n / highest for n in before], edges, fill=True, color=ORANGE, alpha=0.5)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlim(histogram.low, histogram.high)
        axes.set_ylim(0, 1.08)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.figure.set_layout_engine("none")  # to measure texts takes longer than all else, and there may be hundreds
        axes.set_position((0.01, 0.17, 0.98, 0.82))

    return draw, 1.35


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], unit: str, log_scale: bool = False
) -> tuple[Draw, float]:
    """Lines over the steps of a training."""

    def draw(axes: Any) -> None:
        for (name, points), color in zip(series.items(), itertools.cycle(SERIES), strict=False):
            kept = points[:: max(len(points) // 400, 1)]
            axes.plot(
                *zip(*kept, strict=True),
                color=color,
                linewidth=1.4,
                label=short(name),
                marker="." if len(kept) < 3 else "",
            )
        if log_scale:
            axes.set_yscale("log")
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        legend_above(axes, 2)

    return draw, 2.5


def spread(values: Iterable[tuple[float, float]]) -> bool:
    """Whether points are positive and differ so much that a logarithmic axis shows more."""
    found = [y for _, y in values]
    return bool(found) and min(found) > 0 and max(found) / min(found) > 30

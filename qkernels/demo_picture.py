"""The demo's picture: accuracy, size and speed, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GRAY, ORANGE, BLUE = "#6b7280", "#e07b39", "#2563a8"


def draw(results: dict[str, Any], headline: str, path: Path) -> None:
    """Accuracy against bits, the size of each model, and the latency of fp32 and int8 by batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results["rows"]
    fp32, ptq, qat = rows[0], [r for r in rows if r["name"] == "PTQ"], [r for r in rows if r["name"] == "QAT"]
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy_axes, size_axes, latency_axes = figure.subplots(1, 3, width_ratios=(1.3, 1, 1.1))
    draw_accuracy(accuracy_axes, fp32, ptq, qat)

    names = ["fp32", *(f"{r['bits']} bits" for r in qat)]
    sizes = [r["size"] / 1e3 for r in (fp32, *qat)]
    bars = size_axes.bar(names, sizes, color=[GRAY, *[BLUE] * len(qat)], width=0.65)
    size_axes.bar_label(bars, [f"{size:.0f}" for size in sizes], fontsize=9, padding=2)
    size_axes.set_title("Model size, kB", loc="left", fontweight="bold")
    size_axes.set_xlabel("below 8 bits: computed, packed")
    size_axes.margins(y=0.15)

    draw_latency(latency_axes, fp32["latency"], qat[0]["latency"])
    latency_axes.set_xlabel(f"{results['machine']['threads']} threads; lines: p20 to p80")
    for axes in (accuracy_axes, size_axes, latency_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=3)
    figure.suptitle(f"{results['data']['name']}: {headline}", x=0.01, ha="left", fontsize=12)
    figure.savefig(path, dpi=150)


def draw_accuracy(axes: Any, fp32: dict[str, Any], ptq: list[dict[str, Any]], qat: list[dict[str, Any]]) -> None:
    x = range(len(qat))
    axes.axhline(100 * fp32["accuracy"], color=GRAY, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"fp32 {100 * fp32['accuracy']:.1f}",
        (0, 100 * fp32["accuracy"]),
        xytext=(0, 5),
        textcoords="offset points",
        color=GRAY,
    )
    for name, series, color, marker in (("PTQ", ptq, ORANGE, "s"), ("QAT", qat, BLUE, "o")):
        values = [100 * r["accuracy"] for r in series]
        axes.plot(x, values, color=color, marker=marker, linewidth=2, label=name)
        for i, value in enumerate(values):
            if name == "QAT":
                at, side = (0, -15), "center"
            elif value < 100 * qat[i]["accuracy"] - 2:  # apart from QAT's line and label
                at, side = (-8, -13), "right"  # PTQ's line falls to the right
            else:
                continue
            axes.annotate(
                f"{value:.1f}", (i, value), xytext=at, textcoords="offset points", ha=side, color=color, fontsize=9
            )
    axes.set_xticks(list(x), [str(r["bits"]) for r in qat])
    axes.set_xlabel("bits of weights and activations")
    axes.set_title("Test accuracy, %", loc="left", fontweight="bold")
    axes.margins(y=0.15)
    axes.legend(frameon=False, loc="lower left")


def draw_latency(axes: Any, fp32: dict[str, Any], int8: dict[str, Any]) -> None:
    """Bars relative to fp32 at that batch. The medians alone set the axis; a p80 beyond it is written, not drawn."""
    top = 1.3 * max(1.0, *(int8[batch][0] / fp32[batch][0] for batch in fp32))
    for place, (name, times, color) in enumerate((("fp32", fp32, GRAY), ("int8", int8, BLUE))):
        for at, batch in enumerate(fp32):
            x, unit = at + 0.36 * place - 0.18, fp32[batch][0]
            median, low, high = times[batch]
            axes.bar(x, median / unit, 0.34, color=color, label=name if at == 0 else None)
            axes.plot([x, x], [low / unit, min(high / unit, top)], color="black", linewidth=1.2)
            beyond = f"\np80 {high:.3g}" if high / unit > top else ""
            axes.text(x + 0.03, median / unit + 0.015 * top, f"{median:.3g} ms{beyond}", fontsize=9, va="bottom")
    axes.set_ylim(0, top)
    axes.set_xlim(-0.5, len(fp32) - 0.3)
    axes.set_xticks(range(len(fp32)), [f"batch {batch}" for batch in fp32])
    axes.set_title("CPU latency, fp32 = 1", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=9, loc="upper right")

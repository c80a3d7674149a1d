"""How times of whole models are shown: lines while it runs, a table of the best peers, a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

INT8_PEERS = ("torch.ao", "onnxruntime", "OpenVINO")
FLOATS = ("fp32", "fp32 channels_last", "fp32 torch.compile")
OURS = ("qkernels", "qkernels channels_last", "qkernels residual")

HEADER = (
    f"{'model':<20}{'batch':>5}{'th':>4}  {'contestant':<24}{'ms':>9}  {'p20–p80':<18}{'SQNR dB':>8}{'peak MB':>9}"
    f"{'/ours':>7}  way"
)


def lines_of(row: dict[str, Any]) -> Iterator[str]:
    for name, times in row["seconds"].items():
        low, middle, high = (1e3 * times[key] for key in ("p20", "median", "p80"))
        ratio = row.get("ratios", {}).get(name, 1.0)
        facts = row["facts"][name]
        peak = f"{facts['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in facts else ""
        yield (
            f"{row['model']:<20}{row['batch']:>5}{row['threads']:>4}  {name:<24}{middle:>9.4g}  "
            f"{f'{low:.4g}–{high:.4g}':<18}{facts['sqnr_db']:>8.1f}{peak:>9}{ratio:>7.2f}  {facts['way']}"
        )
    for name, reason in row["left_out"].items():
        yield f"{row['model']:<20}{row['batch']:>5}{row['threads']:>4}  {name:<24} left out: {reason}"


def best(row: dict[str, Any], names: tuple[str, ...]) -> tuple[str, float] | None:
    """The fastest of those that were timed, and its median in ms."""
    found = [(1e3 * row["seconds"][name]["median"], name) for name in names if name in row["seconds"]]
    return (min(found)[1], min(found)[0]) if found else None


def ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def markdown(result: dict[str, Any]) -> str:
    """A row for each model, batch and number of threads; where others are divided by ours, we are faster above 1."""
    lines = [
        "| model | batch | threads | "
        + " | ".join(f"{name}, ms" for name in (*OURS, *INT8_PEERS, "fp32"))
        + " | best int8 peer ÷ ours (channels_last) | fp32 ÷ ours | memory ÷ fp32's |",
        "|---" * (len(OURS) + len(INT8_PEERS) + 7) + "|",
    ]
    for row in result["rows"]:
        cells = [ms(1e3 * row["seconds"][n]["median"]) if n in row["seconds"] else "–" for n in (*OURS, *INT8_PEERS)]
        peer, fp32, own = best(row, INT8_PEERS), best(row, FLOATS), best(row, OURS[:1])
        cells.append(ms(fp32[1]) if fp32 else "–")
        last = best(row, OURS[1:2])
        ratio = "–"
        if peer and own:
            ratio = f"{peer[1] / own[1]:.2f}" + (f" ({peer[1] / last[1]:.2f})" if last else "") + f" {peer[0]}"
        peaks = [row.get("facts", {}).get(name, {}).get("peak_bytes") for name in (OURS[0], FLOATS[0])]
        cells += [ratio, f"{fp32[1] / own[1]:.2f}" if fp32 and own else "–"]
        cells.append(f"{peaks[0] / peaks[1]:.2f}" if all(peaks) else "–")
        lines.append(f"| {row['model']} | {row['batch']} | {row['threads']} | " + " | ".join(cells) + " |")
    lines.append(
        "\nfp32: the fastest of eager, channels_last and, if it was asked for, torch.compile. Memory: the most at once."
    )
    return "\n".join(lines) + "\n"


def summary(result: dict[str, Any]) -> str:
    """A row for each model, for a README: how many times as long others take, at each number of threads in turn."""
    rows = {(row["model"], row["batch"], row["threads"]): row for row in result["rows"]}
    names, batches, threads = (list(dict.fromkeys(key[at] for key in rows)) for at in range(3))
    titles = [f"{what}, batch {batch}" for batch in batches for what in ("best int8 engine", "fp32")]
    lines = ["| model | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for name in names:
        cells = []
        for batch, others in ((batch, others) for batch in batches for others in (INT8_PEERS, FLOATS)):
            found = [rows[name, batch, count] for count in threads if (name, batch, count) in rows]
            pairs = [(best(row, others), best(row, OURS[:1])) for row in found]
            cells.append(
                " / ".join(f"{other[1] / own[1]:.2f}" if other and own else "–" for other, own in pairs) or "–"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(folder: Path, result: dict[str, Any]) -> None:
    """How many times as fast as the best fp32 each engine is: a panel for each batch and number of threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        panels.setdefault((row["batch"], row["threads"]), []).append(row)
    colors = {"qkernels": "#2563a8", "torch.ao": "#d9a441", "onnxruntime": "#7a9e6d", "OpenVINO": "#b05c5c"}
    most = max(len(rows) for rows in panels.values())
    figure = Figure(figsize=(max(6.0, 1.3 * most + 2), 3.2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, ((batch, threads), rows) in zip(
        figure.subplots(len(panels), squeeze=False).flat, sorted(panels.items()), strict=True
    ):
        for place, (name, color) in enumerate(colors.items()):
            at, heights = [], []
            for column, row in enumerate(rows):
                fp32, own = best(row, FLOATS), best(row, OURS[:2] if name == "qkernels" else (name,))
                if fp32 and own:
                    at.append(column + 0.2 * (place - 1.5))
                    heights.append(fp32[1] / own[1])
            bars = axes.bar(at, heights, 0.19, color=color, label=name)
            axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=7, padding=1)
        axes.axhline(1, color="#6b7280", linewidth=0.8)
        axes.set_xticks(range(len(rows)), [row["model"] for row in rows], fontsize=8)
        axes.set_title(f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}", loc="left", fontsize=10)
        axes.set_ylabel("times as fast as fp32")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    figure.axes[0].legend(frameon=False, fontsize=8, ncols=4)
    figure.suptitle(f"int8 models on {result['machine']['cpu']}", x=0.01, ha="left")
    figure.savefig(folder / "model.png", dpi=110)

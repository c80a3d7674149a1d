"""The page of a report: one HTML file with plots, the table and the notes, for any width of screen, light and dark."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from html import escape
from numbers import Real
from typing import Any

from . import report_plots as plots
from .files import named
from .measures import as_json
from .report_table import LayerRow, Report
from .training_log import read_log

HISTOGRAMS = 9  # shown at once; the others are behind a line to click on
NAMES = {"weight_sqnr": "weights", "output_sqnr": "output"}
CLIPPED = {"weight_clipped": "weights", "input_clipped": "inputs"}

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1f2328; --muted: #626a76; --line: #d8dce2;
  --blue: #2563a8; --orange: #c2571a; --green: #3f7d4e; --violet: #7a4ea3; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --page: #0e1116; --card: #171b22; --ink: #e4e7ec; --muted: #9aa3af;
  --line: #343b46; --blue: #6eaaf0; --orange: #f0975a; --green: #7fc08f; --violet: #bb93e0; --bad: #ff8a7a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: break-word; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 36px 0 10px; }
h3 { font-size: 0.95rem; margin: 0; }
p { margin: 0; } .lead, figcaption p, footer, .unit { color: var(--muted); } .lead { max-width: 75ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 20px; }
.tiles div, figure, details, .table { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tiles div { padding: 10px 14px; } .tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 12px; }
figure { margin: 0; padding: 12px 14px; min-width: 0; }
figcaption { margin-bottom: 8px; } figcaption p { font-size: 0.84rem; line-height: 1.4; }
svg { display: block; width: 100%; height: auto; }
details { margin-top: 12px; padding: 10px 14px; } summary { cursor: pointer; font-weight: 600; }
details .grid { margin-top: 12px; } details figure { border: 0; padding: 0; }
.table { overflow: auto; max-height: 85vh; } @media print { .table { max-height: none; } }
table { border-collapse: collapse; font-size: 0.85rem; width: 100%; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
thead th { position: sticky; top: 0; background: var(--card); box-shadow: 0 1px var(--line); color: var(--muted);
  font-weight: 600; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
th:first-child { position: sticky; left: 0; background: var(--card); font-weight: 500; white-space: normal;
  min-width: min(44vw, 16em); overflow-wrap: anywhere; }
thead th:first-child { z-index: 1; font-weight: 600; }
.before { color: var(--orange); } .after { color: var(--blue); } h2 + .lead { margin-bottom: 10px; font-size: 0.9rem; }
.bad { color: var(--bad); font-weight: 600; }
ul { margin: 8px 0 0; padding-left: 20px; font-size: 0.88rem; overflow-wrap: anywhere; }
footer { margin-top: 28px; font-size: 0.84rem; max-width: 90ch; }
"""

WEIGHTS = """<p class="lead">In steps of the scale, so that all channels share the levels, which are drawn as lines.
<b class="before">Before</b> quantization, <b class="after">after</b> it, each relative to its highest bar. The lowest
SQNR comes first.</p>
"""


def page(
    report: Report,
    title: str,
    accuracies: Mapping[str, Mapping[float, float]] | None,
    latency: Mapping[str, Any] | None,
    log: str | os.PathLike[str] | None,
) -> str:
    """The HTML of a report; its arguments are those of ``Report.html``."""
    _check_accuracies(accuracies)
    by_layer = _check_latency(latency)
    if log is not None and not isinstance(log, str | os.PathLike):
        raise TypeError(f"log: got {log!r}; accepted: the path of a CSV file of qk.TrainingLog, or None")
    with contextlib.nullcontext() if log is None else named("log", log):
        logged = None if log is None else read_log(log)
    measured = []
    if accuracies:
        caption = "Dashed: one figure for all widths."
        measured.append(_figure("Accuracy against bits", caption, *plots.accuracy(accuracies)))
    if latency and by_layer:
        bits = {row.name: row.weight_bits for row in report.layers}
        caption = f"The slowest {min(len(latency), plots.WORST)} layers, by width; filled: the present one."
        measured.append(_figure("Latency of layers", caption, *plots.layer_latencies(latency, bits)))
    elif latency:
        measured.append(_figure("Latency", "", *plots.latencies(latency)))
    sections = [_section("Measured", measured)] if measured else []
    sections.append(_section("Layers", _figures_of_layers(report)))
    if logged is not None:
        sections.append(_section("Training", _figures_of_training(logged)))
    sections.append(_weights(report))
    data = json.dumps(as_json(report.to_dict()), allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="lead">{escape(_lead(report))}</p>
{_tiles(report)}
{"".join(sections)}
<h2>All layers</h2>
{_table(report)}
{_notes(report)}
<footer>SQNR: power of a signal over power of the error that quantization adds, in dB; 6 dB more halve the error.
Weights: against themselves in float. Output: against the float model's, with all layers before it quantized. Clipped:
the share of elements outside the range. Red: below 5 dB a bit − 5 (at most 30), or more than 1 % clipped.</footer>
</main>
<script type="application/json" id="report">{data}</script>
</body>
</html>
"""


def _check_accuracies(accuracies: Any) -> None:
    accepted = "a dict of series, each a dict of bits and accuracies, such as {'QAT': {8: 0.93, 4: 0.92}}"
    for name, series in _items("accuracies", accuracies, accepted):
        if not isinstance(series, Mapping) or not series:
            raise TypeError(f"accuracies: got {series!r} for {name!r}; accepted: {accepted}")
        for pair in series.items():
            for number in pair:
                _check_number("accuracies", name, number)


def _check_latency(latency: Any) -> bool:
    """Whether it has widths for each layer."""
    accepted = "a dict of seconds by name, or what qk.measure_latency returns"
    nested = [isinstance(given, Mapping) for _, given in _items("latency", latency, accepted)]
    if any(nested) and not all(nested):
        raise TypeError(f"latency: got numbers beside dicts; accepted: {accepted}")
    for name, given in _items("latency", latency, accepted):
        for seconds in given.values() if isinstance(given, Mapping) else (given,):
            _check_number("latency", name, seconds)
    return any(nested)


def _items(argument: str, given: Any, accepted: str) -> list[tuple[Any, Any]]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}: got {given!r}; accepted: {accepted}")
    return list(given.items())


def _check_number(argument: str, name: Any, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{argument}: got {number!r} for {name!r}; accepted: a number")
    if not math.isfinite(number):
        raise ValueError(f"{argument}: got {number} for {name!r}; accepted: a finite number")


def _lead(report: Report) -> str:
    """The worst layers in a sentence."""
    known = [row for row in report.layers if row.output_sqnr is not None]
    attribute = "output_sqnr" if known else "weight_sqnr"
    worst = [f"{row.name or '(model)'} ({getattr(row, attribute):.1f} dB)" for row in _worst(report, attribute)[:3]]
    quantized = sum(row.weight_bits is not None for row in report.layers)
    text = f"{quantized} of {len(report.layers)} layers with weights are quantized."
    return f"{text} Lowest SQNR of {NAMES[attribute]}: {', '.join(worst)}." if worst else text


def _worst(report: Report, attribute: str) -> list[LayerRow]:
    known = [(getattr(row, attribute), row) for row in report.layers if getattr(row, attribute) is not None]
    return [row for _, row in sorted(known, key=lambda pair: -math.inf if math.isnan(pair[0]) else pair[0])]


def _tiles(report: Report) -> str:
    known = [(sum(report.histograms[row.name].after), row.weight_bits) for row in report.layers
             if row.name in report.histograms and row.weight_bits]  # fmt: skip
    tiles = [
        (f"{report.quantized_bytes / 1e3:,.1f} kB", "quantized"),
        (f"{report.float_bytes / 1e3:,.1f} kB", "in float"),
        (f"{report.ratio:.2f}×", "smaller"),
    ]
    if known:
        mean = sum(count * bits for count, bits in known) / max(sum(count for count, _ in known), 1)
        tiles.append((f"{mean:.2f}", "mean bits of a weight"))
    if report.accuracy is not None:
        tiles.append((f"{report.accuracy:.2%}", "accuracy"))
    return f'<div class="tiles">{"".join(f"<div><b>{a}</b><span class=unit>{b}</span></div>" for a, b in tiles)}</div>'


def _section(heading: str, figures: list[str]) -> str:
    return f'<h2>{heading}</h2>\n<div class="grid">{"".join(figures)}</div>\n'


def _figure(heading: str, caption: str, draw: plots.Draw, height: float) -> str:
    label = escape(f"{heading}. {caption}", quote=True)
    text = f"<h3>{_breakable(heading)}</h3>" + (f"<p>{escape(caption)}</p>" if caption else "")
    return f"<figure><figcaption>{text}</figcaption>{plots.svg(draw, height, label)}</figure>\n"


def _breakable(name: str) -> str:
    """A name that a line may end in, behind a dot."""
    return escape(name).replace(".", ".<wbr>")


def _figures_of_layers(report: Report) -> list[str]:
    figures = []
    for heading, series, unit, scale, attributes in (
        ("SQNR", NAMES, "dB", 1.0, ("output_sqnr", "weight_sqnr")),
        ("Clipped", CLIPPED, "% of the elements", 100.0, ("weight_clipped", "input_clipped")),
    ):
        rows = [row for row in report.layers if any(getattr(row, key) is not None for key in series)]
        if not rows:
            continue
        if heading == "Clipped" and not any(getattr(row, key) for row in rows for key in series):
            none = "<p>No element of a weight or an input lies outside its range.</p>"
            figures.append(f"<figure><figcaption><h3>Clipped shares</h3>{none}</figcaption></figure>\n")
        elif len(rows) <= plots.MOST_NAMED:
            figures.append(_figure(f"{heading} by layer", "", *plots.by_name(rows, series, unit, scale)))
        else:
            figures.append(_figure(f"{heading} by layer", "", *plots.by_place(rows, series, unit, scale)))
            worst = _most(rows, attributes, heading == "SQNR")
            caption = f"The {len(worst)} worst of {len(rows)} layers."
            figures.append(_figure(f"{heading}, the worst layers", caption, *plots.by_name(worst, series, unit, scale)))
    figures.append(_figure("Bits", "", *plots.widths(report.layers)))
    caption = "Gray: in float. A shared weight counts once."
    if len(report.layers) > plots.WORST:
        caption = f"The {plots.WORST} largest of {len(report.layers)} layers. {caption}"
    figures.append(_figure("Size", caption, *plots.sizes(report.layers)))
    return figures


def _most(rows: list[LayerRow], attributes: tuple[str, ...], lowest: bool) -> list[LayerRow]:
    """The worst rows by what is known of them: by the first attribute if any row has it, or by the largest of all."""

    def badness(row: LayerRow) -> float:
        values = [getattr(row, key) for key in attributes if getattr(row, key) is not None]
        worst: float = -values[0] if lowest else max(values)
        return math.inf if math.isnan(worst) else worst

    return sorted(rows, key=badness, reverse=True)[: plots.WORST]


def _figures_of_training(logged: list[dict[str, Any]]) -> list[str]:
    rows = list({(row["step"], row["name"]): row for row in logged}.values())  # the later ones count
    rows.sort(key=lambda row: row["step"])
    weights = {row["name"] for row in rows if row["flipped"] is not None}
    losses: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["value"] is not None and math.isfinite(row["value"]):
            losses.setdefault(row["name"], []).append((row["step"], row["value"]))
    figures = []
    if losses:
        wide = plots.spread(point for points in losses.values() for point in points)
        figures.append(_figure("Losses", "", *plots.curves(losses, "", wide)))
    kinds = {"weights": [row for row in rows if row["name"] in weights],
             "inputs": [row for row in rows if row["name"] not in weights]}  # fmt: skip
    for heading, key, scale, unit in (("Bits, mean of the quantizers", "bits", 1.0, "bits"),
                                      ("Clipped, mean of the quantizers", "clipped", 100.0, "%")):  # fmt: skip
        series = {kind: _by_step(of, key, scale) for kind, of in kinds.items()}
        if any(series.values()):
            found = {kind: points for kind, points in series.items() if points}
            figures.append(_figure(heading, "", *plots.curves(found, unit)))
    flipped = {"mean": _by_step(kinds["weights"], "flipped", 100.0),
               "highest layer": _by_step(kinds["weights"], "flipped", 100.0, highest=True)}  # fmt: skip
    if flipped["mean"]:
        caption = "Share of the codes that differ from those of the row before."
        figures.append(_figure("Codes that changed", caption, *plots.curves(flipped, "%")))
    return figures or ["<p>The log has no rows.</p>"]


def _by_step(rows: list[dict[str, Any]], key: str, scale: float, highest: bool = False) -> list[tuple[float, float]]:
    steps: dict[int, list[float]] = {}
    for row in rows:
        if row[key] is not None:
            steps.setdefault(row["step"], []).append(scale * row[key])
    return [(step, max(each) if highest else sum(each) / len(each)) for step, each in steps.items()]


def _weights(report: Report) -> str:
    rows = [row for row in report.layers if row.name in report.histograms]
    if not rows:
        return ""
    rows.sort(key=lambda row: math.inf if row.weight_sqnr is None else row.weight_sqnr)
    figures = [
        _figure(row.name or "(model)", _of_weights(row), *plots.weights(report.histograms[row.name])) for row in rows
    ]
    text = "<h2>Weights before and after</h2>\n" + WEIGHTS
    more = figures[HISTOGRAMS:]
    text += f'<div class="grid">{"".join(figures[:HISTOGRAMS])}</div>\n'
    if more:
        text += (
            f'<details><summary>{len(more)} more layers</summary><div class="grid">{"".join(more)}</div></details>\n'
        )
    return text


def _of_weights(row: LayerRow) -> str:
    parts = [f"{row.weight_bits} bits"] if row.weight_bits else []
    parts += [f"SQNR {row.weight_sqnr:.1f} dB"] if row.weight_sqnr is not None else []
    parts += [f"{row.weight_clipped:.2%} clipped"] if row.weight_clipped else []
    return ", ".join(parts)


def _table(report: Report) -> str:
    header, *lines = report.table()
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = []
    for row, line in zip(report.layers, lines, strict=True):
        bad = _bad(row)
        cells = [f"<th>{_breakable(line[0])}</th>"]
        for at, cell in enumerate(line[1:], 1):
            cells.append(f"<td{' class=bad' if header[at] in bad else ''}>{escape(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _bad(row: LayerRow) -> list[str]:
    """The columns in which a layer looks bad, as it does with a NaN."""
    found = []
    least = min(5 * (row.weight_bits or 0) - 5, 30)
    if row.weight_bits and row.weight_sqnr is not None and not row.weight_sqnr >= least:
        found.append("W SQNR dB")
    bits = min(row.weight_bits or 8, row.input_bits or 8)
    if row.weight_bits and row.output_sqnr is not None and not row.output_sqnr >= min(5 * bits - 5, 30):
        found.append("out SQNR dB")
    found += ["W clipped"] if (row.weight_clipped or 0) > 0.01 else []
    found += ["A clipped"] if (row.input_clipped or 0) > 0.01 else []
    return found


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    items = "".join(
        f"<li><b>{escape(name or '(model)')}</b>: {escape(note)}</li>" for name, note in report.notes.items()
    )
    opened = " open" if len(report.notes) <= 6 else ""
    count = f"{len(report.notes)} note{'s' if len(report.notes) > 1 else ''}"
    return f"<details{opened}><summary>{count}</summary><ul>{items}</ul></details>"

"""The newest accuracies as tables: `python bench/accuracy_report.py` prints those of README and docs/accuracy.md."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Seeds = dict[int, float]
Key = tuple[str, str, str]  # network, widths, method

WAYS = ("PTQ", "PTQ, GPTQ", "PTQ, AdaRound", "QAT")
FEW_BITS = ("W4A8", "W4A4", "W3A8", "W3A3", "W2A4", "W2A2")
TUNED = ("W8A8", "W4A8", "W3A3", "W2A4")
# Network, widths, and two methods: what is tried, and its plain counterpart.
COMPARED = (
    ("k-means levels, 3 bits", "cnn", "W3A8", "PTQ, kmeans", "PTQ"),
    ("k-means levels, 3 bits", "cnn", "W3A8", "QAT, kmeans", "QAT"),
    ("k-means levels, 4 bits", "cnn", "W4A8", "PTQ, kmeans", "PTQ"),
    ("k-means levels, 4 bits", "cnn", "W4A8", "QAT, kmeans", "QAT"),
    ("NF4", "cnn", "W4A8", "PTQ, nf4", "PTQ"),
    ("NF4", "cnn", "W4A8", "QAT, nf4", "QAT"),
    ("mixed widths, equal mean bits", "cnn", "W3A8 everywhere", "PTQ, mixed at equal bits", "PTQ"),
    ("mixed widths, equal mean bits", "cnn", "W3A8 everywhere", "QAT, mixed at equal bits", "QAT"),
    ("mixed widths, equal BitOPs", "cnn", "W3A3 everywhere", "PTQ, mixed at equal bitops", "PTQ"),
    ("mixed widths, equal BitOPs", "cnn", "W3A3 everywhere", "QAT, mixed at equal bitops", "QAT"),
    ("hybrid, 100 steps", "cnn", "W3A8 everywhere", "hybrid of 100 steps", "PTQ, mixed at equal bits"),
    ("hybrid, 100 steps", "cnn", "W3A8 everywhere", "hybrid of 100 steps", "mixed, QAT of 100 steps"),
    ("hybrid", "cnn", "W3A8 everywhere", "hybrid", "QAT, mixed at equal bits"),
    *(("AdaRound", "cnn", widths, "PTQ, AdaRound", "PTQ") for widths in FEW_BITS),
    *(("GPTQ", "cnn", widths, "PTQ, GPTQ", "PTQ") for widths in FEW_BITS),
    *(("consistency", "cnn", widths, "QAT, consistency", "QAT") for widths in ("W3A3", "W2A4", "W2A2")),
    *(("consistency", "cnn", widths, "QAT of 100 steps, consistency", "QAT of 100 steps")
      for widths in ("W2A4", "W2A2")),
    ("distillation", "cnn", "W2A2", "QAT, distillation", "QAT"),
    *(("distillation", "cnn", widths, "QAT of 100 steps, distillation", "QAT of 100 steps")
      for widths in ("W2A4", "W2A2")),
    ("widths in cycles, 3 to 4", "cnn", "W4A4", "QAT, cyclic 3 to 4", "QAT"),
    ("widths falling from 4", "cnn", "W2A4", "QAT, falling 4 to 2", "QAT"),
    ("widths falling from 4", "cnn", "W2A2", "QAT, falling 4 to 2", "QAT"),
    ("dampening", "cnn", "W3A3", "QAT, dampening", "QAT"),
    *(("scales frozen in the last fifth", "cnn", widths, "QAT, frozen grid", "QAT") for widths in TUNED),
    *(("float tail in the last fifth", "cnn", widths, "QAT, float tail", "QAT") for widths in TUNED),
    *(("100 steps of the integer model's scales", "cnn", widths, "QAT, 100 steps of its scales",
       "QAT, 100 steps of its scales, before") for widths in TUNED),
    *(("statistics anew", "depthwise", widths, "QAT", "QAT, running statistics") for widths in ("W3A3", "W4A4")),
    *(("dampening", "depthwise", widths, "QAT, dampening", "QAT") for widths in ("W3A3", "W4A4")),
    *(("freezing", "depthwise", widths, "QAT, freezing", "QAT") for widths in ("W3A3", "W4A4")),
)  # fmt: skip


def newest() -> Path:
    """The newest file of accuracies of any machine; of one day, that with most runs."""
    return max(
        RESULTS.glob("*/*-accuracy.json"), key=lambda path: (path.name, len(json.loads(path.read_text())["rows"]))
    )


def accuracies(path: Path) -> dict[Key, Seeds]:
    """Percent of the test images, by network, widths and method, and by seed; other figures as methods of their own."""
    found: dict[Key, Seeds] = {}
    for row in json.loads(path.read_text())["rows"]:
        for name, value in row["figures"].items():
            method = row["method"] if name == "accuracy" else f"{row['method']}, {name}"
            found.setdefault((row["net"], row["widths"], method), {})[row["seed"]] = value
    return found


def mean(values: Seeds) -> float:
    return statistics.fmean(values.values())


def shown(values: Seeds | None) -> str:
    """The mean, and by how much a seed departs from it at most."""
    if not values:
        return "–"
    return f"{mean(values):.1f} ± {max(abs(value - mean(values)) for value in values.values()):.1f}"


def minus(a: Seeds | None, b: Seeds | None) -> Seeds:
    """The differences of the seeds that both have."""
    return {seed: a[seed] - b[seed] for seed in a if seed in b} if a and b else {}


def signed(values: Seeds) -> str:
    if not values:
        return "–"
    low, high = min(values.values()), max(values.values())
    return f"{mean(values):+.2f} ({low:+.2f} to {high:+.2f})".replace("-", "−")


def widths_table(found: dict[Key, Seeds]) -> str:
    """Accuracy by widths: without training, with it, and what is then lost beside float."""
    widths = [key[1] for key in found if key[0] == "cnn" and key[2] == "QAT" and "everywhere" not in key[1]]
    ways = [way for way in WAYS if any(("cnn", width, way) in found for width in widths)]
    float_ = found["cnn", "float", "float"]
    lines = [
        f"| weights, inputs | {' | '.join(ways)} | QAT − float |",
        "|---" * (len(ways) + 2) + "|",
        f"| float: {shown(float_)} |{' |' * (len(ways) + 1)}",
    ]
    for width in widths:
        cells = [shown(found.get(("cnn", width, way))) for way in ways]
        lost = f"{mean(minus(found['cnn', width, 'QAT'], float_)):+.1f}".replace("-", "−")
        lines.append(f"| {width} | {' | '.join(cells)} | {lost} |")
    return "\n".join(lines)


def compared_table(found: dict[Key, Seeds]) -> str:
    """Each method beside its plain counterpart: means, and the differences of the seeds."""
    lines = [
        "| method | network, widths | beside | with it | without | gain (lowest to highest of the seeds) |",
        "|---|---|---|---|---|---|",
    ]
    for title, net, widths, method, plain in COMPARED:
        a, b = found.get((net, widths, method)), found.get((net, widths, plain))
        if a and b:
            gain = signed(minus(a, b))
            lines.append(f"| {title} | {net}, {widths} | {plain} | {mean(a):.1f} | {mean(b):.1f} | {gain} |")
    return "\n".join(lines)


def tables(found: dict[Key, Seeds]) -> tuple[str, ...]:
    return widths_table(found), compared_table(found)


def main() -> None:
    path = newest()
    machine: dict[str, Any] = json.loads(path.read_text())["machine"]
    print(f"{path.name}: {machine['cpu']}, torch {machine['torch']}", *tables(accuracies(path)), sep="\n\n")


if __name__ == "__main__":
    main()

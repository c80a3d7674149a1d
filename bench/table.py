"""Prints the newest results of every op and device as Markdown: all rows behind the README's table."""

from __future__ import annotations

import json
from pathlib import Path


def main() -> None:
    for device in sorted((Path(__file__).parent / "results").iterdir()):
        if (gpu := device / "table.md").exists():
            print(f"\n{gpu.read_text()}")
            continue
        newest = {path.stem[len("2026-01-01-") :]: path for path in sorted(device.glob("*.json"))}
        for op, path in newest.items():
            result = json.loads(path.read_text())
            machine = result["machine"]
            where = f"{machine['cpu']}, {machine['cores']} cores, {machine['path']}, torch {machine['torch']}"
            print(f"\n**{op}** on {where}, {machine['date']}. Times as long as qkernels:\n")
            print("| case | threads | qkernels | others |\n|---|---|---|---|")
            for row in result["rows"]:
                if "figures" in row:
                    figures = ", ".join(f"{name} {value:.4g}" for name, value in row["figures"].items())
                    print(f"| {row['case']} | | | {figures} |")
                    continue
                seconds = row["seconds"]["qkernels"]["median"]
                time = f"{1e6 * seconds:.3g} µs" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"
                ratios = ", ".join(f"{name} {ratio:.2f}×" for name, ratio in row["ratios"].items())
                print(f"| {row['case']} | {row['threads']} | {time} | {ratios} |")


if __name__ == "__main__":
    main()

"""The demo: trains a CNN in fp32 and with fake quantization, converts it to int8, compares accuracy, size and speed."""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
import json
import platform
import statistics
import struct
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .qat import QConfig, QSpec, calibrate, convert, prepare, report
from .qat.fold import find_folds

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
BITS = (8, 4, 3, 2)
BATCH = 64
LEARNING_RATE = 0.05
EXTRAS = {"tqdm": "tqdm", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


class DemoError(Exception):
    """A problem that the user can solve, described in one line."""


@dataclass
class Data:
    """Images [B, 1, H, W] in 0…1 and labels [B]."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass
class Row:
    """One line of the table. Times are medians with p20 and p80 in ms; sizes are in bytes."""

    name: str
    bits: int
    accuracy: float
    size: int
    size_is: str
    fake_quant_accuracy: float | None = None
    same_prediction: float | None = None
    latency: tuple[float, float, float] | None = None
    step: tuple[float, float, float] | None = None
    step_ratio: float | None = None


def load_digits(seed: int) -> Data:
    """Loads scikit-learn's 1,797 handwritten digits, 8×8, half for training and half for testing."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    return Data("digits", (images[train], labels[train]), (images[test], labels[test]))


def load_idx(folder: Path) -> Data:
    """Loads the four files of an MNIST-like set: {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz."""
    parts = []
    for split in ("train", "t10k"):
        images_path, images = _read_idx(folder, f"{split}-images-idx3-ubyte", 3)
        labels_path, labels = _read_idx(folder, f"{split}-labels-idx1-ubyte", 1)
        if len(images) != len(labels) or not len(labels):
            raise DemoError(f"{labels_path}: holds {len(labels)} labels for {len(images)} images of {images_path.name}")
        parts.append((images.float().unsqueeze(1) / 255, labels.long()))
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise DemoError(f"{folder}: the training and test images differ in size")
    if min(parts[0][0].shape[2:]) < 4:
        raise DemoError(f"{folder}: images of {list(parts[0][0].shape[2:])} pixels; accepted: at least 4×4")
    return Data(folder.resolve().name, parts[0], parts[1])


def _read_idx(folder: Path, name: str, dims: int) -> tuple[Path, Tensor]:
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not found:
        raise DemoError(f"{folder / name}: no such file, with or without .gz")
    path = found[0]
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DemoError(f"{path}: cannot be read ({error})") from None
    # The header is two zero bytes, the dtype (8: unsigned byte), the number of dims, each dim as big-endian 32 bits.
    header = 4 + 4 * dims
    if content[:4] != bytes((0, 0, 8, dims)):
        raise DemoError(
            f"{path}: not an idx file of unsigned bytes with {dims} dims (starts with {content[:4].hex(' ')})"
        )
    if len(content) < header:
        raise DemoError(f"{path}: truncated, {len(content)} bytes are less than its header of {header}")
    shape = struct.unpack(f">{dims}I", content[4:header])
    expected = header + torch.Size(shape).numel()
    if len(content) != expected:
        what = "truncated" if len(content) < expected else "too long"
        raise DemoError(f"{path}: {what}, {len(content)} bytes where its header says {expected}")
    return path, torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)


class Net(nn.Module):
    """Four 3×3 convolutions with BatchNorm and a linear layer, 66k parameters.

    Two more strides of 2 halve images above 16 pixels twice, so that any set trains in about the time of the digits.
    """

    def __init__(self, classes: int, pixels: int = 8) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, **geometry: Any) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **geometry), nn.BatchNorm2d(outputs), nn.ReLU()
            )

        stride = 2 if pixels > 16 else 1
        self.first = block(1, 32, stride=stride)
        self.body = nn.Sequential(block(32, 32, stride=stride), block(32, 64, stride=2), block(64, 64))
        self.last = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)).mean((2, 3)))


def quantized(bits: int) -> QConfig:
    """Weights and activations at ``bits``; the first and last layer at 8 bits, as is usual in the literature."""
    # Pixels have a known range, so their scale can be fixed, and the first convolution needs no gradient of its input.
    first = {"weight": {"bits": 8}, "input": {"bits": 8, "quantizer": "minmax"}}
    last = {"weight": {"bits": 8}, "input": {"bits": 8}}
    return QConfig(QSpec(bits), QSpec(bits, symmetric=False), rules=[("first.*", first), ("last", last)])


def train(model: nn.Module, data: Data, steps: range, total: int, seed: int, tick: Callable[[], object]) -> None:
    """Trains by SGD over ``steps`` of a cosine schedule of ``total`` steps; batches depend only on seed and step."""
    images, labels = data.train
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * (steps.start + step) / total)))
    )
    for step in steps:
        pick = torch.randint(len(labels), (BATCH,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad()
        F.cross_entropy(model(images[pick]), labels[pick]).backward()
        optimizer.step()
        schedule.step()
        tick()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(500)])


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels).double().mean())


def state_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def quantized_row(name: str, bits: int, prepared: nn.Module, data: Data) -> tuple[Row, nn.Module]:
    """Converts a model, measures the result and compares it with the fake-quantized model."""
    converted = convert(prepared)
    images, labels = data.test
    real, simulated = predict(converted, images), predict(prepared, images)
    same = accuracy(real, simulated)
    if same < 0.995:  # both are equal up to rounding, which at a near tie may flip a code now and then
        raise RuntimeError(
            f"{name} {bits}: converted and fake-quantized model agree on {same:.2%} of the predictions only"
        )
    packed = bits < 8
    row = Row(
        name,
        bits,
        accuracy(real, labels),
        report(converted).quantized_bytes if packed else state_bytes(converted),
        "computed, codes packed" if packed else "state_dict",
        accuracy(simulated, labels),
        same,
    )
    return row, converted


def fold_float(model: nn.Module) -> nn.Module:
    """The fp32 model for deployment, with BatchNorm folded into the convolutions."""
    folded = copy.deepcopy(model).eval()
    for conv, norm in find_folds(folded).batch_norm_of.items():
        fused = nn.utils.fusion.fuse_conv_bn_eval(folded.get_submodule(conv), folded.get_submodule(norm))  # type: ignore[type-var, arg-type]
        folded.set_submodule(conv, fused)
        folded.set_submodule(norm, nn.Identity())
    return folded


def interleaved(calls: Sequence[Callable[[], object]], rounds: int, seconds: float) -> list[list[float]]:
    """Times in ms of each callable; blocks of the callables alternate, so that a change of the machine hits all."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            for _ in range(2):
                call()
            end = time.perf_counter() + seconds
            while (start := time.perf_counter()) < end:
                call()
                own.append((time.perf_counter() - start) * 1e3)
    return times


def spread(times: list[float]) -> tuple[float, float, float]:
    """Median, p20, p80."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    quintiles = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), quintiles[0], quintiles[3]


def training_step(model: nn.Module, data: Data) -> Callable[[], None]:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
    images, labels = data.train[0][:BATCH], data.train[1][:BATCH]

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def inference(model: nn.Module, images: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            model(images)

    return call


def run(
    data: str | Path | None = None, seed: int = 0, out_dir: str | Path = ".", quick: bool = False
) -> dict[str, Any]:
    """Trains, quantizes, converts and compares; prints the table, writes demo.json and demo.png, returns the results.

    Args:
        data: folder of an idx-format set (MNIST, Fashion-MNIST, …). None: Fashion-MNIST if Debian's package has
            installed it, else scikit-learn's digits.
        seed: seed of the split, the initial weights and the batches.
        out_dir: folder for demo.json and demo.png.
        quick: runs a tenth of the steps, to see that everything works.

    Raises:
        DemoError: a package is missing, or a data file is missing, truncated or of another format.
    """
    began = time.perf_counter()
    folder = Path(data) if data is not None else FASHION_MNIST if FASHION_MNIST.is_dir() else None
    missing = [
        package
        for module, package in EXTRAS.items()
        if importlib.util.find_spec(module) is None and not (module == "sklearn" and folder is not None)
    ]
    if missing:
        raise DemoError(f"the demo needs {', '.join(missing)}; install with: pip install 'qkernels[demo]'")
    from tqdm import tqdm

    loaded = load_digits(seed) if folder is None else load_idx(folder)
    total = 80 if quick else 800
    warm_up = total // 2
    torch.manual_seed(seed)
    fp32 = Net(int(loaded.train[1].max()) + 1, min(loaded.train[0].shape[2:]))
    calibration = loaded.train[0][: 4 * BATCH].split(BATCH)
    ticks = total + len(BITS) * (total - warm_up)
    # disable=None shows the bar only on a terminal.
    with tqdm(total=ticks, unit="step", file=sys.stderr, dynamic_ncols=True, disable=None) as bar:
        bar.set_description("fp32")
        train(fp32, loaded, range(warm_up), total, seed, bar.update)
        start = copy.deepcopy(fp32)
        train(fp32, loaded, range(warm_up, total), total, seed, bar.update)
        float_accuracy = accuracy(predict(fp32, loaded.test[0]), loaded.test[1])
        rows = [Row("fp32", 32, float_accuracy, state_bytes(fp32), "state_dict")]
        models: list[nn.Module] = [fold_float(fp32)]
        reports = {}
        for bits in BITS:
            prepared = prepare(fp32, quantized(bits))
            calibrate(prepared, calibration)
            row, converted = quantized_row("PTQ", bits, prepared, loaded)
            rows.append(row)
            models.append(converted)
        steps = [training_step(fp32, loaded)]
        for bits in BITS:
            bar.set_description(f"QAT {bits} bits")
            prepared = prepare(start, quantized(bits))
            calibrate(prepared, calibration)
            train(prepared, loaded, range(warm_up, total), total, seed, bar.update)
            row, converted = quantized_row("QAT", bits, prepared, loaded)
            rows.append(row)
            models.append(converted)
            steps.append(training_step(prepared, loaded))
            reports[f"QAT {bits}"] = report(prepared, loaded.test[0][:BATCH], accuracy=row.accuracy)
        bar.set_description("timing")
        rounds = 1 if quick else 5
        latencies = interleaved([inference(model, loaded.test[0][:BATCH]) for model in models], rounds, 0.1)
        step_times = interleaved(steps, rounds, 0.2)
    for row, times in zip(rows, latencies, strict=True):
        row.latency = spread(times)
    trained = [row for row in rows if row.name != "PTQ"]
    for row, times in zip(trained, step_times, strict=True):
        row.step = spread(times)
        row.step_ratio = row.step[0] / trained[0].step[0]  # type: ignore[index]
    results = {
        "data": {"name": loaded.name, "train": len(loaded.train[1]), "test": len(loaded.test[1])},
        "steps": {"warm_up": warm_up, "total": total, "batch": BATCH},
        "seed": seed,
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": [asdict(row) for row in rows],
        "layers": {name: made.to_dict() for name, made in reports.items()},
        "seconds": time.perf_counter() - began,
    }
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, out / "demo.png")
    print(table(results))
    print(f"wrote {out / 'demo.json'} and {out / 'demo.png'}")
    return results


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    fp32 = rows[0]
    lines = [
        [
            "",
            "bits W/A",
            "accuracy",
            "size kB",
            "smaller",
            "latency ms (p20–p80)",
            "faster",
            "step ms (p20–p80)",
            "step ratio",
        ]
    ]
    for row in rows:
        median, low, high = row["latency"]
        step = row["step"]
        lines.append(
            [
                row["name"],
                "32/32" if row["bits"] == 32 else f"{row['bits']}/{row['bits']}",
                f"{row['accuracy']:.2%}",
                f"{row['size'] / 1e3:.1f}" + ("*" if row["size_is"] != "state_dict" else " "),
                f"{fp32['size'] / row['size']:.2f}x",
                f"{median:.2f} ({low:.2f}–{high:.2f})",
                f"{fp32['latency'][0] / median:.2f}x",
                "–" if step is None else f"{step[0]:.2f} ({step[1]:.2f}–{step[2]:.2f})",
                "–" if step is None else f"{row['step_ratio']:.2f}x",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(c.ljust(w) if i < 1 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    data, steps, machine = results["data"], results["steps"], results["machine"]
    text += [
        "",
        f"{data['name']}: {data['train']} training and {data['test']} test images; {machine['processor']}, "
        f"{machine['threads']} threads, torch {machine['torch']}; {results['seconds']:.0f} s in all.",
        f"fp32: {steps['total']} steps; QAT: {steps['warm_up']} in fp32, then {steps['total'] - steps['warm_up']} with "
        "learned scales (LSQ); PTQ: the fp32 row's model, calibrated only.",
        "First and last layer at 8 bits in every quantized row, as is usual. Accuracy is the converted int8 model's.",
        f"Latency: batch {steps['batch']}, int8 kernels at every width; fp32 with BatchNorm folded. Step: batch "
        f"{steps['batch']}, forward, backward, SGD.",
        "* computed: codes packed at their bits, scales, biases; in memory a convolution holds a byte per code.",
    ]
    return "\n".join(text)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws accuracy against bits, size and latency, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results["rows"]
    fp32, ptq, qat = rows[0], [r for r in rows if r["name"] == "PTQ"], [r for r in rows if r["name"] == "QAT"]
    gray, orange, blue = "#6b7280", "#e07b39", "#2563a8"
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy_axes, size_axes, latency_axes = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))

    x = range(len(BITS))
    accuracy_axes.axhline(100 * fp32["accuracy"], color=gray, linestyle="--", linewidth=1.2)
    accuracy_axes.annotate(
        f"fp32 {100 * fp32['accuracy']:.1f}",
        (0, 100 * fp32["accuracy"]),
        xytext=(0, 5),
        textcoords="offset points",
        color=gray,
    )
    for name, series, color, marker, below in (("PTQ", ptq, orange, "s", True), ("QAT", qat, blue, "o", False)):
        values = [100 * r["accuracy"] for r in series]
        accuracy_axes.plot(x, values, color=color, marker=marker, linewidth=2, label=name)
        for i, value in enumerate(values):
            if i >= 2 or not below:
                accuracy_axes.annotate(
                    f"{value:.1f}",
                    (i, value),
                    xytext=(-8 if below else 0, -15),  # PTQ's line falls to the right; this keeps its labels off it
                    textcoords="offset points",
                    ha="right" if below else "center",
                    color=color,
                    fontsize=9,
                )
    accuracy_axes.set_xticks(list(x), [str(bits) for bits in BITS])
    accuracy_axes.set_xlabel("bits of weights and activations")
    accuracy_axes.set_title("Test accuracy, %", loc="left", fontweight="bold")
    accuracy_axes.margins(y=0.15)
    accuracy_axes.legend(frameon=False, loc="lower left")

    names = ["fp32", *(f"{bits} bits" for bits in BITS)]
    colors = [gray, *[blue] * len(BITS)]
    sizes = [r["size"] / 1e3 for r in (fp32, *qat)]
    bars = size_axes.bar(names, sizes, color=colors, width=0.65)
    size_axes.bar_label(bars, [f"{size:.0f}" for size in sizes], fontsize=9, padding=2)
    size_axes.set_title("Model size, kB", loc="left", fontweight="bold")
    size_axes.set_xlabel("below 8 bits: computed, packed")

    medians = [r["latency"][0] for r in (fp32, qat[0])]
    spans = [
        [r["latency"][0] - r["latency"][1] for r in (fp32, qat[0])],
        [r["latency"][2] - r["latency"][0] for r in (fp32, qat[0])],
    ]
    bars = latency_axes.bar(["fp32", "int8"], medians, yerr=spans, color=[gray, blue], width=0.5, capsize=4)
    latency_axes.bar_label(bars, [f"{median:.2f}" for median in medians], fontsize=9, padding=2)
    latency_axes.set_title("CPU latency, ms", loc="left", fontweight="bold")
    latency_axes.set_xlabel(f"batch {results['steps']['batch']}, {results['machine']['threads']} threads, p20–p80")

    for axes in (accuracy_axes, size_axes, latency_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=3)
    for axes in (size_axes, latency_axes):
        axes.margins(y=0.15)
    figure.suptitle(f"fp32, PTQ and QAT on {results['data']['name']}", x=0.01, ha="left", fontsize=13)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str]) -> int:
    """``python -m qkernels demo``: returns 0 when done, 2 with one line on stderr if it cannot use the input."""
    parser = argparse.ArgumentParser(prog="python -m qkernels demo", description=run.__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", metavar="DIR", help="folder of an idx-format set (train-images-idx3-ubyte[.gz], …)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", default=".", help="where demo.json and demo.png go")
    parser.add_argument("--quick", action="store_true", help="a tenth of the training steps")
    args = parser.parse_args(argv)
    try:
        run(args.data, args.seed, args.out, args.quick)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0

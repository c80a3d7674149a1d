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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .demo_picture import draw
from .qat import QConfig, QSpec, calibrate, convert, prepare, report
from .qat.fold import find_folds

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
BITS = (8, 4, 3, 2)
WIDTHS = (64, 128)  # channels before and after the stride; int8 gains little below
BATCH = 64
LATENCY_BATCHES = (1, BATCH)
LEARNING_RATE = 0.05
HEADS = (("fp32", 32), ("QAT", 8))  # name and bits of the two rows that the headline compares
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
    """One line of the table. Times are medians with p20 and p80 in ms, latencies by batch size; sizes are in bytes."""

    name: str
    bits: int
    accuracy: float
    size: int
    size_is: str
    fake_quant_accuracy: float | None = None
    same_prediction: float | None = None
    latency: dict[str, tuple[float, float, float]] = field(default_factory=dict)
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


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """Two 3×3 convolutions around which the input passes (arXiv 1512.03385, figure 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = block(channels, channels)
        self.conv2 = block(channels, channels)[:2]
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.conv2(self.conv1(x)))


class Net(nn.Module):
    """A small ResNet: six 3×3 convolutions and a linear layer, 445k parameters at widths of 64 and 128.

    Images above 16 pixels are halved twice more, so that any set trains in about the time of the digits.
    """

    def __init__(self, classes: int, pixels: int = 8) -> None:
        super().__init__()
        large = pixels > 16
        narrow, wide = WIDTHS
        self.first = block(1, narrow, stride=2 if large else 1)
        self.pool = nn.MaxPool2d(2) if large else nn.Identity()
        self.body = nn.Sequential(Residual(narrow), block(narrow, wide, stride=2), Residual(wide))
        self.last = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.pool(self.first(x))).mean((2, 3)))


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
    total = 60 if quick else 600
    warm_up = total // 2
    torch.manual_seed(seed)
    fp32 = Net(int(loaded.train[1].max()) + 1, min(loaded.train[0].shape[2:]))
    calibration = loaded.train[0][: 4 * BATCH].split(BATCH)
    ticks = total + len(BITS) * (total - warm_up)
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    if not terminal:  # a bar would be a line for each of its states
        print(f"{ticks} training steps on {loaded.name}: a minute or two", file=sys.stderr, flush=True)
    with tqdm(total=ticks, unit="step", file=sys.stderr, dynamic_ncols=True, disable=not terminal) as bar:
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
        for batch in LATENCY_BATCHES:
            calls = [inference(model, loaded.test[0][:batch]) for model in models]
            for row, times in zip(rows, interleaved(calls, rounds, 0.06), strict=True):
                row.latency[str(batch)] = spread(times)
        step_times = interleaved(steps, rounds, 0.2)
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
    draw(results, headline(results), out / "demo.png")
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


def times_faster(row: dict[str, Any], fp32: dict[str, Any], batch: str) -> float:
    return fp32["latency"][batch][0] / row["latency"][batch][0]


def headline(results: dict[str, Any]) -> str:
    """What quantization-aware training to 8 bits gives, in one line."""
    fp32, int8 = (next(row for row in results["rows"] if (row["name"], row["bits"]) == which) for which in HEADS)
    faster = ", ".join(f"{times_faster(int8, fp32, batch):.1f}x faster at batch {batch}" for batch in int8["latency"])
    return (
        f"int8 after QAT: {int8['accuracy']:.1%} of the test images right (fp32: {fp32['accuracy']:.1%}), "
        f"{fp32['size'] / int8['size']:.1f}x smaller, {faster}"
    )


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    fp32 = rows[0]
    speed = [title for batch in fp32["latency"] for title in (f"batch {batch}, ms", "faster")]
    lines = [["", "bits W/A", "accuracy", "size kB", "smaller", *speed, "step ms", "step ratio"]]
    for row in rows:
        times = [
            cell
            for batch, (median, _, _) in row["latency"].items()
            for cell in (f"{median:.3g}", f"{times_faster(row, fp32, batch):.2f}x")
        ]
        lines.append(
            [
                row["name"],
                "32/32" if row["bits"] == 32 else f"{row['bits']}/{row['bits']}",
                f"{row['accuracy']:.2%}",
                f"{row['size'] / 1e3:.1f}" + ("*" if row["size_is"] != "state_dict" else " "),
                f"{fp32['size'] / row['size']:.2f}x",
                *times,
                "–" if row["step"] is None else f"{row['step'][0]:.1f}",
                "–" if row["step"] is None else f"{row['step_ratio']:.2f}x",
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
        "Times are medians; demo.json has p20 and p80. int8 kernels at every width; fp32 with BatchNorm folded. Step: "
        f"batch {steps['batch']}, forward, backward, SGD.",
        "* computed: codes packed at their bits, scales, biases; in memory a convolution holds a byte per code.",
    ]
    return "\n".join([headline(results), "", *text])


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

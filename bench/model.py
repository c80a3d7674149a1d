"""Whole models on this machine's CPU against other int8 engines: `python -m qkernels bench model`.

All contestants start from the same float weights and the same calibration batches. What each gives is compared with the
float model before it is timed; one that is wrong is left out by name. They take turns in blocks (laps.py says why).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_layers
import model_peers
import models
import torch
from ceilings import ceilings
from laps import alternate, machine, peak_bytes, record
from model_peers import Job
from model_report import HEADER, lines_of, markdown, plot, summary
from peers import Call
from shapes import positive
from torch import nn

import qkernels as qk

OURS = "qkernels"
CHANNELS_LAST = "channels_last"
CALIBRATION_IMAGES = 16


def converted(job: Job, residual: bool) -> nn.Module:
    """Static int8: weights per output channel, each input by the extremes of the calibration batches."""
    key = f"qkernels {residual}"
    if key not in job.quantized:
        config = qk.presets["w8a8"]
        # The states of recurrent layers too, as other engines do; by default they stay in float.
        states = [(nn.LSTM, {"hidden": qk.QSpec(8)})] if job.model_has(nn.LSTM) else []
        sums = qk.QSpec(8, symmetric=False) if residual else None
        config = qk.QConfig(config.weight, config.input, residual=sums, rules=states)
        prepared = qk.prepare(job.model, config).eval()
        qk.calibrate(prepared, job.calibration, method="minmax")
        job.quantized[f"{key} quantizers"] = sum(isinstance(m, qk.nn.FakeQuantize) for m in prepared.modules())
        model = qk.convert(prepared).eval()
        agrees(model, prepared, job)
        job.quantized[key] = model
    return job.quantized[key]


def agrees(model: nn.Module, prepared: nn.Module, job: Job) -> None:
    """Refuses a converted model that is farther from the prepared one than that is from the float model."""
    with torch.no_grad():
        trained, y = prepared(job.x).double(), model(job.x).double()
    signal = job.expected - job.usual
    found, quantization = (model_peers.decibels(signal, noise) for noise in (y - trained, trained - job.expected))
    if found < quantization:
        raise RuntimeError(f"{found:.1f} dB against the prepared model, which has {quantization:.1f} dB against fp32")


def ours(job: Job) -> dict[str, Callable[[], Call]]:
    def residual() -> Call:
        converted(job, False)
        model = converted(job, True)
        if job.quantized["qkernels True quantizers"] == job.quantized["qkernels False quantizers"]:
            raise RuntimeError("prepare finds no sums to quantize in this model")
        return model_peers.in_eval(model, job.x)

    builders = {OURS: lambda: model_peers.in_eval(converted(job, False), job.x)}
    if not job.sequences:
        nhwc = job.x.to(memory_format=torch.channels_last)
        builders[f"{OURS} {CHANNELS_LAST}"] = lambda: model_peers.in_eval(converted(job, False), nhwc)
    builders[f"{OURS} residual"] = residual
    return builders


def fp32(job: Job, compile_too: bool) -> dict[str, Callable[[], Call]]:
    builders = {"fp32": lambda: model_peers.in_eval(job.model, job.x)}
    if not job.sequences:

        def channels_last() -> Call:
            if CHANNELS_LAST not in job.quantized:
                model = model_peers.copy.deepcopy(job.model)
                job.quantized[CHANNELS_LAST] = model.to(memory_format=torch.channels_last)
            x = job.x.to(memory_format=torch.channels_last)
            return model_peers.in_eval(job.quantized[CHANNELS_LAST], x)

        builders[f"fp32 {CHANNELS_LAST}"] = channels_last
    if compile_too:

        def compiled() -> Call:
            torch._dynamo.reset()
            return model_peers.in_eval(torch.compile(job.model, fullgraph=True, dynamic=False), job.x)

        builders["fp32 torch.compile"] = compiled
    return builders


def contestants(job: Job, threads: int, compile_too: bool) -> tuple[dict[str, Call], dict[str, Any], dict[str, str]]:
    """The calls by name; SQNR in dB and the way that was chosen, by name; and why others are left out."""
    one: dict[str, dict[str, Callable[[], Call]]] = {
        name: {"": build} for name, build in {**ours(job), **fp32(job, compile_too)}.items()
    }
    peers = {name: build(job, threads) for name, build in {**model_peers.INT8, **model_peers.FLOAT}.items()}
    calls: dict[str, Call] = {}
    facts: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, builders in {**one, **peers}.items():
        try:
            way, call = model_peers.fastest(builders, job)
        except RuntimeError as error:
            left_out[name] = str(error).removeprefix(": ")
            continue
        calls[name] = call
        facts[name] = {"sqnr_db": round(model_peers.sqnr_db(call(), job), 1), "way": way}
        if name in one or name == "torch.ao":  # others do not ask torch for memory
            facts[name]["peak_bytes"] = peak_bytes(call)
    return calls, facts, left_out


def row_of(name: str, batch: int, threads: int, job: Job, options: argparse.Namespace) -> dict[str, Any]:
    calls, facts, left_out = contestants(job, threads, options.compile)
    times = alternate(calls, options.blocks)
    row: dict[str, Any] = {
        "op": "model",
        "case": f"{name}, batch {batch}",
        "model": name,
        "batch": batch,
        "threads": threads,
        "seconds": times,
        "facts": facts,
        "left_out": left_out,
    }
    if OURS in times:
        mine = times[OURS]["median"]
        row["ratios"] = {other: times[other]["median"] / mine for other in times if other != OURS}
    return row


def save(folder: Path, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(result, indent=1) + "\n")
    if result["rows"][0]["op"] == "model":
        (folder / "model.md").write_text(f"{markdown(result)}\n{summary(result)}")


def parsed(argv: list[str]) -> argparse.Namespace:
    timed = [name for name, entry in models.MODELS.items() if not entry.tiny]
    parser = argparse.ArgumentParser(prog="python -m qkernels bench model", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(models.MODELS), default=timed, metavar="NAME",
                        help=f"of {', '.join(timed)}")  # fmt: skip
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=positive, default=5, help="of 0.12 s, in which contestants take turns")
    parser.add_argument("--quick", action="store_true", help="resnet18 and mobilenet_v2, batch 1, 2 blocks")
    parser.add_argument("--compile", action="store_true", help="also fp32 under torch.compile: minutes a model")
    parser.add_argument("--layers", action="store_true", help="each layer alone instead, beside torch's fp32 one")
    parser.add_argument("--out", type=Path, help="a folder for model.json, model.md and, with matplotlib, a plot")
    parser.add_argument("--record", action="store_true", help="add the rows to bench/results/<device>, to be committed")
    options = parser.parse_args(argv)
    if options.quick:
        options.models = ["resnet18", "mobilenet_v2"] if options.models == timed else options.models
        options.batch, options.blocks = options.batch[:1], min(options.blocks, 2)
    return options


def main(argv: list[str]) -> int:
    options = parsed(argv)
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    print(f"{result['machine']['cpu']}, {result['machine']['path']}, torch {torch.__version__}", flush=True)
    if result["machine"]["path"] == "reference":
        print("the C++ kernels are not loaded, python -m qkernels info says why: this times plain torch", flush=True)
    print(model_layers.HEADER if options.layers else HEADER, flush=True)
    peaks: dict[int, float] = {}
    for name, batch in itertools.product(options.models, options.batch):
        entry = models.MODELS[name]
        count = max(1, CALIBRATION_IMAGES // batch)
        x, *calibration = models.inputs(entry, batch, 1 + count, seed=7)
        with tempfile.TemporaryDirectory() as folder:
            job = Job(models.build(name), x, calibration, Path(folder))
            for threads in options.threads:
                torch.set_num_threads(threads)
                if options.layers:
                    if threads not in peaks:
                        peaks[threads] = ceilings(threads).get("ops_per_second", math.nan)
                    rows = model_layers.rows_of(name, batch, threads, job.model, x, options.blocks, peaks[threads])
                else:
                    rows = iter([row_of(name, batch, threads, job, options)])
                for row in rows:
                    result["rows"].append(row)
                    print(*([model_layers.line_of(row)] if options.layers else lines_of(row)), sep="\n", flush=True)
                if options.out:
                    save(options.out, result)
    wrong = [row["case"] for row in result["rows"] if OURS not in row["seconds"]]
    if wrong:
        print(f"bench model: qkernels itself is left out of {', '.join(wrong)}", file=sys.stderr)
        return 1
    if options.record:
        print(f"wrote {record('model_layers' if options.layers else 'model', result['rows'])}")
    if not options.layers:
        threads = ", ".join(map(str, options.threads))
        print("", markdown(result), f"How many times as long others take, at {threads} threads:", "", sep="\n")
        print(summary(result))
        if options.out:
            try:
                plot(options.out, result)
            except ImportError:
                print("no plot: matplotlib is missing; run: pip install matplotlib")
    return 0


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.ao and of the ONNX exporter
        sys.exit(main(sys.argv[1:]))

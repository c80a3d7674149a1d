"""Each layer of a model alone, in int8 and in torch's fp32, on the input that it gets in the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import model_peers
import torch
from laps import alternate
from torch import Tensor, nn

import qkernels as qk

KINDS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.LSTM)
HEADER = (
    f"{'model':<20}{'batch':>5}{'th':>4}  {'layer':<34}{'times':>5}{'MMAC':>9}  {'ours':>8}{'NHWC':>8}{'fp32':>8}"
    f"{'NHWC':>8}  ms;{'GOPS':>6}{'peak':>6}{'fp32/ours':>10}{'best/best':>10}{'SQNR dB':>8}"
)


def described(layer: nn.Module, x: Tensor) -> str:
    if isinstance(layer, nn.Linear):
        return f"linear {x.shape[:-1].numel()}×{layer.in_features}→{layer.out_features}"
    if isinstance(layer, nn.LSTM):
        return f"lstm {layer.num_layers}×{layer.hidden_size}, {x.shape[1]} steps"
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    kind = "transposed " if isinstance(layer, nn.ConvTranspose2d) else ""
    groups = "" if layer.groups == 1 else f" g{layer.groups}"
    stride = "" if layer.stride[0] == 1 else f" s{layer.stride[0]}"
    size = f"{layer.kernel_size[0]}×{layer.kernel_size[1]}"
    return f"{kind}{size}{stride}{groups} {layer.in_channels}→{layer.out_channels} at {x.shape[2]}²"


def multiplications(layer: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(layer, nn.ConvTranspose2d):
        return x.numel() * layer.weight[0].numel()
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return y.numel() * layer.weight[0].numel()
    return x.shape[:-1].numel() * sum(p.numel() for p in layer.parameters() if p.dim() > 1)


def seen_layers(model: nn.Module, x: Tensor) -> dict[str, tuple[nn.Module, Tensor, int]]:
    """A description of each kind of layer, with one such layer, its input, and how often it occurs."""
    found: dict[str, tuple[nn.Module, Tensor, int]] = {}

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        key = described(layer, args[0])
        first, entry, count = found.get(key, (layer, args[0].clone(), 0))
        found[key] = (first, entry, count + 1)

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, KINDS)]
    with torch.inference_mode():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def rows_of(
    name: str, batch: int, threads: int, model: nn.Module, x: Tensor, blocks: int, peak: float
) -> Iterator[dict[str, Any]]:
    """Floats in and out: the layer's own call quantizes its input. peak: operations a second at most, or NaN."""
    for case, (layer, inference_x, count) in seen_layers(model, x).items():
        x = inference_x.clone()
        alone = nn.Sequential(copy.deepcopy(layer)).eval()
        with torch.inference_mode():
            expected = alone(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a layer alone: no rules for it and the like
            prepared = qk.prepare(alone, "w8a8").eval()
            qk.calibrate(prepared, [x], method="minmax")
            converted = qk.convert(prepared).eval()
        calls = {"qkernels": model_peers.in_eval(converted, x), "fp32": model_peers.in_eval(alone, x)}
        if x.dim() == 4:
            nhwc = x.to(memory_format=torch.channels_last)
            float_nhwc = copy.deepcopy(alone).to(memory_format=torch.channels_last)
            calls["qkernels channels_last"] = model_peers.in_eval(converted, nhwc)
            calls["fp32 channels_last"] = model_peers.in_eval(float_nhwc, nhwc)
        output = expected[0] if isinstance(expected, tuple) else expected
        got = calls["qkernels"]()
        times = alternate(calls, blocks)
        work = multiplications(layer, x, output)
        speed = 2 * work / min(times[c]["median"] for c in times if c.startswith("qkernels"))
        yield {
            "op": "model_layers",
            "case": f"{name}, batch {batch}: {case}",
            "model": name,
            "batch": batch,
            "layer": case,
            "count": count,
            "threads": threads,
            "multiplications": work,
            "operations_per_second": speed,
            "share_of_peak": speed / peak,
            "sqnr_db": model_peers.decibels(output, (got[0] if isinstance(got, tuple) else got) - output),
            "seconds": times,
            "ratios": {
                other: times[other]["median"] / times["qkernels"]["median"] for other in times if other != "qkernels"
            },
        }


def line_of(row: dict[str, Any]) -> str:
    names = ("qkernels", "qkernels channels_last", "fp32", "fp32 channels_last")
    at = {name: row["seconds"][name]["median"] for name in names if name in row["seconds"]}
    cells = "".join(f"{1e3 * at[name]:>8.3f}" if name in at else f"{'':>8}" for name in names)
    best_ours = min(value for name, value in at.items() if name.startswith("qkernels"))
    best_fp32 = min(value for name, value in at.items() if name.startswith("fp32"))
    gops, share = row["operations_per_second"] / 1e9, 100 * row["share_of_peak"]
    same_input = at["fp32"] / at["qkernels"]
    return (
        f"{row['model']:<20}{row['batch']:>5}{row['threads']:>4}  {row['layer']:<34}{row['count']:>5}"
        f"{row['multiplications'] / 1e6:>9.2f}  {cells}     {gops:>6.0f}{share:>5.0f}%{same_input:>10.2f}"
        f"{best_fp32 / best_ours:>10.2f}{row['sqnr_db']:>8.1f}"
    )

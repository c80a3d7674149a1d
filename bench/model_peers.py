"""Whole models in int8 by other engines, from the same float model and the same calibration batches.

Each engine has several ways to do it; the fastest whose output agrees with the float model's stands for the engine.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers import Call
from torch import Tensor, nn

LEAST_SQNR_DB = 3.0  # what does not look at its input has 0; drawn weights leave MobileNetV2 at 8 bits some 10
RACE_SECONDS = 0.25
Builder = Callable[[], Call]


@dataclass
class Job:
    """A float model in eval mode, its input and the batches to calibrate with; folder: for files of this job."""

    model: nn.Module
    x: Tensor
    calibration: list[Tensor]
    folder: Path
    expected: Tensor = field(init=False)
    usual: Tensor = field(init=False)  # the mean of what the float model gives for the calibration batches
    quantized: dict[str, Any] = field(default_factory=dict)  # what serves more than one thread count

    def __post_init__(self) -> None:
        with torch.inference_mode():
            self.expected = self.model(self.x).double()
            self.usual = torch.cat([self.model(batch) for batch in self.calibration]).double().mean(0, keepdim=True)

    @property
    def sequences(self) -> bool:
        return self.x.dim() == 3

    def model_has(self, kind: type[nn.Module]) -> bool:
        return any(isinstance(module, kind) for module in self.model.modules())


class Disagrees(RuntimeError):
    """A model gives something else than the float model."""


def decibels(signal: Tensor, noise: Tensor) -> float:
    """10·log10 of the ratio of energies; -inf where the noise holds NaN."""
    energy = noise.square().sum().item()
    return 10 * math.log10(signal.square().sum().item() / max(energy, 1e-30)) if math.isfinite(energy) else -math.inf


def sqnr_db(got: Any, job: Job) -> float:
    """Signal to noise, where the signal is how this input's output differs from the usual one.

    Outputs of drawn weights are mostly a constant, which a model gets right that ignores its input.
    """
    y = torch.as_tensor(got).double()
    if y.shape != job.expected.shape:
        raise Disagrees(f"gives {list(y.shape)} where the float model gives {list(job.expected.shape)}")
    return decibels(job.expected - job.usual, y - job.expected)


def checked(call: Call, job: Job) -> float:
    sqnr = sqnr_db(call(), job)
    if sqnr < LEAST_SQNR_DB:
        raise Disagrees(f"SQNR against fp32 of {sqnr:.1f} dB; accepted: at least {LEAST_SQNR_DB:.0f}")
    return sqnr


def seconds_of_best(call: Call) -> float:
    best, end = math.inf, time.perf_counter() + RACE_SECONDS
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def fastest(builders: dict[str, Builder], job: Job) -> tuple[str, Call]:
    """The name of the fastest that is right, and its call.

    Raises:
        RuntimeError: none is; the text says of each why.
    """
    calls: dict[str, Call] = {}
    reasons = {}
    for name, build in builders.items():
        try:
            with quiet():
                call = build()
            checked(call, job)
        except Exception as error:  # whatever a library raises on a model that it does not take
            reasons[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        else:
            calls[name] = call
    if not calls:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    if len(calls) == 1:
        return next(iter(calls.items()))
    times = {name: min(seconds_of_best(call) for _ in range(2)) for name, call in calls.items()}
    best = min(times, key=times.__getitem__)
    return best, calls[best]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and the progress bars of exporters and quantizers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def in_eval(model: nn.Module, x: Tensor) -> Call:
    return torch.inference_mode()(lambda: model(x))


# torch.ao


def ao_static(job: Job, engine: str) -> nn.Module:
    """FX graph mode with extremes for ranges; reduce_range as FBGEMM's kernels need it, which saturate without."""
    import torch.ao.quantization as tq
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = engine
    activation = tq.MinMaxObserver.with_args(dtype=torch.quint8, reduce_range=engine == "fbgemm")
    channels = tq.QConfig(activation=activation, weight=tq.default_per_channel_weight_observer)
    mapping = tq.QConfigMapping()
    if job.model_has(nn.LayerNorm):  # as in the other engines: norms, softmax and sums gain nothing by it
        mapping = mapping.set_object_type(nn.Linear, channels).set_object_type(nn.Conv2d, channels)
    else:
        # Its transposed convolutions in int8 take no scales per channel, and give wrong values with one scale.
        mapping = mapping.set_global(channels).set_object_type(nn.ConvTranspose2d, None)
    prepared = prepare_fx(copy.deepcopy(job.model), mapping, (job.x,))
    with torch.no_grad():
        for batch in job.calibration:
            prepared(batch)
    return convert_fx(prepared)


def ao_dynamic(job: Job, engine: str) -> nn.Module:
    torch.backends.quantized.engine = engine
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(job.model), {nn.Linear, nn.LSTM}, dtype=torch.qint8)


def torch_ao(job: Job, threads: int) -> dict[str, Builder]:
    def build(make: Callable[[Job, str], nn.Module], engine: str) -> Call:
        key = f"{make.__name__} {engine}"
        if key not in job.quantized:
            job.quantized[key] = make(job, engine)
        return in_eval(job.quantized[key], job.x)

    makers = {"FX static": ao_static, **({"dynamic": ao_dynamic} if job.sequences else {})}
    # oneDNN's model is channels_last in some layers and not in others, so it may win or lose by layer.
    return {
        f"{label}, {name}": lambda make=make, engine=engine: build(make, engine)  # type: ignore[misc]
        for label, make in makers.items()
        for name, engine in (("FBGEMM", "fbgemm"), ("oneDNN", "onednn"))
        if engine in torch.backends.quantized.supported_engines
    }


# onnxruntime


def exported(job: Job) -> Path:
    """The float model as ONNX, with the shapes of the job."""
    path = job.folder / "float.onnx"
    if not path.exists():
        # The exporter by tracing: the newer one needs onnxscript.
        torch.onnx.export(job.model, (job.x,), str(path), dynamo=False, opset_version=17, input_names=["x"])
    return path


def qdq(job: Job, kinds: tuple[str, ...] | None) -> Path:
    """onnxruntime's static quantization: uint8 activations by their extremes, int8 weights per channel."""
    from onnxruntime import quantization as oq
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = job.folder / f"qdq-{'-'.join(kinds or ('all',))}.onnx"
    if path.exists():
        return path
    ready = job.folder / "ready.onnx"
    if not ready.exists():
        quant_pre_process(str(exported(job)), str(ready), skip_symbolic_shape=True)

    class Reader(oq.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"x": batch.numpy()} for batch in job.calibration])

        def get_next(self) -> Any:
            return next(self.batches, None)

    oq.quantize_static(
        str(ready), str(path), Reader(), quant_format=oq.QuantFormat.QDQ, per_channel=True,
        activation_type=oq.QuantType.QUInt8, weight_type=oq.QuantType.QInt8,
        op_types_to_quantize=list(kinds) if kinds else None,
    )  # fmt: skip
    return path


def ort_dynamic(job: Job) -> Path:
    """Weights in int8, activations quantized at run time: the only int8 that it has for LSTM."""
    from onnxruntime import quantization as oq

    path = job.folder / "dynamic.onnx"
    if not path.exists():
        oq.quantize_dynamic(str(exported(job)), str(path), weight_type=oq.QuantType.QInt8, per_channel=False)
    return path


PRODUCTS = ("MatMul", "Gemm", "Conv")


def qdq_models(job: Job) -> dict[str, Callable[[], Path]]:
    """For transformers also with the products alone in int8, as norms, softmax and sums gain nothing by it."""
    models = {"QDQ static": lambda: qdq(job, None)}
    if job.model_has(nn.LayerNorm):
        models["QDQ static, products alone"] = lambda: qdq(job, PRODUCTS)
    return models


def session(path: Path, x: Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Its threads spin after a call for work, on the cores of who is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {made.get_inputs()[0].name: x.numpy()}
    return lambda: made.run(None, feed)[0]


def onnxruntime_int8(job: Job, threads: int) -> dict[str, Builder]:
    models = {name: lambda make=make: session(make(), job.x, threads) for name, make in qdq_models(job).items()}
    if job.sequences:
        models["dynamic"] = lambda: session(ort_dynamic(job), job.x, threads)
    return models


# OpenVINO


def compiled_request(model: Any, x: Tensor, threads: int, **options: Any) -> Call:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **options}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    feed = openvino.Tensor(x.numpy(), shared_memory=True)

    def call() -> Any:
        request.infer([feed], share_outputs=True)
        return request.get_output_tensor().data

    return call


def nncf_model(job: Job) -> Any:
    """OpenVINO's own quantizer: FakeQuantize where its CPU kernels take integers."""
    import nncf
    import openvino

    if "nncf" not in job.quantized:
        options = {"model_type": nncf.ModelType.TRANSFORMER} if job.model_has(nn.LayerNorm) else {}
        job.quantized["nncf"] = nncf.quantize(
            openvino.Core().read_model(str(exported(job))),
            nncf.Dataset(job.calibration, lambda batch: batch.numpy()),
            subset_size=len(job.calibration),
            preset=nncf.QuantizationPreset.MIXED,
            fast_bias_correction=True,
            **options,
        )
    return job.quantized["nncf"]


def openvino_int8(job: Job, threads: int) -> dict[str, Builder]:
    models: dict[str, Builder] = {
        name: lambda make=make: compiled_request(str(make()), job.x, threads) for name, make in qdq_models(job).items()
    }
    models["NNCF"] = lambda: compiled_request(nncf_model(job), job.x, threads)
    return models


def openvino_fp32(job: Job, threads: int) -> dict[str, Builder]:
    # By default it computes in bf16 where the CPU has that.
    return {"fp32": lambda: compiled_request(str(exported(job)), job.x, threads, INFERENCE_PRECISION_HINT="f32")}


INT8: dict[str, Callable[[Job, int], dict[str, Builder]]] = {
    "torch.ao": torch_ao,
    "onnxruntime": onnxruntime_int8,
    "OpenVINO": openvino_int8,
}
FLOAT: dict[str, Callable[[Job, int], dict[str, Builder]]] = {"OpenVINO fp32": openvino_fp32}

"""Converted models under tracers and compilers, and in other dtypes."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.multiprocessing
from converted import CONFIGS, DTYPES, KINDS, batch, layers, made
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import Int8TrainingLinear
from qkernels.nn.tracing import Tracer
from qkernels.qat import convert


@pytest.mark.parametrize("config", CONFIGS)
def test_symbolic_trace_takes_each_layer_as_one(config):
    prepared, converted = made(config)
    x = batch()
    for model in (prepared, converted):
        layer = nn.Sequential(model.conv, nn.ReLU(), nn.Flatten(), model.fc)
        traced = torch.fx.symbolic_trace(layer)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
        assert torch.equal(traced(x), layer(x))
        assert [type(m) for m in traced.children()] == [type(m) for m in layer.children()]
    # What the tracer made of a prepared model is one still.
    traced = torch.fx.symbolic_trace(nn.Sequential(prepared.conv, nn.ReLU(), nn.Flatten(), prepared.fc))
    assert torch.equal(convert(traced)(x), converted(x))
    assert isinstance(torch.fx.symbolic_trace(Keyword(converted.fc)), torch.fx.GraphModule)


class Keyword(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(input=x)


def test_symbolic_trace_of_the_other_layers():
    for _, layer, x in layers().values():
        traced = torch.fx.symbolic_trace(nn.Sequential(layer))
        assert torch.equal(traced(x), layer(x))
    layer, x = Int8TrainingLinear(8, 4), torch.randn(2, 8)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert torch.equal(traced(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_symbolic_trace_of_a_layer_itself(kind):
    _, layer, x = layers()[kind]
    traced = torch.fx.symbolic_trace(layer)
    first, *ops = [node.op for node in traced.graph.nodes]  # a transposed convolution also takes output_size
    assert (first, [op for op in ops if op != "placeholder"]) == ("placeholder", ["call_module", "output"])
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), torch.fx.symbolic_trace(traced)):
        assert torch.equal(graph(x), layer(x))
    assert layer.itself is layer
    assert [name for name, _ in layer.named_modules()] == [""]


def test_hooks_run_when_the_graph_does():
    _, converted = made("int8")
    calls: list[type] = []
    converted.fc.register_forward_hook(lambda m, args, y: calls.append(type(y)))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Flatten(), converted.fc))
    assert calls == []
    traced(torch.randn(1, 96))
    assert calls == [torch.Tensor]


@pytest.mark.parametrize("config", CONFIGS)
def test_converted_models_trace_export_and_compile(config):
    torch._dynamo.reset()
    _, converted = made(config)
    x = batch()
    with torch.no_grad():
        expected = converted(x)
        traced = torch.jit.trace(converted, (x,))
        assert torch.equal(traced(x), expected)
        exported = torch.export.export(converted, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
        compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
def test_converted_models_trace_and_export_with_gradients_enabled(config, dtype):
    """Another batch size than traced with; a graph of torch.jit holds no gradient of a kernel, and says so."""
    torch.manual_seed(0)
    _, converted = made(config, dtype)
    x, other = batch(dtype), torch.randn(7, 4, 4, 4).to(dtype)
    file = io.BytesIO()
    for example in (x, x.clone().requires_grad_()):
        traced = torch.jit.trace(converted, (example,))
        assert torch.equal(traced(other), converted(other))
        torch.jit.save(traced, file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(other), converted(other))
        file.seek(0)
    leaf = other.clone().requires_grad_()
    if "weight only" not in config and dtype != torch.float64:
        assert not traced(leaf).requires_grad
    for strict in (True, False):
        exported = torch.export.export(
            converted, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict
        ).module()
        assert torch.equal(exported(other), converted(other))


@pytest.mark.parametrize("config", CONFIGS)
def test_fp64_models_convert(config):
    prepared, converted = made(config, torch.float64)
    x = batch(torch.float64)
    y, expected = converted(x), prepared(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert converted.fc.weight.dtype == torch.float64
    leaf = x.clone().requires_grad_()
    converted(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert converted.fc.bias.grad is not None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("Embedding")])
def test_fp64_input_by_hand(kind):
    _, layer, x = layers()[kind]
    with torch.no_grad():
        torch.testing.assert_close(layer(x.double()), layer(x).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS)
def test_autocast(config, dtype):
    prepared, converted = made(config)
    x = batch()
    with torch.autocast("cpu", dtype), torch.no_grad():
        for given in (x, x.to(dtype)):
            y, expected = converted.conv(given), prepared.conv(given)
            assert y.dtype == expected.dtype == dtype
            assert y.stride() == expected.stride()
            torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
            hidden = F.relu(expected).flatten(1)
            y, expected = converted.fc(hidden), prepared.fc(hidden)
            assert y.dtype == expected.dtype == dtype
            torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
        with torch.autocast("cpu", enabled=False):
            assert converted.conv(x).dtype == torch.float32


def test_other_threads_run_models_while_one_traces():
    """torch.fx's own tracer takes their calls for its own."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(1, 3, 5, 5)
    tracing, called = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x):
            tracing.set()
            assert called.wait(60)
            return torch.relu(x)

    results = []

    def trace() -> None:
        results.append(Tracer().trace(nn.Sequential(Slow(), nn.Linear(2, 2))))

    with torch.no_grad():
        expected = model(x)
        thread = threading.Thread(target=trace)
        thread.start()
        assert tracing.wait(60)
        found = model(x)
        weight = model[0].weight
        called.set()
        thread.join()
    assert torch.equal(found, expected)
    assert isinstance(weight, nn.Parameter)
    assert [node.name for node in results[0].nodes] == ["input_1", "relu", "_1", "output"]
    assert torch.equal(model(x), expected)


def test_other_threads_run_converted_layers_while_convert_traces():
    """Its tracer goes through the layers of an attention, of those calls alone that its own thread makes."""
    torch.manual_seed(0)
    x, tracing, called = torch.randn(2, 5, 8), threading.Event(), threading.Event()
    called.set()

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            y = self.fc(x) + x
            tracing.set()
            assert called.wait(60)
            return y

    def converted(model: nn.Module) -> nn.Module:
        prepared = qk.prepare(model.eval(), "w8a8")
        qk.calibrate(prepared, [x])
        return qk.convert(prepared)

    attention, slow = converted(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), converted(Slow())
    attention.self_attn.register_forward_hook(lambda *_: None)  # so that no program runs instead of the layers
    with torch.no_grad():
        expected = attention(x), slow(x)
        slow, results = copy.deepcopy(slow), []
        called.clear()
        tracing.clear()
        thread = threading.Thread(target=lambda: results.append(slow(x)))  # traces at the first call
        thread.start()
        assert tracing.wait(60)
        found = attention(x)
        called.set()
        thread.join()
    assert torch.equal(found, expected[0])
    assert torch.equal(results[0], expected[1])

"""Converted models as services run them: in threads, in inference mode, copied, compiled, exported, ahead of time."""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT
from saved import CASES, Case, flat
from torch import nn

import qkernels as qk
from qkernels.qat import QConfig, QSpec

pytestmark = pytest.mark.filterwarnings(
    "ignore:prepare:UserWarning",
    "ignore:enable_nested_tensor:UserWarning",
    "ignore:LSTM with projections:UserWarning",
    "ignore::DeprecationWarning",
)

# torch.compile with fullgraph refuses torch's recurrent layers, and so one that stays in float.
COMPILED = [
    pytest.param(name, marks=() if name in ("mlp, 4 bits", "BatchNorms", "language, 4 bits") else pytest.mark.nightly)
    for name in CASES
    if name != "recurrent, float weights"
]
EXPORTED = [*COMPILED, pytest.param("recurrent, float weights", marks=pytest.mark.nightly)]


def converted(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return qk.convert(CASES[name].prepared()), CASES[name].x()


def assert_equal(found: object, expected: object, largest: float = 0.0) -> None:
    """largest: the share of the largest output by which a float part may differ that a compiler has fused."""
    for y, wanted in zip(flat(found), flat(expected), strict=True):
        assert y.shape == wanted.shape
        assert y.dtype == wanted.dtype
        assert float((y - wanted).detach().abs().max()) <= largest * float(wanted.detach().abs().max())


@pytest.mark.parametrize("name", CASES)
def test_threads_call_one_model(name):
    """At once, each with an input of its own size, from the first call on."""
    model, _ = converted(name)
    inputs = [torch.cat([CASES[name].x()] * n) for n in (1, 2, 3, 1, 2, 3)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    model = copy.deepcopy(model)
    start, wrong = threading.Barrier(len(inputs)), []

    def call(x: torch.Tensor, y: object) -> None:
        try:
            start.wait(60)
            with torch.no_grad():
                for _ in range(5):
                    assert_equal(model(x), y)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", CASES)
def test_inference_mode(name, tmp_path):
    model, x = converted(name)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert_equal(model(x), expected)
        qk.save(model, tmp_path / "model.safetensors")
        loaded = qk.load(tmp_path / "model.safetensors", CASES[name].make())
        assert_equal(loaded(x), expected)
        for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), loaded.to(torch.device("cpu"))):
            assert_equal(other(x), expected)
    with torch.no_grad():
        assert_equal(loaded(x), expected)
        assert_equal(model(x), expected)


@pytest.mark.parametrize("name", CASES)
def test_copies_pickles_and_files(name):
    model, x = converted(name)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(x)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
        for other in copies:
            assert_equal(other(x), expected)
            assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_as_one_graph(name):
    torch._dynamo.reset()
    model, x = converted(name)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for batch in (x, torch.cat([x, x])):
            assert_equal(compiled(batch), model(batch), 1e-6)


@pytest.mark.parametrize("name", EXPORTED)
def test_exported(name):
    """The file of torch.export needs no code of the model."""
    model, x = converted(name)
    file = io.BytesIO()
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,))
        torch.export.save(exported, file)
        file.seek(0)
        for program in (exported, torch.export.load(file)):
            assert_equal(program.module()(x), expected, 1e-6)


class Small(nn.Module):
    """Convolutions and linear layers of 8 and of 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.first, self.second = nn.Linear(72, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(self.first(self.norm(self.conv(x)).relu().flatten(1)).relu())


SMALL = Case(Small, lambda: torch.randn(2, 3, 7, 7), QConfig(rules=[("second", {"weight": QSpec(4)})]))

LOADS = """
import sys, torch
import qkernels  # registers the ops
package, file = sys.argv[1:]
kept = torch.load(file)
run = torch._inductor.aoti_load_package(package)
with torch.no_grad():
    for x, y in kept:
        assert (run(x) - y).abs().max() <= 1e-6 * y.abs().max()
"""


def compiled_ahead_of_time(model: nn.Module, inputs: list[torch.Tensor], tmp_path) -> Callable[..., object]:
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (inputs[0],), dynamic_shapes=({0: batch},))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    return torch._inductor.aoti_load_package(package)  # type: ignore[no-any-return]


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++")
def test_ahead_of_time(tmp_path):
    torch.manual_seed(0)
    model, inputs = qk.convert(SMALL.prepared()), [SMALL.x(), torch.cat([SMALL.x()] * 3)]
    run = compiled_ahead_of_time(model, inputs, tmp_path)
    with torch.no_grad():
        kept = [(x, model(x)) for x in inputs]
    for x, y in kept:
        assert_equal(run(x), y, 1e-6)
    torch.save(kept, tmp_path / "kept.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOADS, tmp_path / "model.pt2", tmp_path / "kept.pt"]
    subprocess.run(command, check=True, env=environment)


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@pytest.mark.parametrize("name", COMPILED)
def test_inductor(name, tmp_path):
    torch._dynamo.reset()
    model, x = converted(name)
    with torch.no_grad():
        assert_equal(torch.compile(model, fullgraph=True)(x), model(x), 1e-6)
        exported = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        assert_equal(torch._inductor.aoti_load_package(package)(x), model(x), 1e-6)

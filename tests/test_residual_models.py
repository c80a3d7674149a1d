"""Models with quantized sums all the way: copied, compiled, trained, saved, converted and back to float."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from test_fuse import assert_fused, assert_layers, tensors
from test_residual import ON, SHAPE, Basic, Net, prepared_of, roles
from torch import nn
from torch.utils.checkpoint import checkpoint
from wild_models import WILD

import qkernels as qk
from qkernels.nn import FakeQuantize
from qkernels.qat.fuse import fused_parts

# Models, and how many quantizers their sums, concatenations and pools have; None: their forward cannot be traced.
ARCHITECTURES: dict[str, int | None] = {
    "ResNetBottleneck": 4,
    "MobileNetV2": 2,
    "MobileNetV3": 4,
    "EfficientNet": 4,
    "ShuffleNet": 1,
    "DenseNet": 3,
    "RepVGG": 6,
    "UNet": 2,
    "FPNDetector": 2,
    "WaveNet": 6,
    "TCN": 4,
    "HiFiGAN": 4,
    "GPT": 6,
    "LLaMA": 9,
    "MLPMixer": 3,
    "TiedAutoencoder": 0,
    "Siamese": 0,
    "VAE": 2,
    "ASPP": None,
}
NAMED = ("ASPP",)  # the forward of a module that may hold sums cannot be traced
LEFT = ("GPT", "LLaMA", "ASPP")  # parts of them are in no program


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    torch.manual_seed(0)
    case = WILD[name]
    model, inputs = case.make(), case.inputs()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prepared = qk.prepare(model, qk.QConfig(residual=qk.QSpec(8), rules=case.rules))
    assert any("sums and pools" in str(w.message) for w in said) == (name in NAMED)
    own = [n for n in roles(prepared) if not n.endswith("pool.input")]
    assert len(own) == (ARCHITECTURES[name] or 0), own
    qk.calibrate(prepared, [inputs], fallback=4.0)
    sum(t.float().square().mean() for t in tensors(prepared.train()(*inputs)) if t.requires_grad).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in prepared.parameters())
    prepared.eval()
    with torch.no_grad():
        expected, y = tensors(prepared(*inputs)), tensors(qk.convert(prepared)(*inputs))
        for got, wanted in zip(y, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-2 * float(wanted.abs().max()))
        converted = qk.convert(prepared)
    if fused_parts(converted) and name not in LEFT:
        assert_fused(converted, *inputs)
        assert_layers(prepared, converted, inputs)
    back = qk.unprepare(prepared)
    assert {n: type(m) for n, m in back.named_modules()} == {n: type(m) for n, m in model.named_modules()}


def test_the_float_model_stays_inside() -> None:
    torch.manual_seed(0)
    model, seen = Net(), []
    model.layer1[0].register_forward_hook(lambda m, args, y: seen.append(y))
    model.layer1[1].note = "mine"
    before = {name: type(module) for name, module in model.named_modules()}
    prepared = prepared_of(model)
    kept = {n: m for n, m in prepared.named_modules() if not isinstance(m, FakeQuantize)}
    assert list(kept) == list(before)
    assert all(isinstance(kept[name], kind) for name, kind in before.items())
    assert [key for key in prepared.state_dict() if "_fake_quant." not in key] == list(model.state_dict())
    prepared.load_state_dict(model.state_dict(), strict=False)
    seen.clear()
    y = prepared.eval()(torch.randn(SHAPE))
    levels = prepared.layer1[0].add_fake_quant
    assert torch.equal(seen[0], levels(seen[0]))  # a hook sees what the next block reads
    back = qk.unprepare(prepared)
    assert {name: type(module) for name, module in back.named_modules()} == before
    assert list(back.state_dict()) == list(model.state_dict())
    assert not any("traced_forward" in vars(module) for module in back.modules())
    assert not torch.equal(back(torch.randn(SHAPE)), y)
    in_place = qk.prepare(model, ON, inplace=True)
    assert in_place is model
    assert list(roles(model)) == list(roles(prepared))
    assert type(qk.unprepare(model, inplace=True).layer1[0]) is Basic


def test_copies_and_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(SHAPE)
    prepared = prepared_of(model).eval()
    converted, expected = qk.convert(prepared), prepared(x)
    other = qk.prepare(model, ON).eval()
    other.load_state_dict(prepared.state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    copies = (
        copy.deepcopy(prepared),
        pickle.loads(pickle.dumps(prepared)),
        torch.load(file, weights_only=False),
        other,
    )
    for made in copies:
        assert torch.equal(made(x), expected)
        assert made.layer1[1].conv1.input_fake_quant is made.layer1[0].add_fake_quant
        assert made.layer1[0].add_fake_quant.at_source
    for stage in (prepared, converted):
        with torch.no_grad():
            wanted = stage(x)
            qk.save(stage, tmp_path / "model.safetensors")
            loaded = qk.load(tmp_path / "model.safetensors", Net().eval())
            assert torch.equal(loaded.eval()(x), wanted)
            assert [type(m).__name__ for m in loaded.modules()] == [type(m).__name__ for m in stage.modules()]
            assert torch.equal(pickle.loads(pickle.dumps(stage))(x), wanted)
    assert loaded.__dict__["forward"].plans == converted.__dict__["forward"].plans

    class Basic(nn.Module):  # of the same name and parts, with another forward
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.__dict__ = block.__dict__

        def forward(self, x):
            return self.relu(self.conv2(x))

    changed = Net().eval()
    changed.layer1[0] = Basic(changed.layer1[0])
    with pytest.raises(ValueError, match="the forward of Basic is another one: its forward makes no add "):
        qk.load(tmp_path / "model.safetensors", changed)


def test_a_run_that_is_resumed() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model.train()(torch.randn(SHAPE)).square().mean().backward()
        optimizer.step()

    torch.manual_seed(0)
    model = Net()
    prepared = prepared_of(model)
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-3)
    step(prepared, optimizer, 1)
    state = copy.deepcopy((prepared.state_dict(), optimizer.state_dict()))
    step(prepared, optimizer, 2)
    again = qk.prepare(model, ON)
    again.load_state_dict(state[0])
    resumed = torch.optim.Adam(again.parameters(), 1e-3)
    resumed.load_state_dict(state[1])
    step(again, resumed, 2)
    for (name, a), b in zip(prepared.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_switches() -> None:
    torch.manual_seed(0)
    prepared, x = prepared_of(Net()), torch.randn(SHAPE)
    qk.freeze_observers(prepared)
    start = prepared.layer1[0].add_input_fake_quant.scale.clone()
    prepared.train()(100 * x)
    assert torch.equal(prepared.layer1[0].add_input_fake_quant.scale, start)
    qk.freeze_observers(prepared, False)
    prepared(100 * x)
    assert not torch.equal(prepared.layer1[0].add_input_fake_quant.scale, start)
    assert {name.removesuffix("_fake_quant") for name in qk.set_bits(prepared, 4, "*.add_fake_quant")} == {
        "layer1.0.add", "layer1.1.add", "layer1.2.add"
    }  # fmt: skip
    assert prepared.layer1[1].conv1.input_fake_quant.bits == 4
    prepared.eval()
    levels = prepared.layer1(prepared.stem(x)).unique().numel()
    assert levels <= 16
    assert "layer1.0.add_fake_quant" in qk.enable_fake_quant(prepared, inputs=False)
    assert prepared.layer1(prepared.stem(x)).unique().numel() > 100
    with pytest.raises(ValueError, match=r"switched off in stem\.0\.input_fake_quant"):
        qk.convert(prepared)
    qk.enable_fake_quant(prepared)
    notes = qk.report(prepared, x).notes
    assert notes["layer1.0"] == "its own forward passes tensors through quantizers: add_input, add"


def one_block() -> nn.Module:
    """A net whose forwards draw nothing."""
    net = Net()
    net.layer1 = net.layer1[1:]
    for block in net.layer1:
        block.p = 0.0
    return net


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training: bool) -> None:
    torch.manual_seed(0)
    plain, x = prepared_of(one_block()).train(training), torch.randn(SHAPE)
    qk.freeze_observers(plain)  # compiled layers that share an input each count it for its range
    made = pickle.loads(pickle.dumps(plain))
    torch._dynamo.reset()
    compiled, results = torch.compile(made, fullgraph=True, backend="eager"), []
    for model in (compiled, plain):
        y = model(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    made.layer1[0].p = 0.1
    with pytest.raises(Exception, match="to call the model once in this way before it is compiled"):
        compiled(x)


def test_exported_and_traced() -> None:
    torch.manual_seed(0)
    prepared, x = prepared_of(one_block()).eval(), torch.randn(SHAPE)
    with torch.no_grad():
        expected = prepared(x)
        assert torch.equal(torch.export.export(prepared, (x,)).module()(x), expected)
        assert torch.equal(torch.fx.symbolic_trace(prepared)(x), expected)
        converted = qk.convert(prepared)
        assert torch.equal(torch.export.export(converted, (x,)).module()(x), converted(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_and_autocast(reentrant: bool) -> None:
    torch.manual_seed(0)
    plain, x = prepared_of(Net()), torch.randn(SHAPE)
    for block in plain.layer1:
        block.p = 0.0
    other = copy.deepcopy(plain)

    def checkpointed(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        t = model.stem(x)
        for block in model.layer1:
            t = checkpoint(block, t, use_reentrant=reentrant)
        return model.fc(model.pool(t).flatten(1))

    for norm in (*plain.modules(), *other.modules()):
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0  # torch counts a batch twice
    a, b = plain(x), checkpointed(other, x)
    assert torch.equal(a, b)
    for y in (a, b):
        y.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p.grad, q[1].grad), name
    for q, r in zip(roles(plain).values(), roles(other).values(), strict=True):
        assert torch.equal(q.scale, r.scale)
    with torch.autocast("cpu", torch.bfloat16):
        y = plain(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    half = copy.deepcopy(plain).bfloat16().eval()
    assert half(x.bfloat16()).dtype == torch.bfloat16

"""qk.save and qk.load: what comes back from a file is the model that was saved."""

from __future__ import annotations

import copy
import os
import stat
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from saved import CASES, Case, assert_same, description_of, flat, images, mlp, rewrite, rows, tensors_of
from torch import nn

import qkernels as qk
from qkernels.nn import Int8Linear
from qkernels.qat import QConfig, QSpec

pytestmark = pytest.mark.filterwarnings(
    "ignore:prepare:UserWarning", "ignore:enable_nested_tensor:UserWarning", "ignore:LSTM with projections:UserWarning"
)


@pytest.mark.parametrize("stage", ["converted", "prepared"])
@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, stage, tmp_path):
    torch.manual_seed(0)
    case, path = CASES[name], tmp_path / "model.safetensors"
    model, x = case.prepared(), case.x()
    if stage == "converted":
        model = qk.convert(model)
    with torch.no_grad():
        model(x)  # an embedding with max_norm changes its weight by that
    qk.save(model, path)
    fresh = case.make().eval()
    before = copy.deepcopy(fresh.state_dict())
    loaded = qk.load(path, fresh)
    assert_same(loaded, model, x)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert not any(m.training for m in loaded.modules())
    for own, t in before.items():  # the float model stays as it was
        assert torch.equal(fresh.state_dict()[own], t)
    assert not {t.data_ptr() for t in fresh.parameters()} & {t.data_ptr() for t in loaded.parameters() if t.numel()}
    again = tmp_path / "again.safetensors"
    qk.save(loaded, again)
    assert description_of(again) == description_of(path)
    assert again.read_bytes() == path.read_bytes()
    if stage == "converted":
        assert qk.report(loaded).quantized_bytes == qk.report(model).quantized_bytes
        assert qk.report(loaded).notes == qk.report(model).notes
    else:
        with torch.no_grad():
            for y, expected in zip(flat(qk.convert(loaded)(x)), flat(qk.convert(model)(x)), strict=True):
                assert torch.equal(y, expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "two names" and "computed" not in name])
def test_a_model_on_the_meta_device(name, tmp_path):
    torch.manual_seed(0)
    case, path = CASES[name], tmp_path / "model.safetensors"
    model = qk.convert(case.prepared())
    qk.save(model, path)
    with torch.device("meta"):
        fresh = case.make()
    assert_same(qk.load(path, fresh.eval()), model, case.x())


def test_another_process_computes_the_same(tmp_path):
    """With nothing but the file, the float model's code and the input."""
    case, path = CASES["BatchNorms"], tmp_path / "model.safetensors"
    model, x = qk.convert(case.prepared()), case.x()
    qk.save(model, path)
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "expected.pt")
    code = (
        "import sys, torch, qkernels as qk; from saved import CASES; path, expected = sys.argv[1:]\n"
        "loaded, kept = qk.load(path, CASES['BatchNorms'].make()), torch.load(expected)\n"
        "assert torch.equal(loaded(kept['x']), kept['y'])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    subprocess.run([sys.executable, "-c", code, path, tmp_path / "expected.pt"], check=True, env=environment)


def test_the_file_holds_the_state_dict_and_says_what_it_is(tmp_path):
    case, path = CASES["BatchNorms"], tmp_path / "model.safetensors"
    model = qk.convert(case.prepared())
    qk.save(model, path)
    held, state = tensors_of(path), model.state_dict()
    assert held.keys() == state.keys()
    assert all(torch.equal(held[name], t) for name, t in state.items())
    found = description_of(path)
    assert (found["format"], found["min_reader"], found["version"]) == (1, 1, qk.__version__)
    assert found["folded"] == dict.fromkeys(("norm1", "norm2", "norm3"), "BatchNorm2d")
    layer = found["layers"]["second"]
    assert (layer["class"], layer["of"], layer["arguments"]["groups"]) == ("Int8Conv2d", "Conv2d", 8)
    assert layer["arguments"]["weight_bits"] == layer["input"]["bits"] == 8
    assert layer["input"]["granularity"] == {"kind": "PerTensor"}
    assert found["layers"]["first"]["of"] == "SameConv"
    assert found["layers"]["up"]["why_float"] == (
        "its weight is quantized with a zero point; the int8 kernels take symmetric=True"
    )
    assert found["quantizers"][found["layers"]["up"]["quantizers"]["input"]]["bits"] == 8


def test_shared_tensors_are_stored_once(tmp_path):
    path = tmp_path / "model.safetensors"
    for name in ("tied", "tied, 4 bits", "language"):
        model = qk.convert(CASES[name].prepared())
        qk.save(model, path)
        shared = description_of(path)["shared"]
        assert shared
        assert set(tensors_of(path)) == set(model.state_dict()) - set(shared)
        loaded = qk.load(path, CASES[name].make())
        for other, first in shared.items():
            own = loaded.state_dict()
            assert own[other].data_ptr() == own[first].data_ptr()
    loaded = qk.load(path, CASES["language"].make())
    assert loaded.head.data is loaded.table.data


def train(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(qk.parameter_groups(model, lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()


def test_a_loaded_prepared_model_trains_on_as_the_saved_one(tmp_path):
    path, x = tmp_path / "model.safetensors", images()
    prepared = qk.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    qk.calibrate(prepared, [x])

    train(prepared, x)
    qk.save(prepared, path)
    loaded = qk.load(path, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    assert loaded.training
    train(prepared, x)
    train(loaded, x)
    assert_same(loaded, prepared, x)
    with pytest.raises(RuntimeError, match="of another model or config"):
        loaded.load_state_dict(qk.prepare(mlp()).state_dict())
    loaded.load_state_dict(prepared.state_dict())


def normed() -> nn.Module:
    """A BatchNorm that convert folds, and one that it keeps."""
    first = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*first, nn.Linear(24, 8), nn.BatchNorm1d(8))


@pytest.mark.parametrize("where", ["*", "1", "5"])
def test_frozen_batch_norms(where, tmp_path):
    path, again, x = tmp_path / "model.safetensors", tmp_path / "again.safetensors", torch.randn(5, 3, 8)
    prepared = qk.prepare(normed())
    qk.calibrate(prepared, [x])
    qk.freeze_bn(prepared, where=where)
    train(prepared, x)
    qk.save(prepared, path)
    others = normed()
    qk.freeze_bn(others, where="5")  # the file says which are frozen
    for loaded in (qk.load(path, normed()), qk.load(path, others)):
        assert [m.training for m in loaded] == [m.training for m in prepared.train()]
        qk.save(loaded, again)
        assert again.read_bytes() == path.read_bytes()
    assert [type(m).__name__ for m in (others[1], others[5])] == ["BatchNorm1d", "FrozenBatchNorm1d"]
    train(prepared, x)
    train(loaded, x)
    assert_same(loaded, prepared, x)
    converted = qk.convert(prepared.eval())
    qk.save(converted, path)
    assert_same(qk.load(path, normed()), converted, x)
    with pytest.raises(ValueError, match=r"'5' is a (Frozen)?BatchNorm1d in the file, and a SyncBatchNorm in"):
        qk.load(path, nn.SyncBatchNorm.convert_sync_batchnorm(normed()))


@pytest.mark.parametrize("frozen", ["scales", "hybrid", "own"])
def test_what_gets_no_gradient(frozen, tmp_path):
    torch.manual_seed(0)
    path, x = tmp_path / "model.safetensors", rows()
    if frozen == "hybrid":
        prepared = qk.hybrid(mlp(), [x], 600, share=0.5, bits=(8, 4)).model
    else:
        prepared = qk.prepare(mlp(), QConfig(QSpec(4), QSpec(4, quantizer="lsq+")))
        qk.calibrate(prepared, [x])
    if frozen == "scales":
        qk.freeze_scales(prepared)
    elif frozen == "own":
        prepared[0].bias.requires_grad_(False)
    learning = [p.requires_grad for p in prepared.parameters()]
    assert len(set(learning)) == 2
    qk.save(prepared, path)
    loaded = qk.load(path, mlp().requires_grad_(False))
    assert [p.requires_grad for p in loaded.parameters()] == learning
    train(prepared, x)
    train(loaded, x)
    assert_same(loaded, prepared, x)
    rewrite(path, gradients=None)  # a file of before it said that
    older = qk.load(path, mlp().requires_grad_(False))
    assert not older[0].bias.requires_grad
    assert qk.load(path, mlp())[0].bias.requires_grad
    qk.save(qk.convert(prepared.eval()), path)
    assert_same(qk.load(path, mlp()), qk.convert(prepared), x)


def test_what_the_float_model_adds(tmp_path):
    """Hooks, attributes and buffers outside the state_dict are those of the float model."""
    path, x = tmp_path / "model.safetensors", rows()
    qk.save(qk.convert(CASES["two names"].prepared()), path)
    fresh = CASES["two names"].make()
    calls: list[str] = []
    fresh.layer.register_forward_hook(lambda module, args, y: calls.append(type(module).__name__))
    fresh.layer.note = "kept"
    fresh.factor.mul_(2)
    loaded = qk.load(path, fresh)
    loaded(x)
    assert calls == ["Int8Linear"] * 2
    assert loaded.layer.note == "kept"
    assert torch.equal(loaded.factor, fresh.factor)
    assert loaded.factor is not fresh.factor
    assert loaded.again is loaded.layer is loaded.rest["same"]


def test_a_model_that_has_integer_layers_itself(tmp_path):
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), Int8Linear(16, 8), nn.Linear(8, 4))

    path, x = tmp_path / "model.safetensors", rows()
    with torch.no_grad():
        float_model = make()
        float_model[1] = Int8Linear.from_float(nn.Linear(16, 8))
    prepared = qk.prepare(float_model)
    qk.calibrate(prepared, [x])
    for model in (prepared.eval(), qk.convert(prepared)):
        qk.save(model, path)
        assert_same(qk.load(path, make().eval()), model, x)
    with pytest.raises(ValueError, match=r"'1' has arguments=.*weight_bits': 8.*weight_bits': 6"):
        qk.load(path, nn.Sequential(nn.Linear(16, 16), Int8Linear(16, 8, weight_bits=6), nn.Linear(8, 4)))


class Counting(nn.Linear):
    def get_extra_state(self):
        return torch.tensor(self.count)

    def set_extra_state(self, state):
        self.count = int(state)

    count = 0


def test_extra_state(tmp_path):
    path, x = tmp_path / "model.safetensors", rows()
    case = Case(lambda: nn.Sequential(nn.Linear(16, 16), Counting(16, 4)), rows, QConfig(rules=[("1", None)]))
    model = qk.convert(case.prepared())
    model[1].count = 5
    qk.save(model, path)
    loaded = qk.load(path, case.make())
    assert loaded[1].count == 5
    assert torch.equal(loaded(x), model(x))


def test_a_newer_format_that_this_version_understands(tmp_path):
    path = tmp_path / "model.safetensors"
    model = qk.convert(CASES["mlp"].prepared())
    qk.save(model, path)
    layers = description_of(path)["layers"]
    layers["0"]["not known yet"] = 1
    rewrite(path, format=2, layers=layers, more={"of": "it"})
    x = rows()
    assert torch.equal(qk.load(path, mlp())(x), model(x))


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path, model = tmp_path / "model.safetensors", qk.convert(CASES["mlp"].prepared())
    qk.save(model, path)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    before = path.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    other = qk.convert(CASES["mlp"].prepared())
    for failing in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, failing, lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                qk.save(other, path)
        assert path.read_bytes() == before
    qk.save(other, link)
    assert link.is_symlink()
    assert path.read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.safetensors", "model.safetensors"]


def test_a_loaded_model_does_not_need_its_file(tmp_path):
    path, x = tmp_path / "model.safetensors", images()
    model = qk.convert(CASES["BatchNorms"].prepared())
    qk.save(model, path)
    loaded = qk.load(path, CASES["BatchNorms"].make())
    with open(path, "r+b") as file:
        file.truncate(10)  # memory that is mapped to the file would be gone
    assert torch.equal(loaded(x), model(x))


def test_weights_alone_come_back_without_a_calibration(tmp_path):
    """What QConfig says nothing of is in the file: the widths that set_bits changed."""
    path, x = tmp_path / "model.safetensors", rows()
    prepared = qk.prepare(mlp(), QConfig(QSpec(8), QSpec(8)))
    qk.set_bits(prepared, 4)
    qk.calibrate(prepared, [x])
    qk.save(prepared.eval(), path)
    assert_same(qk.load(path, mlp().eval()), prepared, x)


def test_a_zero_point_that_a_width_rounded_comes_back_exactly(tmp_path):
    path, x = tmp_path / "model.safetensors", rows()
    prepared = qk.prepare(mlp(), QConfig(input=QSpec(8, symmetric=False, quantizer="minmax"))).eval()
    qk.calibrate(prepared, [x])
    before = prepared(x)
    qk.set_bits(prepared, 3, "*input_fake_quant")
    qk.save(prepared, path)
    loaded = qk.load(path, mlp().eval())
    qk.set_bits(loaded, 8, "*input_fake_quant")
    torch.testing.assert_close(loaded(x), before)

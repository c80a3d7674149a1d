"""What qk.save and qk.load refuse, with what they say, and that nothing is half saved or half loaded."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import sys

import pytest
import torch
from safetensors.torch import save_file
from saved import CASES, Attending, Norms, description_of, mlp, recurrent, rewrite, rows, tensors_of
from torch import nn

import qkernels as qk
from qkernels.nn import FakeQuantize
from qkernels.qat import QConfig, QSpec


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def saved(name, path):
    torch.manual_seed(0)
    model = qk.convert(CASES[name].prepared())
    qk.save(model, path)
    return model


def refused(path, model: nn.Module) -> str:
    """The text of the refusal, after which the model is what it was."""
    state, modules = copy.deepcopy(model.state_dict()), [id(m) for m in model.modules()]
    kinds, held = [type(m) for m in model.modules()], [id(t) for t in (*model.parameters(), *model.buffers())]
    with pytest.raises(ValueError) as error:  # noqa: PT011  # callers look at the text
        qk.load(path, model)
    assert modules == [id(m) for m in model.modules()]
    assert kinds == [type(m) for m in model.modules()]
    assert held == [id(t) for t in (*model.parameters(), *model.buffers())]
    for key, t in model.state_dict().items():
        assert t.is_meta or torch.equal(t.nan_to_num(7), state[key].nan_to_num(7))
    return str(error.value)


# Files


def test_a_file_that_is_cut_off(path):
    saved("mlp", path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (*range(0, len(whole), 97), 3, 8, 9, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        text = refused(path, mlp())
        assert "is not a whole safetensors file" in text
        assert "copy it again or save it again" in text
    path.write_bytes(whole + b"\0")
    assert "is not a whole safetensors file" in refused(path, mlp())
    path.write_bytes(whole)
    qk.load(path, mlp())


def offsets(whole: bytes) -> dict[str, int]:
    """Where the bytes of each tensor begin."""
    header = int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8 : 8 + header])
    return {name: 8 + header + each["data_offsets"][0] for name, each in entries.items() if name != "__metadata__"}


def test_a_byte_of_a_tensor_that_was_changed(path):
    saved("mlp", path)
    whole = path.read_bytes()
    for name, place in offsets(whole).items():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert f"written: its digest differs: the tensor {name!r} has other values; accepted" in refused(path, mlp())


def test_a_byte_of_the_header_that_was_changed(path):
    saved("mlp", path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    texts = {
        b'weight_bits\\": 8': (b"7", "its digest differs: its tensors are as they were, its header is not"),
        b'"0.bias': (b"t", "differs: the tensor '0.bias' is missing; the tensor '0.biat' was not in it; accepted"),
        b'"0.scale":{"dtype":"F32","shape":[3': (b"4", "Error while deserializing header"),
        b'min_reader\\": 1': (b"3", "its tensors are as they were, its header is not"),
        b'"qkernels': (b"t", "without the description that qk.save writes"),
    }
    for place, (byte, text) in texts.items():
        at = whole.rindex(place) + len(place) - 1
        path.write_bytes(whole[:at] + byte + whole[at + 1 :])
        assert text in refused(path, mlp())
    for at in [*range(9), *random.Random(0).sample(range(9, header), 60)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert refused(path, mlp()).startswith("path: ")


def test_tensors_that_were_changed(path):
    saved("mlp", path)
    tensors, description = tensors_of(path), description_of(path)
    changes = {
        "the tensor '0.scale' is missing; accepted": {"0.scale": None},
        "the tensor 'more' was not in it; accepted": {"more": torch.zeros(2)},
        "the tensor '2.bias' has shape [2, 2], and had [4]; accepted": {"2.bias": tensors["2.bias"].view(2, 2)},
        "the tensor '2.bias' has dtype int32, and had float32": {"2.bias": tensors["2.bias"].view(torch.int32)},
        "'2.bias' has other values; the tensor '2.scale' is missing; and 1 more;": {
            "0.scale": None,
            "2.scale": None,
            "2.bias": -tensors["2.bias"],
            "more": torch.zeros(2),
        },
    }
    for text, change in changes.items():
        held = {name: t for name, t in {**tensors, **change}.items() if t is not None}
        save_file(held, path, metadata={"qkernels": json.dumps(description)})
        assert text in refused(path, mlp())
    for facts in (3, {}, dict.fromkeys(tensors, 3)):
        save_file(tensors, path, metadata={"qkernels": json.dumps({**description, "tensors": facts})})
        assert "is not as it was written: its digest differs: " in refused(path, mlp())


def test_a_file_of_before_it_said_what_its_tensors_are(path):
    model = saved("mlp", path)
    rewrite(path, tensors=None)
    x = rows()
    assert torch.equal(qk.load(path, mlp())(x), model(x))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "its digest differs: it does not say what its tensors were" in refused(path, mlp())


def test_a_newer_file(path):
    saved("mlp", path)
    rewrite(path, format=3, min_reader=2, version="9.1.0")
    text = refused(path, mlp())
    assert "has format 3, written by qkernels 9.1.0; accepted by this version: formats up to 1, so install" in text


def test_other_files(path, tmp_path):
    save_file({"0.weight": torch.zeros(2)}, path)
    assert "without the description that qk.save writes" in refused(path, mlp())
    for text in ("not json", "[]", "{}", '{"min_reader": "x", "digest": ""}'):
        save_file({"0.weight": torch.zeros(2)}, path, metadata={"qkernels": text})
        assert "has a description that cannot be read" in refused(path, mlp())
    torch.save(mlp().state_dict(), path)
    assert "is not a whole safetensors file" in refused(path, mlp())
    path.write_bytes(b"")
    assert "is not a whole safetensors file" in refused(path, mlp())
    with pytest.raises(FileNotFoundError, match=r"where no file is; accepted: a file that qk.save wrote"):
        qk.load(tmp_path / "none.safetensors", mlp())
    with pytest.raises(IsADirectoryError, match=r"a folder; accepted: a file that qk.save wrote"):
        qk.load(tmp_path, mlp())


def test_a_file_that_may_not_be_read(path, monkeypatch):
    saved("mlp", path)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read anything
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="which this process may not read"):
        qk.load(path, mlp())


# Models


def edited(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return model


def with_module(model: nn.Module, name: str) -> nn.Module:
    model.add_module(name, nn.Linear(2, 2))
    return model


def without(model: nn.Module, name: str) -> nn.Module:
    del model._modules[name]
    return model


class Linear(nn.Module):
    """Not the one of torch."""


class MyConv(nn.Conv2d):
    pass


MODELS = {
    "missing module": (lambda: without(Norms(), "second"), "the module 'second' (Int8Conv2d) is in the file and not"),
    "missing BatchNorm": (lambda: without(Norms(), "norm1"), "the module 'norm1' (Identity) is in the file and not"),
    "extra module": (lambda: with_module(Norms(), "more"), "the module 'more' (Linear) is in the model and not in the"),
    "other class": (
        lambda: edited(Norms(), "up", nn.Conv2d(8, 6, 2)),
        "the module 'up' is a ConvTranspose2d in the file, and a Conv2d in the model",
    ),
    "other class of the user": (
        lambda: edited(Norms(), "second", MyConv(8, 8, 3, padding=1, groups=8)),
        "the module 'second' is a Conv2d in the file, and a MyConv in the model",
    ),
    "plain instead of the user's class": (
        lambda: edited(Norms(), "first", nn.Conv2d(3, 8, 3, stride=2, bias=False)),
        "the module 'first' is a SameConv in the file, and a Conv2d in the model",
    ),
    "Identity instead of a BatchNorm": (
        lambda: edited(Norms(), "norm2", nn.Identity()),
        "the module 'norm2' is a BatchNorm2d in the file, and a Identity in the model",
    ),
    "stride": (
        lambda: edited(Norms(), "second", nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8, bias=False)),
        "the module 'second' has stride=[1, 1] in the file, and stride=[2, 2] in the model",
    ),
    "groups": (
        lambda: edited(Norms(), "second", nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)),
        "the module 'second' has groups=8 in the file, and groups=4 in the model",
    ),
    "padding mode": (
        lambda: edited(Norms(), "second", nn.Conv2d(8, 8, 3, 1, 1, 1, 8, False, padding_mode="circular")),
        "has padding_mode=zeros in the file, and padding_mode=circular in the model",
    ),
    "channels of a layer in float": (
        lambda: edited(Norms(), "up", nn.ConvTranspose2d(8, 7, 2, bias=False)),
        "the tensor 'up.weight' has shape [8, 6, 2, 2] in the file, and [8, 7, 2, 2] in the model",
    ),
    "dtype": (lambda: Norms().half(), "weights of float32 in the file, and of float16 in the model (cast the model"),
    "dtype of a layer in float": (
        lambda: edited(Norms(), "up", nn.ConvTranspose2d(8, 6, 2, bias=False).double()),
        "the tensor 'up.weight' is torch.float32 in the file, and torch.float64 in the model (cast the model first, by",
    ),
    "prepared": (lambda: qk.prepare(Norms()), "the module 'first' is a SameConv in the file, and a QATSameConv in the"),
    "converted": (lambda: qk.convert(CASES["BatchNorms"].prepared()), "is a BatchNorm2d in the file, and a Identity"),
    "another architecture": (mlp, "the module 'first' (Int8SameConv) is in the file and not in the model"),
}


@pytest.mark.parametrize("name", MODELS)
def test_another_model(name, path):
    saved("BatchNorms", path)
    make, text = MODELS[name]
    found = refused(path, make())
    assert text in found
    assert "model: not the one that was saved in" in found
    assert "Nothing was loaded; accepted: the float model that was prepared" in found


def test_many_differences(path):
    saved("BatchNorms", path)
    assert re.search(r"; and \d+ more. Nothing was loaded", refused(path, mlp()))


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        ("mlp", lambda: nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 4)), "bias=True in"),
        ("mlp", lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)), "out_features=32 in the file"),
        ("mlp", lambda: edited(mlp(), "1", nn.GELU()), "the module '1' is a ReLU in the file, and a GELU in the model"),
        ("mlp", lambda: edited(mlp(), "0", Linear()), "'0' is a layer of torch.nn in the file, and a test_"),
        ("two names", lambda: unshared(), "'again' is 'layer' itself in the file, and a module of its own"),
        ("language", lambda: nn.Sequential(mlp()), "the module 'table' (Int8Embedding) is in the file and not"),
        ("attention", lambda: heads(4), "'own' has num_heads=2 in the file, and num_heads=4 in the model"),
        ("recurrent", lambda: nn.LSTM(16, 12, 2, bidirectional=True), "hidden_size=8 in the file, and hidden_size=12"),
        ("recurrent", lambda: nn.LSTM(16, 8, bidirectional=True), "num_layers=2 in the file, and num_layers=1 in the"),
        ("recurrent", lambda: nn.GRU(16, 8, 2, bidirectional=True), "is a LSTM in the file, and a GRU in the model"),
    ],
)  # fmt: skip
def test_other_layers(name, make, text, path):
    saved(name, path)
    assert text in refused(path, make())


def unshared() -> nn.Module:
    model = CASES["two names"].make()
    model.again = nn.Linear(16, 16)
    return model


def heads(n: int) -> nn.Module:
    return edited(Attending(), "own", nn.MultiheadAttention(16, n, batch_first=True, add_bias_kv=True))


# Tensors


def test_missing_extra_and_other_tensors(path):
    saved("BatchNorms", path)
    tensors = tensors_of(path)
    small = torch.zeros(2)
    changes = {
        "the tensor 'second.scale' is in the model and not in the file": {"second.scale": None},
        "the tensor 'up.bias' is in the model and not in the file": {"up.bias": None},
        "the tensor 'more' is in the file and not in the model": {"more": small},
        "the tensor 'second.codes' has shape [2] in the file, and [8, 1, 3, 3] in the model": {"second.codes": small},
        "the tensor 'second.scale' is torch.float64 in the file, and torch.float32 in the model": {
            "second.scale": tensors["second.scale"].double()
        },
        "the tensor 'up.input_fake_quant.scale' has shape [2] in the file": {"up.input_fake_quant.scale": small},
    }
    for text, change in changes.items():
        rewrite(path, {name: t for name, t in {**tensors, **change}.items() if t is not None})
        found = refused(path, Norms())
        assert text in found
        assert "Nothing was loaded" in found
    rewrite(path, tensors)
    qk.load(path, Norms())


def test_a_shared_tensor_that_is_missing(path):
    saved("tied", path)
    tensors, shared = tensors_of(path), description_of(path)["shared"]
    first = shared["second.codes"]
    del tensors[first]
    rewrite(path, tensors)
    text = refused(path, CASES["tied"].make())
    assert f"'{first}' is in the model and not in the file" in text or "another name holds it" in text


def test_a_layer_that_this_version_does_not_know(path):
    saved("mlp", path)
    layers = description_of(path)["layers"]
    layers["0"]["class"] = "Int1Linear"
    rewrite(path, layers=layers)
    assert "'0' is a Int1Linear in the file, which this version does not know" in refused(path, mlp())


# What no file can hold, and where nothing can be loaded


def test_buffers_that_no_file_holds(path):
    saved("two names", path)
    with torch.device("meta"):
        fresh = CASES["two names"].make()
    text = refused(path, fresh)
    assert "'factor' is on the meta device, and no state_dict holds it" in text
    fresh.factor = torch.arange(16.0)
    qk.load(path, fresh)
    fresh.layer.table = torch.empty(3, device="meta")
    assert "'layer.table' is on the meta device" in refused(path, fresh)


def test_what_save_refuses(path, tmp_path):
    model = qk.convert(CASES["mlp"].prepared())
    with pytest.raises(TypeError, match=r"model: got a str; accepted: a torch.nn.Module"):
        qk.save("model", path)
    with pytest.raises(TypeError, match="accepted: the float model"):
        qk.load(path, "model")
    for call in (lambda: qk.save(model, None), lambda: qk.load(None, mlp())):
        with pytest.raises(TypeError, match="path: got None; accepted: the path of a file"):
            call()
    for float_model in (mlp(), nn.Sequential(FakeQuantize())):
        with pytest.raises(ValueError, match=r"holds no layer of this package; accepted: what qk.convert or qk.prep"):
            qk.save(float_model, path)
    with pytest.raises(FileNotFoundError, match="accepted: the name of a file in a folder that exists"):
        qk.save(model, tmp_path / "none" / "model.safetensors")
    with pytest.raises(IsADirectoryError, match="accepted: the name of a file"):
        qk.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"its tensor '0.bias' is on the meta device; accepted: dense tensors"):
        qk.save(copy.deepcopy(model).to("meta"), path)
    sparse = copy.deepcopy(model)
    sparse.register_buffer("adjacency", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"its tensor 'adjacency' is torch.float32, torch.sparse_coo"):
        qk.save(sparse, path)
    stateful = copy.deepcopy(model)
    stateful[1].__class__ = Stateful
    with pytest.raises(ValueError, match=r"holds '1._extra_state', a dict; accepted: tensors"):
        qk.save(stateful, path)
    lazy = qk.prepare(nn.Sequential(nn.LazyLinear(4)))
    with pytest.raises(ValueError, match="the layer '0' has no shape yet; accepted: layers that know theirs"):
        qk.save(lazy, path)
    own = copy.deepcopy(model)
    own[0].__class__ = OwnInt8
    with pytest.raises(ValueError, match="the layer '0' is a OwnInt8, which save does not know; accepted: Int8Linear"):
        qk.save(own, path)
    assert list(tmp_path.iterdir()) == []


class Stateful(nn.ReLU):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


class OwnInt8(qk.nn.Int8Linear):
    pass


def test_a_lazy_float_model(path):
    saved("mlp", path)
    lazy = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(ValueError, match=r"its tensor '0.weight' has no shape yet; accepted: a model that knows its"):
        qk.load(path, lazy)


def test_without_the_package(path, monkeypatch):
    model = saved("mlp", path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: qk.save(model, path), lambda: qk.load(path, mlp())):
        with pytest.raises(ImportError, match=r"pip install 'qkernels\[checkpoints\]'"):
            call()


def test_other_widths_of_a_prepared_model(path):
    """A prepared file says its widths itself; a float model takes them all."""
    for bits in (4, 8):
        prepared = qk.prepare(mlp(), QConfig(QSpec(bits)))
        qk.calibrate(prepared, [rows()])
        qk.save(prepared, path)
        assert qk.load(path, mlp())[0].weight_fake_quant.bits == bits


def test_recurrent_layers_keep_their_weights_together(path):
    saved("recurrent, float weights", path)
    loaded = qk.load(path, recurrent())
    assert len(loaded._flat_weights) == 16
    assert all(own is held for own, held in zip(loaded._flat_weights, loaded.parameters(), strict=False))

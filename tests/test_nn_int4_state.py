"""Int4Linear and Int4Embedding: state that comes back exactly or not at all, casts and moves."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from int4_layers import LAYERS, assert_same, example, filled, state_bytes
from torch import nn

import qkernels as qk
from qkernels import layouts
from qkernels.nn import FakeQuantize, Int4Embedding, Int4Linear, Int8Linear


def blank(layer: nn.Module) -> nn.Module:
    """A layer of the same form that holds other values."""
    other = copy.deepcopy(layer)
    # What is packed stands for zeros now, what is not is 1.
    zeros = {name: torch.zeros(form[1], dtype=form[0]) for name, form in other._logical().items() if form}
    other._hold(other._pack(zeros))
    for name, t in (*other.named_parameters(), *other.named_buffers()):
        if name not in (*other.private_buffers, *other.private_parameters, "weight_dtype"):
            t.detach().fill_(1)
    return other


@pytest.mark.parametrize("name", LAYERS)
def test_state_is_logical_and_comes_back_exactly(name, tmp_path):
    layer = LAYERS[name]()
    state = layer.state_dict()
    packed = {"data", "colsum", "weight_sum", "packed_scale", "packed_zero_point", "packed_minimum"}
    assert not packed & set(state)
    assert all(t.is_contiguous() for t in state.values())

    fresh = blank(layer)
    assert not torch.equal(fresh(x := example(layer)), layer(x))
    fresh.load_state_dict(state, strict=True)
    assert_same(fresh, layer)

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    fresh = blank(layer)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(fresh, layer)

    safetensors = pytest.importorskip("safetensors.torch")
    nested, other = nn.Sequential(layer, nn.ReLU()), nn.Sequential(blank(layer), nn.ReLU())
    safetensors.save_model(nested, str(tmp_path / "model.safetensors"))
    safetensors.load_model(other, str(tmp_path / "model.safetensors"), strict=True)
    assert_same(other[0], layer)

    assert_same(copy.deepcopy(layer), layer)
    pickled = pickle.dumps(layer)
    assert_same(pickle.loads(pickled), layer)
    assert not any(word.encode() + b"\x94" in pickled and word in state for word in packed)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False), layer)
    assert len(buffer.getvalue()) < state_bytes(state) + 8000  # with the buffers it would hold everything twice


def test_a_pickle_holds_no_packed_buffer():
    layer = Int4Linear.from_float(nn.Linear(512, 512), 128)
    assert len(pickle.dumps(layer)) < state_bytes(layer.state_dict()) + 4000
    assert layer.__getstate__()["_buffers"]["data"] is None
    assert layer.data is not None


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "cpu", "share_memory"])
def test_casts_and_moves_keep_the_state(name, cast):
    layer = LAYERS[name]()
    moved = getattr(copy.deepcopy(layer), cast)()
    state = layer.state_dict()
    for key, value in moved.state_dict().items():
        assert value.dtype == (moved.dtype if key == "bias" else state[key].dtype)
        assert torch.equal(value, state[key].to(value.dtype))
    if not isinstance(layer, Int4Embedding) and cast in ("cpu", "share_memory"):
        assert_same(moved, layer)


@pytest.mark.parametrize("name", LAYERS)
def test_bad_state_names_the_tensor_and_changes_nothing(name):
    layer = LAYERS[name]()
    good = layer.state_dict()
    other = blank(layer)
    before = copy.deepcopy(other)
    model = nn.ModuleDict({"layer": other})

    def refused(state, message, strict=True):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({f"layer.{key}": value for key, value in state.items()}, strict=strict)
        assert_same(other, before)

    for key, value in good.items():
        if key == "codes_form":  # files of earlier versions have none
            continue
        without = {k: v for k, v in good.items() if k != key}
        refused(without, rf'Missing key\(s\).*"layer\.{key}"')
        assert model.load_state_dict({f"layer.{k}": v for k, v in without.items()}, strict=False).missing_keys == [
            f"layer.{key}"
        ]
        assert_same(other, before)
        wrong = torch.int32 if value.is_floating_point() else torch.float32
        for strict in (True, False):
            accepted = rf"; accepted: {value.dtype} of shape"
            refused({**good, key: value.to(wrong)}, rf"layer\.{key}: got {wrong} of shape .*{accepted}", strict)
            refused({**good, key: value[1:]}, rf"layer\.{key}: got {value.dtype} of shape .*{accepted}", strict)
            refused({**good, key: value[None]}, rf"layer\.{key}: got .*{accepted}", strict)
            refused({**good, key: "text"}, rf"layer\.{key}: got str{accepted}", strict)
    for key in ("zero_point", "minimum", "input_scale"):
        if key not in good and (key in layer._logical() or key in layer._buffers):
            for strict in (True, False):
                refused({**good, key: torch.ones(1)}, rf"layer\.{key}: got .*; accepted: none", strict)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"layer\.extra"'):
        blank(layer).load_state_dict({**good, "layer.extra": torch.ones(1)})
    model.load_state_dict({f"layer.{k}": v for k, v in {**good, "extra": torch.ones(1)}.items()}, strict=False)
    assert_same(other, layer)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_point_out_of_range_is_refused(bits):
    layer = filled(bits=bits)
    before = copy.deepcopy(layer)
    state = {**layer.state_dict(), "bias": torch.zeros(37)}
    state["zero_point"] = torch.full_like(state["zero_point"], 2 ** (bits - 1))
    with pytest.raises(RuntimeError, match=rf"zero_point: got {2 ** (bits - 1)}; accepted: the codes of {bits} bits"):
        layer.load_state_dict(state)
    assert_same(layer, before)


def test_a_checkpoint_of_another_form_is_refused():
    for source, target, message in (
        (filled(), filled("symmetric"), r"zero_point: got torch\.int8 of shape \[37, 3\]; accepted: none"),
        (filled("symmetric"), filled(), 'Missing key.*"zero_point"'),
        (filled("minimum"), filled(), 'Missing key.*"zero_point"'),
        (filled(bits=3), filled(), r"codes: got torch.uint8 of shape \[37, 18\]; accepted: .*\[37, 24\]"),
        (filled(scale_dtype=torch.float16), filled(), "scale: got torch.float16.*accepted: torch.float32"),
        (filled(input="static"), filled(), 'Missing key.*"input_zero_point"'),
        (Int8Linear.from_float(nn.Linear(48, 37)), filled(), r"codes: got torch.int8 of shape \[37, 48\]"),
    ):
        before = copy.deepcopy(target)
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(source.state_dict())
        assert_same(target, before)


@pytest.mark.parametrize("kind", ["symmetric", "zero_point", "minimum"])
def test_a_move_to_a_gpu_repacks(kind, monkeypatch):
    """The layout follows the device: here the CPU is said to take a GPU's."""
    layer = filled(kind)
    x = example(layer)
    with qk.use_kernel("reference"):
        expected, state = layer(x), layer.state_dict()
        monkeypatch.setattr(layouts, "int4_layout_on", lambda device, bits=4: layouts.HALVES)
        moved = copy.deepcopy(layer).to("cpu")
        assert moved.data.shape == (37, 32)  # rows of 48 codes in halves of 16
        assert moved.packed_scale.shape == (3, 37)
        assert torch.equal(moved(x), expected)
        for key, value in moved.state_dict().items():
            assert torch.equal(value, state[key]), key
        again = pickle.loads(pickle.dumps(moved))
        assert again.data.dim() == 2
        monkeypatch.undo()
        assert_same(moved.to("cpu"), layer)
        assert_same(pickle.loads(pickle.dumps(again.to("cpu"))), layer)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "int8 convolution"])
def test_meta_device(name):
    layer = LAYERS[name]()
    state = layer.state_dict()
    on_meta = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in (*on_meta.parameters(), *on_meta.buffers()))
    assert {k: (t.shape, t.dtype) for k, t in on_meta.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in state.items()
    }
    x = example(layer)
    if not isinstance(layer, Int8Linear):  # its zero point and scale are looked at
        assert on_meta(x.to("meta")).shape == layer(x).shape
    filled_again = on_meta.to_empty(device="cpu")
    filled_again.load_state_dict(state)
    assert_same(filled_again, layer)
    assigned = copy.deepcopy(layer).to("meta")
    assigned.load_state_dict(state, assign=True)
    assert_same(assigned, layer)


def test_made_on_meta():
    with torch.device("meta"):
        layers = nn.ModuleList(
            [
                Int4Linear(48, 5, group_size=16, symmetric=False, input=FakeQuantize(symmetric=False)),
                Int4Linear(48, 5, group_size=16, symmetric=False, minimum=True),
                Int4Embedding(9, 48, group_size=16, symmetric=False),
            ]
        )
    assert all(t.is_meta for t in (*layers.parameters(), *layers.buffers()))
    assert not any(t.is_meta for t in layers.to_empty(device="cpu").buffers())

"""Which layers prepare takes, and what it says of the others: parents that read weights, specs, parametrizations."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from converting import SameConv, assert_converts, prepare_and_calibrate
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from qkernels.nn import (
    Int4Linear,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConv2d,
    QATLinear,
    QATMultiheadAttention,
)
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare, report

pytestmark = pytest.mark.filterwarnings("ignore:prepare. ", "ignore:enable_nested_tensor", "ignore:.*weight_norm")

FAST = {"batch_first": True, "dropout": 0.0}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_transformer_encoder_layer_calls_its_layers_in_eval_mode(norm_first, copies):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, norm_first=norm_first, **FAST)
    x = torch.randn(3, 5, 32)
    prepared = prepare(model, QConfig(QSpec(2), QSpec(8, symmetric=False)))
    calibrate(prepared, [x])
    assert prepared.linear1.input_fake_quant.is_calibrated
    prepared = copies(prepared)
    by_hand = copy.deepcopy(model)  # quantized by hand, on torch's slow path
    for name in ("self_attn", "linear1", "linear2"):
        setattr(by_hand, name, prepared.get_submodule(name))
    expected = by_hand.train()(x)
    with torch.no_grad():
        y, plain = prepared.eval()(x), model.eval()(x)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-5, atol=1e-5)
    assert (y - plain).abs().max() > 0.01
    converted = copies(assert_converts(prepared, x, tolerance=1e-2))
    assert type(converted.linear1) is Int4Linear
    with torch.no_grad():
        assert (converted(x) - plain).abs().max() > 0.01


@pytest.mark.parametrize("mask", [None, "padding"])
def test_transformer_encoder_leaves_its_nested_tensor_path(mask):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, **FAST)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True), torch.randn(3, 5, 32)
    padding = None if mask is None else torch.arange(5) >= torch.tensor([[5], [3], [4]])
    prepared = prepare(model, QConfig(QSpec(2)))
    assert not prepared.use_nested_tensor
    calibrate(prepared, [{"src": x, "src_key_padding_mask": padding}])
    prepared.apply(torch.ao.quantization.disable_observer)  # or ranges would grow in training mode
    with torch.no_grad():
        y = prepared.eval()(x, src_key_padding_mask=padding)
        difference = y - model.eval()(x, src_key_padding_mask=padding)
        slow = prepared.train()(x, src_key_padding_mask=padding)
    seen = torch.ones(3, 5, dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(y[seen], slow[seen], rtol=1e-5, atol=1e-5)
    assert difference[seen].abs().max() > 0.01
    assert_converts(prepared, x, src_key_padding_mask=padding, tolerance=1e-2)
    clones = nn.TransformerEncoder(prepared.layers[0], 2, enable_nested_tensor=True).eval()
    with torch.no_grad():
        assert torch.isfinite(clones(x, src_key_padding_mask=padding)).all()


def test_transformer_decoder_and_whole_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 1, 1, 64, **FAST)
    x, y = torch.randn(2, 5, 32), torch.randn(2, 4, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every = prepare(model, QConfig(QSpec(4)))
    assert sum(isinstance(module, QATLinear) for module in every.modules()) == 4 + 3
    assert sum(isinstance(module, QATMultiheadAttention) for module in every.modules()) == 3
    calibrate(every, [{"src": x, "tgt": y}])
    converted = assert_converts(every, x, y, tolerance=2e-2)
    assert sum(isinstance(module, Int4Linear) for module in converted.modules()) == 4 + 3 * 4
    with pytest.warns(
        UserWarning, match=r"encoder\.layers\.0\.self_attn\.out_proj, .* \(MultiheadAttention\.forward reads"
    ):
        prepared = prepare(model, QConfig(QSpec(4), rules=[(nn.MultiheadAttention, None)]))
    calibrate(prepared, [{"src": x, "tgt": y}])
    assert sum(isinstance(module, QATLinear) for module in prepared.modules()) == 4
    converted = assert_converts(prepared, x, y, tolerance=2e-2)
    for made in (report(prepared), report(converted)):
        assert "stays float: MultiheadAttention.forward reads" in made.notes["decoder.layers.0.multihead_attn.out_proj"]
        assert "no rule or default of the config selects it" in made.notes["decoder.layers.0.self_attn"]


class Reader(nn.Module):
    """Layers called, read, and both, in the ways in which models do."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)
        self.named, self.shared = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.loop = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.stack = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.deep = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(8, 8))})
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.both = nn.Linear(8, 8)
        self.dtype_only = nn.Linear(8, 8)

    def forward(self, x):
        x = self.called(x)
        x = F.linear(x, self.read.weight, self.read.bias)
        layer = self.named
        x = x @ layer.weight.t()
        x = self.helper(x)
        x = F.linear(x, weight=self.layers[0].weight)
        x = self.layers[1](x)
        for i, layer in enumerate(self.loop):
            x = torch.addmm(layer.bias, x, layer.weight.T) + i
        x = self.stack(x)
        x = F.linear(x, self.deep["inner"][0].weight)
        x = F.conv2d(x[None, None], self.conv.weight, self.conv.bias, padding=1)[0, 0]
        x = self.both(x) + 1e-3 * self.both.weight.square().sum()
        assert self.dtype_only.weight.dtype is not None
        return self.dtype_only(x.to(self.dtype_only.weight.device)) * len(self.dtype_only.weight.shape)

    def helper(self, x):
        return F.linear(x, self.shared.weight)


INSTEAD = ["read", "named", "shared", "layers.0", "loop.0", "loop.1", "deep.inner.0", "conv"]


def test_layers_whose_weight_a_parent_reads_stay_in_float_and_are_named():
    torch.manual_seed(0)
    model, x = Reader(), torch.randn(5, 8)
    with pytest.warns(UserWarning, match="^prepare: 8 layers that config selects stay in float: read, ") as caught:
        prepared = prepare(model)
    (text,) = [str(w.message) for w in caught]
    assert "deep.inner.0, conv (Reader.forward reads its weight instead of calling it)" in text
    assert "shared (Reader.helper reads" in text
    assert "1 layer quantized only where called: both (Reader.forward also reads its weight" in text
    quantized = {name for name, module in prepared.named_modules() if isinstance(module, QATLinear | QATConv2d)}
    assert quantized == {"called", "layers.1", "stack.0", "both", "dtype_only"}
    calibrate(prepared, [x])
    converted = assert_converts(prepared, x, tolerance=1e-2)
    for made in (report(prepared, x, float_model=model), report(converted, x, float_model=model)):
        assert [name for name, note in made.notes.items() if "reads its weight instead" in note] == INSTEAD
        assert "also reads its weight" in made.notes["both"]
        assert "dtype_only" not in made.notes
    silent = prepare(model, QConfig(rules=[(name, None) for name in (*INSTEAD, "both")]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(model, QConfig(rules=[(name, None) for name in (*INSTEAD, "both")]))
    assert type(silent.read) is nn.Linear


def test_a_model_that_only_reads_is_refused_by_name():
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(x, self.fc.weight)

    with pytest.raises(ValueError, match=r"holds no layer that config selects.*fc \(Only.forward reads its weight"):
        prepare(Only())


def test_forwards_without_a_source_are_passed_over():
    namespace = {"nn": nn, "F": F}
    exec(
        "class Typed(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        return F.linear(x, self.fc.weight)\n",
        namespace,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(prepare(namespace["Typed"]()).fc, QATLinear)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: QSpec("4"), TypeError, "bits: got '4', a str; accepted: 2 to 8"),
        (lambda: QSpec(True), TypeError, "bits: got True, a bool"),
        (lambda: QSpec(4.0), TypeError, "bits: got 4.0, a float"),
        (lambda: QSpec(9), ValueError, "bits: got 9"),
        (lambda: QSpec(symmetric="yes"), TypeError, "symmetric: got 'yes'"),
        (lambda: QSpec(symmetric=1), TypeError, "symmetric: got 1, a int"),
        (lambda: QSpec(quantizer=None), TypeError, "quantizer: got None"),
        (lambda: QSpec(quantizer="min_max"), ValueError, "quantizer: got 'min_max'.*did you mean 'minmax'"),
        (lambda: QSpec(straight_through="clap"), ValueError, "straight_through: got 'clap'"),
        (lambda: QSpec(straight_through=3), TypeError, "straight_through: got 3"),
        (lambda: QSpec(quantizer="ema", straight_through="ewgs"), ValueError, "straight_through: got 'ewgs' with"),
        (lambda: QSpec(granularity=PerChannel), TypeError, r"PerChannel.*an instance, not the class"),
        (
            lambda: QSpec(granularity="per_channel"),
            TypeError,
            r"granularity: got 'per_channel'; accepted: PerTensor\(\)",
        ),
        (lambda: PerGroup("32"), TypeError, "size: got '32'"),
        (lambda: PerGroup(32.0), TypeError, "size: got 32.0"),
        (lambda: PerChannel(None), TypeError, "axis: got None"),
        (lambda: QConfig(weight=4), TypeError, r"weight: got 4; accepted: a QSpec such as QSpec\(bits=4\), None"),
        (lambda: QConfig(4), TypeError, r"QSpec\(bits=4\)"),
        (lambda: QConfig(input=True), TypeError, "input: got True; accepted: a QSpec"),
        (lambda: QConfig(weight={"bits": 4}), TypeError, "weight: got {'bits': 4}; accepted: a QSpec"),
        (lambda: QConfig(weight=QSpec), TypeError, "weight: got <class"),
        (lambda: QConfig(rules={"fc": None}), TypeError, "rules: got {'fc': None}; accepted: a list"),
        (lambda: QConfig(rules="fc"), TypeError, "rules: got 'fc'"),
        (lambda: QConfig(rules=("fc", None)), TypeError, r"rules\[0\]: got 'fc'; accepted: a pair"),
        (lambda: QConfig(rules=[("fc",)]), TypeError, r"rules\[0\]: got \('fc',\)"),
        (lambda: QConfig(rules=[(3, None)]), TypeError, r"rules\[0\]: got 3 as its pattern"),
        (lambda: QConfig(rules=[(int, None)]), TypeError, r"rules\[0\]: got <class 'int'> as its pattern"),
        (lambda: QConfig(rules=[("fc", 4)]), TypeError, r"rules\[0\]: got 4 as its overrides"),
        (lambda: QConfig(rules=[("fc", {"weights": None})]), ValueError, "'weights'.*did you mean 'weight'"),
        (lambda: QConfig(rules=[("fc", {"weight": 4})]), TypeError, r"rules\[0\], weight: got 4.*QSpec\(bits=4\)"),
        (lambda: QConfig(rules=[("fc", {"weight": {"bit": 4}})]), ValueError, "'bit'.*did you mean 'bits'"),
        (lambda: QConfig(rules=[("fc", {"input": {"bits": "4"}})]), TypeError, r"rules\[0\], bits: got '4'"),
        (lambda: prepare(nn.Linear(2, 2), QSpec(4)), TypeError, r"config: got QSpec.*accepted: QConfig\(weight="),
        (lambda: prepare(nn.Linear(2, 2), 4), TypeError, "config: got 4"),
        (lambda: prepare("model"), TypeError, "model: got a str"),
    ],
)
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "weight", "reason"),
    [
        (nn.Conv2d(2, 4, 4), QSpec(4, PerGroup(2)), r"PerGroup\(size=2\); the int8 kernels take"),
        (nn.Conv2d(2, 4, 4), QSpec(4, symmetric=False), "zero point"),
        (nn.Linear(131072, 1), QSpec(8), "K = 131072; accepted: K <= 131071"),
        (nn.Linear(131072, 1), QSpec(4), "K = 131072"),
    ],
)
def test_report_says_before_training_what_no_kernel_takes(layer, weight, reason):
    prepared = prepare(nn.Sequential(layer), QConfig(weight))
    assert re.search(
        f"converts to float weights that hold the quantized values: .*{reason}", report(prepared).notes["0"]
    )


@pytest.mark.parametrize("weight_bits", [8, 5, 4, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [None, PerTensor(), PerGroup(16), PerGroup(8), PerGroup(32)])
@pytest.mark.parametrize("input", [None, QSpec(8), QSpec(8, PerToken(), quantizer="dynamic")])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(32, 4), lambda: nn.Conv2d(2, 3, 16)])
def test_what_prepare_takes_converts(layer, input, granularity, symmetric, weight_bits):
    torch.manual_seed(0)
    model = layer()
    x = torch.randn(3, 32) if isinstance(model, nn.Linear) else torch.randn(2, 2, 17, 17)
    try:
        prepared = prepare(model, QConfig(QSpec(weight_bits, granularity, symmetric), input))
    except ValueError:
        return
    calibrate(prepared, [x])
    assert_converts(prepared, x)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


NORMS = {
    "weight_norm, old": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm, old": lambda layer: nn.utils.spectral_norm(layer),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Double()) or layer,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "weight", 0.2), "weight", 0.2),
    "bias pruned": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
}


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), SameConv(4, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NORMS)
def test_parametrized_weights_prepare_train_and_convert(name, bits, when):
    torch.manual_seed(0)
    model, x = small_net(), torch.randn(6, 3, 8, 8)

    def parametrize_layers(net):
        for i in (0, 2, 4):
            NORMS[name](net[i])
        net(x)

    if when == "before":
        parametrize_layers(model)
    expected = copy_state(model)
    prepared = prepare(model, QConfig(QSpec(bits)))
    if when == "after":
        calibrate(prepared, [x])
        parametrize_layers(prepared)
    calibrate(prepared, [x])
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(prepared.train()(x), torch.arange(6) % 5)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    before = copy_state(prepared)
    converted = assert_converts(prepared, x, tolerance=1e-2)
    assert all(map(torch.equal, before.values(), prepared.state_dict().values()))
    prepared.train()(x).sum().backward()  # still parametrized
    model(x)
    assert all(map(torch.equal, expected.values(), model.state_dict().values())) or "spectral" in name
    assert not any("orig" in key or "mask" in key for key in converted.state_dict())
    assert not any(layer._forward_pre_hooks for layer in converted.modules())
    plain = convert(prepare_and_calibrate(small_net(), x, QConfig(QSpec(bits))))
    assert set(converted.state_dict()) == set(plain.state_dict())
    if name == "pruned":
        assert (converted[4].dequantize() == 0).float().mean() >= 0.5
    # float weights are baked as well
    weight_only = prepare(model, QConfig(QSpec(8), None))
    assert_converts(weight_only, x)


def copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema", "dynamic"])
@pytest.mark.parametrize("bits", [8, 4])
def test_prepare_on_the_meta_device(bits, quantizer):
    torch.manual_seed(0)
    input = QSpec(8, symmetric=False, quantizer=quantizer)
    config = QConfig(QSpec(bits, quantizer=quantizer), input, rules=[("2", {"weight": {"bits": 6}})])
    real = small_net()
    x = torch.randn(6, 3, 8, 8)
    prepared = prepare_and_calibrate(real, x, config)
    with torch.device("meta"):
        empty = prepare(small_net(), config)
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    for meta in (empty, prepare(small_net().to("meta"), config)):
        loaded = meta.to_empty(device="cpu")
        loaded.load_state_dict(prepared.state_dict(), strict=True)
        assert torch.equal(loaded.eval()(x), prepared.eval()(x))
        assert_converts(loaded, x, tolerance=1e-2)
    assigned = prepare(small_net().to("meta"), config)
    assigned.load_state_dict(prepared.state_dict(), strict=True, assign=True)
    assert torch.equal(assigned.eval()(x), prepared(x))
    if quantizer == "ema":
        return  # its switches are buffers, which to_empty leaves without values
    # A float checkpoint, then calibration.
    with torch.device("meta"):
        fresh = prepare(small_net(), config)
    fresh.to_empty(device="cpu").load_state_dict(real.state_dict(), strict=False)
    calibrate(fresh, [x])
    assert torch.equal(fresh.eval()(x), prepared(x))

"""report: every layer with weights has a row, sizes are those of files, models route and return as they like."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from qkernels.nn import Int4Embedding, PerToken
from qkernels.qat import QConfig, QSpec, calibrate, convert, exact, prepare, report

pytestmark = pytest.mark.filterwarnings("ignore:prepare. ", "ignore:.*weight_norm")


def stored(model: nn.Module) -> int:
    """Bytes of the tensors of a state_dict, once per storage."""
    state = model.state_dict()  # keeps tensors alive that are made for it
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in state.values()}
    return sum(storage.nbytes() for storage in storages.values())


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 13, 3, groups=1), nn.BatchNorm2d(13)
        self.fc = nn.Linear(13, 5)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return self.fc(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


class Tied(nn.Module):
    """A small language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(40, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)).relu())


class TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.again = self.first

    def forward(self, x):
        return self.again(self.second(self.first(x)))


class Zoo(nn.Module):
    """One of every kind of layer with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.bag = nn.Embedding(10, 16), nn.EmbeddingBag(10, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lstm, self.gru, self.rnn = (kind(16, 16, batch_first=True) for kind in (nn.LSTM, nn.GRU, nn.RNN))
        self.conv1, self.conv3 = nn.Conv1d(16, 16, 3, padding=1), nn.Conv3d(1, 1, 3, padding=1)
        self.up1, self.up2 = nn.ConvTranspose1d(16, 16, 3, padding=1), nn.ConvTranspose2d(1, 1, 3, padding=1)
        self.bilinear = nn.Bilinear(16, 16, 16)
        self.norm = nn.LayerNorm(16)
        self.position = nn.Parameter(torch.randn(5, 16))
        self.normed = nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(16, 16, 1))
        self.fc, self.left = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, ids):
        x = self.embedding(ids) + self.bag(ids).unsqueeze(1) + self.position
        x, _ = self.attention(x, x, x)
        for recurrent in (self.lstm, self.gru, self.rnn):
            x, _ = recurrent(x)
        x = self.normed(self.up1(self.conv1(x.transpose(1, 2)))).transpose(1, 2)
        x = self.up2(self.conv3(x[:, None, None])[:, :, 0])[:, 0]
        x = self.norm(self.bilinear(x.contiguous(), x.contiguous()))
        return self.left(self.fc(x))


IDS = torch.arange(10).reshape(2, 5) % 10
MODELS = {
    "conv": (ConvNet, lambda: torch.randn(4, 3, 8, 8)),
    "tied": (Tied, lambda: torch.arange(12).reshape(2, 6)),
    "tied linears": (TiedLinears, lambda: torch.randn(3, 16)),
    "zoo": (Zoo, lambda: IDS),
    "odd": (lambda: nn.Sequential(nn.Linear(48, 7), nn.Linear(7, 3, bias=False)), lambda: torch.randn(2, 48)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(32, 4, 48, batch_first=True),
        lambda: torch.randn(2, 5, 32),
    ),
    "pruned": (
        lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(32, 16), "weight", 0.5), nn.Linear(16, 4)),
        lambda: torch.randn(2, 32),
    ),
    "bf16": (lambda: ConvNet().bfloat16(), lambda: torch.randn(4, 3, 8, 8).bfloat16()),
}
STATIC, TOKEN = QSpec(8, symmetric=False), QSpec(8, PerToken(), quantizer="dynamic")
CONFIGS = {
    **{f"{bits} bits": QConfig(QSpec(bits), STATIC) for bits in (8, 7, 5, 4, 3, 2)},
    "weight-only 8": QConfig(QSpec(8), None),
    "weight-only 4": QConfig(QSpec(4, symmetric=False), None),
    "mixed": QConfig(QSpec(4), STATIC, rules=[(nn.Conv2d, {"weight": {"bits": 3}}), ("0", {"input": None})]),
    "input only": QConfig(None, STATIC),
}


@pytest.mark.filterwarnings("ignore:rules")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_file(name, config, tmp_path):
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model, x = make(), batch()
    model(x)
    names = dict(model.named_modules())
    config = CONFIGS[config]
    config = dataclasses.replace(
        config, rules=[rule for rule in config.rules if rule[0] in names or rule[0] is nn.Conv2d]
    )
    prepared = prepare(model, config)
    before = report(prepared)  # not calibrated yet
    calibrate(prepared, [x])
    made, converted = report(prepared, float_model=model), convert(prepared)
    after = report(converted, float_model=model)
    size = made.quantized_bytes
    assert size == after.quantized_bytes == before.quantized_bytes == report(prepared).quantized_bytes
    assert size == stored(converted)
    path = tmp_path / "model.pt"
    torch.save(converted.state_dict(), path)
    entries = 1000 + 600 * len(converted.state_dict())  # zip and pickle have some for each tensor
    assert size <= path.stat().st_size <= size + entries
    assert made.float_bytes == after.float_bytes == stored(model)
    assert report(prepared).float_bytes == stored(model)
    for rows, total in ((made.layers, size), (after.layers, size)):
        assert [row.name for row in rows] == [row.name for row in before.layers]
        assert sum(row.quantized_bytes for row in rows) <= total
    assert [row.quantized_bytes for row in made.layers] == [row.quantized_bytes for row in after.layers]
    assert [row.float_bytes for row in made.layers] == [row.float_bytes for row in after.layers]


def test_sizes_are_those_of_a_safetensors_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    prepared = prepare(ConvNet(), QConfig(QSpec(4)))
    calibrate(prepared, [torch.randn(4, 3, 8, 8)])
    converted = convert(prepared)
    safetensors.save_file(converted.state_dict(), tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert report(prepared).quantized_bytes == size - 8 - header


def test_tied_weights_count_once():
    torch.manual_seed(0)
    model = Tied()
    prepared = prepare(model, QConfig(QSpec(8), rules=[("head", None), ("embedding", None)]))
    calibrate(prepared, [torch.arange(12).reshape(2, 6)])
    made = report(prepared)
    rows = {row.name: row for row in made.layers}
    assert made.float_bytes == 4 * (40 * 32 + 32 * 32 + 32)
    assert rows["embedding"].float_bytes == rows["embedding"].quantized_bytes == 4 * 40 * 32
    assert (rows["head"].float_bytes, rows["head"].quantized_bytes) == (0, 0)


def test_every_layer_with_weights_has_a_row_and_every_float_one_a_reason():
    torch.manual_seed(0)
    model = Zoo()
    left = ("embedding", "bag", "attention", "lstm", "gru", "rnn", "up1", "up2", "bilinear", "normed", "left")
    zero_points = {"weight": {"symmetric": False}}  # which the int8 kernels do not take
    prepared = prepare(model, QConfig(rules=[*((name, None) for name in left), ("conv3", zero_points)]))
    calibrate(prepared, [IDS])
    for made in (report(prepared, IDS), report(convert(prepared), IDS, float_model=model)):
        rows = {row.name: row for row in made.layers}
        burnt_in = {name for name, note in made.notes.items() if "hold" in note and "quantized values" in note}
        assert burnt_in == {"conv3"}
        kinds = {name: row.kind for name, row in rows.items() if row.weight_bits is None and name not in burnt_in}
        assert kinds == {
            "": "Zoo",
            "embedding": "Embedding",
            "bag": "EmbeddingBag",
            "attention": "MultiheadAttention",
            "attention.out_proj": "NonDynamicallyQuantizableLinear",
            "lstm": "LSTM",
            "gru": "GRU",
            "rnn": "RNN",
            "up1": "ConvTranspose1d",
            "up2": "ConvTranspose2d",
            "bilinear": "Bilinear",
            "normed": "ParametrizedConvTranspose1d",
            "left": "Linear",
        }
        assert set(made.notes) == set(kinds) | burnt_in
        assert all(made.notes[name].startswith("weight stays float: ") for name in kinds)
        assert "MultiheadAttention.forward reads its weight" in made.notes["attention.out_proj"]
        assert "no rule or default of the config selects it" in made.notes["lstm"]
        assert "no rule or default of the config selects it" in made.notes["left"]
        assert rows["fc"].weight_bits == 8
        assert rows["attention"].quantized_bytes == 4 * (3 * 16 * 16 + 3 * 16)
        assert rows["lstm"].float_bytes == 4 * 4 * (2 * 16 * 16 + 2 * 16)
        assert rows["normed"].float_bytes == 4 * (16 * 16 + 16 + 16)
        assert rows["lstm"].output_sqnr == float("inf")
        assert rows["fc"].output_sqnr > 20
        text = str(made)
        assert "note: lstm: weight stays float" in text
        assert json.dumps(made.to_dict())


class Routed(nn.Module):
    """Two experts, each on the rows that a router's sign gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 1), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        left = self.router(x)[:, 0] > 0
        y = torch.zeros_like(x)
        for mask, expert in ((left, self.experts[0]), (~left, self.experts[1])):
            if mask.any():
                y = y.masked_scatter(mask[:, None], expert(x[mask]))
        return self.last(y)


def test_routing_that_differs_between_the_models_shows_no_figure():
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(20, 8)
    prepared = prepare(model)
    calibrate(prepared, [x, -x])
    converted = convert(prepared)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.router.bias += 0.3  # some rows go the other way
        rows = {row.name: row for row in report(converted, x, float_model=other).layers}
        assert rows["experts.0"].output_sqnr is None
        assert rows["last"].output_sqnr is not None
        assert "–" in str(report(converted, x, float_model=other))
        other.router.bias += 1e3  # all rows do
        made = report(prepared, x, float_model=other)
    rows = {row.name: row for row in made.layers}
    assert rows["experts.1"].output_sqnr is None
    narrow = Routed()
    narrow.last = nn.Linear(8, 4)
    rows = {row.name: row for row in report(converted, x, float_model=narrow).layers}
    assert rows["last"].weight_sqnr is None
    assert rows["last"].output_sqnr is None


class Returning(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc, self.twice = how, nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x, scale=None, *, mask=None):
        y = self.twice(self.twice(self.fc(input=x))[:1])
        y, _ = self.lstm(y if mask is None else y * mask)
        y = y if scale is None else y * scale
        return {
            "tensor": y,
            "tuple": (None, "text", y),
            "dict": {"loss": None, "deep": [3, {"logits": y}]},
            "nothing": None,
            "text": "done",
        }[self.how]


@pytest.mark.parametrize("how", ["tensor", "tuple", "dict", "nothing", "text"])
@pytest.mark.parametrize(
    "batch",
    [
        torch.randn(3, 8),
        (torch.randn(3, 8), torch.tensor(2.0)),
        {"x": torch.randn(3, 8), "mask": torch.ones(8)},
    ],
)
def test_models_return_and_take_what_they_like(how, batch):
    torch.manual_seed(0)
    model = Returning(how)
    prepared = prepare(model, QConfig(QSpec(8), QSpec(quantizer="dynamic")))
    calibrate(prepared, [batch])
    compared = report(prepared, batch, float_model=model)
    for made in (compared, report(prepared, batch), report(convert(prepared), batch, float_model=model)):
        rows = {row.name: row for row in made.layers}
        assert rows["fc"].output_sqnr > 30
        assert rows["twice"].output_sqnr > 20
        assert rows["lstm"].output_sqnr > 20
        assert rows["unused"].output_sqnr is None
        assert made.notes["unused"].startswith("nothing called it on the example")
        assert set(made.notes) == {"unused"}


def test_a_whole_model_that_is_one_layer():
    torch.manual_seed(0)
    prepared = prepare(nn.Linear(8, 4))
    calibrate(prepared, [torch.randn(3, 8)])
    made = report(prepared, torch.randn(3, 8))
    assert [(row.name, row.float_bytes) for row in made.layers] == [("", 4 * (8 * 4 + 4))]
    assert made.layers[0].quantized_bytes == made.quantized_bytes == stored(convert(prepared))
    assert "(model)" in str(made)


def test_a_layer_that_no_longer_converts_is_reported():
    torch.manual_seed(0)
    prepared = prepare(nn.Sequential(nn.Linear(64, 4)))
    calibrate(prepared, [torch.randn(3, 64)])
    with torch.no_grad():
        prepared[0].weight[0, 0] = torch.nan
    made = report(prepared)
    assert "as this one does not convert: model: the weight of '0' holds NaN" in made.notes[""]
    assert made.quantized_bytes == made.float_bytes == 4 * (64 * 4 + 4)


def test_an_int4_embedding_by_hand_beside_prepared_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 32), nn.Linear(32, 3))
    prepared = prepare(model)
    prepared[0] = Int4Embedding.from_float(model[0], 16)
    calibrate(prepared, [torch.arange(5)])
    made = report(prepared, torch.arange(5), float_model=model)
    assert made.quantized_bytes == stored(convert(prepared))
    assert [row.kind for row in made.layers] == ["Int4Embedding", "QATLinear"]
    assert made.notes == {}


def test_report_on_the_meta_device():
    with torch.device("meta"):
        prepared = prepare(ConvNet(), QConfig(QSpec(4)))
    made = report(prepared)
    assert made.float_bytes == stored_on_meta(ConvNet())
    assert [row.weight_sqnr for row in made.layers] == [None] * 3


def stored_on_meta(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("config", ["8 bits", "4 bits", "weight-only 8"])
def test_a_sharded_model_is_reported_and_converts(config, tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.manual_seed(0)
    model, x = ConvNet(), torch.randn(4, 3, 8, 8)
    prepared = prepare(model, CONFIGS[config])
    calibrate(prepared, [x])
    expected, converted = report(prepared, x, float_model=model), convert(prepared)
    sharded, sharded_float = copy.deepcopy(prepared), copy.deepcopy(model)
    seen: list[int] = []
    sharded.fc.register_forward_hook(lambda m, args, y: seen.append(len(y)))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for net in (sharded, sharded_float):
            for layer in (net.conv1, net.fc):
                fully_shard(layer)
            fully_shard(net)
        for stage in ("new", "after a forward pass"):
            assert report(sharded, x, float_model=sharded_float) == expected, stage
            assert report(sharded).quantized_bytes == expected.quantized_bytes
            made = convert(sharded)
            assert not any(isinstance(module, FSDPModule) for module in made.modules())
            assert [type(module) for module in made.modules()] == [type(module) for module in converted.modules()]
            seen.clear()
            with torch.no_grad():
                assert torch.equal(made(x), converted(x))
                assert seen == [4]  # hooks of a user's stay
                assert torch.equal(exact(sharded)(x), converted(x))
            sharded.eval()(x).sum().backward()
        assert isinstance(sharded, FSDPModule)
        fully_shard(converted)
        assert report(converted, x, float_model=model).quantized_bytes == expected.quantized_bytes
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("config", ["8 bits", "4 bits", "weight-only 8", "weight-only 4"])
@pytest.mark.parametrize("make", [Tied, TiedLinears])
def test_tied_weights_count_once_without_the_float_model(make, config):
    torch.manual_seed(0)
    model, x = make(), torch.arange(12).reshape(2, 6) if make is Tied else torch.randn(3, 16)
    prepared = prepare(model, CONFIGS[config])
    calibrate(prepared, [x])
    converted = convert(prepared)
    for made in (converted, copy.deepcopy(converted)):
        alone, beside = report(made), report(made, float_model=model)
        assert alone.float_bytes == beside.float_bytes == stored(model)
        assert [row.float_bytes for row in alone.layers] == [row.float_bytes for row in beside.layers]
        assert alone.quantized_bytes == beside.quantized_bytes == stored(made)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_sentences_in_an_encoder_of_torch():
    """The float model's fused path would give its layers nested tensors, which compare with nothing."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True), 2).eval()
    padding = torch.arange(4) >= torch.tensor([[4], [2]])
    batch = {"src": torch.randn(2, 4, 16), "src_key_padding_mask": padding}
    prepared = prepare(model)
    calibrate(prepared, [batch])
    for made in (prepared, convert(prepared)):
        rows = report(made, batch, float_model=model).layers
        assert all(row.output_sqnr > 25 for row in rows if not row.name.endswith("out_proj"))
    assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == (True, 1)

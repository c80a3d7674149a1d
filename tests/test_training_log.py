"""TrainingLog: figures are what a hand counts, files are gone on with, the model stays, TensorBoard gets the same."""

from __future__ import annotations

import copy

import pytest
import torch
from qat_models import ConvNet, assert_unchanged, images, snapshot
from torch import nn

import qkernels as qk
from qkernels.qat.training_log import COLUMNS, read_log

pytestmark = pytest.mark.filterwarnings("ignore:prepare. ")


def net(bits: int = 3, **spec) -> nn.Module:
    torch.manual_seed(0)
    prepared = qk.prepare(ConvNet(), qk.QConfig(qk.QSpec(bits, **spec), qk.QSpec(8)))
    qk.calibrate(prepared, [images()])
    return prepared


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)


def by_name(path, step: int | None = None) -> dict[str, dict[str, float | None]]:
    return {row["name"]: row for row in read_log(path) if step in (None, row["step"])}


def test_figures_are_those_of_a_hand(tmp_path) -> None:
    model, path, x = net(), tmp_path / "log.csv", 3 * images()
    log = qk.TrainingLog(model, path, every=2)
    quantizer, weight = model.conv2.weight_fake_quant, model.conv2.weight
    before = quantizer.quantize(weight)[0]
    model.train()
    move(model)
    state, rng = snapshot(model), torch.get_rng_state()
    log.step(x, loss=torch.tensor(1.5, requires_grad=True), other=2)
    assert_unchanged(model, state)
    assert torch.equal(torch.get_rng_state(), rng)
    codes, scale, _ = quantizer.quantize(weight)
    rows = by_name(path)
    assert list(rows) == [name for name, q in model.named_modules() if isinstance(q, qk.nn.FakeQuantize)] + [
        "loss",
        "other",
    ]
    row = rows["conv2.weight_fake_quant"]
    assert row["step"] == 0
    assert row["bits"] == 3
    assert row["scale"] == pytest.approx(scale.mean().item(), rel=1e-5)
    assert row["scale_min"] == pytest.approx(scale.min().item(), rel=1e-5)
    assert row["scale_max"] == pytest.approx(scale.max().item(), rel=1e-5)
    assert row["flipped"] == pytest.approx((codes != before).float().mean().item(), rel=1e-5)
    assert 0 < row["flipped"] < 1
    clipped = ((weight / scale).round().abs() > 3).float().mean().item()
    assert row["clipped"] == pytest.approx(clipped, rel=1e-5)
    assert clipped > 0
    scale, zero = model.conv1.input_fake_quant.qparams()
    q = (x / scale).round() + (0 if zero is None else zero)
    low, high = model.conv1.input_fake_quant.quant_min, model.conv1.input_fake_quant.quant_max
    clipped = ((q < low) | (q > high)).float().mean().item()
    assert rows["conv1.input_fake_quant"]["clipped"] == pytest.approx(clipped, rel=1e-4)
    assert clipped > 0.1
    assert (rows["loss"]["value"], rows["other"]["value"], rows["loss"]["bits"]) == (1.5, 2, None)
    log.step(loss=7)  # the second of two
    move(model)
    log.step()
    rows = by_name(path, 2)
    assert "loss" not in rows
    assert rows["conv1.input_fake_quant"]["clipped"] is None
    share = (quantizer.quantize(weight)[0] != codes).float().mean().item()
    assert rows["conv2.weight_fake_quant"]["flipped"] == pytest.approx(share, rel=1e-5)


def test_a_width_that_changes(tmp_path) -> None:
    model, path = net(4), tmp_path / "log.csv"
    log = qk.TrainingLog(model, path)
    qk.set_bits(model, 2, "conv1.weight_fake_quant")
    log.step()
    rows = by_name(path)
    assert (rows["conv1.weight_fake_quant"]["bits"], rows["conv1.weight_fake_quant"]["flipped"]) == (2, None)
    assert (rows["fc.weight_fake_quant"]["bits"], rows["fc.weight_fake_quant"]["flipped"]) == (4, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("quantizer", ["nf4", "kmeans", "dynamic", "ema", "minmax"])
def test_every_quantizer(quantizer: str, dtype: torch.dtype, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.LSTM(6, 5)).to(dtype)
    prepared, x = qk.prepare(model, qk.QConfig(qk.QSpec(4, quantizer=quantizer))), torch.randn(7, 16).to(dtype)
    log = qk.TrainingLog(prepared, tmp_path / "log.csv")  # no quantizer has a scale yet
    prepared.train()(x)
    log.step(x)
    move(prepared)
    log.step(x)
    rows = by_name(tmp_path / "log.csv", 1)
    assert 0 < rows["0.weight_fake_quant"]["flipped"] < 1
    assert (rows["0.weight_fake_quant"]["clipped"] is None) == (quantizer in ("nf4", "kmeans"))
    assert 0 <= rows["2.input_fake_quant"]["clipped"] < 1


def test_a_run_goes_on(tmp_path) -> None:
    """A log that is made anew over the same weights writes what the first would have written."""
    one, path, both = net(), tmp_path / "one.csv", tmp_path / "both.csv"
    two = copy.deepcopy(one)
    first, second = qk.TrainingLog(one, path), qk.TrainingLog(two, both)
    for part in range(2):
        for _ in range(2):
            torch.manual_seed(second.steps)
            move(one)
            torch.manual_seed(second.steps)
            move(two)
            first.step(loss=1)
            second.step(loss=1)
        if not part:
            second = qk.TrainingLog(two, both)
            assert second.steps == 2
    assert path.read_text() == both.read_text()
    assert path.read_text().count("step") == 1
    state = first.state_dict()
    again = qk.TrainingLog(one, path)
    again.load_state_dict({"steps": 3})
    again.step(loss=5)
    assert state == {"steps": 4}
    assert by_name(path, 3)["loss"]["value"] == 5  # of two rows the later one


class Writer:
    def __init__(self) -> None:
        self.got: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.got[tag, step] = value


def test_tensorboard_gets_the_same(tmp_path) -> None:
    model, writer, path = net(), Writer(), tmp_path / "log.csv"
    board, file = qk.TrainingLog(model, writer), qk.TrainingLog(model, path)
    move(model)
    x = images()
    for log in (board, file):
        log.step(x, loss=0.5)
    expected = {
        (f"{'loss' if key == 'value' else key}/{row['name']}", 0): row[key]
        for row in read_log(path)
        for key in COLUMNS[2:]
        if row[key] is not None
    }
    assert writer.got == {tag: pytest.approx(value, rel=1e-5) for tag, value in expected.items()}
    assert ("flipped/conv1.weight_fake_quant", 0) in writer.got


def test_bad_arguments(tmp_path) -> None:
    model, path = net(), tmp_path / "log.csv"
    for arguments, error, text in (
        ((ConvNet(), path), ValueError, "model: got one without quantizers"),
        ((3, path), TypeError, "model: got a int"),
        ((model, 3), TypeError, "to: got a int; accepted: a path that ends in .csv, or a SummaryWriter"),
        ((model, tmp_path / "runs"), ValueError, "accepted: a file that ends in .csv, or a SummaryWriter"),
        ((model, tmp_path / "none" / "log.csv"), OSError, "none"),
    ):
        with pytest.raises(error, match=text):
            qk.TrainingLog(*arguments)
    for every in (0, 1.5, True):
        with pytest.raises((ValueError, TypeError), match="every: got"):
            qk.TrainingLog(model, path, every=every)
    (tmp_path / "other.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="got the columns step, loss; accepted: step, name, bits"):
        qk.TrainingLog(model, tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == "step,loss\n1,2\n"
    log = qk.TrainingLog(model, path)
    text = path.read_text()
    with pytest.raises(TypeError, match="loss: got 'high'"):
        log.step(loss="high")
    with pytest.raises(RuntimeError):
        log.step(torch.randn(2, 5))
    with pytest.raises(ValueError, match="state: got"):
        log.load_state_dict({})
    assert (log.steps, path.read_text()) == (0, text)
    for line in ("0,conv1.weight_fake_quant,3", "0,x,3,a,1,1,,,", "x,loss,,,,,,,1", ""):
        path.write_text(text + f"{line}\n1,loss,,,,,,,1\n")
        with pytest.raises(ValueError, match=rf"log.csv, line 2: got '{line}'; accepted: .*, so take the line out"):
            qk.TrainingLog(model, path)


@pytest.mark.parametrize("cut", ["1,conv1.weight_fake_quant,3", "1,lö".encode()[:-1], "1"])
def test_a_last_line_that_is_cut_off_is_dropped_with_a_warning(cut, tmp_path) -> None:
    model, path = net(), tmp_path / "log.csv"
    qk.TrainingLog(model, path).step(loss=1.0)
    whole = path.read_bytes()
    path.write_bytes(whole + (cut if isinstance(cut, bytes) else cut.encode()))
    line = whole.count(b"\n") + 1
    with pytest.warns(UserWarning, match=rf"log.csv, line {line}: got '1.*', which is cut off, .*left out"):
        rows = read_log(path)
    with pytest.warns(UserWarning, match=rf"log.csv, line {line}: got '1"):
        log = qk.TrainingLog(model, path)
    assert log.steps == 1
    assert path.read_bytes() == whole
    log.step(loss=0.5)
    assert read_log(path)[: len(rows)] == rows
    assert read_log(path)[-1]["value"] == 0.5


def test_a_first_line_that_is_cut_off_is_written_again(tmp_path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,name,bi")
    with pytest.warns(UserWarning, match="log.csv, line 1: got 'step,name,bi', which is cut off"):
        log = qk.TrainingLog(net(), path)
    log.step(loss=1.0)
    assert read_log(path)[-1]["step"] == 0

"""Report.html: histograms are what a hand counts, the page is whole in itself, and a browser shows it well."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser, missing
from qat_models import ConvNet, images
from torch import nn

import qkernels as qk
from qkernels.qat.report_table import LayerRow, Report
from qkernels.qat.weight_histograms import BINS, WeightHistogram

pytestmark = pytest.mark.filterwarnings("ignore:prepare. ")
ACCURACIES = {"fp32": {32: 0.93}, "PTQ": {8: 0.92, 4: 0.7, 2: 0.1}, "QAT": {8: 0.93, 4: 0.92, 2: 0.85}}


def prepared_net(config: qk.QConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    prepared = qk.prepare(ConvNet().eval(), config or qk.QConfig(qk.QSpec(3)))
    qk.calibrate(prepared, [images()])
    return prepared


def many_layers(count: int) -> Report:
    """A report of a large model: long names, widths of all kinds, values that are not finite or not known."""
    after = [round(1e4 * 2.0 ** -abs(level / 40)) for level in range(-127, 128)]
    levels = [float(level) for level in range(-127, 128)]
    before = [round(1e4 * 2.0 ** -abs(bin - 48)) for bin in range(BINS)]
    histogram = WeightHistogram(-190.5, 190.5, before, levels, after)
    rows = []
    for i in range(count):
        row = LayerRow(f"backbone.transformer.blocks.{i}.attention.projection", "QATLinear", 8 if i % 7 else 4, 8)
        row.weight_sqnr, row.output_sqnr = 20 + i % 9, float("inf") if i == 3 else 30 - i / 10
        row.weight_clipped, row.input_clipped = 0.001 * (i % 5), 0.01 * (i % 3) if i % 2 else None
        row.float_bytes, row.quantized_bytes = 4 * 10**5 + i, 10**5 + i
        rows.append(row)
    notes = {row.name: "weight stays float: <no rule> & no default" for row in rows[:9]}
    return Report(rows, 10**8, 10**7, notes, 0.5, {row.name: histogram for row in rows})


def test_histograms_are_counts() -> None:
    prepared = prepared_net()
    layer = prepared.conv2
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = 9.0  # far outside of the range
    found = qk.report(prepared).histograms["conv2"]
    codes, scale, _ = layer.weight_fake_quant.quantize(layer.weight)
    assert found.levels == [-3, -2, -1, 0, 1, 2, 3]
    assert found.after == [int((codes == level).sum()) for level in range(-3, 4)]
    position, width = layer.weight / scale, (found.high - found.low) / BINS
    bins = ((position - found.low) / width).floor().clamp(0, BINS - 1).flatten().int().tolist()
    assert [bins.count(i) for i in range(BINS)] == pytest.approx(found.before, abs=1)  # of those on an edge
    assert sum(found.before) == layer.weight.numel()
    assert found.before[-1] >= 1


@pytest.mark.parametrize("bits", [8, 4])
def test_a_converted_layer_has_the_same_histogram(bits: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6))
    prepared, x = qk.prepare(model, qk.QConfig(qk.QSpec(bits))), torch.randn(4, 3, 4, 4)
    qk.calibrate(prepared, [x])
    expected = qk.report(prepared).histograms
    found = qk.report(qk.convert(prepared), float_model=model).histograms
    for name, histogram in expected.items():
        assert found[name].after == histogram.after
        assert found[name].levels == histogram.levels
        assert found[name].before == pytest.approx(histogram.before, abs=1)
    alone = qk.report(qk.convert(prepared)).histograms
    assert [one.before for one in alone.values()] == [[], []]
    assert [one.after for one in alone.values()] == [one.after for one in expected.values()]


@pytest.mark.parametrize("quantizer", ["nf4", "dynamic", "ema", "midrise"])
def test_layers_of_several_weights_and_other_levels(quantizer: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"lstm": nn.LSTM(8, 8), "attention": nn.MultiheadAttention(8, 2), "table": nn.Embedding(9, 8)}
    )
    prepared = qk.prepare(model, qk.QConfig(qk.QSpec(4, symmetric=None, quantizer=quantizer), None))
    found = qk.report(prepared).histograms
    assert sum(found["lstm"].after) == sum(found["lstm"].before) == 2 * 4 * 8 * 8
    assert sum(found["attention"].after) == 3 * 8 * 8
    assert len(found["table"].levels) == len(found["table"].after)


def test_the_page_is_whole_in_itself(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    model = prepared_net()
    report = qk.report(model, images(), accuracy=0.5)
    report.layers[0].name = "<script>alert(1)</script> $x$"
    report.layers[1].output_sqnr = float("inf")
    path = tmp_path / "page.html"
    report.html(path, title="<Net>", accuracies=ACCURACIES, latency={"fp32": 0.01, "int8": 0.004})
    text = path.read_text()
    assert "<script>alert" not in text
    assert "<title>&lt;Net&gt;</title>" in text
    assert re.findall(r"""(?:src|href)=["'](?!data:,|#)[^"']*""", text) == []
    assert not re.search(r"url\((?!#)|@import", text)
    (data,) = re.findall(r'<script type="application/json" id="report">(.*)</script>', text)
    assert json.loads(data)["layers"][1]["output_sqnr"] == "inf"
    assert json.loads(data)["quantized_bytes"] == report.quantized_bytes
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert not re.search(r"#(?:2563a8|c2571a|1f2328)\b[^;]*\"", text)  # every color of a plot follows the scheme
    assert list(tmp_path.iterdir()) == [path]


def test_a_training_and_latency_by_layer(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    model, path = prepared_net(), tmp_path / "log.csv"
    log = qk.TrainingLog(model, path)
    for step in range(3):
        log.step(images(), loss=2.0**-step, penalty=float("nan"))
    qk.report(model).html(tmp_path / "page.html", log=path, latency={"conv1": {8: 1e-3, 3: 2e-3}, "fc": {8: 1e-4}})
    text = (tmp_path / "page.html").read_text()
    for heading in ("Losses", "Bits, mean of", "Clipped, mean of", "Codes that changed", "Latency of layers"):
        assert f"<h3>{heading}" in text
    assert "Accuracy against bits" not in text


def test_bad_arguments(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    report, path = qk.report(prepared_net()), tmp_path / "page.html"
    path.write_text("old")
    (tmp_path / "other.csv").write_text("a,b\n")
    for error, text, arguments in (
        (TypeError, "accuracies: got 3; accepted: a dict of series", {"accuracies": 3}),
        (TypeError, "accuracies: got {} for 'QAT'", {"accuracies": {"QAT": {}}}),
        (TypeError, "accuracies: got 'high' for 'QAT'", {"accuracies": {"QAT": {8: "high"}}}),
        (ValueError, "accuracies: got nan for 'QAT'", {"accuracies": {"QAT": {8: float("nan")}}}),
        (TypeError, "latency: got numbers beside dicts", {"latency": {"a": 1.0, "b": {8: 1.0}}}),
        (ValueError, "got the columns a, b", {"log": tmp_path / "other.csv"}),
        (FileNotFoundError, "log: got .*none.csv.*; accepted: a file that exists", {"log": tmp_path / "none.csv"}),
        (TypeError, "log: got 3; accepted: the path of a CSV file", {"log": 3}),
    ):
        with pytest.raises(error, match=text):
            report.html(path, **arguments)
    for error, given in (
        (FileNotFoundError, tmp_path / "none" / "page.html"),
        (NotADirectoryError, path / "page.html"),
        (IsADirectoryError, tmp_path),
    ):
        with pytest.raises(error, match=f"path: got '{given}' .*; accepted: a file in a folder that exists and can be"):
            report.html(given)
    with pytest.raises(TypeError, match="path: got None; accepted: the path of a file"):
        report.html(None)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other.csv", "page.html"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="html: matplotlib is missing; run: pip install"):
        report.html(path)
    assert path.read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other.csv", "page.html"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if reason := missing():
        pytest.skip(reason)
    pytest.importorskip("matplotlib")
    one = Browser()
    yield one
    one.close()


OVERFLOWS = """
const most = document.documentElement.clientWidth;
const out = [...document.querySelectorAll("main *")].filter(e => !e.closest(".table") && !e.closest("svg")
    && e.getBoundingClientRect().right > most + 0.5).map(e => e.tagName + "." + e.className);
return [document.documentElement.scrollWidth - most, ...out];
"""
PLOTS = """
return [...document.querySelectorAll("svg")].map(e => e.getBoundingClientRect()).map(
    r => ({x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height}));
"""
# The texts of a plot that another text of it covers, or that its edge cuts off.
CLASHES = """
const found = [];
for (const svg of document.querySelectorAll("svg")) {
  const box = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")].filter(t => t.textContent.trim());
  const rects = texts.map(t => t.getBoundingClientRect());
  rects.forEach((a, i) => {
    if (a.left < box.left - 2 || a.right > box.right + 2 || a.bottom > box.bottom + 2) found.push(texts[i].textContent);
    rects.slice(i + 1).forEach((b, j) => {
      const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (w > 2 && h > 4) found.push(texts[i].textContent + " / " + texts[i + j + 1].textContent);
    });
  });
}
return found;
"""


@pytest.fixture(scope="module", params=["small", "large"])
def made(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    if request.param == "large":
        report, options = many_layers(40), {}
    else:
        model, path = prepared_net(), folder / "log.csv"
        log = qk.TrainingLog(model, path)
        for step in range(3):
            log.step(images(), loss=2.0**-step)
        options = {"accuracies": ACCURACIES, "latency": {"fp32": 0.01, "int8": 0.004}, "log": path}
        report = qk.report(model, images(), accuracy=0.5)
    report.html(folder / "page.html", **options)
    return folder / "page.html"


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_in_a_browser(browser: Browser, made, width: int, dark: bool) -> None:
    browser.open(made, width, dark)
    assert browser.run("return innerWidth") == width
    browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.run(OVERFLOWS) == [0]
    assert browser.run(CLASHES) == []
    plots, whole = browser.run(PLOTS), browser.pixels()
    assert len(plots) >= 9
    page, card, ink = browser.run(
        "const color = e => getComputedStyle(document.querySelector(e));"
        "return [color('body').backgroundColor, color('figure').backgroundColor, color('body').color]"
        ".map(c => c.match(/\\d+/g).map(Number))"
    )
    assert (sum(page) < sum(ink)) == dark
    for box in plots:
        assert box["width"] > 250
        top, left, bottom, right = (
            round(value) for value in (box["y"], box["x"], box["y"] + box["height"], box["x"] + box["width"])
        )
        part = whole[top:bottom, left:right]
        contrast = abs(part - torch.tensor(card).numpy() / 255).max(-1)
        assert 0.005 < (contrast > 0.2).mean() < 0.6
    assert browser.complaints() == []
    assert {url for url in browser.requests() if url != "data:,"} == {made.as_uri()}


@pytest.mark.nightly
def test_two_hundred_layers(browser: Browser, tmp_path) -> None:
    many_layers(200).html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 5e6
    browser.open(tmp_path / "page.html", 390)
    assert browser.run("return document.documentElement.scrollHeight") < 12_000
    assert browser.run(OVERFLOWS) == [0]

"""The demo: data files, errors in one line, and a short run from training to files on disk."""

import gzip
import importlib.util
import json
import struct

import pytest
import torch

from qkernels import demo
from qkernels.demo_picture import draw_latency


def idx(values: torch.Tensor) -> bytes:
    return bytes((0, 0, 8, values.dim())) + struct.pack(f">{values.dim()}I", *values.shape) + values.numpy().tobytes()


@pytest.fixture
def folder(tmp_path):
    """A set of two kinds of 8×8 images, bright above or below; test files gzipped."""
    torch.manual_seed(0)
    for split, count in (("train", 96), ("t10k", 40)):
        labels = torch.arange(count) % 2
        images = torch.randint(0, 60, (count, 8, 8))
        images[labels == 0, :4] += 150
        images[labels == 1, 4:] += 150
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(values.to(torch.uint8))
            if split == "t10k":
                (tmp_path / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / f"{split}-{name}-ubyte").write_bytes(content)
    return tmp_path


def test_idx_files(folder):
    data = demo.load_idx(folder)
    assert data.name == folder.name
    images, labels = data.train
    assert (images.shape, images.dtype, labels.dtype) == ((96, 1, 8, 8), torch.float32, torch.int64)
    raw = (folder / "train-images-idx3-ubyte").read_bytes()[16:]
    assert torch.equal((images * 255).round().to(torch.uint8).flatten(), torch.tensor(list(raw), dtype=torch.uint8))
    assert data.test[1].tolist() == [0, 1] * 20


def damage(folder, kind):
    images = folder / "train-images-idx3-ubyte"
    labels = folder / "train-labels-idx1-ubyte"
    zipped = folder / "t10k-images-idx3-ubyte.gz"
    if kind == "truncated":
        images.write_bytes(images.read_bytes()[:-1])
        return images, "truncated"
    if kind == "too long":
        images.write_bytes(images.read_bytes() + b"x")
        return images, "too long"
    if kind == "header only":
        labels.write_bytes(labels.read_bytes()[:6])
        return labels, "truncated"
    if kind == "foreign":
        images.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
        return images, "not an idx file"
    if kind == "empty":
        images.write_bytes(b"")
        return images, "not an idx file"
    if kind == "broken gzip":
        zipped.write_bytes(zipped.read_bytes()[:100])
        return zipped, "cannot be read"
    if kind == "labels of another set":
        labels.write_bytes(idx(torch.zeros(95, dtype=torch.uint8)))
        return labels, "95 labels for 96 images"
    images.unlink()
    return images, "no such file"


@pytest.mark.parametrize(
    "kind",
    ["truncated", "too long", "header only", "foreign", "empty", "broken gzip", "labels of another set", "missing"],
)
def test_damaged_files_are_named_in_one_line(folder, kind, capsys):
    path, reason = damage(folder, kind)
    assert demo.main(["--data", str(folder), "--out", str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert reason in lines[0]
    assert not (folder / "demo.json").exists()


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("tqdm", "sklearn") else find(name))
    monkeypatch.setattr(demo, "FASHION_MNIST", tmp_path / "nothing here")
    assert demo.main([]) == 2
    error = capsys.readouterr().err
    assert "the demo needs tqdm, scikit-learn" in error
    assert "pip install 'qkernels[demo]'" in error


def test_quick_run_on_a_set_found_by_itself(folder, monkeypatch, capsys):
    for package in ("matplotlib", "tqdm"):
        pytest.importorskip(package)
    monkeypatch.setattr(demo, "FASHION_MNIST", folder)
    monkeypatch.setattr(demo, "WIDTHS", (16, 32))
    out = folder / "results"
    assert demo.main(["--quick", "--out", str(out)]) == 0
    results = json.loads((out / "demo.json").read_text())
    assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG"
    rows = {(row["name"], row["bits"]): row for row in results["rows"]}
    assert list(rows) == [("fp32", 32), *(("PTQ", b) for b in (8, 4, 3, 2)), *(("QAT", b) for b in (8, 4, 3, 2))]
    assert rows["fp32", 32]["accuracy"] == 1.0  # bright above or below: anything that learns gets it right
    assert rows["QAT", 4]["accuracy"] == 1.0
    assert rows["QAT", 8]["size"] < rows["fp32", 32]["size"] / 3.5
    assert rows["QAT", 4]["size"] < rows["QAT", 8]["size"]
    for row in rows.values():
        assert set(row["latency"]) == {"1", "64"}
        for median, low, high in row["latency"].values():
            assert low <= median <= high
    assert set(results["layers"]) == {"QAT 8", "QAT 4", "QAT 3", "QAT 2"}
    printed, progress = capsys.readouterr()
    assert len(progress.splitlines()) == 1  # a bar is for terminals: in a file it would be thousands of lines
    assert printed.splitlines()[0].startswith("int8 after QAT: 100.0% of the test images right (fp32: 100.0%), 3.")
    assert "100.00%" in printed
    assert "First and last layer at 8 bits" in printed


def test_a_disturbed_time_does_not_set_the_axis():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    fp32, int8 = {"1": (2.0, 1.9, 2.1), "64": (9.0, 8.8, 9.1)}, {"1": (0.5, 0.4, 70.0), "64": (3.0, 2.9, 3.1)}
    draw_latency(axes, fp32, int8)
    assert axes.get_ylim() == pytest.approx((0, 1.3))
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1, 1, 1 / 4, 1 / 3])
    assert max(line.get_ydata().max() for line in axes.lines) == pytest.approx(1.3)
    assert [text.get_text() for text in axes.texts] == ["2 ms", "9 ms", "0.5 ms\np80 70", "3 ms"]


def test_digits_are_split_without_overlap():
    pytest.importorskip("sklearn")
    data = demo.load_digits(seed=3)
    assert len(data.train[1]) + len(data.test[1]) == 1797
    assert data.train[0].min() == 0
    assert data.train[0].max() == 1
    assert not torch.equal(data.train[1], demo.load_digits(seed=4).train[1])
    assert torch.equal(data.train[0], demo.load_digits(seed=3).train[0])

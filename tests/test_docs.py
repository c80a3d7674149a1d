"""The pages of docs/ say what the package does: their examples run, and the names in them exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

import qkernels as qk

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(example, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_and_links_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"\bqk\.([a-zA-Z_0-9]+)", text):
        assert hasattr(qk, name), f"{page.name} names qk.{name}"
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"

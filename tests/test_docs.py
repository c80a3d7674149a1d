"""The pages say what the package does: examples run, names and links exist; every public name has its docstring."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT

import qkernels as qk

PAGES = [page for folder in (".", "docs", "examples") for page in sorted((ROOT / folder).glob("*.md"))]
PUBLIC = ("qkernels", "qkernels.nn", "qkernels.qat", "qkernels.qat.losses", "qkernels.qat.schedules",
          "qkernels.codebooks", "qkernels.integrations.aten", "qkernels.integrations.compressed_tensors",
          "qkernels.integrations.gguf")  # fmt: skip


def names_of(module: ModuleType) -> list[str]:
    """What ``__all__`` names, or where there is none what the module defines."""
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
    return getattr(module, "__all__", [name for name in own if not name.startswith("_")])


def documented() -> list[tuple[str, Any]]:
    """Public names that are neither modules nor the same thing again, with what they stand for."""
    modules = [importlib.import_module(name) for name in PUBLIC]
    found = {f"{m.__name__}.{name}": getattr(m, name) for m in modules for name in names_of(m)}
    once = {id(thing): (name, thing) for name, thing in reversed(found.items()) if not inspect.ismodule(thing)}
    return sorted(once.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, as a reader would type them; what stands in comments below a print is what it prints."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(example, names)
        printed = capsys.readouterr().out
        for shown in re.findall(r"^print\(.*\)\n((?:# .*\n)+)", example, re.MULTILINE):
            assert re.sub("^# ", "", shown, flags=re.MULTILINE) in printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_and_links_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"\bqk\.([a-zA-Z_0-9]+)", text):
        assert hasattr(qk, name), f"{page.name} names qk.{name}"
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in link:
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name} links to {link}"
    for path in re.findall(r"`((?:bench|csrc|docs|examples|qkernels|tests)/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}"


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_layers_are_what_the_layers_do() -> None:
    """`python docs/layers.py` writes them; it fails where it knows no sample of a class."""
    page, module = (ROOT / "docs" / "layers.md").read_text(), script("layers")
    for kind in qk.nn.QAT_CLASSES:
        assert f"| {module.label(kind)} |" in page
    for table in module.tables():
        assert table in page, "docs/layers.md is not what `python docs/layers.py` writes"


def parameters(thing: Any) -> list[str]:
    names = list(inspect.signature(thing).parameters) if callable(thing) else []  # Granularity is a union of types
    return [name for name in names if name not in ("args", "kwargs")]


@pytest.mark.parametrize(("name", "thing"), documented(), ids=[name for name, _ in documented()])
def test_docstrings(name: str, thing: Any) -> None:
    """Each says what every argument is, and what it raises, or refers to the function that says so."""
    text = " ".join((inspect.getdoc(thing) or "").split())
    assert len(text) > 40, f"{name} has no docstring to speak of"
    refers = re.search(r"\b([Aa]s|those of|see) (in )?(nn\.|``)", text) is not None
    missing = [p for p in parameters(thing) if not re.search(rf"\b{p}\b", text)]
    assert refers or not missing, f"the docstring of {name} says nothing of {', '.join(missing)}"
    if inspect.isfunction(thing) and parameters(thing):
        assert refers or "aises" in text or "Error" in text, f"the docstring of {name} says nothing of errors"


class Links(HTMLParser):
    """What a page of the built documentation links to, and what in it can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.emphasis: list[str] = []
        self.inside = False
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids.add(found.get("id") or "")
        self.links.add((tag == "a" and found.get("href")) or "")
        self.inside = tag in ("strong", "em")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.emphasis.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Links]:
    """Every page of the documentation, built with warnings as errors."""
    pytest.importorskip("pdoc")
    out = tmp_path_factory.mktemp("docs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        script("build").build(out)
    return {page: Links(page) for page in out.rglob("*.html")}


def test_links_of_the_built_pages(built: dict[Path, Links]) -> None:
    for page, links in built.items():
        for link in links.links - {""}:
            if link.startswith("https://"):
                continue
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), f"{page.name} links to {link}"
            # pdoc links to an inherited member by the name that it has here, and shows it at its own class or nowhere.
            known = target not in built or built[target].ids & {anchor, anchor.partition(".")[0]}
            assert not anchor or known, f"{page.name} links to {link}"


def test_every_public_name_is_in_the_reference(built: dict[Path, Links]) -> None:
    folder = next(page.parent for page in built if page.name == "qkernels.html")
    for name, _ in documented():
        module, _, last = name.rpartition(".")
        page = folder / f"{module.replace('.', '/')}.html"
        assert last in built[page].ids, f"{name} is not in {page.name}"


def test_no_formula_is_taken_for_markup(built: dict[Path, Links]) -> None:
    """``2**a … 2**b`` outside of backticks makes bold text of what is between."""
    for page, links in built.items():
        wrong = [text for text in links.emphasis if not text.endswith(":") and len(text.split()) > 6]
        assert "qkernels" not in page.parts or not wrong, f"{page.name}: {wrong}"


def test_changelog_has_this_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert qk.__version__ in versions

"""What holds for the sources as a whole: length of files, direction of imports, and the files of each op."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from qkernels import registry

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs a source checkout")

MOST_LINES = 500

# The parts of the package from the bottom up. A part imports only from the lines below its own.
LAYERS = (
    ("version", "registry", "host", "checks", "codebooks", "samples"),
    ("loading", "layouts"),
    ("gemm_checks",),
    ("conv_checks", "embedding_checks", "recurrent_checks"),
    ("reference",),
    ("triton",),
    ("library",),
    ("ops",),
    ("nn",),
    ("qat", "integrations"),
    ("qkernels", "selfcheck", "tune", "advise_file"),
    ("demo_picture",),
    ("info", "demo"),
    ("__main__",),
)
# Production code takes what it shares with the reference from checks and layouts.
WITHOUT_REFERENCE = ("nn", "qat", "integrations")


def test_no_source_is_long() -> None:
    sources = [path for folder in ("csrc", "qkernels", "tests", "bench") for path in (ROOT / folder).rglob("*")]
    found = {
        str(path.relative_to(ROOT))
        for path in sources
        if path.suffix in (".py", ".c", ".cpp", ".h", ".cu", ".cuh") and len(path.read_text().splitlines()) > MOST_LINES
    }
    assert found == set()


def imports() -> Iterator[tuple[str, str]]:
    """(module, what it imports) for every import in the package, by full names, those inside functions too."""
    for path in sorted((ROOT / "qkernels").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((module, name.name) for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                package = parts[: len(parts) - node.level] if node.level else ()
                base = [*package, *([node.module] if node.module else [])]
                yield from ((module, ".".join([*base, name.name])) for name in node.names)


def part_of(name: str) -> str:
    """The part of the package that a name belongs to; "qkernels" for the package itself."""
    parts = name.split(".")
    known = {part for layer in LAYERS for part in layer}
    return parts[1] if len(parts) > 1 and parts[1] in known else "qkernels"


def test_imports_go_downwards() -> None:
    height = {part: at for at, layer in enumerate(LAYERS) for part in layer}
    found = {
        path.stem for path in (ROOT / "qkernels").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} <= set(height), "a part of the package stands in no layer"
    own = [(module, name) for module, name in imports() if name.split(".")[0] == "qkernels"]
    assert len(own) > 300
    upwards = {
        (module, name)
        for module, name in own
        if part_of(module) != part_of(name) and height[part_of(module)] <= height[part_of(name)]
    }
    assert upwards == set()


def test_no_private_name_is_imported() -> None:
    own = [(module, name.rpartition(".")[2]) for module, name in imports() if name.split(".")[0] == "qkernels"]
    assert [(module, name) for module, name in own if name.startswith("_") and name != "__version__"] == []


def test_what_ships_imports_neither_tests_nor_benchmarks() -> None:
    beside = {"tests", "bench", *(path.stem for folder in ("tests", "bench") for path in (ROOT / folder).glob("*.py"))}
    assert [(module, name) for module, name in imports() if name.split(".")[0] in beside] == []


def test_production_code_imports_no_reference() -> None:
    found = {
        module for module, name in imports() if part_of(module) in WITHOUT_REFERENCE and part_of(name) == "reference"
    }
    assert found == set()


def stems() -> set[str]:
    """The files of qkernels/reference that define ops."""
    references = {kernel.fn.__module__ for kernel in registry.kernels() if kernel.name == registry.REFERENCE}
    return {module.rpartition(".")[2] for module in references if module.startswith("qkernels.reference.")}


@pytest.mark.parametrize(
    ("folder", "name"),
    [("qkernels/reference", "{}.py"), ("qkernels/ops", "{}.py"), ("tests", "test_{}.py"), ("bench", "bench_{}.py")],
)
def test_each_op_has_a_file(folder: str, name: str) -> None:
    missing = {stem for stem in stems() if not Path(ROOT, folder, name.format(stem)).exists()}
    assert len(stems()) >= 15
    assert missing == set()

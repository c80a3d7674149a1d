"""Builds the HTML documentation: the pages of docs/ and, from the docstrings by pdoc, the API reference.

python docs/build.py [FOLDER]     # build/docs by default; its index.html is docs/README.md
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pdoc.extract
import pdoc.render
from pdoc.render_helpers import to_html

import qkernels as qk

DOCS = Path(__file__).resolve().parent
# pdoc follows __all__: qkernels, less the modules in it that are not for users, and the bridges, which are not in it.
SHOWN = r"nn$|qat$|qat\.(losses|schedules)$|codebooks$|registry$|reference"
MODULES = ["qkernels", rf"!qkernels\.(?!{SHOWN})", "qkernels.integrations"]


def pages() -> dict[Path, str]:
    """The pages and their titles: the guide first, then as its table lists them."""
    guide = DOCS / "README.md"
    linked = re.findall(r"\]\(([\w./]+\.md)\)", guide.read_text())
    files = dict.fromkeys([guide, *((DOCS / link).resolve() for link in linked)])
    return {file: re.findall(r"^# (.*)", file.read_text(), re.MULTILINE)[0] for file in files}


def html_name(page: Path) -> str:
    if page.name == "README.md":
        return "index.html" if page.parent == DOCS else f"{page.parent.name}.html"
    return f"{page.stem.lower()}.html"


def to_page(page: Path, out: Path) -> str:
    """HTML of a page: links to pages lead to their HTML, others into the checkout, public names to the reference."""

    def link(match: re.Match[str]) -> str:
        name, mark, anchor = match[1].partition("#")
        if "://" in name or not name:
            return match[0]
        target = (page.parent / name).resolve()
        file = html_name(target) if target in pages() else os.path.relpath(target, out)
        return f'href="{file}{mark}{anchor}"'

    def name(match: re.Match[str]) -> str:
        return f'<a href="qkernels.html#{match[2]}">{match[0]}</a>' if match[2] in documented else match[0]

    documented = [name for name in qk.__all__ if not isinstance(getattr(qk, name), ModuleType)]
    html = re.sub(r'href="([^"]+)"', link, to_html(page.read_text()))
    return re.sub(r"<code>(qk\.(\w+)[^<]*)</code>", name, html)


def build(out: Path) -> None:
    pdoc.render.configure(docformat="google", template_directory=DOCS / "theme")
    # pdoc cannot follow the annotations of a NamedTuple's constructor and says so; it shows them as they are.
    warnings.filterwarnings("ignore", message="Error parsing type annotation ForwardRef")
    pdoc.pdoc(*MODULES, output_directory=out)
    template = pdoc.render.env.get_template("page.html.jinja2")
    contents = [(html_name(page), title) for page, title in pages().items()]
    modules = pdoc.extract.walk_specs(MODULES)
    for page, title in pages().items():
        html = to_page(page, out.resolve())
        (out / html_name(page)).write_text(template.render(html=html, title=title, pages=contents, modules=modules))


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else DOCS.parent / "build" / "docs")
    build(folder)
    print(f"the documentation is at {folder / 'index.html'}")

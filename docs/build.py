"""Builds the HTML documentation: the pages of docs/ and, from the docstrings by pdoc, the API reference.

python docs/build.py [FOLDER]     # build/docs by default; its index.html is docs/README.md
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path

import pdoc.extract
import pdoc.render
from pdoc.render_helpers import to_html

import qkernels as qk

DOCS = Path(__file__).parent
# pdoc follows __all__: qkernels, less the modules in it that are not for users, and the bridges, which are not in it.
MODULES = ["qkernels", r"!qkernels\.(?!nn$|qat$|codebooks$|registry$|reference)", "qkernels.integrations"]


def pages() -> dict[str, str]:
    """File of each page of docs/ in the output, and its title: the guide first, then as its table lists them."""
    readme = (DOCS / "README.md").read_text()
    names = ["README.md", *dict.fromkeys(re.findall(r"\]\((\w+\.md)\)", readme))]
    return {name: re.findall(r"^# (.*)", (DOCS / name).read_text(), re.MULTILINE)[0] for name in names}


def html_name(name: str) -> str:
    return "index.html" if name == "README.md" else name.replace(".md", ".html")


def to_page(markdown: str, out: Path) -> str:
    """HTML of a page: links to pages lead to their HTML, others into the checkout, public names to the reference."""

    def link(match: re.Match[str]) -> str:
        target = match[1]
        if "://" in target or target.startswith("#"):
            return match[0]
        name, _, anchor = target.partition("#")
        if (DOCS / name).parent == DOCS and name.endswith(".md"):
            return f'href="{html_name(name)}{"#" * bool(anchor)}{anchor}"'
        return f'href="{os.path.relpath(DOCS / name, out)}"'

    def name(match: re.Match[str]) -> str:
        return f'<a href="qkernels.html#{match[2]}">{match[0]}</a>' if match[2] in documented else match[0]

    documented = [name for name in qk.__all__ if not isinstance(getattr(qk, name), type(os))]
    html = re.sub(r'href="([^"]+)"', link, to_html(markdown))
    return re.sub(r"<code>(qk\.(\w+)[^<]*)</code>", name, html)


def build(out: Path) -> None:
    pdoc.render.configure(docformat="google", template_directory=DOCS / "theme")
    # pdoc cannot follow the annotations of a NamedTuple's constructor and says so; it shows them as they are.
    warnings.filterwarnings("ignore", message="Error parsing type annotation ForwardRef")
    pdoc.pdoc(*MODULES, output_directory=out)
    modules = pdoc.extract.walk_specs(MODULES)
    template = pdoc.render.env.get_template("page.html.jinja2")
    contents = [(html_name(name), title) for name, title in pages().items()]
    for name, title in pages().items():
        html = to_page((DOCS / name).read_text(), out.resolve())
        page = template.render(html=html, title=title, pages=contents, modules=modules)
        (out / html_name(name)).write_text(page)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else DOCS.parent / "build" / "docs")
    build(folder)
    print(f"the documentation is at {folder / 'index.html'}")

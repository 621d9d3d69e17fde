"""Settings of the documentation site: `make docs`."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sepdist  # noqa: E402

project = "sepdist"
version = release = sepdist.__version__
html_title = f"sepdist {release}"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "figures"]

# GitHub shows the same pages: plain Markdown, with anchors as there.
myst_heading_anchors = 4
nb_execution_mode = "off"  # a slow test executes the notebook

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
default_role = "code"  # `name` in a docstring

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False

# Pages whose text is a file elsewhere in the repository.
ELSEWHERE = {
    "cluster_files": "cluster/README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "ready_model": "sepdist/pretrained/two-voices-8k/README.md",
}
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")


def read_elsewhere(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace such a page by that file, its links made relative to docs/."""
    if docname in ELSEWHERE:
        path = ROOT / ELSEWHERE[docname]
        app.env.note_dependency(str(path))
        place = os.path.relpath(path.parent, ROOT / "docs")
        source[0] = LINK.sub(rf"]({place}/\1)", path.read_text())


def point_inwards(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let links to the files of `ELSEWHERE` lead to their pages of the site."""

    def page(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        path = os.path.relpath(ROOT / "docs" / target, ROOT)
        for name, file in ELSEWHERE.items():
            if path == file and docname != name:
                return f"]({name}.md{hash_}{anchor})"
        return match[0]

    source[0] = LINK.sub(page, source[0])


def shorten(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str, returns: str
) -> tuple[str, str] | None:
    """Spell array types as the source does, not as Python expands them."""

    def short(text: str | None) -> str:
        text = re.sub(
            r"_Buffer \| .*?_NestedSequence\[complex \| bytes \| str\]", "ArrayLike", text or ""
        )
        text = re.sub(r"ndarray\[tuple\[Any, \.\.\.\], dtype\[(\w+)\]\]", r"NDArray[\1]", text)
        return re.sub(r"~(\w+\.)+(?=\w)|<factory>", lambda m: "..." if m[0][0] == "<" else "", text)

    return (short(signature), short(returns)) if signature else None


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("source-read", read_elsewhere, priority=400)
    app.connect("source-read", point_inwards)
    app.connect("autodoc-process-signature", shorten)

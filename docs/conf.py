"""The site: `sphinx-build -W docs docs/_build`."""

import re

from sphinx.application import Sphinx

project = "parallel_decode"
copyright = "the maintainers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "parallel_decode"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_heading_anchors = 3
suppress_warnings = ["myst.strikethrough"]


def escape(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with shapes such as (B, L, *E) and moduli such as |x|, which are no markup."""
    lines[:] = [
        line if line.lstrip().startswith((">>>", "...")) else re.sub(r"(?<![\\`*])([*|])(?!\*)", r"\\\1", line)
        for line in lines
    ]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", escape, priority=100)

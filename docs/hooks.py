"""Hooks of the documentation site (see mkdocs.yml): pages that lie outside docs/, and roles in docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[1]
# what makes a reader's browser ask another server; mermaid is fetched from one when a page has a diagram
FETCHED = re.compile(
    r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link[^>]+href="(?:https?:)?//|class="mermaid"'
)
PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "conventions.md": "CONVENTIONS.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the README of every bundle as ``bundles/NAME.md``, and the pages of the repository's root."""
    bundles = REPO.glob("bundles/*/docs/README.md")
    pages = {f"bundles/{path.parents[1].name}.md": path for path in bundles}
    pages |= {page: REPO / name for page, name in PAGES.items()}
    for page, path in sorted(pages.items()):
        files.append(File.generated(config, page, abs_src_path=str(path)))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Show ``:func:`name``` of a docstring as plain code; Markdown knows no such roles."""
    return re.sub(r":(?:func|class|meth|mod|data):<code>~?", "<code>", html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that needs the network to be read."""
    if found := FETCHED.search(output):
        raise PluginError(
            f"{page.file.src_uri}: {found[0]} would be fetched from another server; ship it in docs/."
        )
    return output

"""Hooks of ``make docs``: the README becomes the first page, and links stay within the site.

MkDocs calls these functions by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code|`)")
"""Of docstrings, in front of a name."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)([^)]*)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the README as ``index.md``."""
    from mkdocs.structure.files import File

    text = (ROOT / "README.md").read_text()
    files.append(File.generated(config, "index.md", content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    """Show paths of repository files that are not pages, instead of links to them."""
    here = Path(page.file.src_uri).parent if page.file.src_uri != "index.md" else Path()
    docs = Path(config["docs_dir"])

    def within(link: re.Match[str]) -> str:
        picture, words, target, more = link.groups()
        if re.match(r"[a-z]+:", target):
            return link[0]
        place = (docs / here / target).resolve()
        if not place.is_relative_to(docs) or place.suffix == ".py":
            return f"{words} (`{place.relative_to(ROOT) if place.is_relative_to(ROOT) else target}`)"
        if page.file.src_uri == "index.md" and not place.exists():
            return f"{words} (`{target}`)"
        return f"{picture}[{words}]({target}{more})"

    return LINK.sub(within, text)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Strip Sphinx roles from names in docstrings."""
    return ROLE.sub("", html)

"""`make docs-check`: the document on extensions shows the package that the tests install."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tests" / "extension" / "geoaccel-strided"


def test_the_document_shows_the_package_of_the_tests() -> None:
    text = (ROOT / "docs" / "extending.md").read_text()
    for name in ("pyproject.toml", "geoaccel_strided.py", "test_strided.py"):
        assert (PACKAGE / name).read_text().strip() in text, f"docs/extending.md shows another {name}"

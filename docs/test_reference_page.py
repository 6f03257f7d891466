"""`make docs-check`: the table of docs/reference.md is that of the figures that were kept."""

from __future__ import annotations

import json

import bad_images


def test_the_document_shows_what_was_measured() -> None:
    shown = bad_images.DOCUMENT.read_text().partition(bad_images.BEGIN)[2].partition(bad_images.END)[0]
    assert shown == bad_images.table(json.loads(bad_images.KEPT.read_text()))

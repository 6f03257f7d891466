"""`make docs-check`: the tables of docs/scaling.md are those of the command beside them."""

from __future__ import annotations

import scaling
from geoaccel.sharding.predict import Cluster


def test_the_document_shows_what_the_command_prints() -> None:
    shown = scaling.DOCUMENT.read_text().partition(scaling.BEGIN)[2].partition(scaling.END)[0]
    assert shown == scaling.tables(Cluster()), "run python scripts/figures/scaling.py --write"

"""What tests of windows share."""

from __future__ import annotations

import pytest
from oracle import Oracle, short_loop

from geoaccel.windows import identity


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """A network that is exact; what it is made of is of no interest."""
    monkeypatch.setattr(identity, "identity_of", lambda model: {})
    return Oracle([short_loop(48).render(0, 48)])

"""The cost rule that leaves tokens dense where merging would not pay, so that no method makes a forward slower.

Time is counted in multiply-adds of a matrix product. A query and a key of one head take 2 D of them and an exponential;
a similarity takes one for each channel and a comparison; a token that is gathered, averaged and copied back takes some
for each channel; and every attention that merges starts some fifty operations more.
"""

from __future__ import annotations

from dataclasses import dataclass

# In multiply-adds; measured in float32 on one core with AVX-512, where 40 of them take a nanosecond.
EXPONENTIAL = 30.0
COMPARISON = 20.0
COPY = 40.0

# Of the operations that merging adds. The CPU's was measured. The other is not: fifty launches of 5 microseconds on a
# device that does 200 multiply-adds in a picosecond.
START = {"cpu": 1.5e7}
START_ELSEWHERE = 5e10


@dataclass(frozen=True)
class Work:
    """Counts what one attention of one scene would compute with merging.

    Attributes:
        tokens: N.
        queries: Queries left.
        keys: Keys left.
        similarities: How many pairs of tokens are compared over all channels.
        heads: A.
        head_dim: D.
        other: Multiply-adds of anything else that a method does for this attention.
    """

    tokens: int
    queries: float
    keys: float
    similarities: float
    heads: int
    head_dim: int
    other: float = 0.0

    @property
    def dense(self) -> float:
        """Multiply-adds of attention to everything."""
        return self.tokens**2 * self._pair

    def merged(self, device_type: str) -> float:
        """Multiply-adds with merging."""
        width = self.heads * self.head_dim
        matching = self.similarities * (width + COMPARISON) + self.tokens * width * COPY
        return self.queries * self.keys * self._pair + matching + START.get(device_type, START_ELSEWHERE) + self.other

    @property
    def _pair(self) -> float:
        return self.heads * (2 * self.head_dim + EXPONENTIAL)


def why_dense(work: Work, device_type: str) -> str | None:
    """Why merging would not pay; None where it does."""
    share = work.merged(device_type) / work.dense
    return None if share < 1 else f"merging {work.tokens:,} tokens would take {share:.1f} x dense attention"

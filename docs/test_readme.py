"""`make docs-check`: the README is easy to read, and every number in it is that of the code or was measured."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator

import pytest
import torch

import mini_tables
from geoaccel.eval.metrics.effects import summary
from geoaccel.merging.asymmetric import FEW
from geoaccel.merging.gain import ERROR, MIN_GAIN
from table_parts import BENCHMARKS, MODELS, ROOT, read

TEXT = (ROOT / "README.md").read_text()
LEAST_EASE = 50


def paragraphs(text: str) -> Iterator[str]:
    """The prose of a document: no code, headings, tables or pictures; of a link its words."""
    for block in re.split(r"\n\s*\n", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)):
        if block.strip() and not block.lstrip().startswith(("#", "|", "![")):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(block.split()))
            yield re.sub(r"`[^`]*`", " ", words).replace("*", "")


def syllables(word: str) -> int:
    """Vowels that stand together count once, an ending that is mute does not; of an abbreviation every letter counts.

    Over the words of the README and of docs/*.md this is one percent less than what the CMU Pronouncing Dictionary
    gives, that is one point of reading ease too many.
    """
    if len(word) > 1 and word.isupper():
        return len(word)
    word = word.lower()
    found = len(re.findall(r"[aeiouy]+", word))
    mute = r"[^aeiouy]e$", r"[^aeiouytd]ed$", r"[^aeiouysxzcghy]es$"
    if found > 1 and any(re.search(ending, word) for ending in mute) and not re.search(r"[^aeiouy]les?$", word):
        found -= 1
    return max(1, found)


def reading_ease(text: str) -> float:
    """Flesch's reading ease of a document's prose; the higher, the easier."""
    sentences = [s for block in paragraphs(text) for s in re.split(r"(?<=[.!?])\s+", block)]
    counted = [found for sentence in sentences if (found := re.findall(r"[A-Za-z][A-Za-z']*", sentence))]
    words = [word for found in counted for word in found]
    return 206.835 - 1.015 * len(words) / len(counted) - 84.6 * sum(map(syllables, words)) / len(words)


def test_the_readme_is_easy_to_read() -> None:
    assert reading_ease(TEXT) >= LEAST_EASE


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("make", 1),
        ("table", 2),
        ("merged", 1),
        ("trusted", 2),
        ("frames", 1),
        ("pieces", 2),
        ("reconstruction", 4),
        ("GPU", 3),
    ],
)
def test_syllables(word: str, count: int) -> None:
    assert syllables(word) == count


def test_reading_ease_of_what_can_be_counted_by_hand() -> None:
    """Six words of one syllable in one sentence; code, tables and headings do not count."""
    easy = (
        "# Incomprehensibilities\n\nThe `polysyllabic` [cat](x.md) sat\non the mat.\n\n| a |\n\n```\ncode. code.\n```\n"
    )
    assert reading_ease(easy) == pytest.approx(206.835 - 1.015 * 6 - 84.6)
    hard = "Feed-forward reconstruction accuracy necessitates considerable computational expenditure."
    assert reading_ease(hard) < 0


NAMES = (
    *(
        "3D reconstruction",
        "3D language models",
        "3DGS",
        "Merge3D",
        "pi3",
        "Pi3X",
        "Pi3",
        "Depth Anything 3",
        "VGGT-1B",
    ),
    *("w4a16", "fp8"),
)
"""In which digits are no number."""

CHOSEN = (
    "--max-memory 24GB",
    "--max-pose-error 0.5deg",
    "within half a degree",
    "torchrun --nproc-per-node 4",
)
"""Numbers of examples, which the reader chooses."""


def facts() -> list[str]:
    """What the README says in numbers outside of its table of results, as the code and what was measured have it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((height, width),) = {tuple(document["size"]) for document in read("merging-{}-frames-report.json").values()}
    rows = json.loads((BENCHMARKS / "quantization-time-cpu.json").read_text())["rows"]
    slower = [rows[model][name]["over_dense"] for model in MODELS for name in ("fp8", "w4a16")]
    return [
        f"Python {project['requires-python'].removeprefix('>=')} or later",
        f"{width} x {height} pixels",
        "95 % intervals",
        f"at least {MIN_GAIN:g} times as fast, with {100 * (ERROR - 1):.0f} % to spare",
        f"up to {FEW:.0f} photographs `asymmetric` keeps every key",
        f"a forward takes {min(slower):.2f} to {max(slower):.2f} times as long",
        f"`vggt-mini` and `pi3-mini`: {project['license']}",
    ]


def test_intervals_are_of_95_percent() -> None:
    """Of a mean of many values: so many standard errors to both sides as a normal distribution has 95 % within."""
    values = torch.linspace(-1, 1, 500, dtype=torch.float64)
    found = summary([{"x": float(value)} for value in values])["x"]
    error = float(values.std()) / len(values) ** 0.5
    share = math.erf((found["high"] - found["low"]) / (2 * error) / math.sqrt(2))
    assert share == pytest.approx(0.95, abs=0.01)


def test_every_number_is_that_of_the_code_or_was_measured() -> None:
    """The table of results is held to the figures by docs/test_figures.py."""
    shown = set(mini_tables.merging_tables.front())
    rest = " ".join(" ".join(line for line in TEXT.splitlines() if line not in shown).split())
    for said in (*facts(), *CHOSEN):
        assert said in rest, f"the README does not say {said!r}"
        rest = rest.replace(said, "")
    rest = re.sub(r"\]\([^)]*\)", "]", rest)
    for name in NAMES:
        rest = rest.replace(name, "")
    assert re.findall(r".{0,20}\d.{0,20}", rest) == [], "numbers that no check knows"

"""Facts about a backbone stand in its own file: code elsewhere names none."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from geoaccel.models import BACKBONES

ROOT = Path(__file__).resolve().parents[2]
# Evaluation protocols and merging methods that are published under such a name; they know no backbone.
PUBLISHED = {
    "VggtCo3d", "Pi3Co3d", "Pi3Points", "VggtReplay", "VggtDraws", "FastVGGT", "LiteVGGT", "fastvggt", "litevggt",
    "write_vggt_list", "vggt-co3d", "pi3-co3d", "pi3-points", "co3d_vggt",
}  # fmt: skip
CHECKPOINTS = re.compile(r"(vggt|pi3)-mini")
WORD = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, BACKBONES))})(?![a-z])", re.IGNORECASE)


def own_files() -> set[Path]:
    """The file of each backbone: where its network is defined."""
    modules = (backbone.network.__module__ for backbone in BACKBONES.values())
    return {
        ROOT / "models" / f"{name.rpartition('.')[2]}.py" for name in modules if name.startswith("geoaccel.models.")
    }


def sources() -> list[Path]:
    own = own_files()
    assert all(path.is_file() for path in own)
    return sorted(
        path for folder in ("geoaccel", "models", "eval") for path in (ROOT / folder).rglob("*.py") if path not in own
    )


def named_in(text: str) -> Iterator[tuple[int, str]]:
    """Identifiers, imports and strings that name a backbone; docstrings and messages of several words may explain."""
    tree = ast.parse(text)
    explained = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Name):
            found = [node.id]
        elif isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found = [node.name]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found = [alias.name for alias in node.names]
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        elif isinstance(node, ast.keyword):
            found = [node.arg or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in explained:
            found = [] if " " in node.value else [node.value]
        for name in found:
            rest = CHECKPOINTS.sub("", name)
            for known in sorted(PUBLISHED, key=len, reverse=True):
                rest = rest.replace(known, "")
            if WORD.search(rest) or any(word in re.findall("[A-Z][a-z0-9]+|[A-Z]+[0-9]*", rest) for word in CLASSES):
                yield node.lineno, name  # type: ignore[attr-defined]


CLASSES = {name for backbone in BACKBONES.values() for name in (backbone.network.__name__, *backbone.class_names)}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_names_a_backbone(path: Path) -> None:
    assert list(named_in(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        'READERS = {"vggt": read}',
        "from geoaccel.models.pi3 import Pi3",
        "import geoaccel.models.vggt",
        "class _ReadVGGT: ...",
        "def read_pi3(model): ...",
        "isinstance(model, models.VGGT)",
        "f(vggt=1)",
        'if name == "pi3": ...',
        'kind = "full-vggt"',
    ],
)
def test_names_are_found(line: str) -> None:
    assert list(named_in(line))


@pytest.mark.parametrize(
    "line",
    [
        'model = "vggt-mini"',
        'protocol = "pi3-points-dtu"',
        "from geoaccel.merging.fastvggt import FastVGGT",
        '"""What vggt does."""',
        'help = "try the compensation token of VGGT"',
        "class VggtReplay: ...",
    ],
)
def test_what_is_published_may_be_named(line: str) -> None:
    assert not list(named_in(line))

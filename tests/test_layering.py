"""Who may import whom: a package imports lower rows of one table and itself, and no modules import in a circle."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"geoaccel": "geoaccel", "models": "geoaccel.models", "eval": "geoaccel.eval", "configs": "geoaccel.configs"}

# From the ground up. The packages of a row do not import each other; where an entry names several, each may import
# those to its left. A module belongs to the longest name that it begins with; names leave out "geoaccel.", and
# "geoaccel" itself is the public face. Each module at the top of geoaccel is a package of its own.
ROWS = (
    # floor 0: pure functions, and what every file needs
    ("errors", "version", "configs", "model_lock"),
    (
        "manifest claims atomic",
        "console",
        "cameras",
        "conditions",
        "cost",
        "edges",
        "fingerprint",
        "frame_matches",
        "freed_memory",
        "kept",
        "kernels",
        "knobs",
        "memory_plan host_memory memory",
        "network_config",
        "open3d_loader",
        "point_cloud",
        "precision",
        "registry",
    ),
    ("alignment", "plan", "similarity", "measured"),
    ("layout", "bfloat16", "workers"),
    # floor 1: the seams, and what is said about backbones, images and scenes
    ("segments attention_kernels attention kernel_memory", "backbone", "linears", "runtime", "slots"),
    ("images", "mllm", "reference"),
    ("scene",),
    ("outliers", "priors", "tracks"),
    # floor 2: methods, networks and formats, side by side
    (
        "export",
        "merging",
        "models.layers models",
        "quantization.method quantization.swap quantization.formats quantization.calibrate quantization",
    ),
    # floor 3: where methods meet backbones
    ("description tuned api trying", "quantized_file", "inputs prediction refine reconstruction"),
    ("sharding", "windows"),
    ("testing",),
    ("geoaccel",),
    # floor 4: measuring
    ("eval eval.metrics eval.data.procedural eval.data eval.report eval.run eval.bench eval.tuning eval.tools",),
    # floor 5: user interface
    ("info", "options", "viewer"),
    ("finished_scenes checks account windows_command dry_run scene_command ray_command reconstruct_command",),
    ("cli",),
    ("__main__",),
)
# Place of a package: its row, its entry in the row, and how far to the right it stands there.
PLACES = {
    name: (row, entry, step)
    for row, entries in enumerate(ROWS)
    for entry, names in enumerate(entries)
    for step, name in enumerate(names.split())
}
HEAVY = {
    "OpenEXR",
    "open3d",
    "matplotlib",
    "trimesh",
    "scipy",
    "transformers",
    "ray",
    "triton",
    "torchao",
    "xformers",
    "pycolmap",
    "viser",
}
# Kernels are defined with triton, and their module is imported where one is about to run.
WITH_TRITON = {
    f"geoaccel.kernels.{name}"
    for name in ("match", "nibbles", "fp8_flash", "rounding", "heads", "rows", "blocks", "joins", "picks")
}


def sources() -> dict[str, str]:
    """Every module of the package with its text."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path.read_text()
    return found


SOURCES = sources()


def package_of(module: str) -> str | None:
    """The package that a module belongs to; None if it is in no row of the table."""
    if module == "geoaccel":
        return "geoaccel"
    name = module.removeprefix("geoaccel.")
    while name and name not in PLACES:
        name = name.rpartition(".")[0]
    return name or None


def may_import(importer: str, target: str) -> bool:
    """Whether one package may import another."""
    own, other = PLACES[importer], PLACES[target]
    return importer == target or other[0] < own[0] or (other[:2] == own[:2] and other[2] < own[2])


@functools.cache
def parsed(text: str) -> ast.Module:
    """The tree of a text."""
    return ast.parse(text)


@functools.cache
def imports(text: str, modules: frozenset[str], *, in_functions: bool = True) -> frozenset[str]:
    """Modules that a text imports, anywhere in it.

    A string that is the name of one of the modules counts too: it is going to be imported by that name. What stands
    under ``if TYPE_CHECKING`` does not: it is never run, so it makes no circle, and floors are about what runs.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
            return
        if not in_functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import in full, from geoaccel on"
            assert node.module is not None
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                found.add(name if name in modules else node.module)
        if isinstance(node, ast.Constant) and node.value in modules and "." in node.value:
            found.add(node.value)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parsed(text))
    return frozenset(found)


def graph(texts: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Which module imports which of the others."""
    modules = frozenset(texts)
    return {module: imports(text, modules) & modules for module, text in texts.items()}


def offenders(texts: Mapping[str, str]) -> Iterator[str]:
    """One line for every import that the table does not allow, and for every module that it does not know."""
    for module, targets in sorted(graph(texts).items()):
        own = package_of(module)
        if own is None:
            yield f"{module} stands in no row"
            continue
        for target in sorted(targets):
            other = package_of(target)
            if other is not None and not may_import(own, other):
                upward = PLACES[other][0] > PLACES[own][0]
                yield f"{module} imports {target}, {'upward' if upward else 'sideways'}"


def circle(texts: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty where there are none."""
    try:
        TopologicalSorter(graph(texts)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def planted(module: str, line: str) -> dict[str, str]:
    """The sources with one more line at the end of a module."""
    return {**SOURCES, module: f"{SOURCES.get(module, '')}\n{line}\n"}


def test_imports_go_down() -> None:
    assert list(offenders(SOURCES)) == []


def test_no_modules_import_in_a_circle() -> None:
    assert circle(SOURCES) == []


def test_every_row_names_what_there_is() -> None:
    assert {package_of(module) for module in SOURCES} == set(PLACES)


def test_what_is_forbidden_is_found() -> None:
    for module, line, found in (
        ("geoaccel.layout", "import geoaccel.api", "geoaccel.layout imports geoaccel.api, upward"),
        ("geoaccel.plan", "def f():\n    from geoaccel import layout", "geoaccel.plan imports geoaccel.layout, upward"),
        ("geoaccel.plan", "from geoaccel import load_model", "geoaccel.plan imports geoaccel, upward"),
        (
            "geoaccel.merging.httm",
            "from geoaccel.models.vggt import VGGT",
            "geoaccel.merging.httm imports geoaccel.models.vggt, sideways",
        ),
        (
            "geoaccel.plan",
            "from geoaccel.similarity import best_match",
            "geoaccel.plan imports geoaccel.similarity, sideways",
        ),
        (
            "geoaccel.models.layers.block",
            "from geoaccel.models import build",
            "geoaccel.models.layers.block imports geoaccel.models, sideways",
        ),
        (
            "geoaccel.eval.data.scene",
            "import importlib\nread = importlib.import_module('geoaccel.eval.tools.demo')",
            "geoaccel.eval.data.scene imports geoaccel.eval.tools.demo, sideways",
        ),
        ("geoaccel.novelty", "", "geoaccel.novelty stands in no row"),
    ):
        assert list(offenders(planted(module, line))) == [found]
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import geoaccel.cli"
    assert list(offenders(planted("geoaccel.layout", typed))) == []
    assert list(offenders(planted("geoaccel.cli", "from geoaccel.layout import TokenLayout"))) == []


def test_circles_of_any_length_are_found() -> None:
    two = planted("geoaccel.kernels.fp8_reference", "def f():\n    from geoaccel.kernels.fp8_flash import flash")
    assert set(circle(two)) == {"geoaccel.kernels.fp8_reference", "geoaccel.kernels.fp8_flash"}
    three = planted("geoaccel.models.layers.rope", "from geoaccel.models.layers.stream import alternate")
    found = circle(three)
    assert found[0] == found[-1]
    assert {"geoaccel.models.layers.rope", "geoaccel.models.layers.stream"} <= set(found)
    alone = planted("geoaccel.plan", "import geoaccel.plan")
    assert circle(alone) == ["geoaccel.plan", "geoaccel.plan"]
    by_name = planted("geoaccel.eval.data.scene", "module = 'geoaccel.eval.data.dtu'")
    assert {"geoaccel.eval.data.scene", "geoaccel.eval.data.dtu"} <= set(circle(by_name))


def test_scripts_and_tests_are_never_imported() -> None:
    outside = {path.stem for folder in ("scripts", "tests") for path in (ROOT / folder).rglob("*.py")}
    outside |= {"scripts", "tests"}
    found = {
        module: names
        for module, text in SOURCES.items()
        if (names := {name.partition(".")[0] for name in imports(text, frozenset(SOURCES))} & outside)
    }
    assert found == {}


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    found = {}
    for module, text in SOURCES.items():
        top, all_of_it = (
            {name.partition(".")[0] for name in imports(text, frozenset(SOURCES), in_functions=inside)}
            for inside in (False, True)
        )
        early = top & HEAVY - ({"triton"} if module in WITH_TRITON else set())
        # Settings are read with hydra in one place.
        early |= all_of_it & {"hydra"} - ({"hydra"} if module == "geoaccel.eval.run.settings" else set())
        if early:
            found[module] = early
    assert found == {}

"""Who may import whom: a file imports lower floors and its own package, never upward, and floor 2 never sideways."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"geoaccel": "geoaccel", "models": "geoaccel.models", "eval": "geoaccel.eval"}
# The longest matching prefix decides. `geoaccel` itself is the public face.
FLOORS = {
    "geoaccel.layout": 0,
    "geoaccel.cameras": 0,
    "geoaccel.registry": 0,
    "geoaccel.kernels.e4m3": 0,
    "geoaccel.errors": 0,
    "geoaccel.atomic": 0,
    "geoaccel.fingerprint": 0,
    "geoaccel.knobs": 0,
    "geoaccel.plan": 0,
    "geoaccel.similarity": 0,
    "geoaccel.precision": 0,
    "geoaccel.kernels": 0,
    "geoaccel.point_cloud": 0,
    "geoaccel.attention": 1,
    "geoaccel.backbone": 1,
    "geoaccel.cost": 1,
    "geoaccel.linears": 1,
    "geoaccel.models": 2,
    "geoaccel.merging": 2,
    "geoaccel.quantization": 2,
    "geoaccel.mllm": 1,
    "geoaccel.images": 2,
    "geoaccel.export": 3,
    "geoaccel.memory": 2,
    "geoaccel.reconstruction": 3,
    "geoaccel.quantized_file": 3,
    "geoaccel.quantization.calibrate.calibration": 4,
    "geoaccel.api": 3,
    "geoaccel.eval": 4,
    "geoaccel.info": 4,
    "geoaccel.cli": 4,
    "geoaccel": 4,
}
SIDES = ("geoaccel.models", "geoaccel.merging", "geoaccel.quantization", "geoaccel.images")
HEAVY = {"open3d", "matplotlib", "trimesh", "scipy", "transformers", "ray", "triton", "torchao", "xformers", "pycolmap"}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def floor(module: str) -> int:
    prefix = module
    while prefix not in FLOORS:
        prefix = prefix.rpartition(".")[0]
        assert prefix, f"{module} stands on no floor"
    return FLOORS[prefix]


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    """Modules that a file imports; those inside `if TYPE_CHECKING` do not count."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(submodules & set(MODULES) or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    own = next((side for side in (*SIDES, "geoaccel.export", "geoaccel.eval") if module.startswith(side)), module)
    for target in imports(MODULES[module], top_level_only=False):
        if not target.startswith("geoaccel") or target.startswith(own) or target == "geoaccel":
            continue
        assert floor(target) <= floor(module), (
            f"{module} (floor {floor(module)}) imports {target} (floor {floor(target)})"
        )
        if own in SIDES:
            assert not target.startswith(SIDES), f"{module} imports {target}: floor 2 never sideways"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_packages_are_imported_where_they_are_used(module: str) -> None:
    top = {name.partition(".")[0] for name in imports(MODULES[module], top_level_only=True)}
    # Kernels are defined with triton, and their module is imported where one is about to run.
    with_triton = {"geoaccel.kernels.match", "geoaccel.kernels.nibbles", "geoaccel.kernels.fp8_flash"}
    allowed = {"triton"} if module in with_triton else set()
    assert not top & HEAVY - allowed
    if module != "geoaccel.eval.run.settings":
        assert "hydra" not in {name.partition(".")[0] for name in imports(MODULES[module], top_level_only=False)}

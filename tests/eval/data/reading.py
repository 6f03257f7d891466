"""Reading one small dataset, or the reason why it was left out."""

from __future__ import annotations

from tree_parts import Tree

from geoaccel.eval.data.registry import DATASETS
from geoaccel.eval.data.scene import EvalScene, Skipped


def read_one(tree: Tree, **options) -> EvalScene:
    (scene,) = DATASETS[tree.dataset](tree.root, **{**tree.options, **options})
    return scene


def reason(tree: Tree, **options) -> str:
    skipped: list[Skipped] = []
    assert not list(DATASETS[tree.dataset](tree.root, on_skip=skipped.append, **{**tree.options, **options}))
    return skipped[0].reason

"""Every merging method holds the rules of ``geoaccel.testing``, on every backbone with upstream's random weights.

Plans are looked at in ``test_conformance_groups.py``, knobs and bad input in ``test_conformance_knobs.py``. That the
rules find what is broken is tested in ``test_broken_methods.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import IMAGES, run
from references import IDLE_KNOBS, NEEDED_KNOBS, relative_error
from torch import Tensor, nn

import geoaccel
from geoaccel.merging import MERGING
from geoaccel.models import build
from geoaccel.testing import MERGING_RULES, Trial, check_rule

DEEP: dict[str, Any] = {
    "img_size": 28, "embed_dim": 32, "depth": 8, "num_heads": 2, "vit_depth": 1, "vit_num_heads": 2,
    "camera_head_num_heads": 2, "camera_trunk_depth": 1, "dpt_layers": [0, 2, 4, 7], "heads": ["camera"],
    "layer_scale": 0.3,
}  # fmt: skip


def trial(name: str, network: nn.Module) -> Trial:
    return Trial(MERGING[name], network, NEEDED_KNOBS.get(name, {}), IDLE_KNOBS.get(name, {"ratio": 0}))


@pytest.mark.parametrize("rule", MERGING_RULES)
def test_rule(tiny: nn.Module, name: str, rule: str) -> None:
    if not check_rule(rule, trial(name, tiny)):
        pytest.skip("for methods of another kind")


def test_many_layers_share_what_they_remember(name: str) -> None:
    """Methods that look again every few layers only, where there are as many."""
    torch.manual_seed(0)
    network = build("vggt", **DEEP).eval()
    for rule in ("gradients_reach_every_attention", "a_forward_leaves_nothing_to_the_next"):
        assert check_rule(rule, trial(name, network))


@pytest.mark.slow
def test_compiled_models_have_the_same_output(tiny: nn.Module, method: Any, this_processor: None) -> None:
    geoaccel.accelerate(tiny, merging=method)
    expected = run(tiny, IMAGES)
    torch.compiler.reset()
    compiled = torch.compile(tiny, backend="eager")
    with torch.no_grad():
        camera = compiled(IMAGES, heads=["camera"])
    for key, value in camera.items():
        if isinstance(value, Tensor) and key != "images":
            assert relative_error(value, expected[key]) < 1e-5, key

"""Every merging method holds the rules of ``geoaccel.testing``, on every backbone with upstream's random weights.

Plans are looked at in ``test_conformance_groups.py``, knobs and bad input in ``test_conformance_knobs.py``. That the
rules find what is broken is tested in ``test_broken_methods.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import IMAGES, make, run
from references import IDLE_KNOBS, NEEDED_KNOBS, Golden, relative_error
from torch import Tensor, nn

import geoaccel
from geoaccel.merging import MERGING
from geoaccel.models import build
from geoaccel.testing import MERGING_RULES, Trial, check_rule, tiny_network

DEEP: dict[str, Any] = {
    "img_size": 28, "embed_dim": 32, "depth": 8, "num_heads": 2, "vit_depth": 1, "vit_num_heads": 2,
    "camera_head_num_heads": 2, "camera_trunk_depth": 1, "dpt_layers": [0, 2, 4, 7], "heads": ["camera"],
    "layer_scale": 0.3,
}  # fmt: skip


def trial(name: str, network: nn.Module) -> Trial:
    return Trial(MERGING[name], network, NEEDED_KNOBS.get(name, {}), IDLE_KNOBS.get(name, {"ratio": 0}))


IN_FULL = ("fastvggt", "come")
"""A method of each kind, for which every rule is checked on every backbone."""

ESSENTIAL = (
    "it_acts_and_keeps_every_shape", "it_can_merge_nothing", "restore_is_exact", "packed_rows_are_means",
    "every_token_gets_the_mean_of_its_group", "scenes_do_not_see_each_other", "gradients_reach_every_attention",
    "one_frame_is_dense",
)  # fmt: skip
"""Rules that a backbone can break; the others are about a method alone."""


@pytest.mark.parametrize("rule", MERGING_RULES)
def test_rule(golden: Golden, request: pytest.FixtureRequest, name: str, rule: str) -> None:
    """All of them on two backbones, on the others what these can break; ``--every-backbone`` checks all on all."""
    every = request.config.getoption("--every-backbone")
    known = golden.backbone in ("pi3", "vggt")
    in_full = name in IN_FULL and (rule, name) != ("every_size_and_dtype_works", "come")  # two seconds
    if not (known or every or in_full or rule in ESSENTIAL):
        pytest.skip("run with --every-backbone")
    if not check_rule(rule, trial(name, golden.network() if known or every else tiny_network(golden.backbone))):
        pytest.skip("for methods of another kind")


def test_many_layers_share_what_they_remember(name: str) -> None:
    """Methods that look again every few layers only, where there are as many."""
    torch.manual_seed(0)
    network = build("vggt", **DEEP).eval()
    for rule in ("gradients_reach_every_attention", "a_forward_leaves_nothing_to_the_next"):
        assert check_rule(rule, trial(name, network))


def test_float64_runs(name: str, tiny: nn.Module) -> None:
    model = geoaccel.accelerate(tiny.double(), merging=make(name))
    for key, value in run(model, IMAGES.double()).items():
        assert value.isfinite().all(), key
    assert all(action.effects for action in geoaccel.describe(model).merging)


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

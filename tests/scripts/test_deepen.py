"""A deeper VGGT from a shallow one."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from small_recipes import SMALL_MODEL

from deepen import copy_layers
from geoaccel.models import build
from geoaccel.models.weights import save_model
from training_run import first_weights

SHALLOW = SMALL_MODEL["vggt-mini"] | {"depth": 4, "dpt_layers": [0, 1, 2, 3], "heads": ["camera", "depth"]}
DEEP = SHALLOW | {"depth": 12, "dpt_layers": [2, 5, 8, 11]}


def test_every_layer_comes_three_times_with_smaller_steps(script: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shallow = build("vggt", **SHALLOW)
    save_model(shallow, tmp_path / "shallow.safetensors", dtype=torch.float32)
    network = {"backbone": "vggt", **DEEP}
    deep = first_weights(OmegaConf.create({"network": network, "init_from": str(tmp_path / "shallow.safetensors")}))
    for kind in ("frame_blocks", "global_blocks"):
        ours, theirs = getattr(deep.aggregator, kind), getattr(shallow.aggregator, kind)
        assert (len(ours), len(theirs)) == (12, 4)
        for layer, block in enumerate(ours):
            assert torch.equal(block.attn.qkv.weight, theirs[layer // 3].attn.qkv.weight)
            assert torch.allclose(block.ls1.gamma, theirs[layer // 3].ls1.gamma / 3**0.5)
            assert torch.allclose(block.ls2.gamma, theirs[layer // 3].ls2.gamma / 3**0.5)
    assert torch.equal(deep.aggregator.camera_token, shallow.aggregator.camera_token)
    assert torch.equal(deep.depth_head.norm.weight, shallow.depth_head.norm.weight)


def test_layers_that_do_nothing_do_nothing_three_times() -> None:
    """The heads of both read the same features then: everything beside the layers is where it was."""
    torch.manual_seed(0)
    shallow, deep = build("vggt", **SHALLOW).eval(), build("vggt", **DEEP).eval()
    with torch.no_grad():
        for block in (*shallow.aggregator.frame_blocks, *shallow.aggregator.global_blocks):
            block.ls1.gamma.zero_()
            block.ls2.gamma.zero_()
        copy_layers(shallow, deep)
        images = torch.rand(1, 2, 3, 56, 56)
        ours, theirs = deep(images), shallow(images)
    assert torch.equal(ours["depth"], theirs["depth"])
    assert torch.equal(ours["pose_enc"], theirs["pose_enc"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": 6, "dpt_layers": [0, 1, 2, 3]}, "network.depth=6 is no multiple of the checkpoint's 4 layers"),
        ({"depth": 2, "dpt_layers": [0, 0, 1, 1]}, "network.depth=2 is no multiple"),
        ({"dpt_layers": [0, 1, 2, 3]}, r"give \[2, 5, 8, 11\]"),
        ({"embed_dim": 64}, "network.embed_dim is 64, the checkpoint's 32"),
    ],
)
def test_what_cannot_be_deepened_is_refused(changed: dict[str, object], message: str) -> None:
    deep = build("vggt", **(DEEP | changed))
    with pytest.raises(ValueError, match=message):
        copy_layers(build("vggt", **SHALLOW), deep)


def test_the_recipe_starts_from_the_mini_in_the_package() -> None:
    with initialize_config_module("geoaccel.configs", version_base="1.3"):
        cfg = compose("more", overrides=["network=vggt-mini-deep", "init_from=vggt-mini"])
    deep = first_weights(cfg)
    assert (deep.config.depth, deep.config.dpt_layers) == (12, (2, 5, 8, 11))
    assert sum(p.numel() for p in deep.parameters()) == pytest.approx(15.1e6, rel=0.01)


def test_another_backbone_is_refused() -> None:
    pi3 = build("pi3", **SMALL_MODEL["pi3-mini"])
    with pytest.raises(ValueError, match="only a vggt can be deepened, got pi3 to pi3"):
        copy_layers(pi3, pi3)

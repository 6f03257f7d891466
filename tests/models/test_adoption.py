"""Models of upstream that are adopted: around the same tensors, and nothing else."""

from __future__ import annotations

import pytest
import torch
from references import Golden
from torch import nn
from upstream_objects import upstream_double

import geoaccel
from geoaccel.models.vggt import VGGT


def test_adopt_shares_the_tensors_and_the_outputs(tiny: nn.Module, golden: Golden) -> None:
    with torch.no_grad():
        expected = tiny(golden["inputs.images"])
    network, theirs = type(tiny), upstream_double(tiny)
    ours = geoaccel.adopt(theirs)
    assert type(ours) is network
    assert not ours.training
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter is theirs_by_name[name], name
    with torch.no_grad():
        predictions = ours(golden["inputs.images"])
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(predictions[key], value), key
        next(iter(theirs.parameters())).zero_()
    assert next(iter(ours.parameters())).abs().sum() == 0


def test_adopt_leaves_frozen_what_its_owner_froze(tiny: nn.Module) -> None:
    theirs = upstream_double(tiny.requires_grad_(False))
    next(iter(theirs.parameters())).requires_grad_(True)
    ours = geoaccel.adopt(theirs)
    assert [parameter.requires_grad for parameter in ours.parameters()].count(True) == 1
    assert [parameter.requires_grad for parameter in theirs.parameters()].count(True) == 1


def test_adopt_takes_subclasses_and_refuses_other_objects(tiny: nn.Module) -> None:
    theirs = upstream_double(tiny)
    theirs.__class__ = type("FineTuned", (theirs.__class__,), {})
    assert geoaccel.adopt(theirs) is not theirs
    theirs.extra_head = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"2 unexpected \(first: extra_head.weight\)"):
        geoaccel.adopt(theirs)
    with pytest.raises(ValueError, match=r"cannot adopt a Linear; known classes: DepthAnything3Net, Pi3, .*VGGT"):
        geoaccel.adopt(nn.Linear(2, 2))
    impostor = type("VGGT", (nn.Module,), {})()
    with pytest.raises(ValueError, match="no child 'aggregator'"):
        geoaccel.adopt(impostor)


def test_accelerate_adopts(tiny: nn.Module) -> None:
    network, theirs = type(tiny), upstream_double(tiny)
    theirs.__class__.backbone = None  # upstream's classes know nothing of us
    assert type(geoaccel.accelerate(theirs, attention="matmul")) is network


def test_adopt_gives_a_network_of_ours_back(tiny: nn.Module) -> None:
    assert geoaccel.adopt(tiny) is tiny


def test_adopt_undoes_the_renumbering_of_forks() -> None:
    """FastVGGT and LiteVGGT keep four features and call them 0 to 3; in VGGT's aggregator they are 4, 11, 17, 23."""
    with torch.device("meta"):
        theirs = upstream_double(VGGT.backbone.build())
    for head in (theirs.depth_head, theirs.point_head, theirs.track_head.feature_extractor):
        head.intermediate_layer_idx = [0, 1, 2, 3]
    assert geoaccel.adopt(theirs).config.dpt_layers == (4, 11, 17, 23)
    theirs.depth_head.intermediate_layer_idx = theirs.track_head.feature_extractor.intermediate_layer_idx = [0, 1, 2, 9]
    with pytest.raises(ValueError, match="expected the last of 24, 23, among them"):
        geoaccel.adopt(theirs)

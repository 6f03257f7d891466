"""Scores of point maps and clouds by the protocols that have a rule of their own."""

from __future__ import annotations

import math
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pinhole_scenes import exact_geometry, pinhole_scene
from plans import plan_of

from geoaccel.backbone import Geometry, Preprocess
from geoaccel.eval.data.scene import EvalScene, ScanRegion
from geoaccel.eval.metrics import point_protocols
from geoaccel.eval.metrics.point_protocols import Cut3rCrop, FastVggtScannet, Pi3Points
from geoaccel.eval.metrics.trajectories import trajectory_errors
from geoaccel.eval.run.job import Job
from geoaccel.eval.run.prepare import Truth, network_input, truth_of
from geoaccel.eval.run.scoring import Protocol, _shrink, score_scene
from geoaccel.images import ImageTransform

pytest.importorskip("scipy")


def scanned_square() -> tuple[EvalScene, list[ImageTransform], Geometry, Truth, torch.Tensor]:
    """A scene of 56 x 56 pixels, how it is fed, its exact prediction, its truth, and all true points [N, 3]."""
    scene = pinhole_scene((56, 56))
    _, transforms = network_input(scene, Preprocess(), resize=False)
    known = truth_of(scene, transforms)
    assert known.points_world is not None
    return scene, transforms, exact_geometry(scene, transforms, (56, 56)), known, known.points_world.reshape(-1, 3)


@pytest.mark.parametrize("protocol", ["pi3-points", "cut3r-crop"])
@pytest.mark.parametrize("source", ["depth", "head"])
def test_map_protocols_score_at_the_resolution_of_the_ground_truth(protocol: str, source: str) -> None:
    scene = pinhole_scene((112, 84))
    images, transforms = network_input(scene, Preprocess("crop", 56, 14), resize=True)
    right = exact_geometry(scene, transforms, images.shape[-2:])
    chosen = Protocol(points=protocol, points_from=source)  # type: ignore[arg-type]
    good = score_scene(right, truth_of(scene, transforms), chosen, scene=scene, transforms=transforms).values
    assert good["chamfer"] == good["chamfer_mean"] < 0.05
    assert good["num_gt"] == sum(int(t.seen_mask().sum()) for t in transforms) > 3 * 56 * 56
    bent = replace(
        right,
        depth=right.depth * torch.linspace(1, 2, 56),
        points_world=right.points_world * (1 + right.points_world[..., :1].abs()),
    )
    bad = score_scene(bent, truth_of(scene, transforms), chosen, scene=scene, transforms=transforms).values
    assert bad["chamfer"] > 2 * good["chamfer"]


@pytest.mark.parametrize("kind", [Pi3Points, Cut3rCrop])
@pytest.mark.parametrize("source", ["depth", "head"])
@pytest.mark.parametrize(
    ("size", "scored_size", "seen_rows"),  # of the tall one the network sees a square
    [((120, 168), (56, 84), 56), ((280, 120), (196, 84), 82), ((40, 60), (40, 60), 40)],
)
def test_map_protocols_bring_both_sides_to_their_width(
    kind: type[Pi3Points] | type[Cut3rCrop],
    source: str,
    size: tuple[int, int],
    scored_size: tuple[int, int],
    seen_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scorer = kind(width=84)
    monkeypatch.setitem(point_protocols.PROTOCOLS, scorer.name, scorer)
    scene = pinhole_scene(size)
    images, transforms = network_input(scene, Preprocess("crop", 70, 14), resize=True)
    right = exact_geometry(scene, transforms, images.shape[-2:])
    chosen = Protocol(points=scorer.name, points_from=source)  # type: ignore[arg-type]
    found = score_scene(right, truth_of(scene, transforms), chosen, scene=scene, transforms=transforms).values
    assert scorer.size_of(size) == scored_size
    assert found["num_gt"] == 3 * seen_rows * scored_size[1]
    # No similarity undoes a wrong scale of one axis, 7 % of the first height. Medians feel the ball's smeared edge.
    assert found["chamfer"] < (0.02 if kind is Pi3Points else 0.04)


def test_sizes_of_published_point_maps() -> None:
    for protocol in (Pi3Points(), Cut3rCrop(), point_protocols.PROTOCOLS["pi3-points-dtu"]):
        assert isinstance(protocol, point_protocols.MapProtocol)
        assert protocol.size_of((480, 640)) == (392, 518)
        assert protocol.size_of((4130, 6200)) == (350, 518)
        assert protocol.size_of((518, 518)) == (518, 518)
        assert protocol.size_of((224, 224)) == (224, 224)
    corner = _shrink((480, 640), (392, 518)).pixels_to_original(torch.tensor([518.0, 392.0]))
    assert corner.tolist() == pytest.approx([640, 480])  # stretched, not cropped
    assert asdict(Protocol(points="pi3-points"))["width"] == 518
    assert asdict(Protocol())["width"] is asdict(Protocol(points=None))["width"] is None


def test_one_full_depth_map_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of ETH3D take 100 MB each."""
    monkeypatch.setitem(point_protocols.PROTOCOLS, "pi3-points", Pi3Points(width=84))
    alive: list[weakref.ref] = []
    most = 0
    full = pinhole_scene((56, 168), frames=6)

    def read(depth: torch.Tensor) -> torch.Tensor:
        nonlocal most
        fresh = depth.clone()
        alive.append(weakref.ref(fresh))
        most = max(most, sum(one() is not None for one in alive))
        return fresh

    frames = [replace(frame, read_depth=lambda make=frame.read_depth: read(make())) for frame in full.frames]
    scene = replace(full, frames=tuple(frames))
    images, transforms = network_input(scene, Preprocess("crop", 70, 14), resize=True)
    right = exact_geometry(scene, transforms, images.shape[-2:])
    chosen = Protocol(points="pi3-points")
    found = score_scene(right, truth_of(scene, transforms), chosen, scene=scene, transforms=transforms).values
    assert found["num_gt"] == 6 * 28 * 84
    assert len(alive) == 12
    assert most <= 2


def test_scannet_keeps_what_is_sure_on_either_scale_of_confidence() -> None:
    scene, transforms, right, known, cloud = scanned_square()
    chosen = Protocol(points="fastvggt-scannet")
    scanned = replace(scene, read_points=lambda: cloud)
    logit = torch.linspace(-4, 4, right.conf.numel()).view_as(right.conf)

    def scores(conf: torch.Tensor) -> dict[str, float]:
        return score_scene(replace(right, conf=conf), known, chosen, scene=scanned, transforms=transforms).values

    vggt, pi3 = scores(1 + logit.exp()), scores(logit.sigmoid())
    published = trajectory_errors(right.cam_from_world[0], known.cam_from_world, fastvggt_compat=True)
    assert {name: vggt[f"fastvggt_{name}"] for name in published} == published
    plain = score_scene(right, known, Protocol(points=None), scene=scanned, transforms=transforms).values
    assert not [name for name in plain if name.startswith("fastvggt")]
    assert vggt["kept_share"] == pytest.approx((4 - math.log(2)) / 8, abs=1e-3)
    assert pi3["kept_share"] == pytest.approx(0.8, abs=1e-3)
    assert pi3["chamfer"] < 0.1
    raw = scores(logit)  # any other scale: its order alone counts
    assert (raw["chamfer"], raw["kept_share"]) == (pi3["chamfer"], pi3["kept_share"])
    assert FastVggtScannet().keep(torch.full((4,), 0.5)).all()
    with pytest.raises(ValueError, match=r"keeps confidences of at least 3, the highest here is 1\.5"):
        scores(1 + logit.sigmoid().clamp(max=0.5))


@pytest.mark.parametrize("protocol", ["dtu-mvs", "fastvggt-scannet"])
def test_cloud_protocols_need_a_scan(protocol: str) -> None:
    scene, transforms, right, known, cloud = scanned_square()
    right = replace(right, conf=right.conf + 5)
    chosen = Protocol(points=protocol)
    with pytest.raises(ValueError, match="needs the scanned points"):
        score_scene(right, known, chosen, scene=scene, transforms=transforms)
    box, everywhere = torch.tensor([[-49.0] * 3, [49.0] * 3]), torch.tensor([0.0, 0, 0, 1])
    region = ScanRegion(torch.ones(99, 99, 99, dtype=torch.bool), box, 1.0, everywhere)
    scene = replace(scene, read_region=lambda: region)
    scanned = replace(scene, read_points=lambda: cloud)
    good = score_scene(right, known, chosen, scene=scanned, transforms=transforms).values["chamfer"]
    shifted = replace(scene, read_points=lambda: cloud * torch.tensor([1.0, 1.0, 1.3]))
    bad = score_scene(right, known, chosen, scene=shifted, transforms=transforms).values["chamfer"]
    assert good < 0.06
    assert bad > 3 * good


@pytest.mark.parametrize(
    ("points", "lacks", "needs"),
    [
        ("pi3-points", "depth", "depth and intrinsics"),
        ("cut3r-crop", "intrinsics", "depth and intrinsics"),
        ("fastvggt-scannet", "scan", "the scanned points"),
        ("dtu-mvs", "scan", "the scanned points"),
        ("dtu-mvs", "region", "the scan's ObsMask and Plane files"),
    ],
)
def test_what_a_scene_lacks_is_known_before_it_is_predicted(
    points: str, lacks: str, needs: str, tmp_path: Path
) -> None:
    full, _, _, _, cloud = scanned_square()
    full = replace(full, read_points=lambda: cloud, read_region=lambda: None)
    of_frame: dict[str, Any] = {"depth": {"read_depth": None}, "intrinsics": {"intrinsics": None}}.get(lacks, {})
    of_scene: dict[str, Any] = {"scan": {"read_points": None}, "region": {"read_region": None}}.get(lacks, {})
    poor = replace(full, name="poor", frames=tuple(replace(f, **of_frame) for f in full.frames), **of_scene)
    plan = plan_of(Job("vggt-mini"), lambda: [full, poor], Protocol(points=points), tmp_path)
    assert [scene.name for scene in plan.scenes()] == [full.name]
    (skipped,) = plan.source.skipped
    assert str(skipped).startswith(f"poor: point protocol {points!r} needs {needs}")
    unknown = replace(poor, frames=tuple(replace(f, cam_from_world=f.cam_from_world * torch.nan) for f in poor.frames))
    assert Protocol(points=points).why_not(unknown) is None  # is compared with the dense model alone
    assert Protocol().why_not(poor) is None


def test_dtu_is_scored_within_mask_box_and_plane_or_not_at_all() -> None:
    scene, transforms, right, known, cloud = scanned_square()
    chosen = Protocol(points="dtu-mvs")
    scanned = replace(scene, read_points=lambda: cloud)
    with pytest.raises(ValueError, match="needs the scan's ObsMask and Plane files"):
        score_scene(right, known, chosen, scene=scanned, transforms=transforms)
    low, high = cloud.double().amin(dim=0) - 1, cloud.double().amax(dim=0) + 1
    mask = torch.zeros([int(n) + 1 for n in (high - low) / 0.5], dtype=torch.bool)
    mask[: len(mask) // 2] = True
    level = float(cloud[:, 1].median())
    region = ScanRegion(mask, torch.stack([low, high]), 0.5, torch.tensor([0.0, 1, 0, -level]))
    whole = replace(region, mask=torch.ones_like(mask), ground_plane=torch.tensor([0.0, 0, 0, 1]))

    def scores(where: ScanRegion) -> dict[str, float]:
        judged = replace(scanned, read_region=lambda: where)
        return score_scene(right, known, chosen, scene=judged, transforms=transforms).values

    part, everything = scores(region), scores(whole)
    assert part["num_gt"] == int((cloud[:, 1] > level).sum()) < everything["num_gt"] == len(cloud)
    assert 0 < part["num_pred"] < 0.9 * everything["num_pred"]

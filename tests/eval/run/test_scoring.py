"""Scores of predictions whose errors are known."""

from __future__ import annotations

import math
import weakref
from dataclasses import asdict, replace

import pytest
import torch
from analytic_scene import exact_depth, original_intrinsics, poses

from geoaccel.backbone import Geometry, Preprocess
from geoaccel.cameras import invert_rigid, unproject_depth
from geoaccel.eval.data.scene import EvalFrame, EvalScene, ScanRegion, make_scene
from geoaccel.eval.data.synthetic import SceneBatch, sequence
from geoaccel.eval.metrics import point_protocols
from geoaccel.eval.metrics.point_protocols import Cut3rCrop, FastVggtScannet, Pi3Points
from geoaccel.eval.metrics.pose_protocols import PairErrors
from geoaccel.eval.metrics.trajectories import trajectory_errors
from geoaccel.eval.run.prepare import Truth, network_input, truth_of
from geoaccel.eval.run.scoring import Protocol, SceneScores, _shrink, aggregate, relative_chamfer, score_scene

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def scene() -> SceneBatch:
    return sequence(0, frames=3, size=(42, 42))


def truth(scene: SceneBatch) -> Truth:
    return Truth(scene.cam_from_world[0].double(), scene.depth[0], scene.valid[0], scene.points_world[0])


def values(geometry: Geometry, scene: SceneBatch, **options) -> dict[str, float]:
    return score_scene(geometry, truth(scene), **options).values


def perfect(scene: SceneBatch) -> Geometry:
    """The truth at another scale, surest where it is nearest."""
    poses = scene.cam_from_world.clone()
    poses[..., :3, 3] *= 3
    conf = 1 / scene.depth.clamp(min=0.1)
    return Geometry(poses, scene.intrinsics, 3 * scene.depth, 3 * scene.points_world, conf)


def test_the_truth_at_another_scale_is_perfect(scene: SceneBatch) -> None:
    scores = values(perfect(scene), scene)
    assert scores["auc_30"] == scores["auc_3"] == scores["depth_delta_1_25"] == 1
    assert scores["depth_abs_rel"] == pytest.approx(0, abs=1e-5)
    assert scores["chamfer"] == pytest.approx(0, abs=1e-4)


def test_chamfer_is_over_twice_the_root_mean_square_distance_from_the_centre(scene: SceneBatch) -> None:
    """A plane of 8 x 8 points, and one whose points lie alternately a hundredth above and below it."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = torch.stack([rows, columns, torch.zeros(8, 8)], dim=-1)[None]
    bumpy = plane.clone()
    bumpy[..., 2] = 0.01 * (1 - 2 * ((rows + columns) % 2))
    flat = Truth(scene.cam_from_world[0].double(), None, torch.ones(1, 8, 8, dtype=torch.bool), plane)
    found = relative_chamfer(replace(perfect(scene), points_world=bumpy[None]), flat, "head")
    assert found == pytest.approx(0.01 / (2 * 10.5**0.5), rel=1e-3)


def test_the_larger_angle_of_a_pair_counts(scene: SceneBatch) -> None:
    """The last camera is rolled by 20 degrees about its centre: two of three pairs turn, every place stays right."""
    angle = torch.deg2rad(torch.tensor([0.0, 0.0, 20.0]))
    turn = torch.eye(4).repeat(3, 1, 1)
    turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
    turn[:, 0, 1], turn[:, 1, 0] = -angle.sin(), angle.sin()
    right = perfect(scene)
    scores = values(replace(right, cam_from_world=turn @ right.cam_from_world), scene, points=False)
    assert scores["rotation_median_deg"] == pytest.approx(20, abs=1e-2)
    assert scores["auc_15"] == pytest.approx(1 / 3)
    assert scores["auc_30"] == pytest.approx(1 / 3 + 2 / 3 * 10 / 30, abs=0.03)


def test_depth_and_confidence_errors(scene: SceneBatch) -> None:
    right = perfect(scene)
    depth = right.depth.clone()
    depth[:, 0] *= 1.5
    conf = torch.ones_like(depth)
    conf[:, 0] = 0
    scores = values(replace(right, depth=depth, conf=conf), scene)
    upside_down = values(replace(right, depth=depth, conf=1 - conf), scene)
    assert scores["depth_abs_rel"] > 0.1
    assert scores["chamfer"] > 0.01
    assert scores["conf_spearman"] > 0.5
    assert upside_down["conf_spearman"] == pytest.approx(-scores["conf_spearman"])
    valid = scene.valid[0] & (torch.arange(3)[:, None, None] > 0)  # without the frame that is off
    without = score_scene(replace(right, depth=depth), replace(truth(scene), valid=valid)).values
    assert without["depth_abs_rel"] == pytest.approx(0, abs=1e-5)


def pinhole_scene(size: tuple[int, int], frames: int = 3) -> EvalScene:
    """Images of the analytic scene with exact depth."""
    k = original_intrinsics(size)
    made = []
    for i, pose in enumerate(poses(frames)):
        depth = exact_depth(k, pose, size)
        image = (depth / 8).expand(3, *size).clone()
        made.append(
            EvalFrame(f"{i}", pose.double(), k.double(), read_image=lambda x=image: x, read_depth=lambda d=depth: d)
        )
    return make_scene("analytic", made, category="ball")


def exact_geometry(scene: EvalScene, transforms: list, size: tuple[int, int]) -> Geometry:
    """The output of a perfect model on the pixels of the network input."""
    assert scene.intrinsics is not None
    k = torch.stack([t.intrinsics_to_network(own) for t, own in zip(transforms, scene.intrinsics, strict=True)])
    pose = scene.cam_from_world
    depth = torch.stack([exact_depth(*pair, size) for pair in zip(k, pose, strict=True)])
    points = unproject_depth(depth.double(), k, pose)
    return Geometry(pose[None], k[None], depth[None], points[None].float(), torch.rand(1, len(pose), *size))


@pytest.mark.parametrize(("mode", "size"), [("crop", (60, 80)), ("pad", (90, 60)), ("crop", (200, 120))])
def test_ground_truth_lands_on_the_pixels_of_the_network(mode: str, size: tuple[int, int]) -> None:
    scene = pinhole_scene(size)
    images, transforms = network_input(scene, Preprocess(mode, 56, 14), resize=True)
    known = truth_of(scene, transforms)
    right = exact_geometry(scene, transforms, images.shape[-2:])
    assert known.depth is not None
    assert known.valid is not None
    inside = torch.stack([t.valid_mask() for t in transforms])
    assert torch.equal(known.valid, inside)
    # The nearest pixel of the map is up to half a pixel away: only the ball's edge differs.
    relative = ((known.depth - right.depth[0]).abs() / right.depth[0])[inside]
    assert relative.median() < 0.004
    assert (relative > 0.05).float().mean() < 0.03
    scored = score_scene(right, known, scene=scene, transforms=transforms)
    assert scored.category == "ball"
    assert scored.values["auc_3"] == 1
    assert scored.values["depth_abs_rel"] < 0.01
    assert scored.values["chamfer"] < 0.01


def test_images_that_are_fed_as_they_are_must_divide_into_patches() -> None:
    images, transforms = network_input(pinhole_scene((56, 84)), Preprocess(), resize=False)
    assert images.shape == (1, 3, 3, 56, 84)
    assert transforms[0].scale == (1, 1)
    with pytest.raises(ValueError, match="80 x 60 pixels do not divide into patches of 14"):
        network_input(pinhole_scene((60, 80)), Preprocess(), resize=False)


def test_depth_is_scored_where_only_intrinsics_are_missing() -> None:
    """The lenses of TUM's freiburg1 and 2 distort: no 3x3 matrix, and depth all the same."""
    full = pinhole_scene((56, 56))
    scene = replace(full, frames=tuple(replace(frame, intrinsics=None) for frame in full.frames))
    _, transforms = network_input(scene, Preprocess(), resize=False)
    known = truth_of(scene, transforms)
    right = exact_geometry(full, transforms, (56, 56))
    assert known.points_world is None
    scored = score_scene(right, known, scene=scene, transforms=transforms).values
    assert scored["depth_abs_rel"] == pytest.approx(0, abs=1e-6)
    assert "conf_spearman" in scored
    assert "chamfer" not in scored
    worse = replace(right, depth=right.depth * torch.linspace(1, 2, 56))
    assert score_scene(worse, known, scene=scene, transforms=transforms).values["depth_abs_rel"] > 0.1
    with pytest.raises(ValueError, match="'pi3-points' needs depth and intrinsics"):
        score_scene(right, known, Protocol(points="pi3-points"), scene=scene, transforms=transforms)


def test_cameras_that_stand_still_cost_no_more_than_the_trajectory() -> None:
    full = pinhole_scene((56, 56))
    spot = torch.tensor([0.3, 2.0, -0.1], dtype=torch.float64)
    still = []
    for frame in full.frames:
        world_from_cam = invert_rigid(frame.cam_from_world)
        world_from_cam[:3, 3] = spot
        pose = invert_rigid(world_from_cam).float().double()  # as a file of float32 has it
        depth = exact_depth(frame.intrinsics, pose, (56, 56))
        still.append(replace(frame, cam_from_world=pose, read_depth=lambda d=depth: d))
    scene = replace(full, frames=tuple(still))
    _, transforms = network_input(scene, Preprocess(), resize=False)
    right = exact_geometry(scene, transforms, (56, 56))
    scored = score_scene(right, truth_of(scene, transforms), scene=scene, transforms=transforms).values
    assert scored["auc_3"] == scored["auc_30"] == 1
    assert scored["depth_abs_rel"] == pytest.approx(0, abs=1e-6)
    assert scored["chamfer"] == pytest.approx(0, abs=1e-4)
    assert scored["rpe_rotation_deg"] == pytest.approx(0, abs=1e-3)
    assert not {"ate_rmse", "ate_mean", "ate_median", "ate_scale", "rpe_translation"} & scored.keys()
    moving = score_scene(right, truth_of(full, transforms), scene=full, transforms=transforms).values
    assert {"ate_rmse", "ate_mean", "ate_median", "ate_scale", "rpe_translation"} <= moving.keys()


def test_a_scene_without_depth_is_scored_by_its_poses_alone() -> None:
    full = pinhole_scene((56, 56))
    scene = replace(full, frames=tuple(replace(frame, read_depth=None) for frame in full.frames))
    _, transforms = network_input(scene, Preprocess(), resize=False)
    known = truth_of(scene, transforms)
    scored = score_scene(exact_geometry(full, transforms, (56, 56)), known, scene=scene, transforms=transforms)
    assert scored.values["auc_30"] == 1
    assert not {"depth_abs_rel", "chamfer", "conf_spearman"} & scored.values.keys()


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
    scene = pinhole_scene((56, 56))
    _, transforms = network_input(scene, Preprocess(), resize=False)
    right = exact_geometry(scene, transforms, (56, 56))
    known, chosen = truth_of(scene, transforms), Protocol(points="fastvggt-scannet")
    assert known.points_world is not None
    cloud = known.points_world.reshape(-1, 3)
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
    scene = pinhole_scene((56, 56))
    _, transforms = network_input(scene, Preprocess(), resize=False)
    right = exact_geometry(scene, transforms, (56, 56))
    right = replace(right, conf=right.conf + 5)
    known, chosen = truth_of(scene, transforms), Protocol(points=protocol)
    with pytest.raises(ValueError, match="needs the scanned points"):
        score_scene(right, known, chosen, scene=scene, transforms=transforms)
    assert known.points_world is not None
    cloud = known.points_world.reshape(-1, 3)
    box, everywhere = torch.tensor([[-49.0] * 3, [49.0] * 3]), torch.tensor([0.0, 0, 0, 1])
    region = ScanRegion(torch.ones(99, 99, 99, dtype=torch.bool), box, 1.0, everywhere)
    scene = replace(scene, read_region=lambda: region)
    scanned = replace(scene, read_points=lambda: cloud)
    good = score_scene(right, known, chosen, scene=scanned, transforms=transforms).values["chamfer"]
    shifted = replace(scene, read_points=lambda: cloud * torch.tensor([1.0, 1.0, 1.3]))
    bad = score_scene(right, known, chosen, scene=shifted, transforms=transforms).values["chamfer"]
    assert good < 0.06
    assert bad > 3 * good


def test_dtu_is_scored_within_mask_box_and_plane_or_not_at_all() -> None:
    scene = pinhole_scene((56, 56))
    _, transforms = network_input(scene, Preprocess(), resize=False)
    right = exact_geometry(scene, transforms, (56, 56))
    known, chosen = truth_of(scene, transforms), Protocol(points="dtu-mvs")
    assert known.points_world is not None
    cloud = known.points_world.reshape(-1, 3)
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


def test_wrong_protocols_are_one_line() -> None:
    for options in ({"pose": "vgt-co3d"}, {"points": "pi3-point"}, {"depth": "meridian"}, {"points_from": "heads"}):
        with pytest.raises(ValueError, match=r"unknown .*; known: "):
            Protocol(**options)


def test_data_sets_are_means_over_categories_and_over_scenes_that_have_a_score() -> None:
    def scene(name: str, category: str, error: float, **values: float) -> SceneScores:
        pairs = PairErrors(torch.tensor([error]), torch.tensor([0.0]), category)
        return SceneScores(name, category, 2, pairs, values)

    rows = [scene("a", "apple", 0.0, x=1.0), scene("b", "apple", 0.0, x=2.0), scene("c", "car", 90.0, y=5.0)]
    scores = aggregate(rows, Protocol())
    assert scores["auc_30"] == 0.5  # two categories, not three scenes
    assert scores["auc_30_pooled"] == pytest.approx(2 / 3)
    assert (scores["x"], scores["y"]) == (1.5, 5.0)
    assert aggregate([], Protocol()) == {}


def test_one_scene_without_a_number_does_not_spoil_the_mean() -> None:
    pairs = PairErrors(torch.tensor([0.0]), torch.tensor([0.0]))
    found = [{"x": 0.4, "z": math.nan}, {"x": math.nan, "y": math.inf}, {"y": 2.0}]
    scores = aggregate([SceneScores("s", None, 2, pairs, values) for values in found], Protocol())
    assert (scores["x"], scores["y"]) == (0.4, 2.0)
    assert math.isnan(scores["z"])

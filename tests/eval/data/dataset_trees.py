"""Small datasets in their official layouts: three photographs of one tilted wall, of which all geometry is known."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tree_parts import (
    Tree,
    depth_of_rays,
    pinhole,
    wall_depth,
    write_depth_png,
    write_photograph,
    write_ply,
    write_text,
)

from geoaccel.cameras import invert_rigid
from geoaccel.eval.data.co3d_layout import SequenceToWrite, viewpoint_from_opencv, write_co3d

OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))


def seven_scenes(root: Path, poses: Tensor) -> Tree:
    tree = Tree("seven_scenes", root, "chess_seq-03", pinhole(525, 525, 320, 240), (480, 640), can_be_partial=True)
    write_text(root / "chess" / "TestSplit.txt", "sequence3")
    write_text(root / "chess" / "TrainSplit.txt", "sequence1")
    folder = root / "chess" / "seq-03"
    for i, pose in enumerate(poses):
        tree.images.append(write_photograph(folder / f"frame-{i:06d}.color.png", tree.size, i))
        depth = wall_depth(tree.intrinsics, pose, tree.size).nan_to_num(1.0)
        tree.depths.append(write_depth_png(folder / f"frame-{i:06d}.depth.proj.png", depth, 1000))
        write_text(folder / f"frame-{i:06d}.pose.txt", *invert_rigid(pose))
    return tree


def neural_rgbd(root: Path, poses: Tensor) -> Tree:
    focal = 32 / np.tan(np.pi / 6)
    tree = Tree("neural_rgbd", root, "kitchen", pinhole(focal, focal, 32, 24), (48, 64))
    rows = []
    for i, pose in enumerate(poses):
        tree.images.append(write_photograph(root / "kitchen" / "images" / f"img{i}.png", tree.size, i))
        depth = wall_depth(tree.intrinsics, pose, tree.size).nan_to_num(1.0)
        tree.depths.append(write_depth_png(root / "kitchen" / "depth" / f"depth{i}.png", depth, 1000))
        rows += list(invert_rigid(pose) @ OPENGL)
    write_text(root / "kitchen" / "poses.txt", *rows)
    return tree


def dtu(root: Path, poses: Tensor) -> Tree:
    tree = Tree("dtu", root, "scan24", pinhole(60, 62, 33.5, 24.5), (48, 64), tolerance=1e-5, can_be_partial=True)
    for i, pose in enumerate(poses):
        folder = root / "scan24"
        tree.images.append(write_photograph(folder / "images" / f"{i:08d}.jpg", tree.size, i))
        tree.depths.append(folder / "depths" / f"{i:08d}.npy")
        tree.depths[-1].parent.mkdir(exist_ok=True)
        np.save(tree.depths[-1], wall_depth(tree.intrinsics, pose, tree.size).numpy().astype(np.float32))
        (folder / "binary_masks").mkdir(exist_ok=True)
        Image.new("L", (64, 48), 255).save(folder / "binary_masks" / f"{i:08d}.png")
        stored = tree.intrinsics - 0.5 * torch.tensor([[0, 0, 1], [0, 0, 1], [0, 0, 0.0]])
        camera = folder / "cams" / f"{i:08d}_cam.txt"
        write_text(camera, "extrinsic", *pose, "", "intrinsic", *stored, "", "425.0 2.5")
    write_ply(root / "Points" / "stl" / "stl024_total.ply", np.eye(3))
    return tree


def scannet(root: Path, poses: Tensor) -> Tree:
    tree = Tree("scannet", root, "scene0000_00", pinhole(80, 80, 48.5, 36.5), (72, 96), tolerance=0.03)
    tree.can_be_partial = True
    folder = root / "scene0000_00"
    small = pinhole(40, 40, 24.5, 18.5)
    shift = torch.zeros(3, 3, dtype=torch.float64)
    shift[:2, 2] = 0.5
    for camera, intrinsics in (("color", tree.intrinsics), ("depth", small)):
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[:3, :3] = intrinsics - shift
        write_text(folder / "intrinsic" / f"intrinsic_{camera}.txt", *matrix)
        write_text(folder / "intrinsic" / f"extrinsic_{camera}.txt", *torch.eye(4))
    for i, pose in enumerate(poses):
        tree.images.append(write_photograph(folder / "color" / f"{i}.jpg", tree.size, i))
        depth = wall_depth(small, pose, (36, 48)).nan_to_num(1.0)
        tree.depths.append(write_depth_png(folder / "depth" / f"{i}.png", depth, 1000))
        write_text(folder / "pose" / f"{i}.txt", *invert_rigid(pose).nan_to_num(-torch.inf))
    write_ply(folder / "scene0000_00_vh_clean_2.ply", np.eye(3))
    return tree


def quaternion(rotation: Tensor) -> list[float]:  # w, x, y, z
    w = (1 + rotation.trace()).sqrt() / 2  # far from half a turn
    x, y, z = rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]
    return [float(w), *(float(n / (4 * w)) for n in (x, y, z))]


LENS = (40.0, 41.0, 32.5, 24.25, -0.05, 0.02, 0.001, -0.002, 0.003, -0.001, 0.0005, 0.0004)


def eth3d(root: Path, poses: Tensor) -> Tree:
    from geoaccel.eval.data.colmap_model import thin_prism_fisheye_pixels

    tree = Tree("eth3d", root, "courtyard", pinhole(45, 46, 34, 25), (50, 68), tolerance=0.03)
    folder = root / "courtyard"
    kinds = {"undistorted": ("PINHOLE", tree.size, (45, 46, 34, 25)), "jpg": ("THIN_PRISM_FISHEYE", (48, 64), LENS)}
    for kind, (model, size, params) in kinds.items():
        inside = "dslr_images_undistorted" if kind == "undistorted" else "dslr_images"
        numbers = " ".join(map(str, params))
        write_text(
            folder / f"dslr_calibration_{kind}" / "cameras.txt",
            "# a comment",
            f"0 {model} {size[1]} {size[0]} {numbers}",
        )
        rows = []
        for i, pose in enumerate(poses):
            values = " ".join(repr(x) for x in (*quaternion(pose[:3, :3]), *pose[:3, 3].tolist()))
            rows += [f"{i} {values} 0 {inside}/DSC_{i:04d}.JPG", "1.5 2.5 -1"]
        write_text(folder / f"dslr_calibration_{kind}" / "images.txt", "# a comment", *rows)
    # which ray each distorted pixel sees, by search among many
    fine = np.stack(np.meshgrid(np.linspace(-1, 1, 401), np.linspace(-1, 1, 401)), axis=-1)
    seen = thin_prism_fisheye_pixels(fine, LENS)
    fine, seen = fine.reshape(-1, 2), seen.reshape(-1, 2)
    order = np.argsort(-np.linalg.norm(seen % 1 - 0.5, axis=-1))  # the ray nearest to a pixel's centre comes last
    fine = fine[order]
    u, v = seen[order].T
    inside_image = (u >= 0) & (u < 64) & (v >= 0) & (v < 48)
    for i, pose in enumerate(poses):
        image = folder / "images" / "dslr_images_undistorted" / f"DSC_{i:04d}.JPG"
        tree.images.append(write_photograph(image, tree.size, i, format="JPEG"))
        depth = np.full((48, 64), np.inf, dtype=np.float32)
        values = depth_of_rays(torch.from_numpy(fine), pose).numpy()[inside_image]
        depth[v[inside_image].astype(int), u[inside_image].astype(int)] = values
        path = folder / "ground_truth_depth" / "dslr_images" / f"DSC_{i:04d}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        depth.tofile(path)
        tree.depths.append(path)
    scans = folder / "dslr_scan_eval"
    write_ply(scans / "scan1.ply", np.eye(3))
    matrix = "1 0 0 10 \n0 1 0 20 \n0 0 1 30 \n0 0 0 1 "
    write_text(
        scans / "scan_alignment.mlp",
        f'<!DOCTYPE MeshLabDocument>\n<MeshLabProject><MeshGroup><MLMesh label="s" filename="scan1.ply">'
        f"<MLMatrix44>\n{matrix}\n</MLMatrix44></MLMesh></MeshGroup></MeshLabProject>",
    )
    return tree


def realestate10k(root: Path, poses: Tensor) -> Tree:
    tree = Tree("realestate10k", root, "000c3ab189999a83", pinhole(32, 40, 32, 24), (48, 64))
    rows = ["https://www.youtube.com/watch?v=0"]
    for i, pose in enumerate(poses):
        stamp = 10_000_000 + 33_367 * i
        tree.images.append(write_photograph(root / "test" / tree.scene / f"{stamp}.png", tree.size, i))
        values = " ".join(repr(x) for x in (32 / 64, 40 / 48, 0.5, 0.5, 0.0, 0.0, *pose[:3].flatten().tolist()))
        rows.append(f"{stamp} {values}")
    write_text(root / "test" / f"{tree.scene}.txt", *rows)
    return tree


def tum_rgbd(root: Path, poses: Tensor) -> Tree:
    tree = Tree("tum_rgbd", root, "rgbd_dataset_freiburg3_desk", pinhole(535.4, 539.2, 320.6, 248.1), (480, 640))
    folder = root / tree.scene
    tables: dict[str, list[str]] = {"rgb": ["# color images"], "depth": ["# depth"], "groundtruth": ["# t xyz q"]}
    for i, pose in enumerate(poses):
        time = 1341845688.5 + i
        tree.images.append(write_photograph(folder / "rgb" / f"{time:.6f}.png", tree.size, i))
        depth = wall_depth(tree.intrinsics, pose, tree.size).nan_to_num(1.0)
        tree.depths.append(write_depth_png(folder / "depth" / f"{time + 0.004:.6f}.png", depth, 5000))
        world_from_cam = invert_rigid(pose)
        w, x, y, z = quaternion(world_from_cam[:3, :3])
        values = " ".join(repr(n) for n in (*world_from_cam[:3, 3].tolist(), x, y, z, w))
        tables["rgb"].append(f"{time:.6f} rgb/{time:.6f}.png")
        tables["depth"].append(f"{time + 0.004:.6f} depth/{time + 0.004:.6f}.png")
        tables["groundtruth"] += [f"{time - 0.5:.4f} 0 0 0 0 0 0 1", f"{time - 0.002:.4f} {values}"]
    for name, rows in tables.items():
        write_text(folder / f"{name}.txt", *rows)
    return tree


def kitti_odometry(root: Path, poses: Tensor) -> Tree:
    tree = Tree("kitti_odometry", root, "04", pinhole(718.9, 718.9, 607.7, 185.7), (376, 1241))
    folder, stored = root / "sequences" / "04", pinhole(718.9, 718.9, 607.2, 185.2)
    rows = []
    to_colour = torch.tensor([0.06, -0.001, 0.002], dtype=torch.float64)
    for i, pose in enumerate(poses):
        tree.images.append(write_photograph(folder / "image_2" / f"{i:06d}.png", tree.size, i))
        grey = pose.clone()
        grey[:3, 3] -= to_colour
        rows.append(invert_rigid(grey)[:3].flatten())
    lines = []
    for camera, shift in (("P0", torch.zeros(3).double()), ("P2", to_colour), ("Tr", torch.ones(3).double())):
        numbers = torch.cat([stored, (stored @ shift)[:, None]], dim=1).flatten().tolist()
        lines.append(f"{camera}: {' '.join(map(repr, numbers))}")
    write_text(folder / "calib.txt", *lines)
    write_text(root / "poses" / "04.txt", *rows)
    return tree


def folder_poses(root: Path, poses: Tensor) -> Tree:
    tree = Tree("folder", root / "wall", "wall", pinhole(60, 62, 33.5, 24.5), (48, 64))
    stored = [[60, 0, 33.0], [0, 62, 24.0], [0, 0, 1]]
    frames = []
    for i, pose in enumerate(poses):
        tree.images.append(write_photograph(tree.root / "images" / f"{i:04d}.jpg", tree.size, i))
        entry = {"file": f"images/{i:04d}.jpg", "extrinsic": pose[:3].tolist(), "intrinsic": stored}
        frames.append({**entry, "width": 64, "height": 48})
    (tree.root / "poses.json").write_text(json.dumps({"name": "wall", "units": "m", "frames": frames}))
    depth = torch.stack([wall_depth(tree.intrinsics, p, tree.size).nan_to_num(1.0) for p in poses])
    names = np.array([path.name for path in tree.images])
    np.savez(tree.root / "depth.npz", depth_mm=(depth * 1000).round().numpy().astype(np.uint16), files=names)
    write_ply(tree.root / "points.ply", np.eye(3))
    return tree


def folder_nerfstudio(root: Path, poses: Tensor) -> Tree:
    tree = Tree("folder", root / "wall", "wall", pinhole(60, 62, 33.5, 24.5), (48, 64))
    frames = []
    for i, pose in enumerate(poses):
        tree.images.append(write_photograph(tree.root / "images" / f"{i:04d}.jpg", tree.size, i))
        matrix = (invert_rigid(pose) @ OPENGL).tolist()
        frames.append({"file_path": f"images/{i:04d}.jpg", "transform_matrix": matrix})
    camera = {"camera_model": "OPENCV", "fl_x": 60, "fl_y": 62, "cx": 33.5, "cy": 24.5, "w": 64, "h": 48, "k1": 0.0}
    write_ply(tree.root / "sparse_pc.ply", np.eye(3))
    document = {**camera, "ply_file_path": "sparse_pc.ply", "frames": frames}
    (tree.root / "transforms.json").write_text(json.dumps(document))
    return tree


def folder_colmap_text(root: Path, poses: Tensor) -> Tree:
    tree = Tree("folder", root, "wall", pinhole(60, 62, 33.5, 24.5), (48, 64))
    model = root / "wall" / "sparse" / "0"
    write_text(model / "cameras.txt", "# cameras", "3 PINHOLE 64 48 60 62 33.5 24.5")
    rows = []
    for i, pose in enumerate(poses):
        tree.images.append(write_photograph(root / "wall" / "images" / f"a view {i}.jpg", tree.size, i))
        values = " ".join(repr(x) for x in (*quaternion(pose[:3, :3]), *pose[:3, 3].tolist()))
        rows += [f"{i + 5} {values} 3 a view {i}.jpg", "" if i == 1 else "1 2 -1"]
    write_text(model / "images.txt", "# images", *rows)
    write_text(model / "points3D.txt", "# points", "1 1 0 0 9 9 9 0.5 5 0", "2 0 1 0 9 9 9 0.5", "9 0 0 1 9 9 9 0.5")
    return tree


def folder_colmap_binary(root: Path, poses: Tensor) -> Tree:
    tree = Tree("folder", root, "wall", pinhole(60, 60, 33.5, 24.5), (48, 64))
    model = root / "wall" / "sparse"
    model.mkdir(parents=True)
    (model / "cameras.bin").write_bytes(struct.pack("<QiiQQ4d", 1, 3, 2, 64, 48, 60, 33.5, 24.5, 0.0))
    data = struct.pack("<Q", len(poses))
    for i, pose in enumerate(poses):
        tree.images.append(write_photograph(root / "wall" / "images" / f"{i}.jpg", tree.size, i))
        data += struct.pack("<i7di", i + 1, *quaternion(pose[:3, :3]), *pose[:3, 3].tolist(), 3) + f"{i}.jpg".encode()
        data += b"\0" + struct.pack("<Q", i) + struct.pack("<ddq", 1, 2, -1) * i
    (model / "images.bin").write_bytes(data)
    points = struct.pack("<Q", 3)
    for i, point in enumerate(np.eye(3)):
        points += struct.pack("<Q3d3BdQ", i, *point, 9, 9, 9, 0.5, i) + struct.pack("<ii", 1, 0) * i
    (model / "points3D.bin").write_bytes(points)
    return tree


def co3d(root: Path, poses: Tensor) -> Tree:
    tree = Tree("co3d", root, "apple_110_1_2", pinhole(60, 62, 33.5, 24.5), (48, 64), tolerance=5e-3)
    depth = torch.stack([wall_depth(tree.intrinsics, p, tree.size).nan_to_num(1.0) for p in poses])
    images = torch.zeros(len(poses), 3, 48, 64) + torch.arange(len(poses))[:, None, None, None] * 40 / 255
    sequence = SequenceToWrite(
        "110_1_2", images, tree.intrinsics.expand(len(poses), 3, 3), poses, depth=depth, points=torch.eye(3)
    )
    write_co3d(root, [sequence], category="apple")
    tree.images = sorted((root / "apple" / "110_1_2" / "images").iterdir())
    tree.depths = sorted((root / "apple" / "110_1_2" / "depths").iterdir())
    return tree


def co3d_lists(root: Path, poses: Tensor) -> Tree:
    tree = Tree("co3d_lists", root, "apple_110_1_2", None, (48, 64))
    tree.options = {"annotations": root / "lists"}
    entries = []
    for i, pose in enumerate(poses):
        file = f"apple/110_1_2/images/frame{i:06d}.jpg"
        tree.images.append(write_photograph(root / file, tree.size, i))
        viewpoint = viewpoint_from_opencv(torch.eye(3), pose, tree.size)
        entries.append({"filepath": file, "R": viewpoint["R"], "T": viewpoint["T"], "focal_length": [1, 1]})
    write_vggt_list(root / "lists", "apple", {"110_1_2": entries})
    return tree


def write_vggt_list(folder: Path, category: str, sequences: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{category}_test.jgz").write_bytes(gzip.compress(json.dumps(sequences).encode()))


TREES: dict[str, Callable[[Path, Tensor], Tree]] = {
    writer.__name__: writer
    for writer in (
        *(seven_scenes, neural_rgbd, dtu, scannet, eth3d, realestate10k, tum_rgbd, co3d, co3d_lists, kitti_odometry),
        *(folder_poses, folder_nerfstudio, folder_colmap_text, folder_colmap_binary),
    )
}

"""A result as one self-contained HTML file: points, cameras, photographs, and a renderer.

The page has its own small renderer (``assets/``, WebGL 2). Points stay packed as by `geoaccel.export.view`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from geoaccel.export.view import View

LARGEST_FILE = 20_000_000
"""Most bytes of a page: points are downsampled to fit."""

LARGEST_PHOTOGRAPHS = 6_000_000
"""Most bytes of all photographs in the page; if there are more, every other camera has none."""

POINT_BYTES = 11
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SCRIPTS = ("vectors.js", "painter.js", "scene.js", "controls.js")
FRUSTUM = 0.06
"""Depth of a drawn camera, as a fraction of the scene's radius."""


def html_page(results: Mapping[str, View], title: str) -> str:
    """The whole page.

    Args:
        results: One, or two to compare, by name; the cameras are those of the last one.
        title: In the head of the page.
    """
    *_, last = results.values()
    around = surroundings(last)
    photographs = _photographs(last)
    facts: dict[str, Any] = {"title": title, "unit": last.unit, **around, "cameras": []}
    for frame, photograph in enumerate(photographs):
        facts["cameras"].append(camera(last, frame, FRUSTUM * around["radius"]) | {"photograph": photograph})
    code = "\n".join(_part(name) for name in SCRIPTS)
    left = LARGEST_FILE - len(json.dumps(facts)) - len(code) - 20_000
    most = int(left * 3 / 4 / POINT_BYTES) // len(results)
    thinned = {name: view.thin(most) for name, view in results.items()}
    facts["results"] = [_facts(name, view) for name, view in thinned.items()]
    blobs = [
        f'<script type="text/plain" id="points-{i}">{base64.b64encode(packed(view)).decode()}</script>'
        for i, view in enumerate(thinned.values())
    ]
    written = json.dumps(facts).replace("<", "\\u003c")  # a name must not end the element
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{_part('scene.css')}</style></head>\n<body>\n{_part('scene.html')}"
        f'<script type="application/json" id="facts">{written}</script>\n'
        + "\n".join(blobs)
        + f"\n<script>{code}</script></body></html>\n"
    )


def packed(view: View) -> bytes:
    """Points as the page reads them: positions, colours, ranks, jumps."""
    return view.points.astype("<u2").tobytes() + view.colors.tobytes() + view.rank.tobytes() + view.jump.tobytes()


def surroundings(view: View) -> dict[str, Any]:
    """Size of a scene, its up direction, and the initial viewpoint: behind its cameras, with everything in view."""
    points = view.world()[:: max(1, len(view) // 50_000)]
    centre = np.median(points, axis=0)
    radius = float(np.percentile(np.linalg.norm(points - centre, axis=1), 90)) or 1.0
    if len(view.names) == 0:
        up, forward = np.array([0.0, -1.0, 0.0]), np.array([0.0, 0.0, 1.0])
    else:
        rotations = view.cam_from_world[:, :3, :3]
        up, forward = -_unit(rotations[:, 1].sum(axis=0)), _unit(rotations[:, 2].sum(axis=0))
    if abs(up @ forward) > 0.9:  # they look down, or all around
        forward = _unit(np.cross(up, [1.0, 0.0, 0.0]) if abs(up[0]) < 0.9 else np.cross(up, [0.0, 1.0, 0.0]))
    eyes = -np.einsum("sji,sj->si", view.cam_from_world[:, :3, :3], view.cam_from_world[:, :3, 3])
    reach = max(radius, *np.linalg.norm(eyes - centre, axis=1)) if len(eyes) else radius
    back = _unit(up * 0.35 - (forward - up * (up @ forward)))
    eye = centre + 2.6 * min(reach, 2 * radius) * back
    return {"radius": radius, "up": up.tolist(), "home": {"eye": eye.tolist(), "target": centre.tolist()}}


def camera(view: View, frame: int, depth: float) -> dict[str, Any]:
    """Pose of a camera, and the corners of its image at some depth, from the top left on."""
    pose = view.cam_from_world[frame].astype(np.float64)
    rotation = pose[:3, :3].T
    eye = -rotation @ pose[:3, 3]
    fx, fy, cx, cy = view.lens[frame].astype(np.float64)
    rays = [((u - cx) / fx, (v - cy) / fy, 1.0) for u, v in ((0, 0), (1, 0), (1, 1), (0, 1))]
    return {
        "name": str(view.names[frame]),
        "eye": eye.tolist(),
        "forward": rotation[:, 2].tolist(),
        "up": (-rotation[:, 1]).tolist(),
        "corners": [(eye + depth * rotation @ np.array(ray)).tolist() for ray in rays],
    }


def _facts(name: str, view: View) -> dict[str, Any]:
    return {
        "name": name,
        "count": len(view),
        "low": view.low.tolist(),
        "step": view.step.tolist(),
        "cut": view.cut,
        "rated": view.rated,
    }


def _photographs(view: View) -> list[str]:
    """Data URL of each camera's photograph; empty for those without."""
    files = [view.photograph(frame) for frame in range(len(view.names))]
    every = 1
    while sum(len(file) for file in files[::every]) * 4 / 3 > LARGEST_PHOTOGRAPHS:
        every *= 2
    return [
        f"data:image/jpeg;base64,{base64.b64encode(file).decode()}" if file and frame % every == 0 else ""
        for frame, file in enumerate(files)
    ]


def _part(name: str) -> str:
    return files("geoaccel.viewer").joinpath("assets", name).read_text(encoding="utf-8")


def _unit(vector: np.ndarray) -> np.ndarray:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float64)

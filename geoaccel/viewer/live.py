"""Live viewer in the browser, by viser: changes of the controls are sent to all viewers at once."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from geoaccel.errors import MissingPackage
from geoaccel.export.view import LARGEST_CUT, LARGEST_JUMP, View
from geoaccel.viewer.page import FRUSTUM, surroundings

SIDE_BY_SIDE = "side by side"
BLENDED = "blended"
IMAGE, CONFIDENCE = "image", "confidence"
APART = 3.0
"""Distance between two results side by side, in radii of the scene."""


def serve(results: Mapping[str, View], host: str, port: int) -> Live:
    """Start a server that shows results.

    Args:
        results: One, or two to compare, by name.
        host: Address to listen on.
        port: Port; another one is used if it is taken.

    Raises:
        MissingPackage: Without viser.
    """
    try:
        import viser
    except ImportError as error:
        raise MissingPackage(
            f"geoaccel view needs viser ({error}): pip install 'geoaccel[view]', or write a page: --html scene.html"
        ) from None
    return Live(viser.ViserServer(host=host, port=port, verbose=False), results)


class Live:
    """A server and the scene that it shows.

    Args:
        server: The viser server.
        results: One, or two to compare, by name.
    """

    def __init__(self, server: Any, results: Mapping[str, View]) -> None:
        self.server, self.results = server, dict(results)
        *_, self.last = self.results.values()
        self.around = surroundings(self.last)
        server.scene.set_up_direction(tuple(self.around["up"]))
        server.initial_camera.position = tuple(self.around["home"]["eye"])
        server.initial_camera.look_at = tuple(self.around["home"]["target"])
        self._controls()
        right = np.cross(np.subtract(self.around["home"]["target"], self.around["home"]["eye"]), self.around["up"])
        self.beside = APART * self.around["radius"] * right / np.linalg.norm(right)
        self.clouds: dict[str, Any] = {}
        self.frusta = [self._frustum(frame) for frame in range(len(self.last.names))]
        self.update()

    @property
    def address(self) -> str:
        """URL of the viewer."""
        return f"http://{self.server.get_host()}:{self.server.get_port()}"

    def wait(self) -> None:
        """Serve until interrupted."""
        while True:
            time.sleep(1)

    def stop(self) -> None:
        """Stop the server."""
        self.server.stop()

    def _controls(self) -> None:
        gui, cut = self.server.gui, min(LARGEST_CUT, round(max(view.cut for view in self.results.values())))
        names = list(self.results)
        rated = not any(view.rated for view in self.results.values())
        if len(names) > 1:
            self.show = gui.add_dropdown("show", (SIDE_BY_SIDE, BLENDED, *names))
            self.mix = gui.add_slider("blend (%)", 0, 100, 1, 50)
        self.cut = gui.add_slider("leave out the least confident (%)", 0, LARGEST_CUT, 1, cut, disabled=rated)
        self.edge = gui.add_slider("leave out depth edges over (%)", 1, 50, 1, 50, disabled=rated)
        self.size = gui.add_slider("size of points", 1, 40, 1, 8)
        self.colour = gui.add_dropdown("colour by", (IMAGE, CONFIDENCE), disabled=rated)
        self.cameras = gui.add_checkbox("cameras", True)
        shot, export = gui.add_button("screenshot"), gui.add_button("save these points")
        self.counted = gui.add_markdown("")
        controls = [self.cut, self.edge, self.size, self.colour, self.cameras]
        for control in controls + ([self.show, self.mix] if len(names) > 1 else []):
            control.on_update(lambda _: self.update())
        shot.on_click(self._screenshot)
        export.on_click(lambda event: event.client.send_file_download("points.ply", self.ply()))

    def _frustum(self, frame: int) -> Any:
        from PIL import Image
        from viser.transforms import SO3

        pose = self.last.cam_from_world[frame].astype(np.float64)
        rotation, (height, width) = pose[:3, :3].T, self.last.size[frame]
        file = self.last.photograph(frame)
        frustum = self.server.scene.add_camera_frustum(
            f"/cameras/{frame:05d} {self.last.names[frame]}",
            fov=float(2 * np.arctan(0.5 / self.last.lens[frame][1])),
            aspect=float(width / height),
            scale=FRUSTUM * self.around["radius"],
            image=np.asarray(Image.open(io.BytesIO(file))) if file else None,
            wxyz=SO3.from_matrix(rotation).wxyz,
            position=-rotation @ pose[:3, 3],
        )

        @frustum.on_click
        def _(event: Any) -> None:
            camera = event.client.camera
            with event.client.atomic():
                camera.wxyz, camera.position = frustum.wxyz, frustum.position
                camera.look_at = np.asarray(frustum.position) + self.around["radius"] * rotation[:, 2]

        return frustum

    def shown(self) -> dict[str, np.ndarray]:
        """Which points of each visible result are shown [N], bool."""
        found = {}
        way = self.show.value if len(self.results) > 1 else next(iter(self.results))
        for number, (name, view) in enumerate(self.results.items()):
            if way not in (SIDE_BY_SIDE, BLENDED, name):
                continue
            keep = np.ones(len(view), bool)
            if view.rated:
                keep = (view.rank >= 255 * self.cut.value / 100) & (
                    (view.jump <= 255 * self.edge.value / 100 / LARGEST_JUMP) | (self.edge.value >= 100 * LARGEST_JUMP)
                )
            if way == BLENDED:
                drawn = np.random.default_rng(0).random(len(view)) < self.mix.value / 100
                keep &= drawn if number else ~drawn
            found[name] = keep
        return found

    def update(self) -> None:
        """Apply the controls."""
        shown = self.shown()
        apart = len(self.results) > 1 and self.show.value == SIDE_BY_SIDE
        with self.server.atomic():
            for number, name in enumerate(self.results):
                self._cloud(name, shown.get(name), number * self.beside if apart else np.zeros(3))
            for frustum in self.frusta:
                frustum.visible = self.cameras.value
            count = sum(int(keep.sum()) for keep in shown.values())
            self.counted.content = f"{count:,} points, {len(self.frusta)} cameras; unit: {self.last.unit}"

    def _cloud(self, name: str, keep: np.ndarray | None, offset: np.ndarray) -> None:
        if name in self.clouds:
            self.clouds.pop(name).remove()
        if keep is None or not keep.any():
            return
        view = self.results[name]
        self.clouds[name] = self.server.scene.add_point_cloud(
            f"/{name}",
            points=view.world()[keep],
            colors=painted_ranks(view.rank[keep]) if self.colour.value == CONFIDENCE else view.colors[keep],
            point_size=self.size.value * self.around["radius"] / 2000,
            point_shape="circle",
            position=tuple(offset),
        )

    def _screenshot(self, event: Any) -> None:
        from PIL import Image

        picture, camera = io.BytesIO(), event.client.camera
        pixels = event.client.get_render(height=camera.image_height, width=camera.image_width)
        Image.fromarray(pixels).save(picture, "PNG")
        event.client.send_file_download("view.png", picture.getvalue())

    def ply(self) -> bytes:
        """The visible points as a PLY file."""
        import trimesh

        from geoaccel.export.ply import with_unit

        shown = self.shown()
        points = np.concatenate([self.results[name].world()[keep] for name, keep in shown.items()])
        colors = np.concatenate([self.results[name].colors[keep] for name, keep in shown.items()])
        return with_unit(trimesh.PointCloud(points, colors=colors).export(file_type="ply"), self.last.unit)


def painted_ranks(rank: np.ndarray) -> np.ndarray:  # [N, 3]
    """Colours of confidence, as the page has them (``rank`` [N], uint8)."""
    t = rank[:, None] / 255
    ramp = np.concatenate([1.6 * t**3 - 0.6 * t + 0.25, 0.05 + 0.95 * t, 0.35 + 0.75 * t - 0.95 * t * t], axis=1)
    return (255 * ramp.clip(0, 1)).round().astype(np.uint8)

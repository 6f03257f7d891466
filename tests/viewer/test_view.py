"""What viewers are given: places, ranks and jumps, of any folder; pages within their size; and what is served live."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic_scene import checked_memory  # noqa: F401 (a fixture)
from browser import CHROMIUM, WHY_NOT, browser
from command_line import refused, run
from export_scenes import small  # noqa: F401 (a fixture)
from PIL import Image
from view_scenes import a_view, two_results

from geoaccel.edges import depth_edges, depth_jumps
from geoaccel.export.view import DENSE_FILE, FILE, LARGEST_CUT, make_view, read_view, view_of
from geoaccel.viewer import page as pages
from geoaccel.viewer.folder import read_results

pytestmark = pytest.mark.usefixtures("checked_memory")


def test_a_view_holds_the_scene(small: Any, tmp_path: Path) -> None:
    small.save(tmp_path / "scene", formats="view", conf_percentile=25)
    view = read_view(tmp_path / "scene" / FILE)
    keep = small.mask.numpy()
    points = small.points_world.numpy()[keep]
    assert len(view) == len(points) == keep.sum()
    extent = points.max(axis=0) - points.min(axis=0)
    assert (np.abs(view.world() - points) <= extent / 65535 + 1e-5).all()
    conf = small.conf.numpy()[keep]
    share = (conf[None] < conf[:, None]).mean(axis=1)
    np.testing.assert_allclose(view.rank / 255, share, atol=1 / 200)
    np.testing.assert_array_equal(view.colors, (small.images.permute(0, 2, 3, 1).numpy()[keep] * 255).round())
    assert view.rated
    assert view.cut == pytest.approx(25, abs=1)
    assert view.names.tolist() == small.names
    for frame in range(len(small)):
        assert view.photograph(frame).startswith(b"\xff\xd8")
    np.testing.assert_allclose(view.lens[:, 0] * view.size[:, 1], small.intrinsics[:, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.03])
def test_what_masks_leave_out_is_not_called_unsure(small: Any, tmp_path: Path, share: float) -> None:
    chosen = torch.rand(small.mask.shape, generator=torch.Generator().manual_seed(0)) < share
    by_option, by_hand = tmp_path / "option", tmp_path / "hand"
    cloud = replace(small, selected=chosen).save(by_option, formats="view,npz", conf_percentile=25)
    small.save(by_hand, formats="view", conf_percentile=25, mask=chosen)
    view = read_view(by_option / FILE)
    assert len(view) == int((small.mask & chosen).sum())
    assert int((view.rank >= 255 * view.cut / 100).sum()) == pytest.approx(len(cloud), abs=2)
    (by_option / FILE).unlink()
    (of_arrays,) = read_results(by_option).values()
    for name in ("points", "colors", "rank", "jump"):
        np.testing.assert_array_equal(getattr(of_arrays, name), getattr(view, name))
        np.testing.assert_array_equal(getattr(read_view(by_hand / FILE), name), getattr(view, name))
    assert read_view(by_hand / FILE).cut == of_arrays.cut == view.cut > 0


def test_a_result_of_the_surest_points_alone_is_within_the_slider(small: Any, tmp_path: Path) -> None:
    pytest.importorskip("viser")
    from geoaccel.viewer.live import serve

    small.save(tmp_path / "scene", formats="view", conf_percentile=99.9)
    view = read_view(tmp_path / "scene" / FILE)
    assert view.cut == LARGEST_CUT
    older = replace(view, cut=99.9)  # as earlier versions wrote it
    shown = serve({"result": older}, "localhost", free_port())
    assert shown.cut.value == LARGEST_CUT
    shown.stop()


def test_jumps_are_those_of_the_edge_filter() -> None:
    generator = torch.Generator().manual_seed(0)
    depth = 1 + torch.rand(2, 9, 11, generator=generator)
    mask = torch.rand(2, 9, 11, generator=generator) > 0.2
    conf = torch.rand(2, 9, 11, generator=generator)
    jumps = depth_jumps(depth, mask, conf)
    for jump in (0.1, 0.3):
        assert torch.equal(depth_edges(depth, mask, jump, conf), mask & (jumps > jump))
    assert (jumps[~mask] == 0).all()


def test_a_few_far_points_do_not_make_the_others_coarse() -> None:
    view, rng = a_view(), np.random.default_rng(0)
    points = rng.normal(size=(5000, 3)).astype(np.float32)
    points[:3] = 1e6
    cameras = {name: getattr(view, name) for name in ("cam_from_world", "lens", "size", "names")}
    found = make_view(points, np.zeros((5000, 3)), cameras, unit="metre")
    assert len(found) == 4997
    assert np.abs(found.world() - points[3:]).max() < 1e-3
    assert not found.rated


@pytest.mark.parametrize("formats", ["npz", "ply,colmap", "ply"])
def test_folders_of_other_formats(small: Any, tmp_path: Path, formats: str) -> None:
    small.save(tmp_path / "scene", formats=formats, conf_percentile=0)
    (view,) = read_results(tmp_path / "scene").values()
    wanted = view_of(small)
    np.testing.assert_allclose(np.sort(view.world(), axis=0), np.sort(wanted.world(), axis=0), atol=1e-3)
    assert view.rated == (formats == "npz")
    if formats != "ply":
        np.testing.assert_allclose(view.cam_from_world, wanted.cam_from_world, atol=1e-5)
        np.testing.assert_allclose(view.lens, wanted.lens, rtol=1e-4)
        assert view.photograph(1).startswith(b"\xff\xd8")
    if formats == "npz":
        np.testing.assert_array_equal(view.rank, wanted.rank)
        np.testing.assert_array_equal(view.jump, wanted.jump)


def test_photographs_of_16_bits_and_with_transparency_keep_their_tones(small: Any, tmp_path: Path) -> None:
    small.save(tmp_path / "scene", formats="ply,colmap", tracks="project", conf_percentile=0)
    grey = np.tile(np.linspace(0, 0.5, 42), (28, 1))
    clear = np.full((28, 42, 4), 255, np.uint8)
    clear[..., :3] = (255 * grey[..., None]).astype(np.uint8)
    clear[:, :21, 3] = 0
    for name, picture in zip(small.names, ((65535 * grey).astype(np.uint16), clear), strict=True):
        Image.fromarray(picture).save(tmp_path / "scene" / "images" / name)
    (view,) = read_results(tmp_path / "scene").values()
    seen = [np.asarray(Image.open(io.BytesIO(view.photograph(frame)))).mean() for frame in (0, 1)]
    assert seen == pytest.approx([255 * 0.25, (255 + 255 * 0.375) / 2], abs=3)  # what is transparent is white


def test_a_folder_whose_name_is_not_utf_8(small: Any, tmp_path: Path) -> None:
    small.save(tmp_path / "r", formats="view")
    here = os.fsencode(tmp_path)  # as bytes: what pytest keeps of a test has to be UTF-8
    os.rename(here + b"/r", here + b"/r\xe9")
    # With a stdout of its own: what captures that of tests is not as strict.
    command = [sys.executable, "-m", "geoaccel", "view", b"r\xe9", "--html", b"\xe9.html"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote \\udce9.html, ")
    with open(here + b"/\xe9.html", encoding="utf-8") as page:
        assert "<title>r?</title>" in page.read()


def test_two_results(small: Any, tmp_path: Path) -> None:
    for name in ("fast", "slow"):
        small.save(tmp_path / name, formats="view")
    assert list(read_results(tmp_path / "fast", tmp_path / "slow")) == ["fast", "slow"]
    (tmp_path / "slow" / FILE).rename(tmp_path / "fast" / DENSE_FILE)
    assert list(read_results(tmp_path / "fast")) == ["dense", "accelerated"]


def test_the_command_writes_one_file(small: Any, tmp_path: Path, capsys: Any) -> None:
    small.save(tmp_path / "scene", formats="view")
    html = tmp_path / "scene.html"
    code, out, err = run(capsys, "view", tmp_path / "scene", "--html", html)
    assert code == 0, err
    assert out.startswith(f"wrote {html}, ")
    text = html.read_text()
    assert "http" not in text.replace("http-equiv", "").partition('id="points-0"')[0].replace("https", "")
    refused(capsys, "view", tmp_path / "scene", "--html", html, says="exists")
    assert run(capsys, "view", tmp_path / "scene", "--html", html, "--overwrite")[0] == 0
    refused(capsys, "view", tmp_path / "nowhere", says="is not a folder; give one that geoaccel reconstruct")
    refused(capsys, "view", tmp_path, says="nothing to show")
    (tmp_path / "walk" / "piece_1").mkdir(parents=True)
    refused(capsys, "view", tmp_path / "walk", says=f"view one: {tmp_path / 'walk' / 'piece_1'}")
    refused(capsys, "view", tmp_path / "scene", "--against", tmp_path / "scene", says="was given twice")
    (tmp_path / "scene" / FILE).write_bytes(b"PK")
    refused(capsys, "view", tmp_path / "scene", "--html", tmp_path / "b.html", says="is not a file for geoaccel view")


@pytest.mark.parametrize("name", ["view", "npz"])
def test_a_file_that_is_cut_off_is_one_line(small: Any, tmp_path: Path, name: str) -> None:
    small.save(tmp_path / "scene", formats=name)
    (file,) = (tmp_path / "scene").glob("*.npz")
    whole = file.read_bytes()
    for size in (0, 2, 500, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        # In a process of its own, whose stderr is nobody else's.
        command = [sys.executable, "-m", "geoaccel", "view", "scene"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert line.endswith("write it again: --formats view")


@pytest.mark.parametrize("port", ["99999", "-5", "0", "http"])
def test_what_is_no_port_is_refused(capsys: Any, port: str) -> None:
    says = f"argument --port: {port} is no port; give a number from 1 to 65535"
    refused(capsys, "view", "scene", "--port", port, says=says)


def test_a_page_is_thinned_to_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pages.html_page(two_results(), "scene")
    monkeypatch.setattr(pages, "LARGEST_FILE", 200_000)
    monkeypatch.setattr(pages, "LARGEST_PHOTOGRAPHS", 1_000)
    small = pages.html_page(two_results(), "scene")
    assert len(small) <= 200_000 < len(whole)
    assert small.count("data:image/jpeg") < whole.count("data:image/jpeg")


def test_a_million_points_and_many_photographs_are_under_20_mb() -> None:
    """From the sizes alone: 11 bytes a point, in base64."""
    assert 1_000_000 * pages.POINT_BYTES * 4 / 3 + 4_000_000 < pages.LARGEST_FILE == 20_000_000


def test_without_viser_a_line_says_how_to_get_it(small: Any, tmp_path: Path) -> None:
    """In a process of its own: servers that other tests have stopped may still write to stderr."""
    small.save(tmp_path / "scene", formats="view")
    program = "import sys; sys.modules['viser'] = None; from geoaccel.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "view", str(tmp_path / "scene")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "pip install 'geoaccel[view]', or write a page: --html scene.html" in done.stderr


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def live() -> Iterator[Any]:
    pytest.importorskip("viser")
    from geoaccel.viewer.live import serve

    shown = serve(two_results(), "localhost", free_port())
    yield shown
    shown.stop()


def test_the_controls_of_the_server(live: Any) -> None:
    dense, fast = two_results().values()
    counts = lambda: {name: int(keep.sum()) for name, keep in live.shown().items()}  # noqa: E731
    assert counts() == {"dense": len(dense), "accelerated": len(fast)}
    live.show.value = "accelerated"
    assert counts() == {"accelerated": len(fast)}
    live.cut.value = 40
    assert counts()["accelerated"] == pytest.approx(0.6 * len(fast), rel=0.02)
    live.cut.value, live.edge.value = 0, 10
    assert counts()["accelerated"] == (fast.jump < 255 * 0.2).sum() < len(fast)
    live.edge.value, live.show.value, live.mix.value = 50, "blended", 25
    assert counts()["dense"] == pytest.approx(0.75 * len(dense), rel=0.05)
    assert counts()["accelerated"] == pytest.approx(0.25 * len(fast), rel=0.05)
    head = live.ply().partition(b"end_header")[0].decode()
    assert f"element vertex {sum(counts().values())}" in head
    assert "comment unit: metre" in head
    assert len(live.frusta) == 2
    live.cameras.value = False
    live.update()
    assert not any(frustum.visible for frustum in live.frusta)


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
def test_the_server_in_a_browser(live: Any, tmp_path: Path) -> None:
    """It opens and draws points; a slider changes the picture."""
    live.show.value = "dense"
    with browser(tmp_path) as page:
        page.open(live.address, (700, 500))
        page.wait("document.querySelector('canvas') !== null && document.body.innerText.includes('least confident')")

        def colourful() -> int:
            picture = page.picture()[:, :400]
            return int(((picture.max(axis=2) - picture.min(axis=2)) > 30).sum())

        def settled(least: int, most: int) -> None:
            for _ in range(60):
                if least <= colourful() <= most:
                    return
            raise AssertionError(f"{colourful()} pixels of points, not {least} to {most}; {page.problems()}")

        settled(3000, 200_000)
        before = colourful()
        live.cut.value = 90
        settled(1, before // 2)

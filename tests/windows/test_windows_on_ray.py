"""Windows and scenes on a Ray cluster of two nodes: the files of one process, whoever is killed or interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from references import Golden
from test_windows import contents, photographs
from torch import nn
from two_nodes import one_thread, two_nodes

import geoaccel
from geoaccel.backbone import Preprocess
from geoaccel.claims import resolve
from geoaccel.cli import main
from geoaccel.errors import UserError
from geoaccel.images.elsewhere import absolute
from geoaccel.images.sources import FilePicture, list_pictures
from geoaccel.models.weights import save_model
from geoaccel.windows import join
from geoaccel.windows.agree import Agreement
from geoaccel.windows.frames import read_chunk
from geoaccel.windows.identity import same
from geoaccel.windows.store import Store, unfinished_folder

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes(__name__) as nodes:
        yield nodes


@pytest.fixture
def network() -> nn.Module:
    """Of one backbone: what differs between them is tested in one process."""
    return Golden("vggt_tiny", "vggt").network()


@dataclass(frozen=True)
class DieOnce:
    """Stands in front of a forward, and kills the process that comes there first."""

    marker: Path

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_and_an_interruption_leave_the_files_of_one_process(
    cluster: Any, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is joined is decided here, not by workers: everything, so that wide windows and loops are made, too.
    monkeypatch.setattr(join, "ONE_SHOT", Agreement(-1, -2, -1))
    monkeypatch.setattr(join, "JOINED", -1)
    monkeypatch.setattr(join, "APART", 1)
    paths = photographs(tmp_path / "photos", 9)
    paths += [Path(shutil.copy(path, path.with_name(f"again_{path.name}"))) for path in paths]
    paths[6].write_bytes(paths[6].read_bytes()[:60])
    options: dict[str, Any] = {"window": 8, "overlap": 4, "size": 28, "formats": "ply,colmap,tum", "skip_bad": True}
    model = geoaccel.accelerate(network, merging="asymmetric")
    with one_thread():
        local = geoaccel.reconstruct_windows(paths, model=model, out=tmp_path / "local", **options)
    marker, out = tmp_path / "died", tmp_path / "ray"
    model.register_forward_pre_hook(DieOnce(marker))
    options |= {"engine": "ray", "ray_address": cluster.address}
    write = Store.write

    def interrupted(self: Store, name: str, window: Any) -> None:
        write(self, name, window)
        if name == "window_00001":
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        geoaccel.reconstruct_windows(paths, model=model, out=out, **options)
    monkeypatch.setattr(Store, "write", write)
    kept = unfinished_folder(resolve(out))
    assert sorted(path.stem for path in kept.glob("*.safetensors")) == ["window_00000", "window_00001"]
    assert marker.exists()
    marker.unlink()
    result = geoaccel.reconstruct_windows(paths, model=model, out=out, **options)
    assert marker.exists()
    assert local.joined.wide
    assert local.joined.loops
    assert result.left_out.keys() == local.left_out.keys() == {"frame_006.png"}
    assert contents(out) == contents(tmp_path / "local")


@pytest.mark.slow
def test_scenes_on_workers_have_the_files_of_one_process(
    cluster: Any, network: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(network, tmp_path / "model.safetensors", dtype=torch.float32)
    for number, name in enumerate(("a", "b", "c")):
        photographs(tmp_path / name, 2 + number)
    (tmp_path / "b" / "frame_001.png").write_text("no picture")
    scenes = [str(tmp_path / name) for name in ("a", "b", "c")]
    given = ["reconstruct", *scenes, "--scenes", "--model", str(tmp_path / "model.safetensors"), "--size", "28"]
    with one_thread():
        assert main([*given, "--out", str(tmp_path / "local")]) == 2
    local = capsys.readouterr()
    ray = ["--engine", "ray", "--ray-address", cluster.address]
    assert main([*given, *ray, "--out", str(tmp_path / "out")]) == 2
    remote = capsys.readouterr()
    for told in (local.err, remote.err):
        assert told.splitlines()[-1] == "geoaccel: 1 of 3 scenes failed: b; see above"
        assert "frame_001.png" in next(line for line in told.splitlines() if line.startswith("b: "))
    assert [json.loads(line)["frames"] for line in remote.out.splitlines()] == [2, 4]
    assert "running " + str(tmp_path / "model.safetensors") + " in float32 on 2 workers (cpu)" in remote.err
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "c"}
    photographs(tmp_path / "b", 3)
    assert main([*given, *ray, "--out", str(tmp_path / "local")]) == 0  # each goes on with the other engine
    remote = capsys.readouterr()
    with one_thread():
        assert main([*given, "--out", str(tmp_path / "out")]) == 0
    local = capsys.readouterr()
    for told in (local, remote):
        assert [json.loads(line).get("kept", False) for line in told.out.splitlines()] == [True, False, True]
        assert sum(": kept; " in line for line in told.err.splitlines()) == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b", "c"}


def test_images_that_cannot_be_seen_from_a_worker_are_not_bad_ones(tmp_path: Path) -> None:
    pictures = list_pictures(photographs(tmp_path / "photos", 3))
    (tmp_path / "photos" / "frame_001.png").rename(tmp_path / "elsewhere.png")
    with pytest.raises(FileNotFoundError, match=r"frame_001.png does not exist"):
        read_chunk(pictures, Preprocess(size=28), True)
    (tmp_path / "photos" / "frame_001.png").touch()
    chunk = read_chunk(pictures, Preprocess(size=28), True)
    assert chunk.names == ["frame_000.png", "frame_002.png"]
    assert list(chunk.left_out) == ["frame_001.png"]


def test_images_are_sent_by_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path / "photos", 2)
    monkeypatch.chdir(tmp_path)
    near = list_pictures("photos")
    far = absolute(near)
    assert [picture.path for picture in near] == [Path("photos/frame_000.png"), Path("photos/frame_001.png")]
    assert far == [FilePicture(tmp_path / "photos" / f"frame_00{i}.png", f"frame_00{i}.png") for i in range(2)]


def test_workers_with_other_models_are_refused() -> None:
    one = {"model": ["vggt", {"float32": 9}, "cpu"], "weights": "a"}
    same([one, dict(one)])
    with pytest.raises(
        UserError, match=r"worker 3 of 3 has a different model from the first \(weights was 'a', is now 'b'"
    ):
        same([one, one, {**one, "weights": "b"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"engine": "rey"}, "Did you mean 'ray'"), ({"ray_address": "auto"}, "applies to engine ray")],
)
def test_an_engine_that_cannot_be_is_one_line(
    network: nn.Module, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        geoaccel.reconstruct_windows(torch.rand(10, 3, 28, 28), model=network, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_sent_is_one_line(network: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    network.register_forward_pre_hook(lambda module, inputs, open=(x for x in ()): None)
    with pytest.raises(UserError, match="cannot be sent to workers") as raised:
        geoaccel.reconstruct_windows(torch.rand(10, 3, 28, 28), model=network, out=tmp_path / "out", engine="ray")
    assert "\n" not in str(raised.value)

"""``geoaccel tune`` on a tiny network: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, run, write_images
from PIL import Image
from tiny_checkpoint import write_checkpoint

import geoaccel
from geoaccel.errors import UserError
from geoaccel.eval.run.job import Job
from geoaccel.eval.tuning import trials
from geoaccel.eval.tuning.budget import Budget
from geoaccel.eval.tuning.choices import CHOICES
from geoaccel.eval.tuning.earlier import Earlier
from geoaccel.eval.tuning.memory import check_fits, needed_bytes, units_of
from geoaccel.eval.tuning.photographs import halves
from geoaccel.merging.layers import Layers
from geoaccel.merging.rates import Rates
from geoaccel.tuned import TunedPlan, of_weights

WEIGHTS = {"linears": "0", "rest": "0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("vggt", tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("all") / "photos", count=8)


@pytest.fixture(autouse=True)
def small_networks_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """On so few tokens the operations that a method starts would cost more than it saves."""
    made = Rates.built_in

    def without_starts(*kind: Any) -> Rates:
        return dataclasses.replace(made(*kind), read=0.0, start=0.0)

    monkeypatch.setattr(Rates, "built_in", without_starts)


def test_tune_writes_a_plan_that_acts_and_is_the_same_twice(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "plan.yaml"
    command = ("tune", photos, "--model", model, "--max-pose-error", "60deg", "--out")
    measured: list[str] = []
    measure = trials.errors_of

    def interrupted(changed: Any, dense: Any) -> Any:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append("one")
        return measure(changed, dense)

    monkeypatch.setattr(trials, "errors_of", interrupted)
    code, _, err = run(capsys, *command, out)
    assert code == 130
    assert "goes on from there" in err
    assert len(json.loads((tmp_path / "plan.yaml.progress" / "errors.json").read_text())) == 5
    with monkeypatch.context() as patch:
        patch.setattr("geoaccel.eval.tools.tune.of_others", lambda classes: {"own": "edited"})
        refused(capsys, *command, out, says="packages.own was None, is now 'edited'")
    monkeypatch.setattr(trials, "errors_of", lambda *answers: measured.append("one") or measure(*answers))
    code, said, err = run(capsys, *command, out)
    assert code == 0, err
    first = len(measured)
    assert not (tmp_path / "plan.yaml.progress").exists()
    assert Image.open(tmp_path / "plan.png").size[0] > 400
    document = json.loads((tmp_path / "plan.json").read_text())
    assert [len(row) for row in document["alone"]] == [len(CHOICES)] * 2
    assert document["predicted"]["speedup"] > 1
    assert document["measured"]["dense_ms"] > 0
    assert document["measured"]["unseen"]["pose_deg"] <= 60
    assert "unseen:" in said
    assert f"{document['predicted']['speedup']:.2f}x predicted" in said

    measured.clear()
    again = tmp_path / "again.yaml"
    monkeypatch.setattr("geoaccel.eval.tuning.picture.picture", lambda document: b"one is enough")
    assert run(capsys, *command, again)[0] == 0
    assert again.read_bytes() == out.read_bytes()
    assert len(measured) == first  # five of them had been kept

    measured.clear()
    other = ("--max-pose-error", "90deg", "--measured", tmp_path / "plan.json")
    code, said, err = run(capsys, *command[:4], *other, "--out", tmp_path / "other.yaml")
    assert code == 0, err
    assert len(measured) <= 2  # the choice as a whole, on either half
    whole = json.loads((tmp_path / "other.json").read_text())
    assert whole["alone"] == document["alone"]
    assert whole["trials"].items() >= document["trials"].items()

    plan = TunedPlan.read(out)
    assert plan.tuned["photographs"] == 8
    network = geoaccel.accelerate(geoaccel.load_model(model), plan=out)
    chosen = [entry["chosen"] for entry in document["layers"]]
    assert [method is None for method in plan.layers.each(2)] == [name == "dense" for name in chosen]
    assert geoaccel.describe(network).merging
    refused(capsys, *command, out, says="exists")


def test_a_plan_goes_to_every_command(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, other = tmp_path / "plan.yaml", tmp_path / "other.yaml"
    weights = of_weights(geoaccel.load_model(model))
    TunedPlan(weights, Layers.read({0: "frame-only"})).write(plan, 2)
    TunedPlan({**weights, "rest": "0"}, Layers.read({0: "frame-only"})).write(other, 2)
    reconstruct = ("reconstruct", photos, "--model", model, "--formats", "npz", "--out")
    assert run(capsys, *reconstruct, tmp_path / "scene", "--plan", plan)[0] == 0
    assert run(capsys, *reconstruct, tmp_path / "layers", "--layers", "{0: frame-only}")[0] == 0
    same, layers = ((tmp_path / name).glob("*.npz") for name in ("scene", "layers"))
    assert next(same).stat().st_size == next(layers).stat().st_size
    common = ("data=folder", f"data.root={photos.parent}", f"model={model}", "fidelity=true", "timing.repeats=0")
    code, line, err = run(capsys, "eval", *common, f"plan={plan}", f"out={tmp_path / 'eval'}")
    assert code == 0, err
    assert json.loads(line)["merging"] == "plan plan"
    bench = ("bench", f"model={model}", "frames=[2]", "size=[28,28]", "methods=[httm]", f"out={tmp_path / 'bench'}")
    code, line, err = run(capsys, *bench, f"plan={plan}", "layers={0:first-frame}")
    assert code == 0, err
    assert json.loads(line)["merging"] == "plan plan"
    assert "layers" in err
    refused(capsys, *reconstruct, tmp_path / "no", "--plan", other, says="the plan was made for other weights")
    refused(
        capsys,
        *reconstruct,
        tmp_path / "no",
        "--plan",
        tmp_path / "none.yaml",
        says="does not exist; make one with geoaccel tune",
    )
    refused(capsys, *reconstruct, tmp_path / "no", "--plan", plan, "--merging", "httm", says="a plan already sets")
    refused(capsys, *reconstruct, tmp_path / "no", "--layers", "{7: httm}", says="there is no layer 7")
    refused(capsys, *reconstruct, tmp_path / "no", "--layers", "{0: [", says="is not valid YAML")
    refused(capsys, "eval", *common, f"plan={plan}", "merging=httm", says="leave out merging")
    refused(capsys, *bench, "layers=saf4r", says="unknown preset of layers 'saf4r'")


def test_a_run_is_known_by_its_plan_and_its_layers(model: Path, tmp_path: Path) -> None:
    plain, plan = Job(str(model)), tmp_path / "plan.yaml"
    described = []
    for layers in ({0: "frame-only"}, {1: "frame-only"}):
        TunedPlan(WEIGHTS, Layers.read(layers)).write(plan, 2)
        described.append(Job(str(model), plan=str(plan)).describe())
    assert described[0] != described[1]
    assert Job(str(model), layers={0: "frame-only"}).describe() != plain.describe()
    assert {"plan", "layers"}.isdisjoint(plain.describe())
    for job in (Job(str(model), plan=str(plan)), Job(str(model), layers="saf3r")):
        assert job.accelerated
        assert not job.quantizes
        assert job.dense == plain


def test_figures_of_something_else_are_not_taken(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "tune",
        photos,
        "--model",
        model,
        "--max-pose-error",
        "60deg",
        "--out",
        tmp_path / "plan.yaml",
        "--measured",
    )
    figures = tmp_path / "figures.json"
    refused(capsys, *command, figures, says=f"{figures}: there is no such file; give the .json written with a plan")
    for text in ("{", "[]", '{"made_of": {}}', '{"made_of": {}, "trials": {"choosing": {"pose_deg": 1}}}'):
        figures.write_text(text)
        refused(capsys, *command, figures, says=f"{figures} has no measurements; give the .json written with a plan")
    figures.write_text('{"made_of": {"dtype": "float16"}, "trials": {}}')
    refused(capsys, *command, figures, says=f"{figures} does not match this run (choosing was None")


def test_the_same_photographs_as_other_clips_are_something_else(model: Path, tmp_path: Path) -> None:
    """One folder of eight, and two folders with four of them each."""
    files = sorted(write_images(tmp_path / "all", count=8).iterdir())
    for place, some in (("a", files[:4]), ("b", files[4:])):
        (tmp_path / place).mkdir()
        for file in some:
            shutil.copy(file, tmp_path / place)
    network = geoaccel.load_model(model)
    one, two = (halves([str(tmp_path / name) for name in names], network).describe() for names in (["all"], ["a", "b"]))
    assert one != two
    assert [[*chain(*clips)] for clips in one.values()] == [[*chain(*clips)] for clips in two.values()]
    kept = Earlier(tmp_path / "plan.json", json.loads(json.dumps(one)), {})
    assert kept.errors(one) == {}
    with pytest.raises(UserError, match=r"does not match this run \(choosing was"):
        kept.errors(two)


@pytest.mark.parametrize(("options", "says"), [
    ((), "no budget was given"),
    (("--speedup", "0.5"), "--speedup 0.5 is no faster than the dense model"),
    (("--max-pose-error", "much"), "--max-pose-error much: give a number"),
    (("--speedup", "50"), "no choice of layers is faster than"),
    (("--max-memory", "0.01MB"), "with all blocks in four bits"),
    (("--max-pose-error", "1deg", "--frames", "5"), "holds 8 photographs, 10 are needed: 5 for choosing and 5 others"),
    (("--max-pose-error", "1deg", "--frames", "1"), "--frames 1: cameras are compared in pairs"),
])  # fmt: skip
def test_what_cannot_be_tuned_is_one_line_before_anything_is_measured(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...], says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(trials, "predict", lambda *_: pytest.fail("something was measured"))
    refused(capsys, "tune", photos, "--model", model, "--out", tmp_path / "plan.yaml", *options, says=says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [
    ("tune", "{folder}", "--max-pose-error", "1deg", "--out", "{out}/plan.yaml"),
    ("quantize", "calibrate", "--quantization", "w4a16", "--images", "{folder}", "--out", "{out}/a.safetensors"),
    ("quantize", "sensitivity", "--quantization", "w4a16", "--images", "{folder}", "--out", "{out}/s.json"),
])  # fmt: skip
@pytest.mark.parametrize(("folder", "says"), [
    ("nowhere", "there is no folder"), ("empty", "holds"), ("text", "3.jpg is not a readable image"),
])  # fmt: skip
def test_folders_are_looked_at_before_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...], folder: str, says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("geoaccel.models.weights.open_model", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr("geoaccel.models.weights.read_weights", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "empty").mkdir()
    (write_images(tmp_path / "text", count=8) / "3.jpg").write_text("no picture")
    given = [word.format(folder=tmp_path / folder, out=tmp_path) for word in command]
    refused(capsys, *given, "--model", "vggt-mini", says=says)


def test_a_folder_is_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_images(tmp_path / "photos", count=8)
    folders, budget = (photos, photos / ".." / "photos"), ("--max-pose-error", "1deg")
    refused(
        capsys,
        "tune",
        *folders,
        *budget,
        "--out",
        tmp_path / "p.yaml",
        "--model",
        "vggt-mini",
        says="is given twice; give each folder once",
    )


def test_memory_is_met_with_formats_of_the_least_error(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = geoaccel.load_model(model)
    images = halves([str(photos)], network).together.load()
    needed = needed_bytes(network, 8, (images.shape[-2], images.shape[-1]))
    units = units_of(network)
    save = sum(4 * unit.weights - unit.high_bytes for unit in units) // 2
    limit = f"{(needed - save) / 1e6:.3f}MB"
    out = tmp_path / "plan.yaml"
    code, said, err = run(capsys, "tune", photos, "--model", model, "--max-memory", limit, "--out", out)
    assert code == 0, err
    document = json.loads((tmp_path / "plan.json").read_text())
    blocks = document["blocks"]
    assert blocks["needed_bytes"] <= needed - save + 500
    assert set(blocks["chosen"].values()) - {"float"}
    assert "memory:" in said
    geoaccel.accelerate(network, plan=out)
    assert needed_bytes(network, 8, (images.shape[-2], images.shape[-1])) < needed
    refused(capsys, "bench", f"model={model}", f"plan={out}", says="bench times everything on one set of float weights")
    assert sum(part.linears for part in geoaccel.describe(network).quantization) == sum(
        len(unit.layers) for unit in units if blocks["chosen"][unit.name] != "float"
    )


@pytest.mark.parametrize("frames", [2, 5, 8, 13])
def test_the_memory_that_is_advised_is_enough(model: Path, frames: int) -> None:
    network, size = geoaccel.load_model(model), (28, 42)
    with pytest.raises(UserError, match=r"need .* GB with all blocks in four bits") as caught:
        check_fits(network, Budget(memory_bytes=1), frames, size)
    advised = float(str(caught.value).split(" need ")[1].split(" GB")[0])
    check_fits(network, Budget(memory_bytes=round(advised * 1e9)), frames, size)


def test_photographs_to_check_with_are_others_of_the_same_scene(model: Path, photos: Path) -> None:
    network: Any = geoaccel.load_model(model)
    parts = halves([str(photos)], network, 3)
    names = [[path.name for path in clip.files] for clip in (parts.choosing[0], parts.unseen[0], parts.together)]
    assert names == [["0.jpg", "2.jpg", "4.jpg"], ["1.jpg", "3.jpg", "5.jpg"], [f"{i}.jpg" for i in range(6)]]
    assert torch.equal(parts.together.load()[:, ::2], parts.choosing[0].load())
    whole = halves([str(photos)], network)
    assert [len(clip.files) for clip in (*whole.choosing, *whole.unseen, whole.together)] == [4, 4, 8]

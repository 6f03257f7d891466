"""What is counted of known positions, on cameras that can be counted by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import measure_positions
import seed_command


def test_scores_of_exact_cameras_and_of_one_that_is_off() -> None:
    truth = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = measure_positions.score(0.5 * truth + 3, truth, 0)
    named = {"true/named": 0.0, "far/named": 1.0, "near/named": 1.0}
    assert found == pytest.approx({**dict.fromkeys(found, 0.0), **named}, abs=1e-6)
    off = truth.clone()
    off[3] += 0.2
    assert measure_positions.score(off, truth, 0)["apart"] > 0.01


@pytest.mark.parametrize(("option", "ending"), [([], ""), (["--refine"], "-refined")])
def test_the_command_takes_predictions_that_were_kept(
    tmp_path: Path, capsys: Any, option: list[str], ending: str
) -> None:
    made = seed_command.provenance(*seed_command.MODELS)
    work = seed_command.kept_in(argparse.Namespace(work=tmp_path), made)
    for seed in (1000, 1001):
        poses = torch.eye(4).repeat(8, 1, 1)
        poses[:, :3, 3] = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        kept = {f"{name}/cam_from_world": poses.numpy() for name in ("truth", *measure_positions.MODELS)}
        np.savez(work / f"{seed}{ending}.npz", **kept)
    out = tmp_path / "out.json"
    measure_positions.main(["--seeds", "1000-1001", "--work", str(tmp_path), "--out", str(out), *option])
    printed = json.loads(capsys.readouterr().out)
    document = json.loads(out.read_text())
    assert document["percent"] == printed
    assert ("--refine" in document["command"]) == bool(option)
    assert {name: document[name] for name in made} == made
    assert set(made["weights"]) == set(seed_command.MODELS)
    assert printed["vggt-mini"]["auc_5"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert printed["pi3-mini"]["far/named"] == 100.0
    assert printed["pi3-mini"]["far/scale"] == [0.0, 0.0]


@pytest.mark.parametrize("changed", ["code", "checkpoint"])
def test_what_others_have_made_is_made_anew(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = argparse.Namespace(work=tmp_path)
    before = seed_command.kept_in(work, seed_command.provenance("vggt-mini"))
    assert before == seed_command.kept_in(work, seed_command.provenance("vggt-mini"))
    if changed == "code":
        own = seed_command.made_by
        monkeypatch.setattr(seed_command, "made_by", lambda *given: {**own(*given), "code": "another"})
    else:
        monkeypatch.setattr(seed_command, "fingerprint", lambda name: "another")
    assert seed_command.kept_in(work, seed_command.provenance("vggt-mini")) != before


def test_the_command_is_kept_with_all_its_options(tmp_path: Path) -> None:
    for own, words in (({"jump": 0.2}, "--jump 0.2 "), ({"refine": True}, "--refine "), ({"refine": False}, "")):
        args = argparse.Namespace(seeds="1000", work=tmp_path, out=tmp_path / "out.json", **own)
        seed_command.write(args, "x/measure.py", {"weights": {}}, {"scenes": 1})
        document = json.loads(args.out.read_text())
        shown = f"python scripts/figures/measure.py --seeds 1000 --work FOLDER {words}--out {args.out}"
        assert (document["command"], document["weights"], document["scenes"]) == (shown, {}, 1)

"""The script that measures what a bad first image does: its images, its fit, and one small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bad_images
from geoaccel.errors import UserError


def lines(scenes: int = 30) -> list[dict[str, Any]]:
    """Planted frames that are found nowhere, and one clean frame that is found less than the others."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for scene in range(scenes):
        for kind in bad_images.KINDS:
            ratios = -0.5 + 0.005 * torch.rand(8, 8, generator=generator)
            count = bad_images.bad(kind, 8)
            ratios[:count] = ratios[:, :count] = 0.2
            if kind == "clean" and scene == 0:
                ratios[3] = ratios[:, 3] = -0.2
            first, auto = ({"auc_30": value, "auc_5": value / 2} for value in (0.1 if kind != "clean" else 0.9, 0.9))
            scores = {"first": first, "auto": auto, "reference": 7}
            matches = {"ratios": ratios.tolist(), "others": list(range(8))}
            found.append({"scene": str(scene), "kind": kind, **matches, **scores})
    return found


def test_the_bounds_tell_planted_images_from_clean_ones() -> None:
    bound, several = bad_images.fit(lines())
    assert -0.3 < bound < 0.1  # one clean image in a thousand is named
    assert several < 0.1
    found = bad_images.score(lines(), bound, several)
    assert found["named"] == found["black"]["named"] == found["several foreign"]["named"] == 1
    assert found["clean_images"] == 30 * (8 + 3 * 7 + 6)
    assert 0 <= found["false_alarms"] <= bad_images.FALSE_ALARMS
    assert found["black"]["first"]["auc_30"] == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})
    assert found["black"]["auto"]["auc_5"]["mean"] == pytest.approx(0.45)
    assert found["black"]["taken_as_reference"] == 0
    assert found["foreign"]["trials"] == found["scenes"] == 30
    none = bad_images.score(lines(), 9.0, 9.0)
    assert none["named"] == none["false_alarms"] == 0
    loose = bad_images.score(lines(), -0.05, 9.0)
    assert loose["several foreign"]["named"] == 0.5  # one of the two, which goes by the other bound
    eager = bad_images.score(lines(), -0.2, 9.0)
    assert eager["clean"]["false_alarms"] == pytest.approx(1 / 240, abs=1e-4)
    with pytest.raises(UserError, match="cannot choose bounds by seed 8200"):
        bad_images.fit([{**line, "scene": "8200"} for line in lines()])


def test_figures_are_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document, kept = tmp_path / "reference.md", tmp_path / "figures.json"
    document.write_text(f"above\n{bad_images.BEGIN}old\n{bad_images.END}\nbelow\n")
    monkeypatch.setattr(bad_images, "DOCUMENT", document)
    monkeypatch.setattr(bad_images, "KEPT", kept)
    records = [{"of": "rendered", "model": "vggt-mini", **bad_images.score(lines(), -0.05)}]
    bad_images.write(records)
    assert json.loads(kept.read_text()) == records
    text = document.read_text()
    assert text.startswith(f"above\n{bad_images.BEGIN}| scenes |")
    assert text.endswith(f"{bad_images.END}\nbelow\n")
    assert "| 30 rendered, vggt-mini | clean | 0.900 (0.900 to 0.900) | 0.450 (0.450 to 0.450) | 0.900 " in text
    assert "|  | black | 0.100 (0.100 to 0.100) | " in text
    assert "| 0.450 (0.450 to 0.450) | 100 % | 0.00 % |" in text


def test_planted_images() -> None:
    images, foreign = torch.rand(8, 3, 28, 42), torch.rand(8, 3, 28, 42)
    for kind in bad_images.KINDS:
        count = bad_images.bad(kind, 8)
        assert torch.equal(bad_images.planted(images, kind, foreign)[count:], images[count:])
    assert torch.equal(bad_images.planted(images, "clean", foreign), images)
    assert torch.equal(bad_images.planted(images, "foreign", foreign)[0], foreign[0])
    assert torch.equal(bad_images.planted(images, "several foreign", foreign)[:2], foreign[:2])
    assert not bad_images.planted(images, "black", foreign)[0].any()
    soft = bad_images.planted(images, "blurred", foreign)[0]
    assert soft.std() < 0.3 * images[0].std()
    assert float(soft.mean()) == pytest.approx(float(images[0].mean()), abs=0.05)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lines.jsonl"
    command = ["bad_images.py", "measure", "vggt-mini", "--seeds", "1000", "--frames", "4", "--size", "56"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(out)])
    bad_images.main()
    found = bad_images.read(out)
    assert [line["kind"] for line in found] == list(bad_images.KINDS[:4])  # one of four is a quarter
    assert all(len(line["ratios"]) == 4 for line in found)
    assert found[3]["other"] == "501000"
    bad_images.main()  # it is there
    assert len(bad_images.read(out)) == 4
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", [*command[:-1], "28", "--out", str(out)])
    with pytest.raises(ValueError, match="has lines from another model, frames, size, root, code or machine"):
        bad_images.main()
    monkeypatch.setattr("sys.argv", ["bad_images.py", "score", str(out)])
    bad_images.main()
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["scenes"], record["of"], record["model"]) == (1, "rendered, seeds 1000 to 1000", "vggt-mini")
    monkeypatch.setattr("sys.argv", [*command[:4], "1000000", "--out", str(out)])
    with pytest.raises(ValueError, match="cannot measure on seed 1000000: it is in the training set"):
        bad_images.main()
    # What was measured on the report set may be scored, and nothing chosen by it.
    monkeypatch.setattr("sys.argv", [*command[:4], "8192", *command[5:], "--out", str(tmp_path / "report.jsonl")])
    bad_images.main()
    monkeypatch.setattr("sys.argv", ["bad_images.py", "fit", str(tmp_path / "report.jsonl")])
    with pytest.raises(ValueError, match="cannot choose bounds by seed 8192"):
        bad_images.main()

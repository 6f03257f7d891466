"""The example: from a folder of photographs to an answer, with a tiny host in place of a checkpoint."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_hosts import IMAGE_GRID, batch, tiny_host
from torch import Tensor, nn

from geoaccel.models.weights import save_model

transformers = pytest.importorskip("transformers")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "ask_photographs.py"


class Processor:
    """Two images and a question, whatever the photographs show."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> Any:
        self.asked = messages[0]["content"]
        return transformers.BatchFeature(batch("qwen2_5_vl", (2, IMAGE_GRID, 1, IMAGE_GRID, 5)))

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Processor]:
    spec = importlib.util.spec_from_file_location("ask_photographs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    processor = Processor()
    host = SimpleNamespace(from_pretrained=lambda name, dtype: tiny_host("qwen2_5_vl").to(dtype))
    monkeypatch.setattr(module, "AutoProcessor", SimpleNamespace(from_pretrained=lambda name: processor))
    monkeypatch.setattr(module, "AutoModelForImageTextToText", host)
    return module, processor


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [(["--ratio", "1"], 12), (["--ratio", "0.3"], 3)],
)
def test_it_answers(
    arguments: list[str],
    kept: int,
    script: tuple[ModuleType, Processor],
    tiny: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, processor = script
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(2):
        noise = torch.randint(0, 255, (64, 96, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(photographs / f"{number}.png")
    save_model(tiny, tmp_path / "tiny.safetensors", dtype=torch.float32)
    given = [str(photographs), "How many?", "--device", "cpu", "--max-new-tokens", "4", "--compare"]
    given += ["--geometry", str(tmp_path / "tiny.safetensors")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given, *arguments])
    module.main()
    out, err = capsys.readouterr()
    short, whole = out.splitlines()
    assert len(short.split()) == len(whole.split()) == 4
    assert (short == whole) == (kept == 12)
    assert f"with {kept} of 12 visual tokens" in err
    assert [part["type"] for part in processor.asked] == ["image", "image", "text"]
    assert processor.asked[-1]["text"] == "How many?"

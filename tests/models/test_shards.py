"""Checkpoints in several files: read as one, told apart by all that they hold, and refused where one is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from geoaccel.errors import UserError
from geoaccel.info import describe_checkpoint
from geoaccel.models.files import fingerprint
from geoaccel.models.shards import INDEX, is_index
from geoaccel.models.weights import load_model, save_model
from geoaccel.quantized_file import export_quantized

NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tiny: nn.Module, tmp_path: Path) -> Path:
    """The tiny network as `save_pretrained` writes large ones."""
    save_model(tiny, tmp_path / "whole.safetensors", dtype=torch.float32)
    tensors = load_file(tmp_path / "whole.safetensors")
    (tmp_path / "whole.safetensors").unlink()
    found = tmp_path / "sharded"
    found.mkdir()
    (found / "config.json").write_text(json.dumps(tiny.config.to_dict()))  # type: ignore[union-attr, operator]
    names = sorted(tensors)
    parts = dict(zip(NAMES, (names[::2], names[1::2]), strict=True))
    for name, own in parts.items():
        save_file({tensor: tensors[tensor] for tensor in own}, found / name, {"format": "pt"})
    held = {tensor: name for name, own in parts.items() for tensor in own}
    (found / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": held}))
    return found


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_they_are_one_checkpoint(folder: Path, tiny: nn.Module) -> None:
    assert same(load_model(folder), tiny)
    assert same(load_model(folder / INDEX), tiny)
    megabytes = sum((folder / name).stat().st_size for name in NAMES) / 1e6
    assert f"{megabytes:.1f} MB" in describe_checkpoint(str(folder))


def test_every_file_counts_in_the_fingerprint(folder: Path) -> None:
    before = fingerprint(folder)
    assert before == fingerprint(folder / INDEX)
    for name in NAMES:
        tensors = load_file(folder / name)
        changed = next(iter(tensors))
        save_file(tensors | {changed: tensors[changed] + 1}, folder / name)
        after = fingerprint(folder)
        assert after != before
        before = after


def test_one_file_alone_says_what_to_give(folder: Path, tiny: nn.Module) -> None:
    for name in NAMES:
        with pytest.raises(UserError, match=f"to be one of 2 files: give their folder, or the index {INDEX}$"):
            load_model(folder / name)
    (folder / NAMES[0]).rename(folder / "one-00001-of-00001.safetensors")
    with pytest.raises(UserError) as caught:
        load_model(folder / "one-00001-of-00001.safetensors")
    assert "one of" not in str(caught.value)
    whole = folder / "run-00003-of-00010.safetensors"
    save_model(tiny, whole, dtype=torch.float32)
    assert same(load_model(whole), tiny)  # a name is no reason to refuse a whole file


def test_a_file_that_is_missing_is_named(folder: Path) -> None:
    (folder / NAMES[1]).unlink()
    for call in (load_model, fingerprint):
        with pytest.raises(FileNotFoundError, match=f"lists {NAMES[1]}, which is not in its folder .1 of 2 files"):
            call(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}',
                                  '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": ""}}',
                                  '{"weight_map": {"a": ".."}}'])  # fmt: skip
def test_what_is_no_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(UserError, match="is not an index of safetensors files"):
        load_model(folder)


def test_a_tensor_stands_in_one_file(folder: Path) -> None:
    tensors = load_file(folder / NAMES[0])
    save_file(tensors, folder / NAMES[1])
    with pytest.raises(UserError, match=f"{NAMES[1]} contains .* and so does another file of the checkpoint"):
        load_model(folder)


def test_no_file_of_the_source_is_written_over(folder: Path) -> None:
    with pytest.raises(UserError, match="is the source checkpoint; choose another"):
        export_quantized(str(folder), [], folder / NAMES[0], dtype="float32", overwrite=True)


def test_from_the_hub_all_files_come(folder: Path, tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index, what it names, and the sizes; what is half there is fetched again."""
    from huggingface_hub.errors import EntryNotFoundError

    asked, cached = list[str](), dict[str, str]()

    def download(hub_id: str, name: str) -> str:
        asked.append(name)
        if not (folder / name).is_file():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda hub_id, name: cached.get(name))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert same(load_model("someone/finetune"), tiny)
    assert asked == ["config.json", "model.safetensors", "model.pt", INDEX, *NAMES]
    cached[INDEX] = str(folder / INDEX)
    asked.clear()
    assert same(load_model("someone/finetune"), tiny)
    assert not asked
    (folder / NAMES[1]).rename(folder / "elsewhere")
    with pytest.raises(UserError, match=f"lists {NAMES[1]}, which the hub repository lacks"):
        load_model("someone/finetune")


def test_sizes_on_the_hub_come_before_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are in the cache are taken as they are: without their sizes they would be another network."""
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(hub_id: str, name: str) -> str:
        if name != "config.json":
            pytest.fail(f"asked for {name}")
        raise HfHubHTTPError.__new__(HfHubHTTPError)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *given: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match="cannot download someone/finetune"):
        load_model("someone/finetune")


def test_names_of_an_index() -> None:
    assert is_index(Path("a") / INDEX)
    assert is_index(Path("other.safetensors.index.json"))
    assert not is_index(Path("model.safetensors"))

"""Checkpoints in and out, and adoption of upstream objects."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from geoaccel.errors import UserError, UserTypeError
from geoaccel.models import BACKBONES, weights
from geoaccel.models.files import read_tensors
from geoaccel.models.vggt import VGGT
from geoaccel.models.weights import history, load_model, save_model


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_own_file_round_trip(tiny: nn.Module, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "a.safetensors", dtype=torch.float32, provenance={"steps": 3})
    assert same(load_model(tmp_path / "a.safetensors"), tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_of_backbones_that_fit_the_one_with_the_most_children_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is registered first."""

    def backbone(*children: str) -> Any:
        return SimpleNamespace(
            children=children,
            from_upstream=lambda tensors: tensors,
            owns=lambda tensors: all(f"{c}.weight" in tensors for c in children),
        )

    fitting = {"before": backbone("a"), "after": backbone("a", "b"), "other": backbone("a", "b", "c")}
    tensors = {"a.weight": torch.ones(1), "b.weight": torch.ones(1)}
    for order in (fitting, dict(reversed(fitting.items()))):
        monkeypatch.setattr(weights, "BACKBONES", order)
        assert weights.recognise(tensors, {}, Path("a.pt")) is fitting["after"]


def test_history_names_every_round_once() -> None:
    """A mean of two rounds that share their first one, nested or flat."""
    first = {"steps": 1}
    second = {"steps": 2, "source_provenance": first}
    mean = {"steps": 3, "source_provenance": [first, second]}
    assert history({}) == history({"source_provenance": []}) == []
    assert history(second) == [{"steps": 1}]
    assert history(mean) == [{"steps": 1}, {"steps": 2}]
    assert history({"source_provenance": [mean, second]}) == [{"steps": 1}, {"steps": 2}, {"steps": 3}]
    assert history({"source_provenance": {"steps": 3, "source_provenance": history(mean)}}) == [
        *history(mean),
        {"steps": 3},
    ]


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_upstream_pickles(tiny: nn.Module, tmp_path: Path, wrapper: str | None) -> None:
    state = tiny.state_dict()
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "model.pt")
    # config.json as the hub has it: fields of ours and of others; and as some programs mark UTF-8
    config = json.dumps({**tiny.config.to_dict(), "enable_camera": True})
    (tmp_path / "config.json").write_text(config, encoding="utf-8-sig")
    assert same(load_model(tmp_path), tiny)
    assert same(load_model(str(tmp_path / "model.pt")), tiny)


def test_full_size_checkpoint_needs_no_configuration() -> None:
    for backbone in BACKBONES.values():
        with torch.device("meta"):
            model = backbone.build()
        tensors = model.state_dict()
        assert backbone.owns(tensors)
        with torch.device("meta"):
            again = backbone.build(**backbone.config_from_names(tensors))
        assert {name: t.shape for name, t in again.state_dict().items()} == {
            name: t.shape for name, t in tensors.items()
        }


def test_a_checkpoint_may_lack_heads() -> None:
    tensors = torch_meta(VGGT).state_dict()
    tensors = {name: tensors[name] for name in tensors if not name.startswith(("track_head", "point_head"))}
    assert VGGT.backbone.config_from_names(tensors)["heads"] == ("camera", "depth")


def torch_meta(cls: Any, **config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls.backbone.build(**config)


def test_narrow_dtype_leaves_the_heads_in_float32(tiny: nn.Module, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "a.safetensors", dtype=torch.float32)
    model = load_model(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        in_head = name.split(".")[0] in model.backbone.heads_in_float32
        expected = torch.float32 if in_head else torch.bfloat16
        assert parameter.dtype == expected, name
    patch = model.preprocess.patch_size
    images = torch.rand(1, 2, 3, 4 * patch, 5 * patch)
    with torch.no_grad():
        predictions = model(images)
    assert all(value.isfinite().all() for value in predictions.values() if isinstance(value, torch.Tensor))


def test_a_wide_dtype_is_that_of_the_heads_too(tiny: nn.Module, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "a.safetensors", dtype=torch.float32)
    model = load_model(tmp_path / "a.safetensors", dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_numbers_that_a_file_cannot_hold_are_refused(tiny: nn.Module, tmp_path: Path) -> None:
    name, parameter = next((n, p) for n, p in tiny.named_parameters() if n.endswith("norm1.weight"))
    parameter.data[0] = 1e5
    with pytest.raises(UserError, match=f"{name} has values too large for torch.float16; save in torch.bfl"):
        save_model(tiny, tmp_path / "a.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    save_model(tiny, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    parameter.data[0] = float("inf")  # what is none already is the network's
    save_model(tiny, tmp_path / "b.safetensors", dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constants_of_the_network_stay_exact(tiny: nn.Module, tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(tiny, tmp_path / "a.safetensors", dtype=dtype)
    loaded = load_model(tmp_path / "a.safetensors", dtype=dtype)
    assert next(iter(loaded.parameters())).dtype == dtype
    for name, constant in tiny.named_buffers(recurse=False):  # pi3's mean and deviation; vggt has none
        assert torch.equal(loaded.get_buffer(name), constant), name


def test_loading_holds_one_copy(tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors that were read from the file become the parameters: nothing is allocated and copied."""
    save_model(tiny, tmp_path / "a.safetensors", dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}

    def read_and_remember(path: Path) -> Any:
        tensors, metadata = read_tensors(path)
        seen.update(tensors)
        return tensors, metadata

    monkeypatch.setattr("geoaccel.models.weights.read_tensors", read_and_remember)
    model = load_model(tmp_path / "a.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == seen[name].data_ptr(), name


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: f"_forward_module.module._orig_mod.{name}",
        lambda name: f"model._fsdp_wrapped_module.{name.replace('.', '._fsdp_wrapped_module.', 1)}",
        lambda name: name.replace(".", "._orig_mod.", 1),  # each part compiled
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_prefixes_of_wrappers(tiny: nn.Module, tmp_path: Path, wrapped: Any, suffix: str) -> None:
    state, path = {wrapped(name): tensor for name, tensor in tiny.state_dict().items()}, tmp_path / f"last{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "epoch": 3}, path)
        (tmp_path / "config.json").write_text(json.dumps(tiny.config.to_dict()))
    else:
        bad(state, tiny, path)
    assert same(load_model(path), tiny)


def test_prefixes_that_are_mixed_or_unknown(tiny: nn.Module, tmp_path: Path) -> None:
    state = tiny.state_dict()
    first, path = next(name for name in state if "." in name), tmp_path / "a.ckpt"
    model = {f"model.{name}": tensor for name, tensor in state.items()}
    count = len(model)
    for found, says in (
        ({**model, "loss.weight": torch.ones(1)}, f"{count} of {count + 1} tensors .* model., .*first: loss.weight"),
        ({**model, **{f"ema.{name}": state[name] for name in state}}, rf"{count} of {2 * count} .*first: ema\."),
        (
            {**model, **{f"_orig_mod.{name}": state[name] for name in state}},
            f"{count} of {2 * count} tensors begin with _orig_mod",
        ),
        ({**state, first.replace(".", "._orig_mod.", 1): state[first]}, f"contains {first} twice, the second time as"),
        ({f"student.{name}": state[name] for name in state}, r"under student\. are one of them: save only those"),
    ):
        torch.save(found, path)
        with pytest.raises(ValueError, match=says) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- bad files


def bad(tensors: dict[str, torch.Tensor], model: nn.Module, path: Path) -> Path:
    metadata = {"backbone": model.backbone.name, "config": json.dumps(model.config.to_dict())}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state, key: state.pop(key), "1 tensors missing (first: {key})"),
        (lambda state, key: state.update({key + ".extra": torch.zeros(1)}), "1 unexpected (first: {key}.extra)"),
        (lambda state, key: state.update({key: torch.zeros(7)}), "1 of another shape (first: {key} is [7], expected"),
    ],
)
def test_tensors_that_do_not_fit(tiny: nn.Module, tmp_path: Path, damage: Any, message: str) -> None:
    state = dict(tiny.state_dict())
    key = next(name for name in reversed(state) if name.endswith("weight"))
    damage(state, key)
    path = bad(state, tiny, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_model(path)
    assert message.format(key=key) in str(caught.value)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code of the checkpoint ran",))


def test_pickles_that_are_not_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "list.pt").write_bytes(pickle.dumps([1, 2]))
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    torch.save({"a": 3}, tmp_path / "numbers.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    for name in ("text.pt", "list.pt", "evil.pt", "numbers.pt", "other.pt", "legacy.pt", "noise.pt", "cut.safetensors"):
        with pytest.raises(ValueError, match=name) as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value), name
    assert "code of the checkpoint ran" not in capsys.readouterr().out


def test_a_pickle_that_was_cut_off(tiny: nn.Module, tmp_path: Path) -> None:
    torch.save(tiny.state_dict(), tmp_path / "model.pt")
    data = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model.pt is not a complete checkpoint .*; download it again"):
        load_model(tmp_path / "model.pt")


def test_hub_ids_that_are_like_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: Any) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"unknown hub id 'facebook/vggt-1b'; .* Did you mean 'facebook/VGGT-1B'"):
        load_model("facebook/vggt-1b")
    with pytest.raises(ValueError, match=r"not in the local cache .* Did you mean 'facebook/VGGT-1B'"):
        load_model("facebook/VGGT")
    with pytest.raises(ValueError, match=r"is part of the package$"):
        load_model("somebody/else")


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown model 'vgt-mini'.*Did you mean 'vggt-mini'"):
        load_model("vgt-mini")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_model(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors or model.pt"):
        load_model(tmp_path)
    for empty in ("", " "):
        with pytest.raises(ValueError, match="the model name is empty; give a name such as 'vggt-mini'"):
            load_model(empty)
    for nothing in (None, 5, b"vggt-mini"):
        with pytest.raises(UserTypeError, match=f"got a {type(nothing).__name__} as the model; give a name"):
            load_model(nothing)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float16", "auto", np.float32, torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_weights_cannot_have_is_refused_before_a_file_is_read(dtype: Any) -> None:
    with pytest.raises(
        UserTypeError, match=r"is not a dtype for weights; give torch.float32, torch.bfloat16 or torch.float16"
    ):
        load_model("nowhere.safetensors", dtype=dtype)


def test_hub_ids_are_found_in_the_cache_under_any_of_their_names(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only `model.pt` was downloaded: it is taken, without asking the network for `model.safetensors`."""
    save_model(tiny, tmp_path / "model.safetensors", dtype=torch.float32)
    cache = {("someone/finetune", "model.pt"): str(tmp_path / "model.safetensors")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: cache.get((repo, name)))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: pytest.fail("asked the network"))
    assert same(load_model("someone/finetune"), tiny)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("GatedRepoError", "is gated"),
        ("EntryNotFoundError", "has none"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, error: str, says: str) -> None:
    from huggingface_hub import errors

    def refuse(*args: Any) -> None:
        cls = getattr(errors, error)
        raise cls.__new__(cls)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(ValueError, match=says) as caught:
        load_model("someone/else")
    assert "\n" not in str(caught.value)

"""What a training run starts from."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from small_recipes import NEEDS_MUON, ROOT, SMALL_MODEL

from geoaccel.models import build
from geoaccel.models.files import read_tensors
from geoaccel.models.weights import save_model
from training_run import first_weights
from transfer import copy_trunk


def test_pi3_starts_from_the_trunk_of_a_vggt(script: ModuleType, tmp_path: Path) -> None:
    sizes = SMALL_MODEL["vggt-mini"] | {"depth": 2, "dpt_layers": [0, 0, 1, 1], "num_register_tokens": 4}
    vggt = build("vggt", **sizes, heads=["camera"]).eval()
    save_model(vggt, tmp_path / "vggt.safetensors", dtype=torch.float32)
    pi3 = first_weights(
        OmegaConf.create(
            {"network": {"backbone": "pi3", **SMALL_MODEL["pi3-mini"]}, "init_from": str(tmp_path / "vggt.safetensors")}
        )
    ).eval()
    # VGGT without a reference frame is the same network: give its first frame the tokens of the others.
    with torch.no_grad():
        vggt.aggregator.camera_token[:, 0] = vggt.aggregator.camera_token[:, 1]
        vggt.aggregator.register_token[:, 0] = vggt.aggregator.register_token[:, 1]
        for block in (*vggt.aggregator.frame_blocks, *vggt.aggregator.global_blocks):
            block.norm1.eps = block.norm2.eps = pi3.decoder[0].norm1.eps
        images = torch.rand(1, 3, 3, 56, 56)
        features, _ = vggt.aggregator(images)
        assert torch.allclose(pi3.features(images), features[-1], atol=1e-5)


def test_several_checkpoints_start_as_their_mean(script: ModuleType, config: DictConfig, tmp_path: Path) -> None:
    options = OmegaConf.to_container(config.network)
    backbone, states, paths = options.pop("backbone"), [], []
    for seed in (0, 1, 2):
        torch.manual_seed(seed)
        paths.append(str(tmp_path / f"{seed}.safetensors"))
        network = build(backbone, **options)
        states.append(network.state_dict())
        save_model(network, paths[-1], dtype=torch.float32, provenance={"steps": seed})
    run = script.Run(OmegaConf.merge(config, {"init_from": paths}))
    for name, tensor in run.model.state_dict().items():
        assert torch.allclose(tensor, (states[0][name] + states[1][name] + states[2][name]) / 3, atol=1e-6), name
    run.export({})
    made = json.loads(read_tensors(tmp_path / "run" / "model.safetensors")[1]["provenance"])
    assert [source["steps"] for source in made["source_provenance"]] == [0, 1, 2]
    one = script.Run(OmegaConf.merge(config, {"init_from": paths[1], "out": str(tmp_path / "one")}))
    one.export({})
    made = json.loads(read_tensors(tmp_path / "one" / "model.safetensors")[1]["provenance"])
    assert made["source_provenance"] == [{"steps": 1}]
    save_model(build(backbone, **{**options, "img_size": 28}), paths[0], dtype=torch.float32)
    with pytest.raises(ValueError, match="different networks cannot be averaged"):
        first_weights(OmegaConf.merge(config, {"init_from": paths}))


@NEEDS_MUON
def test_no_step_writes_what_it_starts_from(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = OmegaConf.merge(OmegaConf.load(ROOT / "configs" / "network" / "vggt-mini.yaml"), SMALL_MODEL["vggt-mini"])
    options = OmegaConf.to_container(small)
    backbone, states, paths = options.pop("backbone"), [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = build(backbone, **options)
        states.append(network.state_dict())
        paths.append(str(tmp_path / f"{seed}.safetensors"))
        save_model(network, paths[-1], dtype=torch.float32, provenance={"steps": seed})
    sizes = [f"network.{name}={value}".replace(" ", "") for name, value in SMALL_MODEL["vggt-mini"].items()]
    given = [f"init_from=[{','.join(paths)}]", f"out={tmp_path / 'mean'}", "device=cpu", "steps=0", "threads=0", *sizes]
    checked = ["validation.scenes=1", "validation.frames=3", "validation.size=[56,56]"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "keep_freed_memory", lambda: None)
    monkeypatch.setattr("sys.argv", ["train_mini.py", *given, *checked])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    tensors, metadata = read_tensors(tmp_path / "mean" / "model.safetensors")
    for name, tensor in tensors.items():
        mean = (states[0][name] + states[1][name]) / 2
        assert torch.allclose(tensor.float(), mean, rtol=2**-8, atol=1e-6), name
    made = json.loads(metadata["provenance"])
    assert (made["steps"], [source["steps"] for source in made["source_provenance"]]) == (0, [0, 1])
    scores = [json.loads(line) for line in (tmp_path / "mean" / "log.jsonl").read_text().splitlines()]
    assert [row["depth_abs_rel"] for row in scores] == [round(made["validation"]["depth_abs_rel"], 4)]
    assert 0 < scores[0]["depth_abs_rel"] < 10


def test_a_trunk_of_another_size_is_refused(tmp_path: Path) -> None:
    sizes = SMALL_MODEL["vggt-mini"] | {"depth": 3, "dpt_layers": [0, 0, 1, 1]}
    pi3 = build("pi3", **SMALL_MODEL["pi3-mini"])
    with pytest.raises(ValueError, match=r"the trunks differ in \d+ tensors, the first is decoder.4"):
        copy_trunk(build("vggt", **sizes, heads=["camera"]), pi3)
    with pytest.raises(ValueError, match="from vggt to pi3, got pi3 to pi3"):
        copy_trunk(pi3, pi3)

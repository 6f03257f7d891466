"""The training script: a run that was cut off continues as itself, and what it writes loads."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

import geoaccel
from geoaccel.eval.data.synthetic import VALIDATION_SEEDS, sample_batch
from geoaccel.eval.run.prepare import Truth
from geoaccel.eval.run.scoring import score_scene
from geoaccel.models import build
from geoaccel.models.files import read_tensors
from geoaccel.models.weights import save_model
from objectives import Weights
from transfer import copy_trunk

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"device": "cpu", "compile": False, "steps": 4, "validation": {"scenes": 1, "frames": 3, "size": [56, 56]}}
SMALL_MODEL = {
    "vggt-mini": {"img_size": 56, "embed_dim": 32, "num_heads": 2, "vit_depth": 1, "vit_num_heads": 2,
                  "camera_head_num_heads": 2, "dpt_features": 8, "dpt_out_channels": [8, 8, 8, 8]},
    "pi3-mini": {"img_size": 56, "vit_dim": 32, "vit_depth": 1, "vit_num_heads": 2, "decoder_dim": 32,
                 "decoder_depth": 4, "decoder_num_heads": 2, "head_decoder_dim": 32, "head_decoder_num_heads": 2,
                 "camera_dim": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_mini", ROOT / "scripts" / "training" / "train_mini.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_mini"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=sorted(SMALL_MODEL))
def config(tmp_path: Path, request: pytest.FixtureRequest) -> DictConfig:
    """The recipe as hydra composes it, made small."""
    model = OmegaConf.merge(
        OmegaConf.load(ROOT / "configs" / "network" / f"{request.param}.yaml"), SMALL_MODEL[request.param]
    )
    recipe = OmegaConf.load(ROOT / "configs" / "train.yaml")
    cfg = OmegaConf.merge(recipe, SMALL, {"out": str(tmp_path / "run"), "network": model})
    for stage in cfg.stages:
        stage.tokens, stage.sizes, stage.frames = 64, [[56, 56]], [2, 3]
    return cfg


@pytest.mark.parametrize(("dtype", "kernel"), [("bfloat16", "matmul"), ("float32", "sdpa")])
def test_a_cpu_takes_the_kernel_that_is_fastest(
    script: ModuleType, config: DictConfig, dtype: str, kernel: str
) -> None:
    config.dtype = dtype
    model = script.Run(config).model
    assert {site.mixer.kernel for sites in model.backbone.sites(model).values() for site in sites} == {kernel}


@pytest.mark.parametrize("muon", [False, True])
def test_a_run_that_was_cut_off_continues_as_itself(
    script: ModuleType, config: DictConfig, tmp_path: Path, muon: bool
) -> None:
    config.optimizer.muon = muon
    straight = script.Run(OmegaConf.merge(config, {"out": str(tmp_path / "straight")}))
    expected = [script.train_step(straight) for _ in range(4)]

    first = script.Run(config)
    losses = [script.train_step(first) for _ in range(2)]
    script.append(first.out / "log.jsonl", {"step": 2, "scenes": 0, "loss": 0.0})
    first.save()
    script.append(first.out / "log.jsonl", {"step": 3, "scenes": 0, "loss": 0.0})  # done after the last state was kept
    with (first.out / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "sce')  # and then it was killed
    second = script.Run(config)
    assert second.step == 2
    assert [json.loads(line)["step"] for line in (second.out / "log.jsonl").read_text().splitlines()] == [2]
    losses += [script.train_step(second) for _ in range(2)]

    assert losses == expected
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    for name, tensor in straight.average.shadow.items():
        assert torch.equal(second.average.shadow[name], tensor), name


def test_a_run_does_not_go_on_as_another(script: ModuleType, config: DictConfig) -> None:
    script.Run(config).save()
    for change, said in (
        ({"optimizer": {"muon": True}}, "begun with optimizer.muon=False, not True"),
        ({"objective": "heads"}, "begun with objective=whole, not heads"),
        ({"seed": 7}, "begun with seed=0, not 7"),
        ({"init_from": []}, r"begun with init_from=None, not \[\]"),
        ({"network": {"vit_depth": 2}}, r"begun with network=\{.*'vit_depth': 1.*'vit_depth': 2.*change out"),
    ):
        with pytest.raises(ValueError, match=said):
            script.Run(OmegaConf.merge(config, change))
    assert script.Run(OmegaConf.merge(config, {"steps": 9})).step == 0


def test_muon_takes_the_matrices_of_the_blocks(script: ModuleType, config: DictConfig) -> None:
    config.optimizer.muon = True
    run = script.Run(config)
    of = {id(p): name for name, p in [*run.model.named_parameters(), *run.objective.named_parameters()]}
    adamw, muon = ({of[id(p)] for group in o.param_groups for p in group["params"]} for o in run.optimizers)
    assert adamw.isdisjoint(muon)
    assert len(adamw | muon) == len(run.parameters())
    ends = {".".join(name.split(".")[-3:]) for name in muon}
    assert ends == {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    # An orthogonal step of root mean square 0.2 for matrices of every shape, where AdamW's first is of 1.
    assert run.optimizers[1].param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"
    block = next(m for m in run.model.modules() if isinstance(m, script.Block))
    before = block.attn.proj.weight.detach().clone()
    script.train_step(run)
    moved = (block.attn.proj.weight.detach() - before).square().mean().sqrt() / script.learning_rate(config, 0)
    assert 0.1 < moved < 0.25
    assert all(group["lr"] == script.learning_rate(config, 0) for o in run.optimizers for group in o.param_groups)


@torch.no_grad()
def test_the_knee_reaches_relative_poses_alone(script: ModuleType, config: DictConfig) -> None:
    run = script.Run(config)
    batch = script.draw(config, 0, run.device)
    targets = script.normalise(batch.cam_from_world, batch.intrinsics, batch.depth, batch.points_world, batch.valid)
    plain, flattened = (
        run.objective(run.model, batch.images, targets, Weights(relative=1.0, relative_knee=knee))
        for knee in (None, 0.1)
    )
    for name in plain.keys() - {"loss", "loss_relative"}:
        assert torch.equal(plain[name], flattened[name]), name
    assert 0 < flattened["loss_relative"] < 0.9 * plain["loss_relative"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "network").glob("*.yaml")), ids=lambda path: path.stem)
def test_minis_have_five_to_eight_million_parameters(path: Path) -> None:
    options = OmegaConf.to_container(OmegaConf.load(path))
    with torch.device("meta"):
        model = build(options.pop("backbone"), **options)
    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 8e6


@pytest.mark.parametrize("recipe", ["train", "heads", "gpu", "more"])
@pytest.mark.parametrize("network", sorted(SMALL_MODEL))
def test_every_recipe_is_complete(script: ModuleType, recipe: str, network: str) -> None:
    with initialize_config_module("geoaccel.configs", version_base="1.3"):
        cfg = compose(recipe, overrides=[f"network={network}", "out=here"])
    shares = [stage.until for stage in cfg.stages]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    for step in (0, cfg.steps - 1):
        Weights(**script.stage_at(cfg, step).weights)
        assert 0 < script.learning_rate(cfg, step) <= cfg.optimizer.lr


def test_stages_follow_each_other_and_the_rate_falls(script: ModuleType, config: DictConfig) -> None:
    config.steps = 1000
    shares = [script.stage_at(config, step).until for step in range(1000)]
    assert shares == sorted(shares)
    assert set(shares) == {stage.until for stage in config.stages}
    rates = [script.learning_rate(config, step) for step in range(1000)]
    assert max(rates) == pytest.approx(config.optimizer.lr)
    assert rates[0] < rates[config.optimizer.warmup - 1]
    assert rates[-1] == pytest.approx(config.optimizer.final_lr, rel=0.05)
    held = rates[config.optimizer.warmup : int(1000 * config.optimizer.hold)]
    assert set(held) == {config.optimizer.lr}
    assert rates[int(1000 * config.optimizer.hold) + 50] < config.optimizer.lr


def test_large_pictures_come_in_fewer_frames(script: ModuleType, config: DictConfig) -> None:
    config.stages[0].update({"tokens": 64, "sizes": [[56, 56]], "frames": [2, 24]})
    counts = {script.draw(config, step, torch.device("cpu")).images.shape[:2] for step in range(12)}
    assert max(frames for _, frames in counts) <= 4
    assert all(scenes * frames <= 4 for scenes, frames in counts)


def test_numbers_of_frames_can_be_listed(script: ModuleType, config: DictConfig) -> None:
    config.stages = [{"until": 1.0, "tokens": 96, "sizes": [[56, 56]], "frames": [2, 24], "among": [2, 5, 12],
                      "span": [30, 90]}]  # fmt: skip
    counts = {script.draw(config, step, torch.device("cpu")).images.shape[1] for step in range(12)}
    assert counts == {2, 5}
    config.stages[0].update({"among": [12]})
    assert script.draw(config, 0, torch.device("cpu")).images.shape[1] == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc is asked")
def test_freed_memory_is_kept() -> None:
    """Memory that is taken and freed again and again gets its pages from the kernel once, in one block or in many."""
    program = f"""
import ctypes, resource, sys
sys.path.insert(0, {str(ROOT / "scripts" / "training")!r})
from train_mini import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults(size, count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        blocks = [libc.malloc(size) for _ in range(count)]
        for block in blocks:
            libc.memset(block, 1, size)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cases = [(2**26, 1), (2**20, 16), (2**16, 256)]
given_back = [faults(*case) for case in cases]
keep_freed_memory()
[faults(*case) for case in cases]
print(*given_back, *[faults(*case) for case in cases])
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    counts = list(map(int, done.stdout.split()))
    assert counts[0] >= 8 * 2**26 // 2**21  # pages are of 2 MB at most
    for given_back, kept in zip(counts[:3], counts[3:], strict=True):
        assert kept < given_back / 20, counts


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(script: ModuleType, config: DictConfig, tmp_path: Path) -> None:
    config.steps = 2
    plain = script.Run(config)
    expected = script.train_step(plain)
    torch.manual_seed(0)
    compiled = script.Run(OmegaConf.merge(config, {"out": str(tmp_path / "compiled"), "compile_blocks": True}))
    assert script.train_step(compiled) == pytest.approx(expected, rel=1e-2)  # bfloat16 is rounded elsewhere
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    assert any(block._compiled_call_impl is not None for block in compiled.model.modules())


def test_pi3_starts_from_the_trunk_of_a_vggt(script: ModuleType, tmp_path: Path) -> None:
    sizes = SMALL_MODEL["vggt-mini"] | {"depth": 2, "dpt_layers": [0, 0, 1, 1], "num_register_tokens": 4}
    vggt = build("vggt", **sizes, heads=["camera"]).eval()
    save_model(vggt, tmp_path / "vggt.safetensors", dtype=torch.float32)
    pi3 = script.first_weights(
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
    with pytest.raises(ValueError, match="different networks have no mean"):
        script.first_weights(OmegaConf.merge(config, {"init_from": paths}))


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
    script.main()
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


def test_dense_heads_go_on_alone(script: ModuleType, config: DictConfig) -> None:
    heads = OmegaConf.load(ROOT / "configs" / "heads.yaml")
    stage = OmegaConf.merge(heads.stages[0], {"tokens": 64, "sizes": [[56, 56]], "frames": [2, 3]})
    cfg = OmegaConf.merge(config, {"objective": heads.objective, "optimizer": heads.optimizer, "stages": [stage]})
    run = script.Run(cfg)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    losses = script.train_step(run)
    assert losses["loss_conf"] != 0
    moved = {
        name.partition(".")[0] for name, tensor in run.model.state_dict().items() if not tensor.equal(before[name])
    }
    assert moved == set(run.objective.heads)
    run.save()
    assert script.Run(cfg).step == 1


def test_validation_scores_depth_and_confidence_as_the_evaluators_do(script: ModuleType, config: DictConfig) -> None:
    config.validation.scenes = 2
    run = script.Run(config)
    found = script.validate(run)
    model, expected = run.averaged(), []
    for seed in list(VALIDATION_SEEDS)[:2]:
        batch = sample_batch([seed], frames=3, size=(56, 56))
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            geometry = model.backbone.geometry(model(batch.images), (56, 56))
        truth = Truth(batch.cam_from_world[0].double(), batch.depth[0], batch.valid[0], batch.points_world[0])
        expected.append(score_scene(geometry, truth).values)
    for name in ("depth_abs_rel", "conf_spearman"):
        assert found[name] == pytest.approx(sum(values[name] for values in expected) / 2, rel=1e-4), name


def test_what_it_writes_loads_with_provenance(script: ModuleType, config: DictConfig) -> None:
    run = script.Run(config)
    script.append(run.out / "log.jsonl", {"step": 1, "scenes": 2, **script.train_step(run)})
    scores = script.validate(run)
    run.export(scores)
    script.append(run.out / "log.jsonl", {"step": 1, "scenes": 2, **scores})
    script.plot(run.out / "log.jsonl", run.out / "curve.png")
    assert (run.out / "curve.png").stat().st_size > 1000
    model = geoaccel.load_model(run.out / "model.safetensors")
    averaged = run.averaged().state_dict()
    for name, tensor in model.state_dict().items():
        stored = averaged[name] if "." not in name and name.startswith("image_") else averaged[name].bfloat16()
        assert torch.equal(tensor, stored.to(tensor.dtype)), name
    from geoaccel.info import describe_checkpoint

    assert "steps: 1" in describe_checkpoint(str(run.out / "model.safetensors"))

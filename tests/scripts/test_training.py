"""The training script: a run that was cut off continues as itself, and what it writes loads."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from small_recipes import NEEDS_MUON, ROOT

import geoaccel
from geoaccel.errors import UserError
from geoaccel.eval.data.synthetic import VALIDATION_SEEDS, sample_batch
from geoaccel.eval.run.prepare import Truth
from geoaccel.eval.run.scoring import score_scene
from geoaccel.models.layers.block import Block
from objectives import Weights


@pytest.mark.parametrize(("dtype", "kernel"), [("bfloat16", "matmul"), ("float32", "sdpa")])
def test_a_cpu_takes_the_kernel_that_is_fastest(
    script: ModuleType, config: DictConfig, dtype: str, kernel: str
) -> None:
    config.dtype = dtype
    model = script.Run(config).model
    assert {site.mixer.kernel for sites in model.backbone.sites(model).values() for site in sites} == {kernel}


@pytest.mark.parametrize("muon", [False, pytest.param(True, marks=NEEDS_MUON)])
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
        ({"objective": "heads"}, "started with objective=whole, not heads"),
        ({"seed": 7}, "started with seed=0, not 7"),
        ({"init_from": []}, r"started with init_from=None, not \[\]"),
        ({"network": {"vit_depth": 2}}, r"started with network=\{.*'vit_depth': 1.*'vit_depth': 2.*change out"),
    ):
        with pytest.raises(ValueError, match=said):
            script.Run(OmegaConf.merge(config, change))
    assert script.Run(OmegaConf.merge(config, {"steps": 9})).step == 0


@NEEDS_MUON
def test_a_run_does_not_go_on_with_muon(script: ModuleType, config: DictConfig) -> None:
    script.Run(config).save()
    with pytest.raises(ValueError, match=r"started with optimizer.muon=False, not True"):
        script.Run(OmegaConf.merge(config, {"optimizer": {"muon": True}}))


def test_a_torch_without_muon_is_said(script: ModuleType, config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    config.optimizer.muon = True
    with pytest.raises(UserError, match=r"needs torch 2\.9 or newer"):
        script.Run(config)


@NEEDS_MUON
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
    block = next(m for m in run.model.modules() if isinstance(m, Block))
    before = block.attn.proj.weight.detach().clone()
    script.train_step(run)
    moved = (block.attn.proj.weight.detach() - before).square().mean().sqrt() / script.learning_rate(config, 0)
    assert 0.1 < moved < 0.25
    assert all(group["lr"] == script.learning_rate(config, 0) for o in run.optimizers for group in o.param_groups)


@torch.no_grad()
def test_the_knee_reaches_relative_poses_alone(script: ModuleType, config: DictConfig) -> None:
    run = script.Run(config)
    batch = script.sample(config, 0, run.device)
    targets = script.normalise(batch.cam_from_world, batch.intrinsics, batch.depth, batch.points_world, batch.valid)
    plain, flattened = (
        run.objective(run.model, batch.images, targets, Weights(relative=1.0, relative_knee=knee))
        for knee in (None, 0.1)
    )
    for name in plain.keys() - {"loss", "loss_relative"}:
        assert torch.equal(plain[name], flattened[name]), name
    assert 0 < flattened["loss_relative"] < 0.9 * plain["loss_relative"]


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

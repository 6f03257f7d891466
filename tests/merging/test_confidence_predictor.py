"""Co-Me's predictor: its network, its files, how it is taught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from references import Golden
from safetensors.torch import save_file
from torch import Tensor, nn

import geoaccel
from distillation import Lesson, fit, observe, predictions, ranking_loss
from geoaccel.merging import confidence
from geoaccel.merging.alike import Alike
from geoaccel.merging.come import CoMe
from geoaccel.merging.confidence import (
    SHIPPED,
    ConfidencePredictor,
    Tap,
    fingerprint,
    load_predictor,
    predictor_for,
    save_predictor,
)
from geoaccel.merging.httm import HTTM
from geoaccel.models import build
from geoaccel.models.files import list_models

TAP = Tap("vggt", 16, 2, 0, "0" * 16)


def predictor(tap: Tap = TAP, seed: int = 0) -> ConfidencePredictor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConfidencePredictor(tap).eval()


def patches(grid: tuple[int, int], frames: int = 3, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, frames, grid[0] * grid[1], width, generator=generator)


# --------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(("width", "hidden", "count"), [(1024, 128, 412_417), (1536, 128, 477_953), (192, 24, 14_929)])
def test_parameters(width: int, hidden: int, count: int) -> None:
    with torch.device("meta"):
        network = ConfidencePredictor(Tap("vggt", width, 24, 14, ""))
    assert network.hidden == hidden
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("grid", [(5, 7), (2, 2), (1, 4), (3, 1), (1, 1)])
def test_any_grid_gives_one_confidence_above_one_for_each_patch(grid: tuple[int, int]) -> None:
    with torch.no_grad():
        conf = predictor()(patches(grid), grid)
    assert conf.shape == (1, 3, *grid)
    assert conf.dtype == torch.float32
    assert (conf > 1).all()


def test_frames_see_each_other_and_their_order_does_not_matter() -> None:
    network, x = predictor(), patches((4, 5))
    with torch.no_grad():
        conf = network(x, (4, 5))
        permuted = network(x[:, [2, 0, 1]], (4, 5))
        alone = network(x[:, :1], (4, 5))
    assert torch.allclose(permuted, conf[:, [2, 0, 1]], atol=1e-5)
    assert not torch.allclose(alone[:, 0], conf[:, 0], atol=1e-4)


def test_scale_of_the_backbone_does_not_matter() -> None:
    with torch.no_grad():
        assert torch.allclose(
            predictor()(50 * patches((4, 5)), (4, 5)), predictor()(patches((4, 5)), (4, 5)), atol=1e-4
        )


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("depth", "layer"), [(24, 14), (12, 7), (3, 1), (2, 0), (1, 0)])
def test_tap_stands_at_the_papers_share(golden: Golden, depth: int, layer: int) -> None:
    name = golden.backbone
    if "vit_depth" not in golden.config:
        pytest.skip("its encoder is the front of one transformer")
    tap = Tap.of(build(name, **{**golden.config, "vit_depth": depth}))
    assert (tap.backbone, tap.width, tap.depth, tap.layer) == (name, 32, depth, layer)


def test_a_tap_beyond_the_encoder_is_refused(tiny: nn.Module) -> None:
    assert Tap.of(tiny, 1).layer == 1
    with pytest.raises(ValueError, match="tap layer 2 does not exist; the encoder has layers 0 to 1"):
        Tap.of(tiny, 2)


def test_fingerprint_knows_the_weights_in_any_dtype(tiny: nn.Module) -> None:
    before = fingerprint(tiny)
    assert fingerprint(tiny.to(torch.bfloat16)) == before
    weight = next(p for name, p in tiny.named_parameters() if name.endswith("patch_embed.proj.weight"))
    weight.data[0, 0, 0, 0] += 1
    assert fingerprint(tiny) != before


def test_fingerprint_survives_an_export_in_float16(tiny: nn.Module) -> None:
    """Quantized files keep everything else in float16, which has fewer bits for numbers below 6e-5."""
    weight = next(p for name, p in tiny.named_parameters() if name.endswith("patch_embed.proj.weight"))
    weight.data = (weight * 1e-4).bfloat16()
    before = fingerprint(tiny)
    rounded = weight.data.half()
    assert not torch.equal(rounded.bfloat16(), weight.data)
    weight.data = rounded
    assert fingerprint(tiny) == before


def test_round_trip(tmp_path: Path) -> None:
    network = predictor()
    save_predictor(network, tmp_path / "p.safetensors", {"steps": 3})
    again = load_predictor(tmp_path / "p.safetensors")
    assert again.tap == network.tap
    assert not again.training
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    with torch.no_grad():
        assert torch.equal(again(patches((4, 5)), (4, 5)), network(patches((4, 5)), (4, 5)))


def test_what_is_no_predictor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"confidence predictor .* does not exist"):
        load_predictor(tmp_path / "absent.safetensors")
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="not a confidence predictor"):
        load_predictor(path)
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="not a confidence predictor"):
        load_predictor(path)
    save_predictor(predictor(), path)
    other = predictor(Tap("vggt", 24, 2, 0, ""))
    save_file(dict(other.state_dict()), path, confidence.safe_open(path, "pt").metadata())
    with pytest.raises(ValueError, match="not a confidence predictor"):
        load_predictor(path)


@pytest.mark.parametrize(
    "other",
    [
        Tap("pi3", 16, 2, 0, "0" * 16),
        Tap("vggt", 32, 2, 0, "0" * 16),
        Tap("vggt", 16, 2, 1, "0" * 16),
        Tap("vggt", 16, 3, 0, ""),
    ],
)
def test_predictors_for_something_else_are_refused(other: Tap, tmp_path: Path) -> None:
    save_predictor(predictor(other), tmp_path / "p.safetensors")
    for given in (predictor(other), tmp_path / "p.safetensors", str(tmp_path / "p.safetensors")):
        with pytest.raises(ValueError, match=f"was trained for {other}; this model has {TAP}"):
            predictor_for(TAP, given)


def test_another_checkpoint_of_the_same_size_may_be_used_knowingly() -> None:
    network = predictor(Tap("vggt", 16, 2, 0, "f" * 16))
    assert predictor_for(TAP, network) is network


def test_the_shipped_one_is_found_by_its_checkpoint(
    tiny: nn.Module, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confidence, "SHIPPED", tmp_path)
    with pytest.raises(
        ValueError, match=r"no bundled confidence predictor fits this checkpoint \(.*, width 32, layer 0"
    ):
        geoaccel.accelerate(tiny, merging=CoMe())
    tap = Tap.of(tiny)
    save_predictor(predictor(Tap(tap.backbone, 32, 2, 0, "f" * 16), seed=1), tmp_path / "a.safetensors")
    save_predictor(predictor(tap, seed=2), tmp_path / "b.safetensors")
    found = predictor_for(tap, "auto")
    assert torch.equal(found.head.weight, predictor(tap, seed=2).head.weight)
    geoaccel.accelerate(tiny, merging=CoMe())
    assert [action.method.name for action in geoaccel.describe(tiny).merging] == ["come"]


def test_it_stays_out_of_the_model_and_of_the_random_state(tiny: nn.Module) -> None:
    keys, state = list(tiny.state_dict()), torch.get_rng_state()
    given = predictor(Tap.of(tiny))
    geoaccel.accelerate(tiny, merging=CoMe(predictor=given, bypass=False))
    assert list(tiny.state_dict()) == keys
    with torch.no_grad():
        tiny.to(torch.bfloat16)(torch.zeros(1, 1, 3, 28, 28, dtype=torch.bfloat16))
    assert given.head.weight.dtype == torch.float32, "the user's own predictor is not cast"
    predictor_for(TAP, "untrained")
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------- teaching


def test_ranking_loss_is_the_papers() -> None:
    predicted = torch.tensor([0.0, 1.0, 3.0, 3.0], requires_grad=True)
    target = torch.tensor([5.0, 6.0, 2.0, 2.0])
    first, second = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    loss = ranking_loss(predicted, target, first, second)
    terms = torch.tensor([-1.0, 2.0, 0.0]).exp().log1p()  # right by 1, wrong by 2, a tie
    assert torch.allclose(loss, terms.mean())
    loss.backward()
    gradient = predicted.grad
    assert gradient is not None
    assert gradient[0] > 0  # should fall
    assert gradient[3] == 0  # only in a tie


def toy_lessons(count: int) -> list[Lesson]:
    """Confidence is a function of two channels of the patch."""
    generator = torch.Generator().manual_seed(1)
    lessons = []
    for _ in range(count):
        x = torch.randn(3, 20, 16, generator=generator)
        lessons.append(Lesson(x, (x[..., 0] - 2 * x[..., 3]).unflatten(1, (4, 5))))
    return lessons


def rank_correlation(network: ConfidencePredictor, lessons: list[Lesson]) -> float:
    ranks = [
        torch.corrcoef(torch.stack([t.flatten().argsort().argsort().double() for t in (conf, lesson.conf)]))[0, 1]
        for conf, lesson in zip(predictions(network, lessons), lessons, strict=True)
    ]
    return float(torch.stack(ranks).mean())


def test_it_learns_an_order_that_is_there() -> None:
    network, unseen = predictor(), toy_lessons(12)[8:]
    before = rank_correlation(network, unseen)
    losses = list(fit(network, toy_lessons(8), steps=60, lr=1e-2))
    assert before < 0.5 < 0.8 < rank_correlation(network, unseen)
    assert len(losses) == 60
    assert losses[-1] < 0.7 * losses[0]
    assert not network.training


def test_the_same_seed_teaches_the_same() -> None:
    state = torch.get_rng_state()
    runs = [list(fit(predictor(), toy_lessons(2), steps=3, seed=seed)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="no scenes to learn from"):
        list(fit(predictor(), [], steps=1))


def test_observing_notes_the_tap_and_leaves_the_model_as_it_was(tiny: nn.Module, golden: Golden) -> None:
    backbone: Any = tiny.backbone
    images = golden["inputs.images"][:1]
    geoaccel.accelerate(tiny, merging=[Alike(bypass=False), HTTM(bypass=False)])
    mixers = [site.mixer for site in backbone.sites(tiny)["global"]]
    slot: Any = next(module for module in tiny.modules() if hasattr(module, "token_packer"))
    packer, seen = slot.token_packer, []
    slot.blocks[0].register_forward_hook(lambda block, given, answer: seen.append(answer))
    lesson = observe(tiny, Tap.of(tiny), images)
    assert slot.token_packer is packer
    assert [site.mixer for site in backbone.sites(tiny)["global"]] == mixers
    assert torch.equal(lesson.patches, seen[0][:, -5 * 7 :])
    geoaccel.restore(tiny)
    with torch.no_grad():
        conf = backbone.geometry(tiny(images), (70, 98)).conf[0]
    assert lesson.conf.shape == (3, 5, 7)
    assert torch.allclose(lesson.conf, F.avg_pool2d(conf, 14))


@pytest.mark.parametrize("name", list_models())
def test_models_of_the_package_have_a_predictor_of_their_own(name: str) -> None:
    """Trained again, a checkpoint needs a new one: its fingerprint is another."""
    model = geoaccel.load_model(name)
    geoaccel.accelerate(model, merging=CoMe())
    (path,) = (path for path in SHIPPED.glob("*.safetensors") if path.stem == name)
    assert load_predictor(path).tap == Tap.of(model)

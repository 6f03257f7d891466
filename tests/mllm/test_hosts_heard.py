"""An encoder that runs under a patch for something else than the next prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_hosts import Fused4, Fused5, old_style
from tiny_hosts import CASES, FAMILIES, IMAGE, VIDEO, batch, cache_argument, tiny_host
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.mllm import Merge3DConfig
from geoaccel.mllm.handed import returned_cache
from geoaccel.mllm.hosts import patch, reduce_for_generate

CONFIG = Merge3DConfig(ratio=0.3, tau_geo=float("inf"))
HOSTS = {family: tiny_host(family) for family in FAMILIES}
FUSED = tiny_host("qwen2_5_vl", Fused5)
CACHE = cache_argument(FUSED)
STEPS = 4


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def look(model: Any, inputs: dict[str, Tensor]) -> None:
    """Ask for features by hand, as one does to make geometry of them."""
    with torch.no_grad():
        model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])


def text(family: str) -> dict[str, Tensor]:
    return {name: x for name, x in batch(family, (9,)).items() if name != "mm_token_type_ids"}


def talk(model: Any, inputs: Any, **options: Any) -> Any:
    """Greedy, without placeholders in the answer, which a real vocabulary hardly gives."""
    options = {"do_sample": False, "suppress_tokens": [IMAGE, VIDEO], **options}
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True, **options
        )


def answer(model: Any, inputs: Any, **options: Any) -> Tensor:  # [steps, B, vocabulary]
    return torch.stack(talk(model, inputs, **options).logits)


@pytest.mark.parametrize("case", ["single", "image and video", "left-padded"])
@pytest.mark.parametrize("other", ["single", "two images"])
@pytest.mark.parametrize("family", [*FAMILIES, "fused"])
def test_features_by_hand_do_not_reach_the_next_prompt(family: str, other: str, case: str) -> None:
    model = FUSED if family == "fused" else HOSTS[family]
    family = "qwen2_5_vl" if family == "fused" else family
    case = "two images" if model is FUSED and case == "image and video" else case
    inputs, seen = batch(family, *CASES[case], seed=1), batch(family, *CASES[other], seed=2)
    # Frames decide too, so that grids of another run would show.
    config = Merge3DConfig(ratio=0.3, scope="frame", tau_geo=0.3 if model is FUSED else float("inf"))
    with patch(model, config) as patched:
        expected = answer(model, inputs)
        plan = patched.plan
        for times in (1, 2):
            for _ in range(times):
                look(model, seen)
            close(answer(model, inputs), expected)
            assert patched.plan is not None
            assert patched.plan.keep.equal(plan.keep)
            assert patched.plan.owner.equal(plan.owner)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_text_goes_on_as_one(family: str) -> None:
    model, seen = HOSTS[family], batch(family, *CASES["single"])
    expected = answer(model, text(family))
    with patch(model, CONFIG) as patched:
        look(model, seen)
        close(answer(model, text(family)), expected)
        assert patched.plan is None
        assert patched.source is None


@pytest.mark.parametrize("family", FAMILIES)
def test_features_by_hand_between_two_turns(family: str) -> None:
    model, inputs, seen = HOSTS[family], batch(family, *CASES["two images"]), batch(family, *CASES["single"])
    logits = []
    with patch(model, CONFIG):
        for between in (False, True):
            first = talk(model, inputs)
            ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], dim=1)
            if between:
                look(model, seen)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: returned_cache(first)}
            logits.append(answer(model, turn))
    close(logits[1], logits[0])


@pytest.mark.parametrize("where", ["encoder", "language model"])
def test_an_interruption_leaves_nothing_behind(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HOSTS["qwen3_vl"]
    seen, inputs = (batch("qwen3_vl", *CASES[case]) for case in ("two images", "single"))

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with patch(model, CONFIG):
        expected = answer(model, inputs)
        with monkeypatch.context() as change:
            if where == "encoder":
                change.setattr(model.model.visual.merger, "forward", stop)
            else:
                change.setattr(model, "prepare_inputs_for_generation", stop)
            with pytest.raises(KeyboardInterrupt):
                answer(model, seen)
        close(answer(model, inputs), expected)


def test_geometry_of_another_run_is_left_out() -> None:
    """Encoder and merger run for something else in front of every forward of the host, in the answer too."""
    host = Fused4().eval()

    def run() -> None:
        host.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"])
        for one in seen["images_vggt"]:
            host.merger(host.vggt(one).sin())

    inputs, seen = (old_style(batch("qwen2_5_vl", *CASES[case])) for case in ("left-padded", "single"))
    with patch(host, Merge3DConfig(ratio=0.3, tau_geo=0.3)) as patched, torch.no_grad():
        expected = host.generate(**inputs, without=(IMAGE, VIDEO))[1]
        plan = patched.plan
        handle = host.register_forward_pre_hook(lambda *_: run())
        close(host.generate(**inputs, without=(IMAGE, VIDEO))[1], expected)
        handle.remove()
        assert patched.plan is not None
        assert patched.plan.owner.equal(plan.owner)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_is_said(family: str) -> None:
    model, inputs, seen = HOSTS[family], batch(family, *CASES["two images"]), batch(family, *CASES["single"])
    with patch(model, CONFIG):
        look(model, seen)
        short = reduce_for_generate(model, inputs, CONFIG)  # this, too, runs the encoder
        slots = int((short["input_ids"] == IMAGE).sum())
        message = (
            rf"^{slots} visual slots, and neither all nor the last of the 6 \+ 12 tokens [^\n]*an unreduced prompt"
        )
        with pytest.raises(UserError, match=message):
            answer(model, short)
        look(model, seen)
        with pytest.raises(
            UserError, match=r"^24 visual slots for 12 tokens of the encoder: [^\n]*one output per prompt"
        ):
            answer(model, inputs, num_beams=2)
        look(model, seen)
        with pytest.raises(UserError, match=r"an unreduced prompt in one piece[^\n]*leave out prefill_chunk_size"):
            answer(model, inputs, prefill_chunk_size=5)
        answer(model, inputs)


def test_a_removed_patch_holds_no_tokens() -> None:
    model, seen = HOSTS["qwen2_5_vl"], batch("qwen2_5_vl", *CASES["single"])
    patched = patch(model, CONFIG)
    look(model, seen)
    assert patched._heard.lengths == [6]
    patched.remove()
    assert patched._heard.lengths == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_piece_of_a_prompt_does_not_pass_for_all_of_it(family: str) -> None:
    """The first 16 slots are those of the video, and the encoder ran on it last."""
    model, inputs = HOSTS[family], batch(family, *CASES["image and video"])
    assert int((inputs["input_ids"][:, :16] == VIDEO).sum()) == int((inputs["input_ids"] == VIDEO).sum()) == 8
    message = r"^\d+ visual slots after the beginning of a prompt, [^\n]* 12 tokens [^\n]*leave out prefill_chunk_size"
    with patch(model, CONFIG), pytest.raises(UserError, match=message):
        answer(model, inputs, prefill_chunk_size=16)

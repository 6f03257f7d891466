"""``geoaccel bench suite=merge3d``: rows, their arithmetic, the sentence, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import write_checkpoint

from geoaccel import cli
from geoaccel.eval.bench.merge3d import Merge3DBench, cache_bytes, parts, prefill, sentence
from geoaccel.eval.bench.merge3d_hosts import HOSTS, frame_prompt
from geoaccel.eval.report import read_rows
from geoaccel.eval.run.settings import compose_settings
from geoaccel.mllm import Merge3DConfig
from geoaccel.mllm.handed import returned_cache
from geoaccel.mllm.hosts import reduce_inputs

pytest.importorskip("transformers")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["bench", "suite=merge3d", "device=cpu", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("host", "method", "ratios", "counts"),
    [("qwen2.5-vl", "merge3d", (0.5, 0.25), (2,)), ("qwen3-vl", "voxel", (0.25,), (1, 2))],
)
def test_every_ratio_beside_the_dense_host(
    host: str,
    method: str,
    ratios: tuple[float, ...],
    counts: tuple[int, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = write_checkpoint("vggt", tmp_path)
    own = {"host": host, "method": method, "ratios": list(ratios), "geometry": checkpoint, "text_tokens": 7}
    own |= {"new_tokens": 3, "geometry_merging": "httm"}
    options = [f"merge3d.{name}={value}" for name, value in own.items()]
    folder = tmp_path / "out"
    code, out, err = run(capsys, f"frames={list(counts)}", "size=[112,112]", "warmup=0", f"out={folder}", *options)
    assert code == 0, err
    rows = read_rows(folder / "report.json")
    assert [(row.frames, row.merging, row.ratio) for row in rows] == [
        (count, "none" if kept is None else method, None if kept is None else 1 - kept)
        for count in counts
        for kept in (None, *ratios)
    ]
    cells = 16 if host == "qwen2.5-vl" else 9
    for row in rows:
        n = row.frames * cells
        kept = n if row.ratio is None else int((1 - row.ratio) * n)
        scores = row.scores
        assert scores["visual_tokens"] == kept
        assert scores["prompt_tokens"] == kept + 2 * row.frames + 7
        # Six layers, two heads of 64 for keys and as many for values, in float32.
        assert scores["kv_cache_mib"] * 2**20 == 6 * 2 * 2 * 64 * 4 * scores["prompt_tokens"]
        encoders = scores["geometry_ms"] + scores["encoder_ms"]
        assert scores["first_token_ms"] == pytest.approx(encoders + scores["reduction_ms"] + scores["prefill_ms"])
        assert row.latency_ms == pytest.approx(scores["first_token_ms"] + 2 * scores["decode_ms_per_token"])
        assert row.speedup == pytest.approx((row.dense_latency_ms or 0) / (row.latency_ms or 1))
    for row, last in zip(rows, [row for row in rows if row.is_dense for _ in (None, *ratios)], strict=True):
        assert row.dense_latency_ms == last.latency_ms
    assert json.loads(out)["visual_tokens"] == rows[-1].scores["visual_tokens"]
    for count in counts:
        assert f"{count} frames, {count * cells} visual tokens: the encoders, which no ratio shortens" in err


TIMES = {"geometry": 60.0, "encoder": 20.0, "prefill none": 20.0, "answer none": 50.0}
TIMES |= {"reduce 0.1": 25.0, "prefill 0.1": 4.0, "answer 0.1": 30.0}


def test_parts_add_up() -> None:
    total, dense = parts(TIMES, "none", 11)
    assert total == 130
    assert dense == pytest.approx(
        {
            "geometry_ms": 60,
            "encoder_ms": 20,
            "reduction_ms": 0,
            "prefill_ms": 20,
            "first_token_ms": 100,
            "decode_ms_per_token": 3,
            "encoder_share": 80 / 130,
            "first_token_limit": 1.25,
        }
    )
    total, short = parts(TIMES, "0.1", 11)
    assert total == 60 + 25 + 30
    assert (short["reduction_ms"], short["first_token_ms"]) == (5, 89)
    assert short["decode_ms_per_token"] == pytest.approx(2.6)


def test_the_sentence_says_what_is_possible() -> None:
    from geoaccel.eval.report import Row

    rows = []
    for name, ratio, visual in (("none", None, 1512), ("0.1", 0.9, 151)):
        total, scores = parts(TIMES, name, 11)
        rest: dict[str, Any] = {"quantization": "none", "attention": "sdpa", "dtype": "float32", "device": "cpu"}
        rest |= {"scenes": 0, "hardware": "", "versions": {}, "command": "", "speedup": 130 / total}
        scores["visual_tokens"] = visual
        rows.append(Row(model="x", merging=name, ratio=ratio, frames=6, scores=scores, latency_ms=total, **rest))
    text = sentence(rows)
    assert text.startswith("6 frames, 1512 visual tokens: ")
    assert "80% of the dense time to the first token and 62% of the whole answer" in text
    assert "the first token would be 1.25x as fast" in text
    assert "keeping 0.1 of the tokens gave 1.12x for the first token and 1.13x for the answer." in text


@pytest.mark.parametrize(("name", "billions"), [("qwen2.5-vl", 3.75), ("qwen3-vl", 4.44)])
def test_full_sizes_are_those_published(name: str, billions: float) -> None:
    model = HOSTS[name][1].build("meta", torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_prefill_of_a_host_leaves_global_randomness_alone() -> None:
    state = torch.random.get_rng_state()
    tiny = HOSTS["qwen3-vl"][0]
    host = tiny.build("cpu", torch.float32)
    inputs = frame_prompt(tiny, 2, (3, 4), 5, "cpu", torch.float32)
    assert torch.random.get_rng_state().equal(state)
    with torch.inference_mode():
        found = reduce_inputs(host, inputs, Merge3DConfig(ratio=0.5, tau_geo=float("inf")))
        out = prefill(host, found.arguments)
        stock = host(**inputs, mm_token_type_ids=(inputs["input_ids"] == tiny.tokens["image_token_id"]).int())
    assert out.logits.shape[1] == 1
    assert stock.logits.shape[1] == 2 * 14 + 5
    sizes = [cache_bytes(returned_cache(one)) for one in (out, stock)]
    assert sizes[0] / sizes[1] == (12 + 9) / (24 + 9)


def test_one_value_is_a_list_of_it() -> None:
    def bench(*overrides: str) -> Merge3DBench:
        settings = compose_settings("bench", ["suite=merge3d", "device=cpu", *overrides])
        return Merge3DBench.from_settings(settings)

    alone = bench("size=224", "frames=8", "merge3d.ratios=0.3")
    assert (alone.size, alone.frames, alone.ratios) == ((224, 224), (8,), (0.3,))
    assert alone == bench("size=[224,224]", "frames=[8]", "merge3d.ratios=[0.3]")
    assert bench("size=null").size == (392, 504)

"""Quantized networks over several processes, and knobs that count keys."""

from __future__ import annotations

from pathlib import Path

import torch
from rank_processes import in_processes
from test_parallel import all_well, forward, network, part, scene
from torch import Tensor, nn

import geoaccel
from geoaccel.errors import UserError
from geoaccel.merging import Asymmetric
from geoaccel.quantization import W4A16, add_token, quantize

COUNTS = (7, 5)


def with_token() -> nn.Module:
    model = network("vggt")
    quantize(model, W4A16())
    generator = torch.Generator().manual_seed(3)
    add_token(model, torch.randn(2 * model.config.embed_dim, generator=generator))  # type: ignore[union-attr, operator]
    return model


def test_the_numbers_of_one_process(tmp_path: Path) -> None:
    """With a camera token that is no frame's; and in the quarter of the layers that keeps every key."""
    images = scene(sum(COUNTS))
    counted = Asymmetric(counted_frames=3, bypass=False)
    alone = [forward(with_token(), images), forward(geoaccel.accelerate(network("vggt"), merging=counted), images)]

    def work(rank: int) -> list[dict[str, Tensor]]:
        networks = with_token(), geoaccel.accelerate(network("vggt"), merging=counted)
        return [forward(geoaccel.parallel(model), part(images, COUNTS, rank)) for model in networks]

    results = all_well(in_processes(2, work, tmp_path))
    for which, expected in enumerate(alone):
        for key, value in expected.items():
            got = torch.cat([result[which][key] for result in results], dim=1)
            assert float((got - value).norm() / value.norm()) < 1e-5, key


def test_one_whose_float_weights_are_gone_leaves_its_group(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[str, bool]:
        model = geoaccel.parallel(geoaccel.accelerate(network("vggt"), quantization="w4a16"))
        try:
            geoaccel.restore(model)
        except UserError as problem:
            said = str(problem)
        alone = getattr(model, "sharing", None) is None
        forward(geoaccel.accelerate(model), scene(2))  # what the message advises
        return said, alone

    for said, alone in all_well(in_processes(2, work, tmp_path)):
        assert "or accelerate(model)" in said
        assert alone

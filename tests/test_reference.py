"""Which frame comes first: the one asked for, or the one that is most like the others; outputs keep their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from references import Golden
from torch import Tensor, nn

import geoaccel
from geoaccel.errors import UserError
from geoaccel.frame_matches import MOST_OTHERS
from geoaccel.merging import CoMe
from geoaccel.reference import likeness, reference_first

FIELDS = ("cam_from_world", "intrinsics", "depth", "conf", "points_world")


def photographs(frames: int = 5) -> Tensor:
    """Views of one picture, each shifted by a patch."""
    wide = torch.rand(3, 70, 98 + 14 * frames, generator=torch.Generator().manual_seed(3))
    return torch.stack([wide[:, :, 14 * i : 14 * i + 98] for i in range(frames)])


def reconstructed(model: nn.Module, images: Tensor, **options: Any) -> dict[str, Tensor]:
    result = geoaccel.reconstruct(images, model=model, **options)
    return {name: getattr(result, name) for name in FIELDS}


def test_the_frame_asked_for_comes_first_and_the_order_stays(tiny: nn.Module) -> None:
    images = photographs()
    order = [3, 0, 1, 2, 4]
    expected = reconstructed(tiny, images[order])
    found = reconstructed(tiny, images, reference=3)
    for name in FIELDS:
        torch.testing.assert_close(found[name][order], expected[name], rtol=1e-4, atol=1e-5)
    unchanged = reconstructed(tiny, images)
    assert all(torch.equal(unchanged[name], value) for name, value in reconstructed(tiny, images, reference=0).items())


def test_a_number_counts_the_images_that_are_left_out(tiny: nn.Module, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path, image in zip(paths, photographs(), strict=True):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(path)
    for bad in (0, 2):
        paths[bad].write_bytes(b"none")
    for number in (1, 3, 4):
        found = geoaccel.reconstruct(tmp_path, model=tiny, size=28, skip_bad=True, reference=number)
        assert found.notes["reference"] == f"{number}.png"
    for number, says in ((2, r"names 2.png, which was left out: .*; name another"), (5, "0 to 4")):
        with pytest.raises(UserError, match=says):
            geoaccel.reconstruct(tmp_path, model=tiny, size=28, skip_bad=True, reference=number)


def test_it_matters_to_vggt() -> None:
    model = Golden("vggt_tiny", "vggt").network()
    first, other = (reconstructed(model, photographs(), reference=frame) for frame in (0, 3))
    assert not torch.allclose(first["depth"], other["depth"], rtol=1e-3)


def test_auto_takes_the_most_alike_and_encodes_once(tiny: nn.Module) -> None:
    images = photographs()
    images[0] = 0
    encoder: Any = next(module for module in tiny.modules() if hasattr(module, "reference"))
    calls = []
    handle = encoder.register_forward_hook(lambda _, inputs, stream: calls.append((inputs[0], stream)))
    with torch.inference_mode(), reference_first(tiny, "auto", 5) as order:
        tiny(images[None])
    handle.remove()
    (called,) = calls
    assert order.alike is not None
    assert order.first == int(order.alike.argmax()) != 0
    assert int(order.alike.argmin()) == 0
    assert torch.equal(called[1].state.images if called[1].state.images is not None else called[0][:, order.order],
                       called[0][:, order.order])  # fmt: skip
    chosen = reconstructed(tiny, images, reference="auto")
    asked = reconstructed(tiny, images, reference=order.first)
    assert all(torch.equal(chosen[name], asked[name]) for name in FIELDS)
    assert encoder.reference is None


def test_in_front_of_a_packer(tiny: nn.Module) -> None:
    model = geoaccel.accelerate(tiny, merging=CoMe(choose="random", bypass=False))
    images = photographs()
    images[0] = 0
    result = geoaccel.reconstruct(images, model=model, reference="auto")
    assert result.notes["reference"] != result.names[0]
    assert geoaccel.describe(model).merging[0].effective_ratio
    with torch.inference_mode(), reference_first(model, 2, 5) as order:
        model(images[None])
    assert order.first == 2


def test_likeness_of_more_frames_and_patches_than_are_compared() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 40 * 44, 16, generator=generator)
    place = torch.randn(1, 40 * 44, 16, generator=generator)
    frames = torch.cat([common[:, torch.randperm(40 * 44, generator=generator)] for _ in range(MOST_OTHERS + 9)])
    frames = frames.unflatten(1, (40, 44)).repeat_interleave(1, 1).flatten(1, 2) + place
    frames[5] = torch.randn(40 * 44, 16, generator=generator) * 2
    found = likeness(frames, (40, 44))
    assert found.shape == (MOST_OTHERS + 9,)
    assert int(found.argmin()) == 5
    assert likeness(frames[:1], (40, 44)).tolist() == [0.0]


@pytest.mark.parametrize("reference", [5, -1, "last", 1.5, True])
def test_a_frame_that_there_is_not(reference: Any) -> None:
    with pytest.raises(UserError, match="is not a frame; give auto, first or the number of an image"):
        geoaccel.reconstruct(photographs(), model=Golden("pi3_tiny", "pi3").network(), reference=reference)


def test_a_network_that_chooses_by_itself() -> None:
    model = Golden("da3_tiny", "da3").network()
    plain, auto = (reconstructed(model, photographs(4), reference=choice) for choice in ("first", "auto"))
    assert all(torch.equal(plain[name], auto[name]) for name in FIELDS)
    with pytest.raises(UserError, match="this network chooses its own"):
        reconstructed(model, photographs(4), reference=2)


def test_an_error_leaves_no_trace(tiny: nn.Module) -> None:
    with pytest.raises(ValueError, match="2 scenes"), reference_first(tiny, "auto", 3):
        tiny(torch.rand(2, 3, 3, 70, 98))
    assert not any(getattr(module, "reference", None) for module in tiny.modules())

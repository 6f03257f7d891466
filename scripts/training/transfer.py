"""One backbone's trunk for another: pi3 starts from VGGT, as its authors did (arXiv 2507.13347, section 3.4).

Encoder and alternating attention are the same network in both; only tokens and heads differ.
"""

from __future__ import annotations

import torch

from geoaccel.errors import UserError
from geoaccel.models.pi3 import Pi3
from geoaccel.models.vggt import VGGT


@torch.no_grad()
def copy_trunk(source: VGGT, target: Pi3) -> None:
    """Copy encoder, attention blocks and special tokens of a VGGT into a pi3 of the same widths and depths.

    VGGT has its own special tokens for the first frame; pi3, which knows no first frame, takes those of the others.
    The heads of ``target`` stay as they are.

    Raises:
        ValueError: If the two are not a VGGT and a pi3, or if their trunks differ in size.
    """
    if not isinstance(source, VGGT) or not isinstance(target, Pi3):
        raise UserError(
            f"a trunk goes from vggt to pi3, got {source.backbone.name} to {target.backbone.name}; "
            "start from a checkpoint of one of these two or leave it out"
        )
    aggregator = source.aggregator
    special = torch.cat([aggregator.camera_token[:, 1:], aggregator.register_token[:, 1:]], dim=2)
    blocks = [block for pair in zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True) for block in pair]
    wanted = target.state_dict()
    given = {f"encoder.{name}": tensor for name, tensor in aggregator.patch_embed.state_dict().items()}
    given.pop("encoder.mask_token", None)
    for index, block in enumerate(blocks):
        given |= {f"decoder.{index}.{name}": tensor for name, tensor in block.state_dict().items()}
    given["register_token"] = special
    trunk = {name for name in wanted if name.startswith(("encoder.", "decoder.")) or name == "register_token"}
    wrong = sorted(name for name in trunk | given.keys() if name not in given or name not in trunk)
    wrong += sorted(name for name in trunk & given.keys() if given[name].shape != wanted[name].shape)
    if wrong:
        raise UserError(
            f"the trunks differ in {len(wrong)} tensors, the first is {wrong[0]}; "
            "they need the same widths, heads, depths, picture size and number of special tokens"
        )
    target.load_state_dict(given, strict=False)

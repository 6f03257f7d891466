"""Co-Me's confidence predictor: a small network that ranks patches by the backbone's expected confidence.

It reads the tokens after one block of the image encoder and is trained for that block of that checkpoint
(``scripts/training/train_confidence.py``). Files are safetensors with everything needed to rebuild the network in their
metadata; those for the bundled checkpoints are in ``predictors`` next to this file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from geoaccel.atomic import write_tensors
from geoaccel.backbone import Backbone
from geoaccel.errors import UserError
from geoaccel.fingerprint import of_bytes
from geoaccel.merging.gain import Extra

SHIPPED = Path(__file__).parent / "predictors"

TAP_SHARE = 15 / 24
"""Fraction of the encoder's blocks before the tap; the paper taps after 15 of 24."""


@dataclass(frozen=True)
class Tap:
    """The tokens that a predictor reads.

    Attributes:
        backbone: Registered name.
        width: Channels C.
        depth: Blocks of the encoder.
        layer: Index of the block after which the tokens are read.
        fingerprint: Identifies the checkpoint among those of the same size.
    """

    backbone: str
    width: int
    depth: int
    layer: int
    fingerprint: str

    @classmethod
    def of(cls, model: nn.Module, layer: int | None = None) -> Tap:
        """The tap of a model; ``layer`` None: at the paper's fraction of the encoder's depth.

        Raises:
            ValueError: If the encoder has no such layer.
        """
        backbone: Backbone = model.backbone  # type: ignore[assignment]
        encoder: Any = backbone.sites(model)["encoder"]
        depth = len(encoder)
        layer = max(1, round(TAP_SHARE * depth)) - 1 if layer is None else layer
        if not isinstance(layer, int) or not 0 <= layer < depth:
            raise UserError(f"tap layer {layer} does not exist; the encoder has layers 0 to {depth - 1}")
        return cls(backbone.name, encoder[0].num_heads * encoder[0].head_dim, depth, layer, fingerprint(model))

    def __str__(self) -> str:
        return f"{self.backbone}, width {self.width}, layer {self.layer} of {self.depth}"


def fingerprint(model: nn.Module) -> str:
    """Hash of the encoder's patch embedding in sixteen hexadecimal digits, the same in any dtype of the weights.

    The embedding is a convolution, so quantized linear layers do not change it.
    """
    backbone: Backbone = model.backbone  # type: ignore[assignment]
    weight: Any = model.get_submodule(backbone.patch_embedding).weight
    # Rounded through bfloat16 and float16, which also have coarser subnormals: weights stored in one of them, or stored
    # in bfloat16 and exported in float16, give the same hash.
    narrow = weight.detach().cpu().bfloat16().half().bfloat16().contiguous()
    return of_bytes(narrow.view(torch.int16).numpy().tobytes())


class ConfidencePredictor(nn.Module):
    """Predicts one confidence for each patch from the tokens of all images of a scene.

    A linear layer, one transformer block over all patches of the scene (one head, no positions), two convolutions over
    each image, and VGGT's confidence activation exp + 1. With C = 1024 it has 412,417 parameters.

    Args:
        tap: The tokens it reads.
        hidden: Its own width; None: an eighth of the tap's in multiples of 8, at most the paper's 128.
    """

    def __init__(self, tap: Tap, hidden: int | None = None) -> None:
        super().__init__()
        hidden = min(128, max(8, tap.width // 64 * 8)) if hidden is None else hidden
        if hidden < 1:
            raise UserError(f"hidden={hidden} is too small; give a width of at least 1")
        self.tap = tap
        self.hidden = hidden
        self.project = nn.Linear(tap.width, hidden)
        self.norm1 = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        self.smooth = nn.Conv2d(hidden, hidden, 3)
        self.head = nn.Conv2d(hidden, 1, 3)

    def forward(
        self,
        patches: Tensor,  # [B, S, h * w, C]
        grid: tuple[int, int],
    ) -> Tensor:  # [B, S, h, w], float32
        """Predict confidence; only the order within a scene, over all its images, is meaningful."""
        # Backbones differ in the scale of their residual stream, and a large one saturates the activation.
        x = self.project(F.layer_norm(patches.flatten(1, 2), patches.shape[-1:]))
        q, k, v = self.qkv(self.norm1(x)).unsqueeze(1).chunk(3, dim=-1)  # one head
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        x = x + self.mlp(self.norm2(x))
        maps = x.reshape(-1, *grid, self.hidden).permute(0, 3, 1, 2)
        logits = self.head(_reflected(F.gelu(self.smooth(_reflected(maps)))))
        return (logits.float().exp() + 1).reshape(*patches.shape[:2], *grid)

    def work(self, patches: int, head_dim: int) -> Extra:
        """Work for one scene, its attention counted in heads of the backbone's size."""
        linear = self.tap.width * self.hidden + (8 + 9) * self.hidden**2 + 9 * self.hidden
        return Extra(products=patches * linear, attended=patches**2 * max(1.0, self.hidden / head_dim))

    def extra_repr(self) -> str:
        return f"{self.tap}, hidden={self.hidden}"


def _reflected(maps: Tensor) -> Tensor:  # [n, C, h, w] -> [n, C, h + 2, w + 2]
    """Reflection padding by one on every side; an axis of one patch has nothing to reflect and is repeated."""
    rows, columns = ("reflect" if side > 1 else "replicate" for side in maps.shape[-2:])
    return F.pad(F.pad(maps, (1, 1, 0, 0), mode=columns), (0, 0, 1, 1), mode=rows)


def save_predictor(
    predictor: ConfidencePredictor, path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file.

    Args:
        predictor: What to write, in float32.
        path: The file; written under a temporary name and renamed.
        provenance: How the weights were trained; stored in the metadata as JSON.
    """
    metadata = {
        "format": "pt",
        "kind": "confidence predictor",
        "tap": json.dumps(asdict(predictor.tap)),
        "hidden": str(predictor.hidden),
        "provenance": json.dumps(dict(provenance or {})),
    }
    tensors = {name: t.detach().to("cpu", torch.float32) for name, t in predictor.state_dict().items()}
    write_tensors(Path(path), tensors, metadata)


def load_predictor(path: str | os.PathLike[str]) -> ConfidencePredictor:
    """Read a file of :func:`save_predictor`, strictly.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a predictor.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"confidence predictor {path} does not exist; check the path")
    try:
        tap, hidden = read_tap(path)
        with torch.device("meta"):
            predictor = ConfidencePredictor(tap, hidden)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        predictor.load_state_dict(tensors, strict=True, assign=True)
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is not a confidence predictor of this version; train one with scripts/training/train_confidence.py"
        ) from error
    return predictor.eval()


def read_tap(path: str | os.PathLike[str]) -> tuple[Tap, int]:
    """The tap that a predictor's file was trained for, and its hidden width; reads only the header."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return Tap(**json.loads(metadata["tap"])), int(metadata["hidden"])


def shipped_predictors() -> list[Path]:
    """Files of the bundled predictors."""
    return sorted(SHIPPED.glob("*.safetensors"))


def predictor_for(tap: Tap, given: ConfidencePredictor | str | os.PathLike[str]) -> ConfidencePredictor:
    """The predictor to use at a tap.

    Args:
        tap: The tap of the model.
        given: A predictor, its path, ``auto`` for the bundled one trained for this checkpoint, or ``untrained`` for one
            with random weights, to time networks with random weights.

    Raises:
        ValueError: If it was trained for another backbone, width, depth or layer, or none is bundled.
    """
    if isinstance(given, str) and given == "auto":
        found = next((path for path in shipped_predictors() if read_tap(path)[0] == tap), None)
        if found is None:
            raise UserError(
                f"no bundled confidence predictor fits this checkpoint ({tap}); train one in minutes with "
                "scripts/training/train_confidence.py and pass its path as predictor=, or use merging='alike', "
                "which needs none"
            )
        return load_predictor(found)
    if isinstance(given, str) and given == "untrained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ConfidencePredictor(tap).eval()
    predictor = given if isinstance(given, ConfidencePredictor) else load_predictor(given)
    if str(predictor.tap) != str(tap):
        raise UserError(
            f"the confidence predictor was trained for {predictor.tap}; this model has {tap}; train one for it with "
            "scripts/training/train_confidence.py"
        )
    return predictor

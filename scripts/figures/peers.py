"""Published implementations of the merging methods, as `compare_peers.py` builds and runs them.

Each runs its authors' code unmodified. Missing dependencies (Transformer Engine, kernels that the authors compile) are
replaced by torch's own operations on the same tensors; ``missing`` lists them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.merging import CoMe, FastVGGT, LiteVGGT
from geoaccel.merging.confidence import ConfidencePredictor, Tap

Outputs = dict[str, Tensor]


class Peer(Protocol):
    """A published implementation.

    Attributes:
        packages: Its own packages.
        multiple: Image sides must be multiples of this.
        missing: Dependencies that are replaced here.
        network: Its network, which runs after :meth:`accelerate`.
    """

    packages: ClassVar[tuple[str, ...]]
    multiple: ClassVar[int]
    missing: tuple[str, ...]
    network: nn.Module

    def __init__(self, device: str) -> None:
        """Build its network."""

    def method(self, ours: nn.Module) -> Any:
        """Our equivalent method."""

    def accelerate(self) -> None:
        """Enable its merging, if that is a separate step; weights, dtype and device are final."""

    def forward(self, images: Tensor) -> Outputs:
        """``pose_enc`` [B, S, 9] and ``depth`` [B, S, H, W, 1] of images [B, S, 3, H, W], as its demo computes them."""


class FastVGGTPeer(Peer):
    """FastVGGT with merging from the first global block on."""

    packages = ("vggt", "merging")
    multiple = 14
    missing = ()

    def __init__(self, device: str) -> None:
        from vggt.models.vggt import VGGT

        self.device = device
        self.network: Any = VGGT(merging=0, enable_point=False)

    def method(self, ours: nn.Module) -> FastVGGT:
        return FastVGGT(released_code=True)

    def accelerate(self) -> None:
        """It always merges."""

    def forward(self, images: Tensor) -> Outputs:
        self.network.update_patch_dimensions(images.shape[-1] // 14, images.shape[-2] // 14)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            return self.network(images)


class LiteVGGTPeer(Peer):
    """LiteVGGT without its FP8, which is another axis: Transformer Engine's layers in bfloat16, its own or torch's."""

    packages = ("vggt", "merging", "transformer_engine")
    multiple = 14

    def __init__(self, device: str) -> None:
        self.missing = () if importlib.util.find_spec("transformer_engine") else ("Transformer Engine",)
        if self.missing:
            sys.modules.update(transformer_engine())
        from vggt.models.vggt import VGGT

        self.device = device
        self.network: Any = VGGT(enable_point=False, enable_track=False)

    def method(self, ours: nn.Module) -> LiteVGGT:
        return LiteVGGT(released_code=True)

    def accelerate(self) -> None:
        """It always merges."""

    def forward(self, images: Tensor) -> Outputs:
        network = self.network
        network.update_patch_dimensions(images.shape[-1] // 14, images.shape[-2] // 14)
        with random_numbers_of_the_cpu() if self.device == "cpu" else contextlib.nullcontext():
            tokens, start = network.aggregator(images)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            pose = network.camera_head(tokens)[-1]
            depth, _ = network.depth_head(tokens, images, start)
        return {"pose_enc": pose, "depth": depth}


class CoMePeer(Peer):
    """Co-Me's fused variant; ours ranks with the peer's own (random) predictor, so that both merge the same groups."""

    packages = ("src",)
    multiple = 42
    TAP = 14

    def __init__(self, device: str) -> None:
        kernels = {"co_me": "co_me_cuext", "flash_attn": "flash_attn_fwd_cuda"}
        names = [f"src.cuda_extension.{package}.{kernel}" for package, kernel in kernels.items()]
        # The package imports its kernels, so whether they are there is a matter of files.
        folders = importlib.import_module("src").__path__
        compiled = all(list(Path(folders[0], "cuda_extension", k).glob(f"{v}*.so")) for k, v in kernels.items())
        self.missing = () if compiled and torch.device(device).type == "cuda" else ("Co-Me's CUDA kernels",)
        if self.missing:
            sys.modules.update({name: ModuleType(name) for name in names})
        accelerate = importlib.import_module("src.accelerate.vggt")
        self._fuse = accelerate.fused_accelerate
        if self.missing:
            accelerate.module.bias_attention.flash_attn_varlen_qkvpacked_func_w_perkey_bias = attention_in_segments
        self._kernels = importlib.import_module("src.utility.feature").CUDAExtension
        self.device = device
        self.network: Any = importlib.import_module("src.thirdparty.vggt.models.vggt").VGGT()
        self._merger = self._untrained_merger()

    def _untrained_merger(self) -> Any:
        """Its token merger around a random predictor, which it only takes from files."""
        merger = importlib.import_module("src.accelerate.token_merger.co_me_2d")
        width = self.network.aggregator.camera_token.shape[-1]
        config = {"predictor_dims": [width, 128, 1], "predictor_active": "expp1", "loss_function": "pairwise-rank"}
        predictor = merger.GlobalAttentionConfidence(hidden_dims=config["predictor_dims"], activation="expp1")
        fill(predictor)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(predictor.state_dict(), Path(folder, "checkpoint.pth"))
            Path(folder, "config.json").write_text(json.dumps(config))
            return merger.CoMe_2D_TokenMerger(
                start_idx=self.network.aggregator.patch_start_idx,
                group_h=3,
                group_w=3,
                threshold=0.5,
                ckpt_path=folder,
                device=self.device,
            )

    def method(self, ours: nn.Module) -> CoMe:
        predictor = TheirPredictor(Tap.of(ours, self.TAP), self._merger.predictor)
        return CoMe(predictor=predictor, tap=self.TAP)

    def accelerate(self) -> None:
        self.network = self._fuse(self.network, self._merger, encoder_layer=self.TAP)

    def forward(self, images: Tensor) -> Outputs:
        # Its network's own forward would add points, and knows float32 only.
        network = self.network
        with self._kernels.disable() if self.missing else contextlib.nullcontext():
            tokens, start = network.aggregator(images)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            pose = network.camera_head(tokens)[-1]
            depth, _ = network.depth_head(tokens, images=images, patch_start_idx=start)
        return {"pose_enc": pose, "depth": depth}


class TheirPredictor(ConfidencePredictor):
    """Co-Me's predictor in place of ours."""

    def __init__(self, tap: Tap, theirs: nn.Module) -> None:
        super().__init__(tap)
        self.theirs = theirs

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        batch, frames = patches.shape[:2]
        maps = patches.unflatten(2, grid)
        return self.theirs(maps, BPHWC=(batch, frames, *grid, patches.shape[-1])).reshape(batch, frames, *grid).float()


PEERS: dict[str, type[Peer]] = {"fastvggt": FastVGGTPeer, "litevggt": LiteVGGTPeer, "come": CoMePeer}


def fill(network: nn.Module) -> None:
    """Random weights from one seed, with layer scales as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            is_scale = tensor.ndim == 1 and name.endswith(("weight", "gamma"))
            tensor.fill_(1.0) if is_scale else tensor.normal_(std=0.02, generator=generator)


def attention_in_segments(
    qkv: Tensor,  # [P, 3, H, D]
    offsets: Tensor,  # [segments + 1]
    longest: int,
    *,
    perkey_bias: Tensor,  # [P]
    dropout_p: float,
    softmax_scale: float,
) -> Tensor:  # [P, H, D]
    """Attention within each segment, with a bias per key: what Co-Me's kernel computes."""
    parts = []
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        q, k, v = qkv[first:last].permute(1, 2, 0, 3)[:, None]  # [1, H, L, D] each
        bias = perkey_bias[None, None, None, first:last].expand(-1, -1, last - first, -1)
        parts.append(F.scaled_dot_product_attention(q, k, v, bias, dropout_p, scale=softmax_scale)[0].transpose(0, 1))
    return torch.cat(parts)


class NormMLP(nn.Module):
    """Transformer Engine's LayerNormMLP: layer norm, linear, GELU in its tanh approximation, linear."""

    def __init__(self, width: int, hidden: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.layer_norm_weight, self.layer_norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.fc1_weight, self.fc1_bias = nn.Parameter(torch.empty(hidden, width)), nn.Parameter(torch.zeros(hidden))
        self.fc2_weight, self.fc2_bias = nn.Parameter(torch.empty(width, hidden)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        x = F.gelu(F.linear(x, self.fc1_weight, self.fc1_bias), approximate="tanh")
        return F.linear(x, self.fc2_weight, self.fc2_bias)


@contextlib.contextmanager
def random_numbers_of_the_cpu() -> Iterator[None]:
    """LiteVGGT saves its device's random state, which torch supports only for GPUs."""
    fork = torch.random.fork_rng

    def fork_of_the_cpu(devices: object) -> AbstractContextManager[None]:
        return fork(devices=[])

    with mock.patch.object(torch.random, "fork_rng", fork_of_the_cpu):
        yield


class DotProductAttention(nn.Module):
    """Transformer Engine's attention without a mask, of [B, N, H, D] each, to [B, N, H * D]."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query_layer, key_layer, value_layer))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def transformer_engine() -> dict[str, ModuleType]:
    """The modules of Transformer Engine that LiteVGGT imports, of torch's layers and without FP8."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common")
    modules = {name: ModuleType(name) for name in (*names, "transformer_engine.common.recipe")}
    layers, recipe = modules["transformer_engine.pytorch"], modules["transformer_engine.common.recipe"]
    layers.__dict__.update(
        LayerNorm=nn.LayerNorm,
        Linear=nn.Linear,
        LayerNormMLP=NormMLP,
        DotProductAttention=DotProductAttention,
        fp8_autocast=lambda **_: contextlib.nullcontext(),
    )
    recipe.__dict__.update(Format=SimpleNamespace(E4M3=None), DelayedScaling=SimpleNamespace)
    return modules

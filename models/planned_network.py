"""Networks that can keep within a memory limit, and can estimate how much they need."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from geoaccel.backbone import Backbone
from geoaccel.memory_plan import MemoryPlan, plans
from geoaccel.models.layers.outputs import HEAD_FRAMES, HeadBytes
from geoaccel.models.layers.peak import Forward
from geoaccel.models.network import Network

CPU_TOKENS = (16_384, 4096, 1024)
"""Tokens at a time on a CPU. Heads keep their chunk of frames: on a CPU, rounding in convolutions depends on it."""


class PlannedNetwork(Network):
    """A network whose encoder has the slot ``memory_plan``, which all its blocks follow.

    A subclass has the two methods below.
    """

    backbone: Backbone

    def kept_layers(self, heads: Collection[str]) -> int:
        """Number of layers that these heads read."""
        raise NotImplementedError

    def head_bytes(self, size: tuple[int, int], heads: Collection[str]) -> HeadBytes:
        """Memory of these heads for a frame of H x W."""
        raise NotImplementedError

    def frames_in_heads(self, encoder: Any, given: int) -> int:
        """Frames at a time in the heads: as requested, or fewer if the plan in the encoder's slot says so."""
        return given if encoder.memory_plan is None else min(given, encoder.memory_plan.frames)

    def memory_plans(self, device: str) -> list[MemoryPlan]:
        """Plans for keeping within a memory limit, from the fastest to the one with the least memory."""
        if device == "cpu":
            return [MemoryPlan(tokens, HEAD_FRAMES) for tokens in CPU_TOKENS]
        return plans(self.kept_layers(self.heads))

    def host_bytes(
        self, frames: int, size: tuple[int, int], plan: MemoryPlan, *, heads: Collection[str] | None = None
    ) -> int:
        layers = min(plan.host_layers, self.kept_layers(self.chosen(heads)))
        patches = size[0] // self.trunk.patch_size * (size[1] // self.trunk.patch_size)
        model: Any = self
        element = model.get_submodule(self.backbone.patch_embedding).weight.element_size()
        return layers * 2 * frames * (patches + self.trunk.special) * self.trunk.width * element

    def activation_bytes(
        self,
        frames: int,
        size: tuple[int, int],
        *,
        heads: Collection[str] | None = None,
        plan: MemoryPlan | None = None,
        device: str | None = None,
    ) -> int:
        model: Any = self
        # Tracks need query points: they are counted only if requested.
        wanted = self.chosen([head for head in self.heads if head != "track"] if heads is None else heads)
        sites = self.backbone.sites(self)["global"]
        parameter = model.get_submodule(self.backbone.patch_embedding).weight
        cuda = (device or parameter.device.type) == "cuda"
        packer: Any = next((p for m in self.modules() if (p := getattr(m, "token_packer", None)) is not None), None)
        forward = Forward(
            trunk=self.trunk,
            frames=frames,
            size=size,
            heads=sites[0].num_heads,  # type: ignore[arg-type]
            element=parameter.element_size(),
            layers=self.kept_layers(wanted),
            cuda=cuda,
            plan=plan,
            weighed=getattr(packer, "weighed", False),
        )
        work = self.head_bytes(size, wanted).at_most(frames, plan, cuda)
        share = 1.0
        if hasattr(packer, "share"):
            there = parameter.device if device is None else torch.device(device)
            share = packer.share(forward.tokens.layout, there, parameter.dtype)
            if getattr(packer, "in_every_block", False):
                forward = replace(forward, rows=packer.kept(forward.tokens.layout))
        return round(forward.peak([site.mixer for site in sites], share, work))  # type: ignore[misc]

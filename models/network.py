"""Base class of the backbones' networks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from geoaccel.backbone import Backbone, Preprocess
from geoaccel.cost import Cost, Trunk
from geoaccel.errors import UserError
from geoaccel.memory_plan import MemoryPlan
from geoaccel.models.head_cost import head_flops
from geoaccel.network_config import NetworkConfig


class Network(nn.Module):
    """The network of a backbone, built from its configuration alone.

    A subclass has the properties and :meth:`activation_bytes` below, and the forward

        network(images, *, heads=None) -> predictions by name

    for images [B, S, 3, H, W] or [S, 3, H, W] in [0, 1]. Its attentions are :class:`layers.block.Attention`, and the
    module that encodes images has a ``token_packer`` slot (:class:`layers.encoder.DinoEncoder`).

    Attributes:
        backbone: Its descriptor.
        config: The configuration that it was built with.
    """

    backbone: Backbone
    config: Any

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    def get_submodule(self, target: str) -> nn.Module:
        """As torch's, but a child with the same name as an attribute (upstream's ``backbone``) takes precedence."""
        first, _, rest = target.partition(".")
        child = self._modules.get(first)
        return super().get_submodule(target) if child is None else child.get_submodule(rest)

    def set_submodule(self, target: str, module: nn.Module, strict: bool = False) -> None:
        """As torch's, but through :meth:`get_submodule`, unlike in older torch; ``strict``: the child must exist."""
        parent, _, name = target.rpartition(".")
        if strict:
            self.get_submodule(target)
        setattr(self.get_submodule(parent), name, module)

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that this network has."""
        raise NotImplementedError

    @property
    def preprocess(self) -> Preprocess:
        """How images are prepared for this network."""
        raise NotImplementedError

    @property
    def trunk(self) -> Trunk:
        """Sizes of everything but the heads."""
        raise NotImplementedError

    def activation_bytes(
        self,
        frames: int,
        size: tuple[int, int],
        *,
        heads: Collection[str] | None = None,
        plan: MemoryPlan | None = None,
        device: str | None = None,
    ) -> int:
        """Peak memory of a forward without the weights, and on a CPU without the images.

        A network without plans need not take the keywords.

        Args:
            frames: S, images of one scene.
            size: (H, W) in pixels.
            heads: Heads to run; all by default.
            plan: One of :meth:`memory_plans`; None: everything at once.
            device: Where it will run, ``cpu`` or ``cuda``; where the weights are by default.
        """
        raise NotImplementedError

    def memory_plans(self, device: str) -> Sequence[MemoryPlan]:
        """Plans for keeping within a memory limit on a device, from the fastest to the one with the least memory."""
        return ()

    def host_bytes(
        self, frames: int, size: tuple[int, int], plan: MemoryPlan, *, heads: Collection[str] | None = None
    ) -> int:
        """Host memory of offloaded layers; arguments as in :meth:`activation_bytes`."""
        return 0

    def cost(self, frames: int, size: tuple[int, int], heads: Collection[str] | None = None) -> Cost:
        """FLOPs of one forward over S frames of H x W, with all heads or only these."""
        return self.trunk.cost(frames, size, heads=frames * head_flops(self, size, self.chosen(heads)))

    def chosen(self, heads: Collection[str] | None) -> tuple[str, ...]:
        """The heads to run: these, or all.

        Raises:
            ValueError: For one that this network lacks.
        """
        return self.heads if heads is None else check_heads(heads, self.heads)


def check_heads(wanted: Collection[str], known: Collection[str]) -> tuple[str, ...]:
    """Refuse a head that does not exist.

    Raises:
        ValueError: Naming it.
    """
    unknown = [head for head in wanted if head not in known]
    if unknown:
        raise UserError(f"unknown head {unknown[0]!r}; this network has: {', '.join(known)}")
    return tuple(wanted)

"""One scene over the processes of a group: ``geoaccel.parallel``."""

from __future__ import annotations

import fnmatch
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from geoaccel.attention import Mixer
from geoaccel.backbone import Backbone, Split, descriptor_of
from geoaccel.errors import UserError
from geoaccel.runtime import versions
from geoaccel.sharding.attention import FramesMixer, over_ranks
from geoaccel.sharding.ranks import Ranks, spans
from geoaccel.sharding.watch import Watch, client
from geoaccel.tuned import of_weights


def parallel(model: nn.Module, group: dist.ProcessGroup | None = None, *, watch: bool | Watch = True) -> nn.Module:
    """Split one scene over the processes of a group, each with some of the frames; results are those of one process.

    Every process calls this with the same model, accelerated or not, and then calls the model with its own frames:
    those of rank 0 come first, then those of rank 1, and so on; at least one each, as memory permits. Each gets the
    predictions for its own frames, in the coordinates of the whole scene. The model is changed in place;
    :func:`geoaccel.restore` takes it out of the group again.

    Dense attention, ``asymmetric`` and layers that see one frame at a time can be split; a method that compares all
    tokens of a scene cannot. Supported backbones: VGGT and pi3.

    Example:
        >>> torch.distributed.init_process_group("nccl")  # under torchrun
        >>> model = geoaccel.accelerate(geoaccel.load_model("facebook/VGGT-1B"), merging="asymmetric")
        >>> model = geoaccel.parallel(model)
        >>> mine = images[geoaccel.sharding.share(len(images))]
        >>> with torch.inference_mode():
        ...     predictions = model(mine)  # of these frames

    Args:
        model: A geoaccel model.
        group: A torch.distributed process group; all processes by default.
        watch: End this process if another one of the group has died, with a line that names it. Needs a TCP store, the
            default of ``torchrun`` and ``init_process_group``.

    Raises:
        UserError: If a method, kernel or backbone cannot be split, or weights, methods or versions differ between
            processes; on every rank.
    """
    backbone = descriptor_of(model)
    if not dist.is_available() or not dist.is_initialized():
        raise UserError("there is no process group; call torch.distributed.init_process_group first, or use torchrun")
    if getattr(model, "sharing", None) is not None:
        raise UserError("this model is already split over processes; call restore(model) first")
    if backbone.splitting is None:
        raise UserError(f"{backbone.name} needs all frames in one process and cannot be split; use VGGT or pi3")
    if any(getattr(module, "token_packer", None) is not None for module in model.modules()):
        raise UserError(
            "a method that packs the token stream (come) cannot run on several processes; use "
            "merging='asymmetric' or none"
        )
    ranks = Ranks(group, _watch(group) if watch is True else watch or None)
    mixers = _mixers(model, backbone, backbone.splitting, ranks)
    _check_same(model, backbone, ranks)
    setattr(model, "sharing", Sharing(model, backbone.splitting, ranks, mixers))  # noqa: B010  # no child of the module
    return model


def share(frames: int, group: dist.ProcessGroup | None = None) -> slice:
    """The frames of this process, of S: nearly equal parts, in the order of ranks.

    Raises:
        UserError: If there are more processes than frames.
    """
    return shares(frames, dist.get_world_size(group))[dist.get_rank(group)]


def shares(frames: int, size: int) -> list[slice]:
    """The frames of each of `size` processes, of S."""
    if frames < size:
        raise UserError(f"{frames} frames are too few for {size} processes; start at most {frames}")
    return spans([frames // size + (rank < frames % size) for rank in range(size)])


class Sharing:
    """The changes of :func:`parallel` to a model, and how to undo them.

    Attributes:
        ranks: The group.
    """

    def __init__(self, model: nn.Module, splitting: Split, ranks: Ranks, mixers: list[tuple[Any, Mixer]]) -> None:
        self.ranks, self._splitting, self._model = ranks, splitting, model
        self._before = [(site, site.mixer) for site, _ in mixers]
        for site, mixer in mixers:
            site.mixer = mixer
        self._reference = _named(model, splitting.reference)
        if self._reference is not None:
            self._reference.holds_reference = ranks.rank == 0
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def undo(self) -> None:
        """Undo :func:`parallel`: the model is then independent of other ranks."""
        for hook in self._hooks:
            hook.remove()
        for site, mixer in self._before:
            site.mixer = mixer
        if self._reference is not None:
            self._reference.holds_reference = True
        setattr(self._model, "sharing", None)  # noqa: B010

    def received(self) -> dict[tuple[str, int], int]:
        """Bytes received from other ranks in the last forward, by kind and index of the attention."""
        return dict(self.ranks.received)

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = args[0] if args else kwargs.get("images")
        if not isinstance(images, torch.Tensor):
            raise UserError("give the images [B, S, 3, H, W] of this rank")
        heads = kwargs.get("heads")
        told = [name for name, value in kwargs.items() if name not in ("images", "heads", "frames_chunk_size")
                and value is not None]  # fmt: skip
        if told or len(args) > 1:
            raise UserError(f"{(told or ['query_points'])[0]} does not work on several processes; leave it out")
        chosen = None if heads is None else sorted(heads)
        self.ranks.begin(images, [chosen, model.training])

    def _end(self, *_: Any) -> None:
        self.ranks.end()


def _named(model: nn.Module, name: str | None) -> Any:
    """A module by its name; None if it does not exist."""
    return None if name is None else model.get_submodule(name)


def _mixers(model: nn.Module, backbone: Backbone, splitting: Split, ranks: Ranks) -> list[tuple[Any, Mixer]]:
    """The attentions over the whole scene, with their new mixers."""
    found = [(site, over_ranks(site.mixer, ranks, layer)) for layer, site in enumerate(backbone.sites(model)["global"])]
    for name, module in model.named_modules():
        if hasattr(module, "mixer") and any(fnmatch.fnmatchcase(name, p) for p in splitting.over_frames):
            found.append((module, FramesMixer(ranks, getattr(module.mixer, "kernel", "sdpa"))))
    return found


def _check_same(model: nn.Module, backbone: Backbone, ranks: Ranks) -> None:
    """Refuse, on all ranks, processes that would compute different results."""
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    methods = [repr(site.mixer) for kind in backbone.sites(model).values() for site in kind]
    of_code = versions()["code"]
    same = "start all processes with the same"
    ranks.agree("backbone", backbone.name, f"{same} model")
    ranks.agree("code of geoaccel", of_code, f"{same} version")
    ranks.agree("precision", dtypes, f"{same} dtype and quantization")
    ranks.agree("choice of methods", ", ".join(dict.fromkeys(methods)), f"{same} merging, layers and attention")
    ranks.agree("checkpoint", of_weights(model), f"{same} weights")


def _watch(group: dist.ProcessGroup | None) -> Watch | None:
    """A watch through the store of the default group."""
    from torch.distributed.distributed_c10d import _get_default_store

    members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    return _watch_over(_get_default_store(), tuple(members), dist.get_rank(group))


@functools.lru_cache(maxsize=8)
def _watch_over(kept: dist.Store, members: tuple[int, ...], rank: int) -> Watch | None:
    """One watch for all models of a group."""
    store = client(kept)
    return None if store is None else Watch(dist.PrefixStore("-".join(map(str, members)), store), rank, len(members))

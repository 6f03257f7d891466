"""The command line under ``torchrun``: rank of this process, its part of the photographs, and the joint result."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geoaccel.backbone import Preprocess
from geoaccel.errors import USER_ERRORS, UserError
from geoaccel.images import ImageBatch, load_images
from geoaccel.images.sources import Picture
from geoaccel.inputs import fitted_to
from geoaccel.memory import Limit, check_memory
from geoaccel.reconstruction import WHOLE_SCENE
from geoaccel.runtime import pick_device
from geoaccel.scene import Scene
from geoaccel.sharding.model import parallel, shares
from geoaccel.sharding.ranks import Ranks
from geoaccel.sharding.watch import TICK_S, Watch

AnyScene = TypeVar("AnyScene", bound=Scene)
ALL_FRAMES = (
    *("window", *WHOLE_SCENE, "reference", "skip_bad", "edge_filter", "poses", "intrinsics", "depths", "scenes"),
    "compare",
)
"""Options of ``reconstruct`` that need all frames, or could fail in a single process."""
PATIENCE = timedelta(hours=24)
"""How long a rank waits for another live one, which may be reading or computing."""


class Session:
    """One command in one process; under ``torchrun`` see :class:`SharedSession`."""

    speaks = True
    """Whether this process writes files and prints messages."""

    def device(self, name: str) -> str:
        """The device of this process."""
        return pick_device(name)

    def agree(self, what: str, mine: Any) -> None:
        """Refuse values that differ between processes."""

    def check(self, args: argparse.Namespace) -> None:
        """Refuse options of ``reconstruct`` that need all frames in one process."""

    def given(self, pictures: list[Picture], model: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Input and options of :func:`geoaccel.reconstruct` in this process."""
        return pictures, options

    def shared(self, model: nn.Module) -> nn.Module:
        """The model, split over all processes."""
        return model

    def whole(self, scene: AnyScene, source: Any) -> AnyScene | None:
        """The scene of all processes, in the process that writes it; None elsewhere."""
        return scene

    def traffic(self, model: nn.Module) -> str | None:
        """Report of the communication."""
        return None


@dataclass(frozen=True)
class SharedSession(Session):
    """One command in several processes, each with some of the frames.

    Attributes:
        ranks: The group.
        watch: Of this process over the others.
        local: Number of this process on its machine.
    """

    ranks: Ranks
    watch: Watch
    local: int

    @property
    def speaks(self) -> bool:  # type: ignore[override]
        return self.ranks.rank == 0

    def device(self, name: str) -> str:
        if name.startswith("cuda:"):
            raise UserError(f"--device {name}: under torchrun every process takes its own device; give cuda")
        device = pick_device(name)
        if device != "cuda":
            return device
        found = torch.cuda.device_count()
        if self.local >= found:
            raise UserError(f"more processes than CUDA devices ({found}); start {found} on each machine")
        torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"

    def agree(self, what: str, mine: Any) -> None:
        self.ranks.agree(what, mine, "give every process the same command, and the same files on every machine")

    def check(self, args: argparse.Namespace) -> None:
        for option in ALL_FRAMES:
            if getattr(args, option) not in (None, False, "first"):
                raise UserError(
                    f"--{option.replace('_', '-')} needs all images in one process; leave it out under torchrun"
                )
        if args.tracks == "head":
            raise UserError("--tracks head needs all images in one process; under torchrun choose another value")

    def given(self, pictures: list[Picture], model: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        fits = partial(check_memory, model, unread=True, planned=False, limit=Limit.of(options["max_memory"]))
        preprocess = fitted_to(model.preprocess, options.pop("size"), options.pop("mode"))
        read: dict[str, Any] = {name: options.pop(name) for name in ("fps", "max_frames", "progress")}
        return self.load(pictures, preprocess, **read, fits=fits), options

    def load(self, pictures: list[Picture], preprocess: Preprocess, **options: Any) -> ImageBatch:
        """The images of this process."""
        mine = shares(len(pictures), self.ranks.size)[self.ranks.rank]
        batch = load_images(pictures[mine], preprocess, **options)
        if len(set(self.ranks.told(tuple(batch.images.shape[-2:])))) == 1:
            return batch
        # Which size images of several shapes get, all of them together say.
        return part_of(load_images(pictures, preprocess, **options), mine)

    def shared(self, model: nn.Module) -> nn.Module:
        return parallel(model, watch=self.watch)

    def whole(self, scene: AnyScene, source: Any) -> AnyScene | None:
        # Whoever reads originals again, reads all of them.
        own = {part.name: getattr(scene, part.name) for part in fields(scene) if part.name != "read_original"}
        batch = {part.name: getattr(source, part.name) for part in fields(source)}
        found = self.ranks.collected((own, {**batch, "images": source.images[:0]}))
        if found is None:
            return None
        scenes, batches = (_joined(list(parts)) for parts in zip(*found, strict=True))
        return replace(scene, **scenes, read_original=ImageBatch(**batches).original)

    def traffic(self, model: nn.Module) -> str | None:
        sharing: Any = model.sharing
        layers = [count for (kind, _), count in sharing.received().items() if kind == "global"]
        if not layers:
            return None
        return (
            f"{self.ranks.size} processes; global attention brought {sum(layers) / len(layers) / 1e6:.3g} MB per layer "
            f"from the others to the first ({len(layers)} layers)"
        )


@contextmanager
def session() -> Iterator[Session]:
    """This process alone, or one of those started by ``torchrun``; an error in it ends the others, too."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield Session()
        return
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    watch = Watch(dist.PrefixStore("geoaccel", store), rank, size)  # before all that waits for others
    signal.signal(signal.SIGTERM, lambda *_: _terminated(watch))
    try:
        with watch.waiting():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        ranks = Ranks(watch=watch)
        yield SharedSession(ranks, watch, local)
        ranks.told(None)  # nobody leaves while another one may still need it
    except USER_ERRORS as error:
        watch.failed(" ".join(str(error).split()), 2)
        raise
    except (KeyboardInterrupt, SystemExit):
        watch.failed("was ended", 1)
        raise
    except Exception as error:
        watch.failed(f"{type(error).__name__}: {' '.join(str(error).split())}", 1)
        raise
    watch.close()
    dist.destroy_process_group()


def part_of(batch: ImageBatch, frames: slice) -> ImageBatch:
    """Some of the images."""
    values = {part.name: getattr(batch, part.name) for part in fields(batch)}
    of_each = {name: value[frames] for name, value in values.items() if not isinstance(value, dict)}
    return ImageBatch(**{**values, **of_each})


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fields of several scenes or batches as those of one: what has an entry for each frame is put in a row."""
    found: dict[str, Any] = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(first, Tensor):
            found[name] = torch.cat(values)
        else:
            found[name] = [item for value in values for item in value] if isinstance(first, list) else first
    return found


def _terminated(watch: Watch) -> None:
    """``torchrun`` ends the others where one has died: the watch may name it before this process ends."""
    watch.explain(4 * TICK_S)
    sys.exit(143)

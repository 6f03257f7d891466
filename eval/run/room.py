"""Whether the whole of a sequence fits into memory at once, known before a model is loaded."""

from __future__ import annotations

import functools
from typing import Any

import torch

from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.run.job import Job
from geoaccel.eval.run.sequences import picture_of
from geoaccel.images import load_images
from geoaccel.memory import Limit, choose, free_bytes, readable
from geoaccel.models.files import origins
from geoaccel.models.outline import without_weights
from geoaccel.models.weights import open_model
from geoaccel.precision import cast


class Room:
    """The memory of a device beside what a job's dense model takes.

    Args:
        job: The model, and where it is to run.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    @functools.cached_property
    def outline(self) -> Any:
        """The network without its weights."""
        dtype = getattr(torch, self.job.dtype)
        known = origins().get(self.job.model)
        if known is not None:
            return without_weights(known[0], known[1].config, dtype)
        return cast(open_model(self.job.model).to("meta"), dtype)

    def why_not(self, scene: EvalScene) -> str | None:
        """Why a scene cannot be predicted in one forward over all of its frames; None where it can."""
        device, frames = torch.device(self.job.device), len(scene.frames)
        if self.job.resize:
            seen = load_images([picture_of(scene.frames[0])], self.outline.preprocess).images.shape[-2:]
            size = (int(seen[0]), int(seen[1]))
        else:
            size = scene.frames[0].size()
        free = free_bytes(device)
        choice = choose(self.outline, frames, size, Limit(device=device), free, planned=False)
        if choice.fits:
            return None
        needed = f"{readable(choice.needed)} on {device.type}, {readable(free)} are free"
        return (
            f"{frames} frames of {size[0]} x {size[1]} pixels need about {needed}; windows=auto takes them part by part"
        )

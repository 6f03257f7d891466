"""Every backbone x method x precision at a tiny size, and what one forward of each costs on the simulated device."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from simulated_cuda import Simulated, SimulatedCuda
from torch import Tensor, nn

import geoaccel
from geoaccel.merging import HTTM, Asymmetric, CoMe, FastVGGT, LiteVGGT
from geoaccel.merging.alike import Alike
from geoaccel.merging.avggt import AVGGT
from geoaccel.models import BACKBONES, build
from geoaccel.precision import cast

FRAMES, SIZE = 6, (84, 98)

ALWAYS: dict[str, Any] = {"bypass": False}
METHODS: dict[str, Callable[[], Any]] = {
    "dense": lambda: None,
    "alike": lambda: Alike(**ALWAYS),
    "asymmetric": lambda: Asymmetric(stride=3, **ALWAYS),
    "avggt": lambda: AVGGT(stride=2, **ALWAYS),
    "come": lambda: CoMe(predictor="untrained", **ALWAYS),
    "come+asymmetric": lambda: [CoMe(predictor="untrained", **ALWAYS), Asymmetric(stride=3, **ALWAYS)],
    "come+httm": lambda: [CoMe(predictor="untrained", **ALWAYS), HTTM(**ALWAYS)],
    "fastvggt": lambda: FastVGGT(**ALWAYS),
    "fastvggt-released": lambda: FastVGGT(released_code=True, **ALWAYS),
    "httm": lambda: HTTM(**ALWAYS),
    "litevggt": lambda: LiteVGGT(**ALWAYS),
    "litevggt-released": lambda: LiteVGGT(released_code=True, **ALWAYS),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {},
    "fp8": {"quantization": "fp8"},
    "w4a16": {"quantization": "w4a16"},
    "attention in fp8": {"attention": "fp8"},
}

Work = Callable[[nn.Module, Tensor], Any]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a forward makes the host and the device do.

    Attributes:
        waits: Of the host, by where and what.
        launches: Of kernels, by place.
        difference: Largest relative distance of a prediction from the same forward on the CPU; None: not asked for.
    """

    waits: dict[str, int]
    launches: Counter[Any]
    difference: float | None = None

    @property
    def by_file(self) -> dict[str, int]:
        """Launches by the file that caused them."""
        found: Counter[str] = Counter()
        for place, count in self.launches.items():
            found[place.file] += count
        return dict(sorted(found.items()))


@functools.cache
def network(backbone: str, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> nn.Module:
    """A tiny network with random weights, on the CPU; sizes may be others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = dataclasses.asdict(BACKBONES[backbone].tiny) | sizes
        return cast(build(backbone, **tiny), dtype).eval()


def prepared(backbone: str, method: str, precision: str, device: str, **sizes: int) -> nn.Module:
    """One of the combinations on a device."""
    settings = dict(PRECISIONS[precision])
    model = copy.deepcopy(network(backbone, settings.pop("dtype", torch.bfloat16), **sizes)).to(device)
    return geoaccel.accelerate(model, merging=METHODS[method](), **settings)


def photographs(frames: int = FRAMES, batch: int = 1) -> Tensor:
    """Random images of one scene, on the CPU."""
    return torch.rand(batch, frames, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def cost(cuda: SimulatedCuda, model: nn.Module, images: Tensor, work: Work = lambda model, x: model(x)) -> Cost:
    """Of a forward that is not the first; the first tries the kernels, and makes what is kept."""
    images = images.to(next(model.parameters()).device)
    with torch.no_grad():
        work(model, images)
        cuda.reset()
        work(model, images)
    waits: Counter[str] = Counter()
    places: Counter[Any] = Counter()
    for (place, what), count in cuda.waits.items():
        waits[f"{place.file} {place.function}: {what}"] += count
    for (place, _), count in cuda.launches.items():
        places[place] += count
    return Cost(dict(sorted(waits.items())), places)


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Largest relative distance of a prediction."""
    worst = 0.0
    for name, value in expected.items():
        if isinstance(value, Tensor):
            ours = found[name]
            numbers = ours.inner if isinstance(ours, Simulated) else ours
            size = value.double().norm().clamp(min=1e-9)
            worst = max(worst, float((numbers.double() - value.double()).norm() / size))
    return worst

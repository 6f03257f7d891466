"""Time published implementations against ours: same weights, same images, same dtype and heads, in one process.

    python scripts/figures/compare_peers.py --fastvggt ../FastVGGT                  # a clone of the authors' repository
    python scripts/figures/compare_peers.py --litevggt ../LiteVGGT-repo --come ../CoMe --size 252 336
    python scripts/figures/compare_peers.py --fastvggt ../FastVGGT --device cuda --frames 8 32 100 300 500 1000

A peer is built at full size; ours wraps the same tensors (`geoaccel.adopt`), once dense and once with the method of the
same name. All alternate. Each frame count gives one line of JSON on stdout: median seconds, ratios to the peer, and the
distance of poses and depth from the peer's.

A peer's imports must be installed; what needs a GPU or a compiler (Transformer Engine, Co-Me's kernels) is replaced by
torch's operations if missing, and listed in ``replaced_by_torch``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import geoaccel
from geoaccel.errors import MissingPackage, UserError, run_program
from geoaccel.eval.bench.speed import MIN_REPEATS, compare
from geoaccel.eval.data.synthetic import sequence
from geoaccel.runtime import hardware, pick_device, versions
from geoaccel.slots import fill_slots, filled_slots
from peers import PEERS, Outputs, Peer, fill


class OnDevice(TorchFunctionMode):
    """Redirect tensors created on ``cuda`` by name to another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = self.device
        if func is F.interpolate and self.device == "cpu" and args[0].dtype == torch.bfloat16:
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)  # a CPU has no bicubic in bfloat16
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_cuda_calls(device: str) -> Iterator[None]:
    """On a CPU, make GPU synchronisation, cache clearing and profiler ranges no-ops."""
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            for name in ("synchronize", "empty_cache"):
                stack.enter_context(mock.patch.object(torch.cuda, name, return_value=None))
            stack.enter_context(mock.patch.object(torch.cuda.nvtx, "range", contextlib.nullcontext))
        yield


@contextlib.contextmanager
def imported_from(folder: Path, packages: tuple[str, ...]) -> Iterator[None]:
    """Make the peer's packages importable inside this context only."""
    if not (folder / packages[0]).is_dir():
        raise FileNotFoundError(f"{folder} has no {packages[0]}/; give a clone of the authors' repository")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]


@torch.inference_mode()
def run(peer: Peer, args: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    """One row per frame count."""
    fill(peer.network)
    network = peer.network.to(device, torch.bfloat16).eval()
    ours = geoaccel.adopt(network).eval()
    peer.accelerate()
    dense = filled_slots(ours)
    merged = filled_slots(geoaccel.accelerate(ours, merging=peer.method(ours)))
    height, width = args.size
    for frames in args.frames:
        images = sequence(0, frames=max(2, frames), size=(height, width)).images[:, :frames].to(device, torch.bfloat16)

        calls = {
            "peer": partial(theirs, peer, images, device),
            "ours": partial(own, ours, merged, images),
            "ours_dense": partial(own, ours, dense, images),
        }
        timings = compare(calls, repeats=args.repeats, device=device)
        seconds = {name: timing.latency_ms / 1000 for name, timing in timings.items()}
        outputs = {name: call() for name, call in calls.items()}
        yield {
            "frames": frames,
            "size": [height, width],
            **{f"{name}_s": round(value, 6) for name, value in seconds.items()},
            "ours_over_peer": round(seconds["ours"] / seconds["peer"], 3),
            "speedup_of_ours": round(seconds["ours_dense"] / seconds["ours"], 3),
            "speedup_of_peer": round(seconds["ours_dense"] / seconds["peer"], 3),
            **{
                f"{key}_difference": round(relative(outputs["ours"][key], outputs["peer"][key]), 4)
                for key in ("pose_enc", "depth")
            },
            "replaced_by_torch": list(peer.missing),
            "dtype": "bfloat16",
            "hardware": hardware(device),
            **versions(),
        }


def theirs(peer: Peer, images: Tensor, device: str) -> Outputs:
    """A forward of the peer, which may name a GPU that does not exist."""
    with OnDevice(device):
        return peer.forward(images)


def own(ours: Any, slots: Any, images: Tensor) -> Outputs:
    """A forward of our network with these methods in its slots, and the peer's heads."""
    fill_slots(slots)
    return ours(images, heads=["camera", "depth"])


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of the second."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def check_size(size: list[int], name: str, multiple: int) -> None:
    """Reject image sizes that a peer does not support."""
    if any(side < multiple or side % multiple for side in size):
        raise UserError(f"--size {size[0]} {size[1]}: {name} needs multiples of {multiple} (252 336 suits all)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=f"a clone of {name}'s repository")
    parser.add_argument("--frames", type=int, nargs="+", default=[2, 8])
    parser.add_argument(
        "--size", type=int, nargs=2, default=[392, 518], metavar=("H", "W"), help="252 336 suits all peers"
    )
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    chosen = {name: getattr(args, name) for name in PEERS if getattr(args, name) is not None}

    def work() -> None:
        if not chosen:
            raise UserError(f"no peer to compare with; give {' or '.join(f'--{name} PATH' for name in PEERS)}")
        device = pick_device(args.device)
        for name, folder in chosen.items():
            build = PEERS[name]
            check_size(args.size, name, build.multiple)
            with imported_from(folder.resolve(), build.packages), without_cuda_calls(device):
                try:
                    for row in run(build(device), args, device):
                        print(json.dumps({"peer": name, **row}), flush=True)
                except ImportError as error:
                    raise MissingPackage(f"{error}; install the requirements of the authors' repository") from None

    sys.exit(run_program("compare_peers", work))


if __name__ == "__main__":
    main()

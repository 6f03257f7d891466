"""The Ray cluster: connection, and placement of workers on its machines."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geoaccel.errors import MissingPackage, UserError
from geoaccel.registry import unknown

ENGINES = ("local", "ray")
KNOCK_SECONDS = 10


@dataclass(frozen=True)
class Team:
    """Number and location of workers.

    Attributes:
        address: Address of a running cluster (``auto``: the one on this machine); None starts one for this run.
        actors: Number of workers; None: one per GPU if they use GPUs, else one per machine.
        cpus: CPUs, and threads, per worker; None: as many as all can have.
        gpus: GPUs per worker, fractions allowed.
    """

    address: str | None = None
    actors: int | None = None
    cpus: int | None = None
    gpus: float = 0.0

    def fitted(self, machines: Sequence[tuple[float, float]]) -> tuple[int, int]:
        """Workers, and CPUs of each.

        Args:
            machines: CPUs and GPUs of each machine of the cluster.

        Raises:
            UserError: If it is too small for one, or for the requested number.
        """

        def room(cpus: int) -> int:
            by_gpu = (int(g / self.gpus + 1e-9) if self.gpus else int(c) for c, g in machines)
            return sum(min(int(c) // cpus, most) for (c, _), most in zip(machines, by_gpu, strict=True))

        largest = max((int(c) for c, _ in machines), default=0)
        actors = self.actors
        if actors is None:
            actors = room(1) if self.gpus else sum(c >= (self.cpus or 1) for c, _ in machines)
        cpus = self.cpus or next((n for n in range(largest, 0, -1) if room(n) >= actors), 1)
        if actors < 1 or room(cpus) < actors:
            total = [sum(column) for column in zip(*machines, strict=True)] or [0, 0]
            raise UserError(
                f"{max(1, actors)} worker(s) of {cpus} CPU and {self.gpus:g} GPU do not fit the cluster "
                f"({total[0]:g} CPU, {total[1]:g} GPU on {len(machines)} machine(s)); use fewer or smaller workers "
                "(ray.actors, ray.cpus, ray.gpus in settings), or a larger cluster"
            )
        return actors, cpus


def require_same_code(found: Iterable[Mapping[str, Any]], own: str) -> None:
    """Refuse workers with different code: results of one run must come from the same code.

    Args:
        found: Results of `Worker.who`.
        own: Code of this process.

    Raises:
        UserError: Naming a machine that differs.
    """
    for one in found:
        if one["code"] != own:
            raise UserError(
                f"a worker on {one['host']} runs different code of geoaccel ({one['code']}) from this process ({own}); "
                "install the same version on all machines"
            )


def check_engine(engine: str, address: str | None) -> None:
    """Refuse an unknown engine, and an address that would not be used.

    Raises:
        UserError: Saying what is allowed.
        MissingPackage: Ray is not installed.
    """
    if engine not in ENGINES:
        raise UserError(unknown("engine", engine, list(ENGINES)))
    if engine == "ray":
        require_ray()
    elif address is not None:
        raise UserError(
            f"ray_address={address} (--ray-address) applies to engine ray; add --engine ray (engine='ray'), or leave "
            "it out"
        )


def device_for(name: str, found: Iterable[tuple[float, float]]) -> str:
    """Device on which workers run a model: ``auto`` uses GPUs if the cluster has any.

    Args:
        name: ``auto``, ``cpu`` or ``cuda``.
        found: Of the cluster, as `machines` says it.

    Raises:
        UserError: For anything else, and for ``cuda`` where Ray knows of no GPU.
    """
    has_gpu = any(gpus for _, gpus in found)
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: Ray gives every worker its own GPU; give auto, cpu or cuda")
    if name == "cuda" and not has_gpu:
        raise UserError("--device cuda: Ray knows of no GPU in the cluster (`ray status`); give --device cpu")
    return name


def machines(ray: Any) -> list[tuple[float, float]]:
    """CPUs and GPUs of every machine of a cluster."""
    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def require_ray() -> Any:
    """Ray.

    Raises:
        MissingPackage: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingPackage(
            "engine=ray (--engine ray) needs Ray, which is not installed: pip install 'geoaccel[ray]'"
        ) from None
    return ray


def connect(address: str | None) -> Any:
    """Ray, connected to a cluster; an existing connection of this process is used.

    Args:
        address: As in `Team`.

    Raises:
        MissingPackage: Ray is not installed.
        UserError: The cluster is not reachable.
    """
    ray = require_ray()
    if not ray.is_initialized():
        options: dict[str, Any] = {} if address else {"include_dashboard": False}
        asked = address
        try:
            address = None if address is None else _found(address)
            _knock(address)
            # Without an address Ray would look for the last cluster of this machine, which may be gone.
            ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **options)
        except (OSError, ValueError) as error:
            there = asked if asked == address else f"{asked}, which is {address}"
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"no Ray cluster at {there} ({reason}); give the HOST:PORT that `ray start --head` printed, auto for "
                "the cluster of this machine, or leave it out to start one for this run"
            ) from None
    return ray


def _found(address: str) -> str:
    """Where Ray would look for the cluster: what ``auto`` stands for may be written down, and no longer there."""
    try:
        from ray._private.services import get_ray_address_from_environment
    except ImportError:  # no function of Ray's says it
        return address
    return str(get_ray_address_from_environment(address, None))


def _knock(address: str | None) -> None:
    """Check the port first: Ray waits minutes for an unreachable cluster."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
